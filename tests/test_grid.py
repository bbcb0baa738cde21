"""Tests of `TileGrid`."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fastroute import TileGrid


@st.composite
def grids(draw: st.DrawFn, coverage: str = "full") -> TileGrid:
    patch = draw(st.integers(1, 40))
    smallest = patch if coverage == "crop" else 1
    height, width = draw(st.integers(smallest, 150)), draw(st.integers(smallest, 150))
    return TileGrid(height, width, patch, draw(st.integers(1, patch)), draw(st.integers(1, 4)), coverage)


def axes(grid: TileGrid) -> list[tuple[list[int], int]]:
    return [(grid.row_origins, grid.height), (grid.col_origins, grid.width)]


def test_example_of_the_docstring():
    grid = TileGrid(540, 960, patch=32, stride=28, scale=4)
    assert (grid.rows, grid.cols, grid.num_patches) == (20, 35, 700)
    # 19 strides are 532 rows, but the last patch ends with the image: 540 - 32.
    assert grid.row_origins[-2:] == [504, 508]
    assert grid.col_origins[-2:] == [924, 928]
    assert grid.output_size == (2160, 3840)


def test_table():
    grid = TileGrid(7, 4, patch=4, stride=2)
    assert grid.row_origins == [0, 2, 3]
    assert grid.col_origins == [0]
    assert grid.origins().tolist() == [[0, 0], [2, 0], [3, 0]]
    wide = TileGrid(4, 7, patch=4, stride=3, scale=2)
    assert wide.origins().tolist() == [[0, 0], [0, 3]]
    assert wide.origins().dtype == torch.int64
    assert wide.output_size == (8, 14)


def test_table_of_crop():
    grid = TileGrid(8, 9, patch=4, stride=3, scale=2, coverage="crop")
    assert grid.crop
    assert grid.row_origins == [0, 3]
    assert grid.col_origins == [0, 3]
    assert grid.output_size == (14, 14)
    assert TileGrid(4, 4, 4, 4, coverage="crop").origins().tolist() == [[0, 0]]


def test_image_smaller_than_a_patch():
    grid = TileGrid(3, 50, patch=32, stride=28, scale=2)
    assert grid.row_origins == [0]
    assert grid.col_origins == [0, 18]
    assert grid.output_size == (6, 100)


@given(grids())
def test_every_pixel_is_covered(grid):
    for origins, size in axes(grid):
        covered = {x for o in origins for x in range(o, o + grid.patch)}
        assert covered >= set(range(size))
    assert grid.output_size == (grid.height * grid.scale, grid.width * grid.scale)


@pytest.mark.slow
@given(st.one_of(grids(), grids("crop")))
def test_origins_lie_inside_and_increase(grid):
    for origins, size in axes(grid):
        assert origins[0] == 0
        steps = [b - a for a, b in pairwise(origins)]
        assert all(step == grid.stride for step in steps[:-1])
        assert all(0 < step <= grid.stride for step in steps)
        assert size < grid.patch or origins[-1] + grid.patch <= size
    assert (grid.rows, grid.cols) == (len(grid.row_origins), len(grid.col_origins))
    assert grid.origins().shape == (grid.num_patches, 2)
    assert grid.origins().tolist() == [[y, x] for y in grid.row_origins for x in grid.col_origins]


@given(grids())
def test_last_tile_is_shifted_to_the_edge(grid):
    for origins, size in axes(grid):
        assume(size >= grid.patch)
        assert origins[-1] == size - grid.patch
        # No tile is spare: without the last one the edge would be bare.
        assert len(origins) == 1 or origins[-2] + grid.patch < size


@given(grids("crop"))
def test_crop_drops_less_than_a_stride(grid):
    for (origins, size), output in zip(axes(grid), grid.output_size, strict=True):
        assert all(o == i * grid.stride for i, o in enumerate(origins))
        assert output == (origins[-1] + grid.patch) * grid.scale
        assert 0 <= size - output // grid.scale < grid.stride


def test_is_a_value():
    assert TileGrid(5, 6, 4, 2) == TileGrid(5, 6, 4, 2)
    assert len({TileGrid(5, 6, 4, 2), TileGrid(5, 6, 4, 2), TileGrid(5, 6, 4, 3)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        TileGrid(5, 6).height = 7


@pytest.mark.parametrize(
    ("kind", "args", "words"),
    [
        (ValueError, {"height": 0}, "height at least 1 0"),
        (ValueError, {"width": -3}, "width at least 1 -3"),
        (ValueError, {"patch": 0}, "patch at least 1 0"),
        (ValueError, {"stride": 0}, "stride at least 1 0"),
        (ValueError, {"scale": 0}, "scale at least 1 0"),
        (TypeError, {"height": 50.0}, "height integer 50.0"),
        (TypeError, {"stride": "4"}, "stride integer '4'"),
        (TypeError, {"scale": None}, "scale integer None"),
        (TypeError, {"patch": True}, "patch integer True"),
        (ValueError, {"stride": 33}, r"stride at most patch \(32\) 33"),
        (ValueError, {"coverage": "most"}, "coverage full crop most"),
        (ValueError, {"coverage": "crop", "height": 31}, "crop 32 x 32 31 x 60 full"),
        (ValueError, {"coverage": "crop", "width": 7}, "crop 32 x 32 50 x 7 full"),
    ],
)
def test_errors(kind, args, words):
    with pytest.raises(kind, match="^TileGrid: .*" + ".*".join(words.split(" "))):
        TileGrid(**{"height": 50, "width": 60} | args)
