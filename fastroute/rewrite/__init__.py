"""Exact faster forms of a network. Internal but for `optimize`."""
