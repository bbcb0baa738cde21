"""What holds for any image, grid, window and grouping."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import random, same
from torch import Tensor

from fastroute import (
    TileGrid,
    extract_patches,
    gather_groups,
    group_by_class,
    scatter_groups,
    stitch_patches,
)
from fastroute.windows import WINDOWS

OPS = ("extract_patches", "gather_groups", "group_by_class", "scatter_groups", "stitch_patches")

SEEDS = st.integers(0, 2**31)
BATCHES = st.integers(0, 2)
CHANNELS = st.integers(1, 3)


@st.composite
def grids(draw: st.DrawFn, largest_scale: int = 1) -> TileGrid:
    patch = draw(st.integers(1, 8))
    coverage = draw(st.sampled_from(["full", "crop"]))
    smallest = patch if coverage == "crop" else 1
    height, width = draw(st.integers(smallest, 20)), draw(st.integers(smallest, 20))
    return TileGrid(height, width, patch, draw(st.integers(1, patch)), draw(st.integers(1, largest_scale)), coverage)


def windows(grid: TileGrid, seed: int) -> list[str | Tensor]:
    """All named windows and one of arbitrary positive weights."""
    return [*WINDOWS, random((grid.patch * grid.scale,), torch.float64, seed=seed) + 0.31]


def inner(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum()


def adjoint(output: Tensor, source: Tensor, seed: int) -> None:
    """<f(x), y> = <x, f'(y)> for a linear f."""
    upstream = random(output.shape, torch.float64, output.device, seed)
    (gradient,) = torch.autograd.grad(output, source, upstream)
    # A few thousand products below 2 in float64.
    torch.testing.assert_close(inner(output, upstream), inner(source, gradient), rtol=1e-12, atol=1e-10)


@given(grids(), BATCHES, CHANNELS, SEEDS, st.integers(0, len(WINDOWS)))
def test_stitch_undoes_extract(backend, grid, b, c, seed, window):
    image = random((b, c, grid.height, grid.width), device=backend.device, seed=seed)
    stitched = stitch_patches(extract_patches(image, grid), grid, windows(grid, seed)[window])
    # Up to 8 x 8 float32 weights that sum to 1, times values below 1.3.
    height, width = grid.output_size
    torch.testing.assert_close(stitched, image[:, :, :height, :width], rtol=0, atol=1e-6)


@pytest.mark.slow
@given(grids(), BATCHES, SEEDS, st.integers(1, 5))
def test_stitch_through_inverse_undoes_extract_in_class_order(backend, grid, b, seed, classes):
    image = random((b, 2, grid.height, grid.width), torch.uint8, backend.device, seed)
    ids = random((b * grid.num_patches,), torch.uint8, backend.device, seed) % classes
    groups = group_by_class(ids, classes)
    patches = extract_patches(image, grid, groups.order, dtype=torch.float32)
    # Every byte comes back: 1e-6 is far less than half a step.
    stitched = stitch_patches(patches, grid, "hann", groups.inverse, torch.uint8)
    height, width = grid.output_size
    same(stitched, image[:, :, :height, :width].contiguous())


@given(grids(3), CHANNELS, st.integers(0, len(WINDOWS)))
def test_weights_sum_to_one(backend, grid, c, window):
    span = grid.patch * grid.scale
    ones = torch.ones(grid.num_patches, c, span, span, device=backend.device)
    stitched = stitch_patches(ones, grid, windows(grid, 0)[window])
    torch.testing.assert_close(stitched, torch.ones_like(stitched), rtol=0, atol=1e-6)


@given(st.integers(0, 60), st.integers(1, 6), st.integers(0, 5), SEEDS)
def test_scatter_undoes_gather(backend, n, classes, width, seed):
    ids = random((n,), torch.uint8, backend.device, seed) % classes
    groups = group_by_class(ids, classes)
    x = random((n, width), device=backend.device, seed=seed)
    same(scatter_groups(gather_groups(x, groups), groups), x)
    same(gather_groups(scatter_groups(x, groups), groups), x)
    # Class c's rows are its slice.
    for c in range(classes):
        begin, end = groups.offsets[c : c + 2].tolist()
        same(gather_groups(x, groups)[begin:end], x[ids == c])


@given(grids(), st.integers(1, 2), CHANNELS, SEEDS, st.booleans())
def test_extract_has_its_adjoint(backend, grid, b, c, seed, repeated):
    image = random((b, c, grid.height, grid.width), torch.float64, backend.device, seed).requires_grad_()
    order = None
    if repeated:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randint(0, b * grid.num_patches, (7,), generator=generator).to(backend.device)
    adjoint(extract_patches(image, grid, order), image, seed + 1)


@pytest.mark.slow
@given(grids(3), st.integers(1, 2), CHANNELS, SEEDS, st.integers(0, len(WINDOWS)), st.booleans())
def test_stitch_has_its_adjoint(backend, grid, b, c, seed, window, repeated):
    span, n = grid.patch * grid.scale, b * grid.num_patches
    patches = random((n, c, span, span), torch.float64, backend.device, seed).requires_grad_()
    inverse = None
    if repeated:
        inverse = torch.randint(0, n, (n,), generator=torch.Generator().manual_seed(seed)).to(backend.device)
    adjoint(stitch_patches(patches, grid, windows(grid, seed)[window], inverse), patches, seed + 1)
