"""Exact faster forms of a network. Internal, except for `optimize`."""
