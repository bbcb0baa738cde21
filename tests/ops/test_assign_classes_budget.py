"""Tests of the budget of `assign_classes`."""

from __future__ import annotations

import pytest
import torch
from support import FLOATING, same
from test_assign_classes import COSTS, LAYOUTS, lay_out, probabilities, reference
from torch import Tensor

from fastroute import assign_classes
from fastroute.ops.assign_classes import solve_classes
from fastroute.reference.assign_classes import assign_classes_budget_reference

OPS = ("assign_classes",)
# What a budget may be exceeded by, as the operator allows, and the rounding of a mean.
SLACK = 1e-9 + 1e-12
SMALLEST = 2.0**-126
MANY = {2: [1.0, 4.0], 3: [304.0, 141.0, 468.0], 4: [8.0, 1.0, 2.0, 4.0], 5: COSTS[5]}


def share(ids: Tensor, cost: list[float]) -> float:
    """Mean cost of the chosen classes, as a fraction of the most expensive."""
    value = torch.tensor(cost, dtype=torch.float64, device=ids.device)
    return (value[ids.long()].mean() / value.max()).item()


def budgets(cost: list[float], steps: int) -> list[float]:
    least = min(cost) / max(cost)
    return [least + (1 - least) * i / steps for i in range(steps + 1)]


def crossings(score: Tensor, cost: list[float]) -> Tensor:
    """All penalties [N, K, K] at which one class of an item overtakes another; NaN where two cost the same."""
    logs = score.double().clamp(min=SMALLEST).log2()
    prices = torch.tensor(cost, dtype=torch.float64, device=score.device).log2()
    difference = prices[:, None] - prices
    return (logs[:, :, None] - logs[:, None]) / torch.where(difference == 0, float("nan"), difference)


def brute_force(score: Tensor, cost: list[float], budget: float) -> Tensor:
    """The first affordable assignment, trying one penalty between every two neighbouring crossings."""
    found = crossings(score, cost)
    found = found[found.isfinite()].unique()
    penalties = torch.cat([found[:1] - 1, (found[1:] + found[:-1]) / 2, found[-1:] + 1]).tolist()
    logs = score.double().clamp(min=SMALLEST).log2()
    prices = torch.tensor(cost, dtype=torch.float64, device=score.device).log2()
    for penalty in penalties:
        ids = (logs - penalty * prices).argmax(dim=1)
        if share(ids, cost) <= budget + SLACK:
            return ids
    raise AssertionError("not even the cheapest class is affordable")


def test_table(backend):
    # Item n prefers the expensive class by log2 of 8, 4, 2, 1, 1/2: as the money runs out, the last ones leave it first.
    gain = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5], device=backend.device)
    score = torch.stack([torch.ones_like(gain), gain], dim=1)
    # n expensive items of 5 cost (5 - n + 2 n) / 10 of all in the expensive class.
    for expensive in range(6):
        expected = [1] * expensive + [0] * (5 - expensive)
        assert assign_classes(score, [1.0, 2.0], budget=(5 + expensive) / 10).tolist() == expected
        if expensive < 5:
            assert assign_classes(score, [1.0, 2.0], budget=(5 + expensive) / 10 + 0.099).tolist() == expected


@pytest.mark.parametrize("classes", MANY)
def test_budget_holds_and_use_is_monotone(backend, classes):
    cost = MANY[classes]
    most_expensive, cheapest = cost.index(max(cost)), cost.index(min(cost))
    for seed, n in ((0, 1), (1, 2), (2, 37), (3, 1000)):
        score = probabilities(n, classes, device=backend.device, seed=seed)
        before = None
        for budget in budgets(cost, 20):
            ids = assign_classes(score, cost, budget=budget)
            assert share(ids, cost) <= budget + SLACK
            if before is not None:
                assert (ids == most_expensive).sum() >= (before == most_expensive).sum()
                assert (ids == cheapest).sum() <= (before == cheapest).sum()
            # One item at a time may be too expensive, but no more than that stays unspent.
            assert share(ids, cost) > budget - (1 - min(cost) / max(cost)) / n - SLACK
            before = ids
        assert (before == most_expensive).all()


@pytest.mark.parametrize("classes", MANY)
def test_no_smaller_penalty_fits(backend, classes):
    for seed in range(4):
        score = probabilities(9, classes, dtype=torch.float64, device=backend.device, seed=seed)
        for budget in budgets(MANY[classes], 12):
            ids = assign_classes(score, MANY[classes], budget=budget)
            assert ids.tolist() == brute_force(score, MANY[classes], budget).tolist()


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sweep_against_reference(kernel, layout, dtype):
    for shape in ((1,), (300,), (2, 7, 19), (1, 1, 33), (0,)):
        for classes, cost in COSTS.items():
            score = probabilities(shape[0], classes, *shape[1:], dtype=dtype, device=kernel.device)
            for budget in budgets(cost, 3):
                ids = assign_classes(lay_out(score, layout), cost, budget=budget)
                # The operator allows this much more than was asked for.
                expected = reference(score, cost, budget=min(budget + 1e-9, 1 + 1e-9))
                assert ids.shape == shape
                wrong = ids != expected
                # Boundary band: of items that switch at one penalty up to rounding, one may and another may not.
                at = crossings(score, cost).movedim((1, 2), (-2, -1)) if score.ndim == 2 else None
                if at is None:
                    same(ids, expected)
                elif wrong.any():
                    item = wrong.nonzero().flatten()
                    switch = at[item, ids[item], expected[item]]
                    assert (switch - switch[0]).abs().max() <= 1e-12 * (1 + switch[0].abs())
                assert len(ids) == 0 or share(ids, cost) <= budget + SLACK


def test_pixels_share_one_budget(backend):
    cost = COSTS[3]
    score = probabilities(3, 3, 8, 9, device=backend.device)
    flat = score.movedim(1, -1).reshape(-1, 3)
    for budget in budgets(cost, 6):
        ids = assign_classes(score, cost, budget=budget, dtype=torch.uint8)
        same(ids.flatten().long(), assign_classes(flat, cost, budget=budget))


@pytest.mark.parametrize("classes", MANY)
def test_both_ends(backend, classes):
    cost = MANY[classes]
    most_expensive, cheapest = cost.index(max(cost)), cost.index(min(cost))
    score = probabilities(50, classes, dtype=torch.float64, device=backend.device)
    # Even where the classifier is as sure as numbers go.
    score[0], score[1] = 0.0, 0.0
    score[0, cheapest], score[1, most_expensive], score[2] = 1.0, 1.0, 0.0
    least = min(cost) / max(cost)
    for slack in (0.0, 5e-10):
        assert (assign_classes(score, cost, budget=1.0 + slack) == most_expensive).all()
        assert (assign_classes(score, cost, budget=least - slack) == cheapest).all()


def test_what_float32_cannot_tell_apart(backend):
    rank = torch.randperm(60, generator=torch.Generator().manual_seed(6))
    gain = (3.0 * (1 + 1e-12 * rank.double())).to(backend.device)
    score = torch.stack([torch.ones_like(gain), gain, 0.1 * gain], dim=1)
    for expensive in (0, 1, 29, 59, 60):
        ids = assign_classes(score, [1.0, 2.0, 2.0], budget=(60 + expensive) / 120)
        assert ids.tolist() == [int(r >= 60 - expensive) for r in rank.tolist()]


def test_equal_items_change_together(backend):
    rows = probabilities(4, 3, device=backend.device)
    copies = torch.arange(40, device=backend.device) % 4
    for budget in budgets(MANY[3], 25):
        ids = assign_classes(rows[copies], MANY[3], budget=budget)
        assert share(ids, MANY[3]) <= budget + SLACK
        assert ids.tolist() == ids[:4].repeat(10).tolist()
        assert ids[:4].tolist() == assign_classes(rows, MANY[3], budget=budget).tolist()


def test_zero_scores(backend):
    # Ruled out by the classifier, not by the operator: 2^-126 has a price.
    score = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.0, 0.0]], device=backend.device)
    # Items 2 and 3 switch at penalty 0, item 1 at a large one, item 0 at a large negative one.
    for budget, expected in ((0.5, [0, 0, 0, 0]), (0.625, [0, 1, 0, 0]), (0.875, [0, 1, 1, 1]), (1.0, [1, 1, 1, 1])):
        assert assign_classes(score, [1.0, 2.0], budget=budget).tolist() == expected
    # Subnormal scores count the same.
    tiny = torch.where(score == 0, 1e-45, score)
    assert assign_classes(tiny, [1.0, 2.0], budget=0.625).tolist() == [0, 1, 0, 0]


def test_equal_costs(backend):
    score = torch.tensor([[0.2, 0.5, 0.3], [0.2, 0.3, 0.5], [0.6, 0.2, 0.2]], device=backend.device)
    # Between classes 1 and 2 the score decides at every budget, on a tie the lower.
    assert assign_classes(score, [1.0, 2.0, 2.0], budget=1.0).tolist() == [1, 2, 1]
    assert assign_classes(score, [1.0, 2.0, 2.0], budget=5 / 6).tolist() == [1, 2, 0]
    assert assign_classes(score, [1.0, 2.0, 2.0], budget=0.5).tolist() == [0, 0, 0]
    assert assign_classes(score, [2.0, 1.0, 1.0], budget=0.5).tolist() == [1, 2, 1]
    # All alike: the only budget is everything, and it is the plain argmax.
    assert assign_classes(score, [3.0, 3.0, 3.0], budget=1.0).tolist() == [1, 2, 0]


def test_unit_of_cost_does_not_matter(backend):
    score = probabilities(300, 5, device=backend.device)
    for budget in budgets(COSTS[5], 5):
        expected = assign_classes(score, COSTS[5], budget=budget)
        for unit in (1e-9, 3.0, 1e12):
            same(assign_classes(score, [c * unit for c in COSTS[5]], budget=budget), expected)


def test_nearly_equal_costs(backend):
    # A relative difference of 1e-6 needs penalties of a billion to overrule a score.
    score = probabilities(40, 3, dtype=torch.float64, device=backend.device)
    cost = [1.0, 1.0 + 1e-6, 2.0]
    assert (assign_classes(score, cost, budget=0.5) == 0).all()
    assert (assign_classes(score, cost, budget=1.0) == 2).all()
    assert share(assign_classes(score, cost, budget=0.75), cost) <= 0.75 + SLACK


def logits_of(n: int, classes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return (3 * torch.randn(n, classes, dtype=torch.float64, generator=generator) + 10).to(dtype).to(device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_logits_and_least_penalties_against_reference(kernel, dtype):
    # On a CPU the search of many items begins between two penalties that a sample suggests.
    for n, classes, budget in ((1, 2, 0.5), (300, 3, 0.6), *([(70_001, 2, 0.5)] if kernel.name == "cpu" else [])):
        score, cost = logits_of(n, classes, dtype, kernel.device), COSTS[classes]
        prices = torch.tensor(cost, dtype=torch.float64)
        for least, logits in ((None, True), (-0.4, True), (1.3, True), (1e9, True), (0.0, False)):
            x = score if logits else logits_of(n, classes, torch.float64, kernel.device).softmax(1)
            penalty, ids = solve_classes(x, cost, budget, least, logits=logits)
            expected, classes_there = assign_classes_budget_reference(x, prices, budget, least, logits, torch.int64)
            assert penalty.shape == () and penalty.dtype == torch.float64 and penalty.device == x.device
            assert (penalty - expected).abs() <= 1e-12 * (1 + expected.abs())
            # Boundary band: the item at the found penalty may lie on either side of it.
            assert (ids != classes_there).sum() <= 1 and share(ids, cost) <= budget + SLACK


def test_logits_tell_what_probabilities_do_not(backend):
    # Their probabilities are 1 in float32.
    score = torch.stack([torch.zeros(5), torch.tensor([20.0, 24.0, 22.0, 21.0, 23.0])], dim=1).to(backend.device)
    for expensive in range(6):
        ids = assign_classes(score, [1.0, 2.0], budget=(5 + expensive) / 10, logits=True)
        assert ids.sum() == expensive and (ids * score[:, 1]).sum() == sum(sorted([20, 24, 22, 21, 23])[5 - expensive :])


def test_logits_under_a_penalty(backend):
    score = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, -3.0]], device=backend.device)
    # 2 log(3) = 2.2 and 0.5 log(3) = 0.55.
    for penalty, expected in ((2.0, [0, 0, 0]), (0.5, [1, 1, 0]), (-5.0, [1, 1, 1]), (0.0, [1, 1, 0])):
        assert assign_classes(score, [1.0, 3.0], penalty, logits=True).tolist() == expected


def test_an_offset_of_logits_decides_nothing(backend):
    score = logits_of(200, 3, torch.float64, backend.device)
    for offset in (-1e6, 1e3):
        for budget in budgets(COSTS[3], 3):
            actual = assign_classes(score.round() + offset, COSTS[3], budget=budget, logits=True)
            same(actual, assign_classes(score.round(), COSTS[3], budget=budget, logits=True))


def test_infinite_score_as_logits(backend):
    inf = float("inf")
    score = torch.tensor([[0.0, inf], [inf, 0.0], [-inf, 0.0], [0.0, -inf], [inf, inf], [0.0, 1.0]], device=backend.device)
    assert assign_classes(score, [2.0, 1.0], budget=0.75, logits=True).tolist() == [1, 0, 1, 0, 0, 1]
    assert assign_classes(score, [2.0, 1.0], budget=1.0, logits=True).tolist() == [0] * 6
    assert assign_classes(score, [2.0, 1.0], budget=0.5, logits=True).tolist() == [1] * 6


def test_a_least_penalty_is_kept(backend):
    score = probabilities(50, 2, device=backend.device)
    penalty, ids = solve_classes(score, [1.0, 4.0], 0.6)
    for least in (float(penalty) - 1, float(penalty)):
        found, again = solve_classes(score, [1.0, 4.0], 0.6, least)
        assert found == penalty
        same(again, ids)
    # At a larger one less is spent.
    found, fewer = solve_classes(score, [1.0, 4.0], 0.6, float(penalty) + 0.5)
    assert found == float(penalty) + 0.5 and fewer.sum() < ids.sum()
