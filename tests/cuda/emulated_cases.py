"""What only kernels of a GPU do: run by test_emulated.py, in a process whose operators are the emulated CUDA kernels."""

from __future__ import annotations

import math
import mmap

import pytest
import torch
from torch import Tensor

import fastroute
from fastroute import TileGrid
from fastroute.reference.adaptive_threshold import adaptive_threshold_reference
from fastroute.reference.assign_classes import assign_classes_budget_reference, assign_classes_reference
from fastroute.reference.extract_patches import extract_patches_reference
from fastroute.reference.merge_regions import merge_regions_reference
from fastroute.reference.stitch_patches import stitch_patches_reference

OPS = torch.ops.fastroute
FAR = (-1, -(2**63), 2**31, 2**40, 2**63 - 1)


def nearest(index: Tensor, count: int) -> Tensor:
    return index.clamp(0, count - 1)


@pytest.mark.parametrize("number", FAR)
def test_index_out_of_range_is_the_nearest(number):
    index = torch.tensor([2, number, 0, number, 1])
    rows = torch.rand(5, 3)
    assert torch.equal(OPS.gather_groups(rows, index, index), rows[nearest(index, 5)])
    assert torch.equal(OPS.scatter_groups(rows, index, index), rows[nearest(index, 5)])

    image = torch.rand(1, 2, 7, 9)
    expected = extract_patches_reference(image, nearest(index, 6), None, None, 4, 3, False)
    assert torch.equal(OPS.extract_patches(image, index, None, None, 4, 3, False, None, False, 4, 4), expected)

    patches, window = torch.rand(3, 1, 4, 4), torch.ones(4)
    place = index[:4].contiguous()
    expected = stitch_patches_reference(patches, nearest(place, 3), window, 6, 7, 4, 3, 1, False)
    assert torch.equal(OPS.stitch_patches(patches, place, window, 6, 7, 4, 3, 1, False, 1, None, 0, 6), expected)


@pytest.mark.parametrize("number", FAR)
def test_region_out_of_range_is_moved_into_one(number):
    # Two rows of two patches: a region of all, and a row of one patch.
    regions, window = [torch.rand(1, 1, 6, 7), torch.rand(1, 1, 4, 4)], torch.ones(4)

    def stitch(inverse, region):
        out = torch.empty(1, 1, 6, 7)
        geometry = (6, 7, 4, 3, 1, False, 1, 0, 6)
        OPS.stitch_patches.batches_out(regions, torch.tensor(inverse), torch.tensor(region), window, *geometry, out=out)
        return out

    row, first = (1, 3) if number > 0 else (0, 0)
    assert torch.equal(stitch([0, 0, 0, number], [0, 0, 0, 3]), stitch([0, 0, 0, row], [0, 0, 0, 3]))
    assert torch.equal(stitch([0, 0, 0, 0], [0, number, 0, 0]), stitch([0, 0, 0, 0], [0, first, 0, 0]))
    # The row of one patch does not hold the last patch where all would: it is moved into it.
    assert torch.equal(stitch([0, 0, 0, 1], [0, 0, 0, 0]), stitch([0, 0, 0, 1], [0, 0, 0, 3]))


@pytest.mark.parametrize("number", FAR)
def test_class_of_a_region_out_of_range_is_the_nearest(number):
    grid = TileGrid(6, 9, 4, 3)
    ids, costs = torch.tensor([2, number, 0, number, 1, 1]), torch.tensor([[1.0], [2.0], [4.0]]).repeat(1, 36)
    place = (grid.height, grid.width, grid.patch, grid.stride, grid.crop, 4, False)
    expected = merge_regions_reference(nearest(ids, 3), costs, *place)
    for actual, wanted in zip(OPS.merge_regions(ids, costs, *place), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("cost", [math.nan, math.inf, -1.0])
def test_costs_that_mean_nothing_give_some_regions(cost):
    grid = TileGrid(30, 40, 8, 6)
    ids, costs = torch.arange(2 * grid.num_patches) % 3, torch.rand(3, 36)
    costs[1:] = cost
    place = (grid.height, grid.width, grid.patch, grid.stride, grid.crop, 4)
    for promote in (False, True):
        executed, region, group = OPS.merge_regions(ids, costs, *place, promote)
        assert ((executed >= ids) & (executed < 3)).all()
        assert ((region >= 0) & (region <= torch.arange(len(ids)))).all()
        assert ((group >= 0) & (group <= 3 * 36)).all()


@pytest.mark.parametrize("number", FAR)
def test_class_out_of_range_is_the_nearest(number):
    ids = torch.tensor([2, number, 0, number, 1])
    expected = fastroute.group_by_class(nearest(ids, 3), 3)
    for actual, wanted in zip(OPS.group_by_class(ids, 3), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_gradient_of_an_index_out_of_range():
    # The adjoint of reading the nearest.
    grad = torch.ones(3, 1, 4, 4)
    image = OPS._extract_patches_backward(grad, torch.tensor([0, -9, 99]), 1, 6, 7, 4, 3, False)
    assert image.sum() == grad.sum()
    patches = OPS._stitch_patches_backward(
        torch.ones(1, 1, 6, 7), torch.tensor([0, -9, 99, 1]), torch.ones(4), 6, 7, 4, 3, 1, False, 3
    )
    assert patches.sum() == 42


def test_nan_scores_get_some_class():
    score = torch.full((7, 3), math.nan)
    cost = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    solved = [OPS.assign_classes.budget(score, cost, 0.5, None, logits, 8)[1] for logits in (False, True)]
    for ids in (OPS.assign_classes(score, cost, 0.0, 8), *solved):
        assert ids.min() >= 0
        assert ids.max() < 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 17, -1])
def test_scores_that_are_not_finite_get_some_class(value, place):
    score = torch.rand(3, 700)
    score[1, place] = value
    ids = OPS.adaptive_threshold(score, 8)
    assert ids.min() >= 0
    assert ids.max() <= 1
    # The other images do not notice.
    assert torch.equal(ids[::2], adaptive_threshold_reference(score[::2], torch.int64))


@pytest.mark.parametrize("items", [3, 5000])
def test_budget_that_takes_many_steps(items):
    # Equal scores of 1 change class at a penalty of 2^-1074.
    score, cost = torch.ones(items, 3), torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    for budget in (0.25, 0.5, 1.0):
        for least, logits in ((None, False), (None, True), (-0.3, False), (0.0, True)):
            expected = assign_classes_budget_reference(score, cost, budget, least, logits, torch.int64)[1]
            assert torch.equal(OPS.assign_classes.budget(score, cost, budget, least, logits, 8)[1], expected)


# None costs 1 in some: rounding then turns the order of equal scores back and forth as the penalty grows.
TIE_COSTS = (
    [4.0, 2.0, 1.0],
    [4.0, 3.0, 2.0],
    [304.0, 141.0, 468.0],
    [0.9, 0.95, 0.5],
    [2.0, 2.0, 1.0],
    [1 + 2.0**-50, 1.0, 3.0],
)


# One block searches, or many do.
@pytest.mark.parametrize(
    ("items", "dtype"), [(24, torch.float16), (24, torch.float32), (24, torch.float64), (4200, torch.float32)]
)
@pytest.mark.parametrize("cost", TIE_COSTS, ids=str)
def test_budget_of_ties(cost, items, dtype):
    # Powers of 2 have the same logarithms in every library; below 2^-126 they count as much.
    levels = torch.tensor([1.0, 0.5, 2.0**-20, 0.0], dtype=dtype)
    constant = levels[:, None, None].expand(4, items, 3)
    mixed = levels[torch.arange(items) % 4][:, None].expand(items, 3)
    beside = levels[torch.arange(3 * items).view(items, 3) // 5 % 4]
    # Of two classes alike, with a third far below or just above.
    pair = torch.tensor([1.0, 1.0, 0.0], dtype=dtype).expand(items, 3)
    above = torch.tensor([1.0, 1.0, 1 + torch.finfo(dtype).eps], dtype=dtype).expand(items, 3)
    prices = torch.tensor(cost, dtype=torch.float64)
    least = min(cost) / max(cost)
    scores = (*constant, mixed, beside, pair, above)
    for score in scores if items < 4096 else scores[::3]:
        for part in (0.0, 0.3, 0.5, 0.77, 1.0):
            budget = least + (1 - least) * part
            expected = assign_classes_budget_reference(score, prices, budget, None, False, torch.uint8)[1]
            assert torch.equal(OPS.assign_classes.budget(score, prices, budget, None, False, 1)[1], expected), (
                score[0],
                budget,
            )


# Vectors of 16 bytes of two classes, of up to four and of more; runs that are not whole; items of one score per class.
@pytest.mark.parametrize("shape", [(2, 64), (3, 35), (97,)], ids=str)
@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_runs_of_items_and_bits_of_a_penalty(shape, classes, dtype):
    generator = torch.Generator().manual_seed(len(shape) * classes)
    # Logits and powers of 2 have no logarithm to round, so that the reference's penalty has the same bits.
    logits = torch.randn((shape[0], classes, *shape[1:]), generator=generator, dtype=torch.float64).mul(3).to(dtype)
    cost = torch.tensor([1.0, 4.0, 2.0, 16.0, 8.0][:classes], dtype=torch.float64)
    for penalty in (0.0, 0.75):
        expected = assign_classes_reference(logits, cost, penalty, torch.uint8)
        assert torch.equal(OPS.assign_classes(logits, cost, penalty, 1), expected)
    least = float(cost.min() / cost.max())
    for part, start in ((0.0, None), (0.3, None), (0.77, 0.1), (0.9, -0.4), (1.0, None)):
        budget = least + (1 - least) * part
        for expected, actual in zip(
            assign_classes_budget_reference(logits, cost, budget, start, True, torch.int32),
            OPS.assign_classes.budget(logits, cost, budget, start, True, 4),
            strict=True,
        ):
            assert torch.equal(actual, expected)


def vast(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are touched."""
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.frombuffer(mmap.mmap(-1, count * size), dtype=dtype)


def test_addresses_beyond_32_bits():
    side, patch = 70_000, 16
    image = vast(side * side, torch.uint8).view(1, 1, side, side)  # 4.9 GB
    image[..., -patch:, -patch:] = torch.arange(patch * patch).view(patch, patch)
    grid = TileGrid(side, side, patch, patch)
    last = torch.tensor([grid.num_patches - 1, 0])
    patches = fastroute.extract_patches(image, grid, last)
    assert torch.equal(patches[0, 0], image[0, 0, -patch:, -patch:])
    assert not patches[1].any()

    rows = (2**31 + 2**20) // 1024
    stack = vast(rows * 1024, torch.float32).view(rows, 1, 32, 32)  # 8.6 GB
    stack[-1] = torch.rand(1, 32, 32)
    inverse = torch.tensor([rows - 1, 0])
    merged = fastroute.stitch_patches(stack, TileGrid(32, 64, 32, 32), inverse=inverse)
    assert torch.equal(merged[0, 0, :, :32], stack[-1, 0])
    assert not merged[..., 32:].any()
