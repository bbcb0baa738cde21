"""The patch path: every patch has a class, and neighbours of one class run as one region. Internal."""
