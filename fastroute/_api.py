"""Every public name of the package; ``fastroute/__init__.py`` takes them from here."""

from fastroute.backends import BackendError, use_backend
from fastroute.catalogue import list_models
from fastroute.files.file_to_file import UpscaledFile, upscale_file
from fastroute.files.shared_images import upscale_many
from fastroute.grid import TileGrid
from fastroute.info import info
from fastroute.loading import load
from fastroute.models.adapters import ScoreClassifier
from fastroute.models.arm import Bicubic
from fastroute.models.checkpoints import CheckpointError
from fastroute.ops.adaptive_threshold import adaptive_threshold
from fastroute.ops.assign_classes import assign_classes
from fastroute.ops.cell_mlp import cell_mlp
from fastroute.ops.extract_patches import extract_patches
from fastroute.ops.gather_groups import gather_groups
from fastroute.ops.group_by_class import ClassGroups, group_by_class
from fastroute.ops.merge_regions import Regions, merge_regions
from fastroute.ops.pixel_mlp import pixel_mlp
from fastroute.ops.refine_boundaries import refine_boundaries
from fastroute.ops.scatter_groups import scatter_groups
from fastroute.ops.stitch_patches import stitch_patches
from fastroute.patch.fixed_patches import FixedPatchRouter, FixedUpscaled
from fastroute.patch.patch_router import PatchRouter
from fastroute.patch.tiles import Tiled, tiled
from fastroute.pixel.fixed_pixels import FixedPixelRouter
from fastroute.pixel.pixel_router import PixelRouter
from fastroute.runtime.cuda_graphs import CudaGraph
from fastroute.runtime.protocols import ArrayReader, ArrayWriter, Reader, Writer
from fastroute.runtime.results import RoutingStats, Streamed, Upscaled
from fastroute.windows import make_window

__all__ = [
    "ArrayReader",
    "ArrayWriter",
    "BackendError",
    "Bicubic",
    "CheckpointError",
    "ClassGroups",
    "CudaGraph",
    "FixedPatchRouter",
    "FixedPixelRouter",
    "FixedUpscaled",
    "PatchRouter",
    "PixelRouter",
    "Reader",
    "Regions",
    "RoutingStats",
    "ScoreClassifier",
    "Streamed",
    "TileGrid",
    "Tiled",
    "Upscaled",
    "UpscaledFile",
    "Writer",
    "adaptive_threshold",
    "assign_classes",
    "cell_mlp",
    "extract_patches",
    "gather_groups",
    "group_by_class",
    "info",
    "list_models",
    "load",
    "make_window",
    "merge_regions",
    "pixel_mlp",
    "refine_boundaries",
    "scatter_groups",
    "stitch_patches",
    "tiled",
    "upscale_file",
    "upscale_many",
    "use_backend",
]
