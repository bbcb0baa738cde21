"""Budgets: what a call may spend, and the speed of classes. It knows scores and costs, but no router. Internal."""
