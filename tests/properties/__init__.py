"""The laws of the project as one table, the suite drawn from it, and the planted bugs that it kills."""
