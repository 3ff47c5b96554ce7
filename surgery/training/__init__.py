"""Training what a program trains: the optimizer that it names, masks that move, tickets, and transformers' Trainer."""
