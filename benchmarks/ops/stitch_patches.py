"""stitch_patches into float and into 8-bit images, beside fold and beside packages that merge patches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import fastroute
from benchmarks.baselines.packages import mergers, padded_size
from benchmarks.measure import save
from benchmarks.ops._common import OURS, PATCH, SCALE, STRIDE, Variant, compare, same, sizes
from fastroute import TileGrid
from fastroute.reference.stitch_patches import stitch_patches_reference

DTYPES = (torch.float32, torch.uint8)


def fold_patches(patches: Tensor, grid: TileGrid, count: Tensor) -> Tensor:  # [N, C, P, P] -> [1, C, H·s, W·s]
    """Merge by fold and divide by how often each pixel was covered."""
    columns = patches.reshape(-1, grid.num_patches, patches[0].numel()).transpose(1, 2)
    merged = F.fold(columns, padded_size(grid, grid.scale), grid.patch * grid.scale, stride=grid.stride * grid.scale) / count
    return merged[:, :, : grid.output_size[0], : grid.output_size[1]]


def fold_count(grid: TileGrid, channels: int) -> Tensor:
    """How often fold covers each pixel; made once, outside the timing."""
    span, step = grid.patch * grid.scale, grid.stride * grid.scale
    ones = torch.ones(1, 1, 1).expand(1, channels * span * span, grid.num_patches)
    return F.fold(ones, padded_size(grid, grid.scale), span, stride=step)


def quantised(image: Tensor, dtype: torch.dtype) -> Tensor:
    """What follows a merge in plain PyTorch when the result is to be 8-bit."""
    return (image.clamp(0, 1) * 255).round().to(dtype) if dtype == torch.uint8 else image


def run_case(name: str, height: int, width: int, dtype: torch.dtype, smoke: bool) -> dict:
    """The patches of one image, float32, merged by all variants."""
    torch.manual_seed(0)
    grid = TileGrid(height, width, PATCH, STRIDE, SCALE)
    span = PATCH * SCALE
    patches = torch.rand(grid.num_patches, 3, span, span)
    args = (patches, None, torch.ones(span), height, width, PATCH, STRIDE, SCALE, False, 1, dtype)
    expected = stitch_patches_reference(*args)
    count = fold_count(grid, 3)
    out = torch.empty_like(expected)
    # What is merged alike wherever the last row and column lie.
    bottom, right = grid.row_origins[-2] * SCALE, grid.col_origins[-2] * SCALE

    def close_inner(image: Tensor) -> None:
        got, wanted = image[:, :, :bottom, :right], expected[:, :, :bottom, :right]
        if dtype == torch.uint8:
            # Sums of at most four products in another order may lie on the other side of a half.
            assert (got.int() - wanted.int()).abs().max() <= 1, "more than one level off"
        else:
            torch.testing.assert_close(got, wanted)

    variants: dict[str, Variant | str] = {
        OURS: Variant(lambda: fastroute.stitch_patches(patches, grid, dtype=dtype), same(expected)),
        "fastroute, out=": Variant(lambda: fastroute.stitch_patches(patches, grid, out=out), same(expected)),
        "reference": Variant(lambda: stitch_patches_reference(*args), same(expected)),
        "reference, compiled": "its loop over patches would be unrolled into thousands of operations",
        "fold": Variant(lambda: quantised(fold_patches(patches, grid, count), dtype), close_inner),
    }
    for package, merge in mergers(grid).items():
        is_there = not isinstance(merge, str)
        run = Variant(lambda m=merge: quantised(m(patches), dtype), close_inner, foreign=True) if is_there else merge
        variants[package] = run
    label = f"stitch_patches, {width} x {height} -> {width * SCALE} x {height * SCALE}"
    label += ", uint8" if dtype == torch.uint8 else ""
    pixel_count = height * width * SCALE**2
    bytes_moved = patches.nbytes + expected.nbytes
    return compare(label, variants, bytes_moved, "fold", smoke, size=name, dtype=str(dtype)[6:], output_pixels=pixel_count)


def test_stitch_patches(smoke: bool, saving: bool) -> None:
    """Every call but that with `out` allocates its result, as in use; the copy does not, which favours the copy."""
    rows = [run_case(name, *size, dtype, smoke) for name, size in sizes(smoke).items() for dtype in DTYPES]
    if saving and not smoke:
        save(
            "stitch_patches",
            rows,
            "from float32; medians of alternating runs, warm; every call allocates its result, the copy does not; fold's "
            "count of patches per pixel is made beforehand; peers assume a padded image where the last patches are shifted "
            "inward here",
        )
