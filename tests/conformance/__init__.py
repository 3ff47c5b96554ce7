"""Against peers: the same numbers give the same results as the ecosystem's own implementations."""
