"""Tests of `stitch_patches` where one tile makes a pixel alone: such pixels are copied, in vectors where memory allows."""

from __future__ import annotations

import math

import pytest
import torch
from support import random, same
from torch import Tensor
from torch.nn import functional as F

from fastroute import TileGrid, make_window, stitch_patches
from fastroute.reference.stitch_patches import patches_of_regions, stitch_patches_reference

OPS = ("stitch_patches",)

# Patches begin at multiples of 48 pixels and columns of 16 bytes; 42 of these are more than a warp of a GPU has lanes.
GRID = TileGrid(24, 168, 16, 12, scale=4)
SPECIAL = [math.nan, math.inf, -math.inf, -0.0, 0.5, 1.0, 2.0**-24, 1.5]


def reference(patches: Tensor, inverse: Tensor | None, window: str, shuffle: int, dtype, rows=None) -> Tensor:
    weights = make_window(window, 64).to(patches.device, torch.float32)
    place = (GRID.height, GRID.width, GRID.patch, GRID.stride, GRID.scale, GRID.crop)
    return stitch_patches_reference(patches, inverse, weights, *place, shuffle, dtype, *(rows or (0, 96)))


def alike(actual: Tensor, expected: Tensor) -> None:
    """Equal values, NaN where NaN is expected."""
    if actual.is_floating_point():
        assert torch.equal(actual.isnan(), expected.isnan())
        actual, expected = actual.nan_to_num(), expected.nan_to_num()
    same(actual, expected)


def values(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers around [0, 1], every 50th of which is a special one."""
    x = random(shape, torch.float32, device) * 1.5 - 0.25
    places = x.view(-1)[::50]
    places.copy_(torch.tensor(SPECIAL, device=device).repeat(len(places) // len(SPECIAL) + 1)[: len(places)])
    return x.to(dtype)


@pytest.mark.parametrize("target", [torch.uint8, torch.uint16, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shuffle", [1, 4])
@pytest.mark.parametrize("window", ["hann", "uniform"])
def test_in_vectors(kernel, window, shuffle, dtype, target):
    count = 2 * GRID.num_patches
    patches = values((count, 3, 64, 64), dtype, kernel.device)
    if shuffle == 4:
        patches = F.pixel_unshuffle(patches, 4).contiguous(memory_format=torch.channels_last)
    inverse = torch.randperm(count, generator=torch.Generator().manual_seed(1)).to(kernel.device)
    for rows in (None, (3, 61)):
        actual = stitch_patches(patches, GRID, window, inverse, target, shuffle, rows)
        alike(actual, reference(patches, inverse, window, shuffle, target, rows))
    # Rows that begin at any address.
    out = torch.empty(2, 3, 96, 673, dtype=target or dtype, device=kernel.device)[..., 1:]
    alike(
        stitch_patches(patches, GRID, window, inverse, shuffle=shuffle, out=out),
        reference(patches, inverse, window, shuffle, target),
    )


@pytest.mark.parametrize("shuffle", [1, 4])
def test_of_regions_in_vectors(kernel, shuffle):
    # The left columns of patches are one region, the others another.
    cols = GRID.num_patches // 2
    left = values((1, 3, 96, 4 * (12 * 4 + 16)), torch.float16, kernel.device)
    right = values((1, 3, 96, 4 * (168 - 12 * 5)), torch.float16, kernel.device)
    regions = [left, right]
    if shuffle == 4:
        regions = [F.pixel_unshuffle(x, 4).contiguous(memory_format=torch.channels_last) for x in regions]
    column = torch.arange(GRID.num_patches, device=kernel.device) % cols
    inverse, region = (column >= 5).long(), torch.where(column >= 5, 5, 0)
    actual = stitch_patches(regions, GRID, "hann", inverse, torch.uint8, shuffle, region=region)
    place = (GRID.height, GRID.width, GRID.patch, GRID.stride, GRID.scale, GRID.crop)
    patches = patches_of_regions(regions, inverse, region, *place, shuffle)
    alike(actual, reference(patches, None, "hann", shuffle, torch.uint8))


def test_every_number_of_float16_as_a_byte(kernel):
    numbers = torch.arange(-(2**15), 2**15, device=kernel.device).to(torch.int16).view(torch.float16)
    patches = torch.zeros(6 * 3 * 64 * 64, dtype=torch.float16, device=kernel.device)
    patches[: len(numbers)] = numbers
    patches, grid = patches.view(6, 3, 64, 64), TileGrid(64, 384, 64, 64)
    expected = stitch_patches_reference(
        patches, None, torch.ones(64, device=kernel.device), 64, 384, 64, 64, 1, False, 1, torch.uint8, 0, 64
    )
    same(stitch_patches(patches, grid, dtype=torch.uint8), expected)
