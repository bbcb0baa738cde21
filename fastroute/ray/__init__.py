"""Many images on the machines of a Ray cluster, by Ray Data: `Upscaler` for datasets, `run_jobs` for folders.

Ray, which the extra ``ray`` installs, is imported by :func:`run_jobs` and :func:`connected` only. An :class:`Upscaler` is a
plain class that takes and gives arrays.
"""

from fastroute.ray.cluster import ClusterError, connected
from fastroute.ray.runs import run_jobs
from fastroute.ray.upscaler import Upscaler, stats_of

__all__ = ["ClusterError", "Upscaler", "connected", "run_jobs", "stats_of"]
