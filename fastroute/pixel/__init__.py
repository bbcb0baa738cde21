"""The pixel path: a class for every output pixel. Internal: see `fastroute.PixelRouter`."""
