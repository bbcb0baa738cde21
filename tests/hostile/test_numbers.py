"""Numbers at their edges as arguments of the public operators: refused by an error that names the operator, or right."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastroute
from fastroute import TileGrid

EDGES = [
    math.inf,
    -math.inf,
    math.nan,
    2**31 - 1,
    2**31,
    2**31 + 1,
    2**63 - 1,
    2**63,
    0,
    -1,
    1,
    2,
    3,
    4,
    8,
    0.5,
    1e-300,
    1e308,
    True,
]
edge = st.sampled_from(EDGES)
# A good number, so that the others are reached.
mostly = {number: st.one_of(st.just(number), edge) for number in (1, 2, 3, 4, 8)}
ERRORS = (ValueError, TypeError, RuntimeError, MemoryError)
campaign = settings(max_examples=60, deadline=None, derandomize=True)


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


IMAGE, PATCHES, CLASSES = rand(1, 2, 8, 8), rand(4, 4, 4, 4), (rand(1, 8, 8) * 2).to(torch.uint8)
LAYERS = [(rand(3, 32), rand(3))]
MLP = [(rand(2, 6), rand(2))]


@pytest.fixture(autouse=True)
def limited_memory() -> Iterator[None]:
    """What no machine has fails here as there."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refused_or_right(names: tuple[str, ...], run: Callable[[], Any]) -> None:
    """Both backends refuse by name, or both give the same."""
    found: dict[str, Any] = {}
    for backend in (None, "reference"):
        with fastroute.use_backend(backend):
            try:
                found[str(backend)] = run()
            except ERRORS as error:
                assert any(name in str(error) for name in names), f"{type(error).__name__}: {error}"
    results = [x if isinstance(x, tuple) else (x,) for x in found.values()]
    # The reference holds more at a time: memory may end sooner.
    for actual, expected in zip(*results, strict=True) if len(results) == 2 else ():
        assert actual.shape == expected.shape
        if actual.is_floating_point():
            assert torch.allclose(actual, expected, atol=1e-4, equal_nan=True)
        else:
            assert torch.equal(actual, expected)


@pytest.mark.slow
@campaign
@given(mostly[8], mostly[8], mostly[4], mostly[4], mostly[1], st.sampled_from(["full", "crop"]))
def test_tile_grid_extract_and_stitch(height, width, patch, stride, scale, coverage):
    def run() -> tuple[Tensor, ...]:
        grid = TileGrid(height, width, patch, stride, scale, coverage)
        patches = fastroute.extract_patches(IMAGE, grid)
        if grid.patch * scale > 64:
            return (patches,)
        return patches, fastroute.stitch_patches(rand(grid.num_patches, 1, grid.patch * scale, grid.patch * scale), grid)

    refused_or_right(("TileGrid", "extract_patches", "stitch_patches"), run)


@pytest.mark.slow
@campaign
@given(mostly[2], edge, edge)
def test_stitch_patches(shuffle, begin, end):
    grid = TileGrid(8, 8, 4, 4, 2)
    for rows in (None, (begin, end), (0, end)):
        refused_or_right(
            ("stitch_patches",), lambda rows=rows: fastroute.stitch_patches(PATCHES, grid, shuffle=shuffle, rows=rows)
        )


@campaign
@given(edge, edge)
def test_refine_boundaries(begin, end):
    for rows in ((begin, end), (0, end)):
        refused_or_right(("refine_boundaries",), lambda rows=rows: fastroute.refine_boundaries(IMAGE, CLASSES, rows))


@campaign
@given(edge)
def test_group_by_class(num_classes):
    refused_or_right(("group_by_class",), lambda: tuple(fastroute.group_by_class(torch.tensor([1, 0, 1]), num_classes)))


@campaign
@given(st.lists(st.one_of(edge, st.floats(0.1, 10)), min_size=3, max_size=3), edge, st.one_of(st.none(), edge))
def test_assign_classes(cost, penalty, budget):
    score = rand(40, 3)
    refused_or_right(("assign_classes",), lambda: fastroute.assign_classes(score, cost, penalty))
    refused_or_right(("assign_classes",), lambda: fastroute.assign_classes(score, cost, budget=budget))
    refused_or_right(("assign_classes",), lambda: fastroute.assign_classes(score, [1.0, 2.0, 4.0], penalty, budget))


@campaign
@given(mostly[4], mostly[1], mostly[1], st.one_of(st.just(0.1), edge))
def test_cell_mlp(cell, span, step, slope):
    refused_or_right(("cell_mlp",), lambda: fastroute.cell_mlp(rand(1, 2, 4, 8), LAYERS, cell, span, step, slope))


@campaign
@given(mostly[1], mostly[2], st.one_of(st.just(0), edge))
def test_conv3x3(groups, shuffle, context):
    image, weight = rand(1, 4, 5, 6), rand(8, 4, 3, 3)

    def run() -> Tensor:
        return fastroute.conv3x3(image, fastroute.conv3x3_weight(weight, groups, shuffle), context=context)

    refused_or_right(("conv3x3",), run)


@campaign
@given(st.lists(edge, min_size=6, max_size=6))
def test_conv1x1_of_edges(values):
    image = torch.tensor([float(x) for x in values]).view(1, 2, 1, 3)
    refused_or_right(
        ("conv1x1",), lambda: fastroute.conv1x1(image, torch.tensor([[1.0, 0.5], [-1.0, 2.0]]), slope=torch.zeros(2))
    )


@campaign
@given(mostly[8], mostly[8], edge, edge)
def test_pixel_mlp(height, width, begin, end):
    for rows in (None, (begin, end), (0, end)):
        refused_or_right(("pixel_mlp",), lambda rows=rows: fastroute.pixel_mlp(IMAGE, [MLP], (height, width), rows=rows))


@campaign
@given(st.lists(edge, min_size=4, max_size=4), st.sampled_from([torch.float32, torch.float64, torch.float16]))
def test_adaptive_threshold_of_edges(values, dtype):
    score = torch.tensor([[float(x) for x in values]]).to(dtype)
    refused_or_right(("adaptive_threshold",), lambda: fastroute.adaptive_threshold(score))


@pytest.mark.parametrize("step", [2**31, 2**62, 2**63 - 1])
def test_a_step_beyond_the_last_window(step):
    image = rand(1, 1, 4, 40)
    layers = [(rand(2, 16), rand(2))]
    expected = fastroute.cell_mlp(image, layers, 4, 3, 7)
    for backend in (None, "reference"):
        with fastroute.use_backend(backend):
            assert torch.allclose(fastroute.cell_mlp(image, layers, 4, 3, step), expected)
            raw = torch.ops.fastroute.cell_mlp(image, [layers[0][0]], [layers[0][1]], 0.1, 4, 3, step)
            assert torch.allclose(raw, expected)


@pytest.mark.parametrize("asked", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_budgets_hold_where_scores_are_infinite(asked, dtype):
    cost = torch.tensor([1.0, 4.0])
    for score in (
        torch.tensor([[0.1, math.inf]] * 10),
        torch.tensor([[math.inf, math.inf]] * 10),
        torch.where(rand(50, 2) > 0.5, math.inf, rand(50, 2)),
        rand(50, 2) * (1e5 if dtype == torch.float16 else 1),
    ):
        for budget in (0.25, 0.3, 0.7, 1.0):
            with fastroute.use_backend(asked):
                ids = fastroute.assign_classes(score.to(dtype), [1.0, 4.0], budget=budget)
            assert cost[ids].mean() / 4 <= budget + 1e-6
