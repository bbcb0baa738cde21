"""Tests of `stitch_patches` with the window "crop": every pixel from the middle of a patch, or from the patch at its edge."""

from __future__ import annotations

import pytest
import torch
from support import GEOMETRIES, few, random, same
from test_stitch_patches import patches_for, rows_of, shuffled
from torch import Tensor

from fastroute import TileGrid, make_window, stitch_patches
from fastroute.reference.stitch_patches import stitch_patches_reference

OPS = ("stitch_patches",)


def owners(size: int, grid: TileGrid, origins: list[int]) -> list[set[int]]:
    """Tiles of every output pixel of one axis: those whose middle holds it, else the one at the nearer end."""
    span, stride = grid.patch * grid.scale, grid.stride * grid.scale
    margin = (span - stride) // 2
    starts = [origin * grid.scale + margin for origin in origins]
    found = [{i for i, start in enumerate(starts) if start <= at < start + stride} for at in range(size)]
    return [tiles or {0 if 2 * at < size else len(origins) - 1} for at, tiles in enumerate(found)]


def by_owner(patches: Tensor, grid: TileGrid) -> Tensor:  # [N, C, P, P] -> [B, C, H·s, W·s] float64
    """The mean of the owners' pixels, one pixel after another."""
    height, width = grid.output_size
    rows, cols = owners(height, grid, grid.row_origins), owners(width, grid, grid.col_origins)
    tiles = patches.double().view(-1, grid.rows, grid.cols, *patches.shape[1:])
    image = torch.zeros(len(tiles), patches.shape[1], height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            here = [(i, j) for i in rows[y] for j in cols[x]]
            for i, j in here:
                k, column = y - grid.row_origins[i] * grid.scale, x - grid.col_origins[j] * grid.scale
                image[:, :, y, x] += tiles[:, i, j, :, k, column].cpu() / len(here)
    return image


def test_table_of_crop(backend):
    patches = rows_of([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]], 4, backend.device)
    # Margins of one pixel: the second patch begins to hold pixels in its second column.
    assert stitch_patches(patches, TileGrid(4, 6, 4, 2), "crop").tolist() == [[[[1, 2, 3, 6, 7, 8]] * 4]]
    # The second patch is shifted inward by one: pixel 2 lies in the middle of both.
    assert stitch_patches(patches, TileGrid(4, 5, 4, 2), "crop").tolist() == [[[[1, 2, 4.5, 7, 8]] * 4]]
    # Patches side by side have no margins; a patch larger than the image is cut.
    assert stitch_patches(patches, TileGrid(4, 8, 4, 4), "crop").tolist() == [[[[1, 2, 3, 4, 5, 6, 7, 8]] * 4]]
    assert stitch_patches(patches[:1], TileGrid(4, 3, 4, 1), "crop").tolist() == [[[[1, 2, 3]] * 4]]
    # An odd margin: one pixel before the middle, two behind it.
    assert stitch_patches(patches, TileGrid(4, 5, 4, 1), "crop").tolist() == [[[[1, 2, 6, 7, 8]] * 4]]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_crop_takes_the_middles(backend, geometry):
    height, width, patch, stride, coverage = geometry
    for b, scale in few([(1, 1), (2, 2), (1, 3)], GEOMETRIES.index(geometry)):
        grid = TileGrid(height, width, patch, stride, scale, coverage)
        patches = patches_for(grid, b, 2, device=backend.device)
        inverse = shuffled(len(patches), backend.device)
        image = stitch_patches(patches, grid, "crop", inverse)
        # A mean of a few numbers below 2, weights rounded to float32.
        torch.testing.assert_close(image.double().cpu(), by_owner(patches[inverse], grid), rtol=0, atol=1e-6)
        weights = make_window("crop", patch * scale, stride * scale).to(backend.device)
        place = (height, width, patch, stride, scale, grid.crop)
        same(image, stitch_patches_reference(patches, inverse, weights, *place, 1, None, 0, grid.output_size[0]))


def test_gradient_of_crop(backend):
    grid = TileGrid(5, 7, 4, 2)
    patches = random((grid.num_patches, 1, 4, 4), torch.float64, backend.device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: stitch_patches(x, grid, "crop"), patches)
    (gradient,) = torch.autograd.grad(stitch_patches(patches, grid, "crop").sum(), patches)
    assert gradient[0, 0, 0, 0] == 1 and gradient[0, 0, 3, 3] == 0
