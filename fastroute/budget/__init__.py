"""Budgets: what classes cost, and the exponent of the cost that fits. It knows scores and costs, no router. Internal."""
