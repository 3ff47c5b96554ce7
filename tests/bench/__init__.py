"""Figures, not tests: scripts to be run by hand, each printing medians and ratios against a peer."""
