"""Measurements for people: evaluation of a model on images, comparison of results on a page."""
