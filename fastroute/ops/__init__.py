"""The operators; importing this package registers all of them as ``torch.ops.fastroute.*``."""

from fastroute.ops import (
    _upsampled,  # noqa: F401, registers an overload of stitch_patches
    adaptive_threshold,
    assign_classes,
    cell_mlp,
    conv1x1,
    conv3x3,
    extract_patches,
    gather_groups,
    group_by_class,
    merge_regions,
    pixel_mlp,
    refine_boundaries,
    scatter_groups,
    stitch_patches,
)

__all__ = [
    "adaptive_threshold",
    "assign_classes",
    "cell_mlp",
    "conv1x1",
    "conv3x3",
    "extract_patches",
    "gather_groups",
    "group_by_class",
    "merge_regions",
    "pixel_mlp",
    "refine_boundaries",
    "scatter_groups",
    "stitch_patches",
]
