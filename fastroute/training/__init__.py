"""Training of the routing systems, and their losses."""
