"""Reports, bounds, and that verification sees what is broken."""
