"""Networks and routing systems, and their checkpoints."""
