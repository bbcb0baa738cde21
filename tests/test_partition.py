"""Images cut into rectangles of one class: all cuts are compared, sums are those of cells, and plans keep what cuts promise."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from fastroute.cascades import partition
from fastroute.cascades.cells import CELL, Cells, Rectangle
from fastroute.cascades.decision import Decision, Table, Target, error_of
from fastroute.cascades.guillotine import cheapest, parts
from fastroute.cascades.partition import COUNTED, PASS, Blocks, Cut, Partition, Region, covering, sums, work
from fastroute.cascades.plan import joined, plan_of, spent
from fastroute.cascades.search import choose

SIZES = [(5 * CELL, 4 * CELL), (3 * CELL + 7, 4 * CELL - 5), (CELL, 6 * CELL), (1, 1)]


def values(rows: int, cols: int, number: int = 2, seed: int = 0) -> np.ndarray:
    """Any values of rectangles; those that there are not are infinite."""
    found = np.random.default_rng(seed).exponential(size=(number, rows, cols, rows, cols))
    h, w, top, left = np.ogrid[1 : rows + 1, 1 : cols + 1, :rows, :cols]
    # Larger ones cost more, but less than their parts.
    found *= (h * w) ** 0.8
    found[:, (h + top > rows) | (w + left > cols)] = np.inf
    return found


def least(whole: np.ndarray, n: int, place: Rectangle) -> float:
    """The least sum over all cuts of one rectangle, by trying all."""

    @cache
    def of(place: Rectangle) -> float:
        top, left, bottom, right = place
        found = [whole[n, bottom - top - 1, right - left - 1, top, left]]
        found += [of(place._replace(bottom=at)) + of(place._replace(top=at)) for at in range(top + 1, bottom)]
        found += [of(place._replace(right=at)) + of(place._replace(left=at)) for at in range(left + 1, right)]
        return min(found)

    return of(place)


@pytest.mark.parametrize("size", [(4, 5), (1, 6), (5, 1), (1, 1)])
def test_all_cuts_are_compared(size):
    whole = values(*size, number=3)
    given = whole.copy()
    best = cheapest(whole)
    assert np.array_equal(whole, given)
    for n in range(3):
        expected = least(whole, n, Rectangle(0, 0, *size))
        assert best[n, -1, -1, 0, 0] == pytest.approx(expected)
        count, total = np.zeros(size, int), 0.0
        for part in parts(whole, best, n):
            count[part.top : part.bottom, part.left : part.right] += 1
            total += whole[n, part.bottom - part.top - 1, part.right - part.left - 1, part.top, part.left]
        assert (count == 1).all() and total == pytest.approx(expected)


@pytest.mark.parametrize("block", [2, 3, 16])
@pytest.mark.parametrize("size", SIZES)
def test_work_and_sums_are_those_of_the_cells(size, block, monkeypatch):
    monkeypatch.setattr(partition, "BLOCK", block)
    cells = Cells(*size)
    amounts = np.random.default_rng(1).random((cells.rows, cells.cols))
    blocks = [one for group in Blocks(cells).groups() for one in group]
    pixels, alone, every, inner = work(blocks, 8), work(blocks, None), sums(blocks, amounts), sums(blocks, amounts, inner=True)
    seen = set()
    for n, (row, col) in enumerate(blocks):
        for h, w, top, left in product(*map(range, (row.size, col.size, row.size, col.size))):
            at, bottom, right = (n, h, w, top, left), top + h + 1, left + w + 1
            place = Rectangle(row.first + top, col.first + left, row.first + bottom, col.first + right)
            if bottom > row.size or right > col.size:
                assert pixels[at] == np.inf
            elif place.top >= cells.rows or place.left >= cells.cols:
                assert pixels[at] == 0 and every[at] == 0
            else:
                place = Rectangle(place.top, place.left, min(place.bottom, cells.rows), min(place.right, cells.cols))
                assert pixels[at] == cells.pixels(place, 8).area + PASS and alone[at] == cells.pixels(place).area
                assert every[at] == pytest.approx(amounts[place.top : place.bottom, place.left : place.right].sum())
                last = place.bottom - (place.bottom < cells.rows), place.right - (place.right < cells.cols)
                within = Rectangle(place.top + (place.top > 0), place.left + (place.left > 0), *last)
                own = amounts[within.top : max(within.bottom, within.top), within.left : max(within.right, within.left)]
                assert inner[at] == pytest.approx(own.sum(), abs=1e-12)
                seen.add(place)
    assert {Rectangle(r, c, r + 1, c + 1) for r in range(cells.rows) for c in range(cells.cols)} <= seen


def expected_errors(cells: Cells, classes: int, seed: int) -> Tensor:  # [K, rows, cols]
    generator = torch.Generator().manual_seed(seed)
    hard = torch.rand(cells.rows, cells.cols, generator=generator, dtype=torch.float64).pow(4) * 1e-3
    return torch.stack([hard * 0.2**k for k in range(classes - 1)] + [hard * 0.02])


@pytest.mark.parametrize(("base", "wide"), [(None, ()), (None, (False, True)), (0, ()), (1, ())])
def test_a_cut_is_the_best_of_its_price(base, wide):
    cells, costs, region = Cells(3 * CELL - 3, 4 * CELL), [1.0, 6.0, 100.0], Region(0.8, 0.2, wide)
    errors = expected_errors(cells, 3, 5)
    area = float(cells.areas().sum())
    given = Partition(cells, costs, 12, errors, region, base)
    assert given.together > 1
    weights = (errors * cells.areas() / area).numpy()

    def terms(k: int, place: Rectangle) -> tuple[float, float, float]:
        """Error, pixels, and what counts of them in the choice."""
        own = weights[:, place.top : place.bottom, place.left : place.right]
        border = np.full(own.shape[1:], 0.8)
        top, left, bottom, right = place
        border[top > 0 : own.shape[1] - (bottom < cells.rows), left > 0 : own.shape[2] - (right < cells.cols)] = 0.2
        in_region = float((own[2] * border).sum())
        error = in_region if k == 2 else float(own[k].sum()) + (in_region if (wide + (False,) * 2)[k] and k != base else 0.0)
        if k == (base or 0):
            return error, 0.0, 0.0
        pixels, alone = cells.pixels(place, 12).area + PASS, cells.pixels(place).area
        return error, pixels * costs[k] / 100, (COUNTED * pixels + (1 - COUNTED) * alone) * costs[k] / 100

    classes = range(base or 0, 3)
    for price in (1e-6, 1e-5, 1e-4, 1e-3):
        whole = values(cells.rows, cells.cols, 1)
        for h, w, top, left in product(*map(range, whole.shape[1:])):
            place = Rectangle(top, left, top + h + 1, left + w + 1)
            if place.bottom <= cells.rows and place.right <= cells.cols:
                options = [terms(k, place) for k in classes]
                whole[0, h, w, top, left] = min(error + price / area * counted for error, _, counted in options)
        expected = least(whole, 0, cells.whole)
        (cut,) = given.at([price])
        told = [terms(k, place) for k, own in enumerate(cut.regions) for place in own]
        assert sum(error + price / area * counted for error, _, counted in told) == pytest.approx(expected)
        assert cut.error == pytest.approx(sum(error for error, _, _ in told))
        assert cut.cost == pytest.approx(sum(pixels for _, pixels, _ in told) + given.shares[base or 0] * area)
    assert given.at([1e-6, 1e-4]) == [*given.at([1e-6]), *given.at([1e-4])]
    (free,) = given.at([2 * given.largest])
    assert not free.regions[-1] and free.cost == pytest.approx(given.shares[base or 0] * area)


@pytest.mark.parametrize("block", [3, 16])
@pytest.mark.parametrize("base", [None, 0, 1])
def test_plans_keep_what_cuts_promise(block, base, monkeypatch):
    monkeypatch.setattr(partition, "BLOCK", block)
    monkeypatch.setattr("fastroute.cascades.plan.BLOCK", block)
    cells, costs = Cells(7 * CELL + 3, 9 * CELL), [1.0, 6.0, 100.0]
    errors = expected_errors(cells, 3, 7)
    scores = errors[0].sqrt() * 255
    table = Table(torch.linspace(0.01, 9, 60, dtype=torch.float64), torch.zeros(3, 60), (8, 16), (1.0, 0.4), 0.2, 1.3)
    law = (table.scores / 255).square()
    table = Table(table.scores, torch.stack([law, 0.2 * law, 0.02 * law]), (8, 16), (1.0, 0.4), 0.2, 1.3)
    decision, areas = Decision(table, base=base), cells.areas()
    paid = []
    for fidelity in (34.0, 40.0, 44.0, 52.0, 90.0):
        plan = choose(decision, Target(fidelity=fidelity), cells, costs, scores, None)
        error = error_of(plan, table.expected(scores), table, areas)
        assert error <= 10 ** (-fidelity / 10) * (1 + 1e-6)
        paid.append(plan.cost)
        held = torch.full_like(plan.class_ids, -1)
        for k, regions in enumerate(plan.regions):
            for r in regions:
                held[r.top : r.bottom, r.left : r.right] = k
        assert torch.equal(held, plan.class_ids)
        assert plan.cost <= float(areas.sum()) * (1 + (0.0 if base is None else costs[base] / 100)) + PASS + 1e-6
    assert paid == sorted(paid) and paid[0] < paid[-1] and plan.dense
    told = []
    for budget in (0.05, 0.2, 0.5, 0.9):
        plan = choose(decision, Target(budget=budget), cells, costs, scores, None)
        assert plan.cost <= max(budget, 0.07) * float(areas.sum())
        told.append(error_of(plan, table.expected(scores), table, areas))
    assert told == sorted(told, reverse=True) and told[0] > told[-1]


@pytest.mark.parametrize("context", [0, 8, 24])
def test_rectangles_of_neighbouring_blocks_are_joined(context):
    cells = Cells(24 * CELL, 40 * CELL)
    needed = torch.zeros(24, 40, dtype=torch.bool)
    needed[3:20, 5:38] = True
    blocks = covering(needed.numpy(), cells, context)
    assert len(blocks) > 1
    assert joined(blocks, cells, context) == [Rectangle(3, 5, 20, 38)]
    # Whatever is joined holds what was there, and costs less.
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        needed = torch.rand(24, 40, generator=generator) < 0.15
        apart = covering(needed.numpy(), cells, context)
        together = joined(apart, cells, context)
        count = torch.zeros(24, 40)
        for r in together:
            count[r.top : r.bottom, r.left : r.right] += 1
        assert bool((count > 0)[needed].all()) and spent(together, cells, context) <= spent(apart, cells, context)


def test_a_cut_of_blocks_becomes_one_plan():
    cells = Cells(20 * CELL, 20 * CELL)
    halves = (Rectangle(0, 0, 10, 8), Rectangle(10, 0, 20, 8))
    plan = plan_of(Cut(((), halves), 0.0, 0.0), cells, [0.1, 1.0], 8)
    assert plan.regions == ((Rectangle(0, 8, 20, 20),), (Rectangle(0, 0, 20, 8),))
    assert bool((plan.class_ids[:, :8] == 1).all()) and bool((plan.class_ids[:, 8:] == 0).all())


@pytest.mark.parametrize("spread", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("base", [None, 0])
def test_a_little_too_far_off_is_mended_by_a_few_cells(spread, base):
    """Where cells are alike no cut lies between the cheap network everywhere and the dense run; a few better cells will do."""
    cells, costs = Cells(10 * CELL, 12 * CELL), [1.0, 100.0]
    generator = torch.Generator().manual_seed(3)
    scores = torch.exp(spread * torch.randn(10, 12, generator=generator, dtype=torch.float64))
    known = torch.linspace(0.05, 12, 200, dtype=torch.float64)
    law = (known / 255).square()
    table = Table(known, torch.stack([law, 0.01 * law]), (8,), (1.0,))
    cheap = float(table.expected(scores)[0].mean())
    area = float(cells.areas().sum())
    fidelity = -10 * float(np.log10(0.92 * cheap))
    plan = choose(Decision(table, base=base), Target(fidelity=fidelity), cells, costs, scores, None)
    assert error_of(plan, table.expected(scores), table, cells.areas()) <= 0.92 * cheap * (1 + 1e-6)
    assert 0 < int((plan.class_ids == 1).sum()) < 20 and plan.cost < 0.3 * area
    # A budget is spent, not left.
    for budget in (0.1, 0.3, 0.6):
        plan = choose(Decision(table, base=base), Target(budget=budget), cells, costs, scores, None)
        assert 0.7 * budget * area < plan.cost <= budget * area
