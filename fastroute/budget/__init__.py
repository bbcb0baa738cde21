"""Budgets: the cost of classes, and the exponent of the cost that fits. It knows scores and costs, but no router. Internal."""
