"""stitch_patches into float and into 8-bit images, beside fold and beside packages that merge patches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import fastroute
from benchmarks.baselines.packages import mergers, padded_size
from benchmarks.measure import device
from benchmarks.ops._common import OURS, PATCH, SCALE, STRIDE, Case, Variant, cases, close, compare, complete, known, same
from benchmarks.setting import Setting
from fastroute import TileGrid
from fastroute.reference.stitch_patches import stitch_patches_reference

# What is written; patches are float32 for 8-bit images.
DTYPES = (torch.float32, torch.uint8)
HALF = (torch.float16, torch.bfloat16)
# Peers sum up to four values in the type of the patches, and divide.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def fold_patches(patches: Tensor, grid: TileGrid, count: Tensor) -> Tensor:  # [N, C, P, P] -> [B, C, H·s, W·s]
    """Merge by fold and divide by how often each pixel was covered."""
    columns = patches.reshape(-1, grid.num_patches, patches[0].numel()).transpose(1, 2)
    merged = F.fold(columns, padded_size(grid, grid.scale), grid.patch * grid.scale, stride=grid.stride * grid.scale) / count
    return merged[:, :, : grid.output_size[0], : grid.output_size[1]]


def fold_count(grid: TileGrid, like: Tensor) -> Tensor:
    """How often fold covers each pixel; made once, outside the timing."""
    span, step = grid.patch * grid.scale, grid.stride * grid.scale
    ones = like.new_ones(1, 1, 1).expand(1, like.shape[1] * span * span, grid.num_patches)
    return F.fold(ones, padded_size(grid, grid.scale), span, stride=step)


def quantised(image: Tensor, dtype: torch.dtype) -> Tensor:
    """What follows a merge in plain PyTorch when the result is to be 8-bit."""
    return (image.clamp(0, 1) * 255).round().to(dtype) if dtype == torch.uint8 else image


def run_case(case: Case, setting: Setting) -> dict:
    """The patches of one image, or of a batch, merged by all variants."""
    torch.manual_seed(0)
    height, width, dtype = case.height, case.width, case.dtype
    grid = TileGrid(height, width, PATCH, STRIDE, SCALE)
    span = PATCH * SCALE
    source = torch.float32 if dtype == torch.uint8 else dtype
    patches = torch.rand(case.batch * grid.num_patches, 3, span, span, device=device()).to(source)
    patches = patches.contiguous(memory_format=case.memory_format)
    ones = torch.ones(span, device=device())
    args = (patches, None, ones, height, width, PATCH, STRIDE, SCALE, False, 1, dtype)
    expected, reference = known(lambda: stitch_patches_reference(*args))
    count = fold_count(grid, patches)
    out = torch.empty_like(expected)
    # What is merged alike wherever the last row and column lie.
    bottom, right = grid.row_origins[-2] * SCALE, grid.col_origins[-2] * SCALE

    close_whole = close(expected[:, :, :bottom, :right], TOLERANCE.get(dtype, 0))

    def close_inner(image: Tensor) -> None:
        close_whole(image[:, :, :bottom, :right])

    variants: dict[str, Variant | str] = {
        OURS: Variant(lambda: fastroute.stitch_patches(patches, grid, dtype=dtype), same(expected)),
        "fastroute, out=": Variant(lambda: fastroute.stitch_patches(patches, grid, out=out), same(expected)),
        "reference": reference,
        "reference, compiled": "its loop over patches would be unrolled into thousands of operations",
        "fold": Variant(lambda: quantised(fold_patches(patches, grid, count), dtype), close_inner),
    }
    for package, merge in mergers(grid).items():
        if isinstance(merge, str):
            variants[package] = merge
        elif case.batch > 1:
            variants[package] = "merges the patches of one image"
        elif source in HALF and package != "kornia":
            variants[package] = "merges in float32 only"
        elif dtype == torch.uint8 and case.name == "8K" and not complete(setting):
            variants[package] = "timed in float32 at this size, which is then rounded; --full times both"
        else:
            variants[package] = Variant(lambda m=merge: quantised(m(patches), dtype), close_inner, foreign=True)
    label = f"stitch_patches, {width} x {height} -> {width * SCALE} x {height * SCALE}, {case.suffix}"
    # A product and a sum per value that is read.
    flops, moved = 2 * patches.numel(), patches.nbytes + expected.nbytes
    return compare(label, variants, moved, "fold", setting, flops, **case.facts)


def test_stitch_patches(setting: Setting) -> None:
    """Every call but that with `out` allocates its result, as in use; the copy does not, which favours the copy."""
    rows = [run_case(case, setting) for case in cases(setting, DTYPES, HALF)]
    setting.save(
        "stitch_patches",
        rows,
        "to uint8 from float32, else to the same type; medians of alternating runs, warm; every call allocates its result, the "
        "copy does not; fold's count of patches per pixel is made beforehand; peers assume a padded image where the last "
        "patches are shifted inward here",
    )
