"""Data: example programs, each run by a test. Read with importlib.resources."""
