"""The patch path: a class for every patch; neighbours of one class run as one region. Internal: see `fastroute.PatchRouter`."""
