"""What both paths run on: rows of images, memory, threads, tuning, results. Internal."""
