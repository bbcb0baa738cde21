"""Tests of `stitch_patches.upsampled_out` with regions: last layers that run once over rectangles of several patches."""

from __future__ import annotations

import pytest
import torch
from support import in_layout, random
from test_stitch_patches_upsampled import TOLERANCE, layers_of, upsampler
from torch import Tensor
from torch.nn import functional as F

import fastroute
from fastroute import TileGrid, group_by_class, make_window, merge_regions, stitch_patches
from fastroute.models.arm import Bicubic
from fastroute.ops._upsampled import FINISHED, Upsampler, stitch_upsampled
from fastroute.reference.stitch_patches import patches_of_regions
from fastroute.rewrite.optimize import interpolation

GRIDS = [(9, 13, 8, 6), (53, 37, 8, 6), (5, 4, 8, 8), (150, 175, 33, 29), (64, 64, 8, 3)]


def clustered(grid: TileGrid, images: int, classes: int, seed: int = 0) -> Tensor:  # [N]
    """Class ids of which neighbours are often alike."""
    make = torch.Generator().manual_seed(seed)
    coarse = torch.rand((images, 1, -(-grid.rows // 3), -(-grid.cols // 3)), generator=make)
    fine = F.interpolate(coarse, (grid.rows, grid.cols), mode="nearest")
    return (fine.flatten() * classes).long().clamp(max=classes - 1)


def two_sided(interpolated: Upsampler, height: int, width: int) -> Upsampler:
    """The interpolation of regions of `height` x `width`."""
    branch = Bicubic(interpolated.shuffle, interpolated.channels)
    down, across = interpolation(branch, height), interpolation(branch, width)
    return down._replace(bias=across.weight)


def check(
    grid: TileGrid,
    upsamplers: list[Upsampler],
    window: str = "uniform",
    images: int = 1,
    merge: int = 4,
    layout: str = "channels_last",
    dtype: torch.dtype = torch.float32,
    rows: tuple[int, int] | None = None,
    finished: bool = False,
) -> None:
    """Class c is upsampler c, or with `finished` the last class has finished patches, against float64 on the same regions."""
    classes = len(upsamplers) + finished
    ids = clustered(grid, images, classes)
    regions = merge_regions(ids, grid, [1.0 + c for c in range(classes)], merge)
    shapes = grid.region_shapes(merge)
    groups = group_by_class(regions.group, classes * len(shapes) + 1)
    offsets = groups.offsets.tolist()
    batches, made, kinds, used = [], [], [], []
    for g in range(classes * len(shapes)):
        count, c, (height, width) = offsets[g + 1] - offsets[g], g // len(shapes), shapes[g % len(shapes)]
        if not count:
            continue
        if c == len(upsamplers):
            batches.append(random((count, upsamplers[0].channels, height * grid.scale, width * grid.scale), seed=g))
            made.append(batches[-1].double())
            kinds.append(FINISHED)
            continue
        u = two_sided(upsamplers[c], height, width) if upsamplers[c].interpolates else upsamplers[c]
        kinds.append(len(used))
        used.append(u)
        batches.append(in_layout(random((count, u.features, height, width), seed=g), layout))
        if u.interpolates:
            made.append(torch.einsum("Yy,ncyx,Xx->ncYX", u.weight.double(), batches[-1].double(), u.bias.double()))
        else:
            made.append(layers_of(batches[-1], u))
    inverse = groups.inverse[regions.region]
    patches = patches_of_regions(made, inverse, regions.region, *grid_of(grid), 1)
    with fastroute.use_backend("reference"):
        expected = stitch_patches(patches, grid, window)
    begin, end = rows or (0, grid.output_size[0])
    expected = expected[:, :, begin:end]
    out = torch.full(expected.shape, 7, dtype=dtype)
    weights = make_window(window, grid.patch * grid.scale, grid.stride * grid.scale)
    for backend in ("cpu", "reference") if rows is None and dtype == torch.float32 else ("cpu",):
        out.fill_(7)
        if backend == "reference":
            with fastroute.use_backend("reference"):
                stitch_upsampled(batches, kinds, used, grid, weights, inverse, (begin, end), out, region=regions.region)
        else:
            stitch_upsampled(batches, kinds, used, grid, weights, inverse, (begin, end), out, region=regions.region)
        if dtype.is_floating_point:
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE)
        else:
            assert ((out.double() - expected.clamp(0, 1) * 255).abs() <= 0.51).all()


def grid_of(grid: TileGrid) -> tuple[int, int, int, int, int, bool]:
    return grid.height, grid.width, grid.patch, grid.stride, grid.scale, grid.crop


@pytest.mark.parametrize("shuffle", [2, 3, 4])
@pytest.mark.parametrize("geometry", GRIDS, ids=str)
def test_equals_the_layers(shuffle, geometry):
    grid = TileGrid(*geometry, shuffle)
    kinds = [upsampler(5, units, 3, shuffle, seed=units) for units in (4, 9)]
    check(grid, kinds, merge=8)
    check(grid, kinds, "hann", images=2, merge=2, layout="contiguous")
    check(grid, kinds, "crop", finished=True, dtype=torch.uint8)


@pytest.mark.parametrize("geometry", GRIDS, ids=str)
def test_interpolations_of_every_shape(geometry):
    grid = TileGrid(*geometry, 4)
    free = interpolation(Bicubic(4, 3), grid.patch)
    check(grid, [free, upsampler(5, 9, 3, 4)])
    check(grid, [free], "linear", merge=8, dtype=torch.uint8)


def test_bands_of_rows():
    grid = TileGrid(53, 37, 8, 6, 4)
    kinds = [upsampler(5, units, 3, 4, seed=units) for units in (4, 9)]
    for rows in [(0, 24), (24, 25), (31, 150), (200, 212), (100, 100)]:
        check(grid, kinds, rows=rows)
        check(grid, kinds, "hann", rows=rows, dtype=torch.uint8)


def test_region_that_does_not_hold_its_patches():
    grid, u = TileGrid(20, 20, 8, 6, 2), upsampler(4, 6, 3, 2)
    features, inverse = random((grid.num_patches, 4, 8, 8)), torch.arange(grid.num_patches)
    out, region = torch.empty(1, 3, 40, 40), torch.arange(grid.num_patches)
    held = ([features], [0], [u], grid, torch.ones(16), inverse, (0, 40), out)
    stitch_upsampled(*held, region=region)
    for wrong in (0, -1, grid.num_patches):
        region[1] = wrong
        with pytest.raises(ValueError, match="region"):
            stitch_upsampled(*held, region=region)
