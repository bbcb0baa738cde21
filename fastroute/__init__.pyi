"""Every public name of the package, and where it lies; ``__init__.py`` loads them on first use."""

from . import files, io, models, profiling, ray, report, training, visualize
from .backends import BackendError, use_backend
from .cascades.router import CascadeRouter
from .cascading import cascade
from .catalogue import list_models
from .diagnostics import info
from .files.file_to_file import UpscaledFile, upscale_file
from .files.pictures import upscale_picture
from .files.shared_images import upscale_many
from .grid import TileGrid
from .loading import load
from .models.adapters import ScoreClassifier
from .models.arm import Bicubic, edge_score
from .models.checkpoints import CheckpointError
from .ops.adaptive_threshold import adaptive_threshold
from .ops.assign_classes import assign_classes
from .ops.cell_mlp import cell_mlp
from .ops.conv1x1 import conv1x1
from .ops.conv3x3 import Conv3x3Weight, conv3x3, conv3x3_weight
from .ops.extract_patches import extract_patches
from .ops.gather_groups import gather_groups
from .ops.group_by_class import ClassGroups, group_by_class
from .ops.merge_regions import Regions, merge_regions
from .ops.pixel_mlp import pixel_mlp
from .ops.refine_boundaries import refine_boundaries
from .ops.scatter_groups import scatter_groups
from .ops.stitch_patches import stitch_patches
from .patch.fixed_patches import FixedPatchRouter
from .patch.patch_router import PatchRouter
from .patch.tiles import tiled
from .pixel.fixed_pixels import FixedPixelRouter
from .pixel.pixel_router import PixelRouter
from .rewrite.optimize import optimize
from .runtime.cuda_graphs import CudaGraph
from .runtime.fixed_size import FixedUpscaled
from .runtime.protocols import ArrayReader, ArrayWriter, Reader, Writer
from .runtime.results import RoutingStats, Streamed, Upscaled
from .runtime.router import Router
from .warming import Warmed, warmup
from .windows import make_window

__version__: str

__all__ = [
    "ArrayReader",
    "ArrayWriter",
    "BackendError",
    "Bicubic",
    "CascadeRouter",
    "CheckpointError",
    "ClassGroups",
    "Conv3x3Weight",
    "CudaGraph",
    "FixedPatchRouter",
    "FixedPixelRouter",
    "FixedUpscaled",
    "PatchRouter",
    "PixelRouter",
    "Reader",
    "Regions",
    "Router",
    "RoutingStats",
    "ScoreClassifier",
    "Streamed",
    "TileGrid",
    "Upscaled",
    "UpscaledFile",
    "Warmed",
    "Writer",
    "adaptive_threshold",
    "assign_classes",
    "cascade",
    "cell_mlp",
    "conv1x1",
    "conv3x3",
    "conv3x3_weight",
    "edge_score",
    "extract_patches",
    "files",
    "gather_groups",
    "group_by_class",
    "info",
    "io",
    "list_models",
    "load",
    "make_window",
    "merge_regions",
    "models",
    "optimize",
    "pixel_mlp",
    "profiling",
    "ray",
    "refine_boundaries",
    "report",
    "scatter_groups",
    "stitch_patches",
    "tiled",
    "training",
    "upscale_file",
    "upscale_many",
    "upscale_picture",
    "use_backend",
    "visualize",
    "warmup",
]
