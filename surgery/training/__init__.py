"""Training what a program trains: the optimizer that it names."""
