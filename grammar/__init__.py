"""Data: the grammar, the language reference and the explanations of error codes. Read with importlib.resources."""
