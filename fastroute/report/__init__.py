"""Reports: evaluation of a model on images, and comparison of results on a page."""
