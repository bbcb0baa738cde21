"""How near a table foretells pictures from which it was not learnt, and the margins with which its promises are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastroute.cascades.decision import FEWEST, Decision, Sampling, Table, Target, error_of
from fastroute.cascades.measured import Measured, rescored
from fastroute.cascades.samples import FEWER, SHARE, TAUGHT, ratios_of
from fastroute.cascades.score import CellScore
from fastroute.cascades.search import Search, choose
from fastroute.cascades.table_fit import learn

# Parts of the pictures each of which is tested by what the others taught.
FOLDS = 4
# Of the pictures tested, this share must keep its promise; and none may miss it by more than `WORST` dB.
KEPT, WORST = 0.95, 1.5
# This share of the pictures comes nearer than what is called the nearest.
NEAREST = 0.1
# By what a margin is lowered as long as promises are kept.
LOWER = 2**-0.0625
# With this margin everything is dense; a promise that even the dense run cannot keep, of more than `EXACT`, ends here.
LARGEST = 1e6
# An error that is below what rounding makes.
EXACT = 1e-10


@dataclass(frozen=True)
class HeldOut:
    """A crop, and a table that was learnt from other pictures.

    Attributes:
        cells: of the crop.
        table: of the others.
        base: see :class:`fastroute.cascades.plan.Plan`.
        searches: see :func:`fastroute.cascades.search.choose`.
    """

    cells: Measured
    table: Table
    base: int | None = None
    searches: dict[int, Search] = field(default_factory=dict, repr=False)

    def by(self, table: Table) -> HeldOut:
        """The same crop by another table; what was searched is known where that differs by its margin alone."""
        return replace(self, table=table, searches=self.searches if table.errors is self.table.errors else {})


@dataclass(frozen=True)
class Calibration:
    """What was learnt, and how well it foretells pictures from which it was not.

    Attributes:
        table: what a router decides by.
        costs: measured seconds of a pixel in each class, relative to the last.
        pictures, cells: from how many it was learnt.
        promised, reached: dB that were asked for, and found on each crop, planned by what other pictures taught.
        spent: share of the dense cost that these crops take, in the mean.
        score: by which cells are told apart; None for the strength of their edges.
        base: the class whose result is scored instead.
        tried: `spent` of each score that was tried, by its name.
        classes: numbers of the networks that the cascade keeps, rising; empty for all.
        left_out: `spent` before a network was left out, by its number.
    """

    table: Table
    costs: tuple[float, ...]
    pictures: int
    cells: int
    promised: float
    reached: tuple[float, ...]
    spent: float = 1.0
    score: CellScore | None = None
    base: int | None = None
    tried: dict[str, float] = field(default_factory=dict)
    classes: tuple[int, ...] = ()
    left_out: dict[int, float] = field(default_factory=dict)


def learnt_from(
    cells: Sequence[Measured],
    costs: Sequence[float],
    fidelity: float,
    contexts: Sequence[int],
    learn_score: Callable[[Sequence[Measured]], CellScore] | None = None,
    wide: Sequence[bool] = (),
    base: int | None = None,
) -> Calibration:
    """The table of all cells, with margins at which most of the pictures keep the promise when the others taught.

    Args:
        cells: as measured.
        costs: of the networks.
        fidelity: in dB.
        contexts: from which calls choose.
        learn_score: from cells to a score by which they are told apart; default that which they have.
        wide: see :class:`fastroute.cascades.decision.Table`.
        base: the class whose result gave the scores; None where the image did.
    """
    pictures = sorted({c.picture for c in cells})
    tests: list[HeldOut] = []
    for fold in range(min(FOLDS, len(pictures))):
        tested = set(pictures[fold::FOLDS])
        others = [c for c in cells if c.picture not in tested]
        score = None if learn_score is None else learn_score(others)
        taught = _taught([_scored(c, score) for c in others], contexts, fidelity, wide)
        tests += [HeldOut(_scored(c, score), taught, base) for c in cells if c.picture in tested]
    margin = least_margin(tests, costs)
    plans = [_planned(test.by(replace(test.table, margin=margin)), costs) for test in tests]
    sampling = None
    if all(len(c.places) == TAUGHT for c in cells):
        margins = []
        for number in range(FEWEST, TAUGHT + 1):
            ratios = [_ratios(test, number) for test in tests]
            pairs = zip(tests, ratios, strict=True)
            margins.append(least_margin([test.by(test.table.corrected(own, 1.0)) for test, own in pairs], costs))
        nearest = torch.quantile(torch.stack([own.min() for own in ratios]), NEAREST)
        sampling = Sampling(tuple(margins), float(nearest))
        for n, (test, own) in enumerate(zip(tests, ratios, strict=True)):
            # As in a call: a crop is measured where that may pay.
            hoped = test.table.corrected(nearest.expand(len(costs) - 1), margins[-1])
            if _planned(test.by(hoped), costs, SHARE).spent < plans[n].spent:
                plans[n] = _planned(test.by(test.table.corrected(own, margins[-1])), costs, SHARE)
    spent = sum(plan.spent for plan in plans) / sum(float(test.cells.cells.areas().sum()) for test in tests)
    score = None if learn_score is None else learn_score(cells)
    table = replace(_taught([_scored(c, score) for c in cells], contexts, fidelity, wide), margin=margin, sampling=sampling)
    number = sum(c.scores.numel() for c in cells)
    reached = tuple(plan.reached for plan in plans)
    return Calibration(table, tuple(costs), len(pictures), number, fidelity, reached, spent, score, base)


def _scored(cells: Measured, score: CellScore | None) -> Measured:
    return cells if score is None else rescored(cells, score)


def _taught(cells: Sequence[Measured], contexts: Sequence[int], fidelity: float, wide: Sequence[bool]) -> Table:
    found = learn(cells, contexts)
    return Table(found.scores, found.errors, tuple(contexts), found.shares, found.inner, 1.0, fidelity, None, tuple(wide))


def _ratios(test: HeldOut, number: int) -> Tensor:  # [K - 1]
    """What `number` of the measured cells tell, those that a call would choose."""
    cells, table = test.cells, test.table
    assert cells.samples is not None  # asked before
    ranked = sorted(range(TAUGHT), key=lambda n: float(cells.scores[cells.places[n].top, cells.places[n].left]))
    chosen = [ranked[n] for n in FEWER.get(number, range(TAUGHT))]
    return ratios_of(cells.samples[:, chosen], [cells.places[n] for n in chosen], table.expected(cells.scores))


@dataclass(frozen=True)
class Planned:
    """A crop as it would be computed.

    Attributes:
        spent: cost, in pixels of the most expensive class.
        reached: dB of its result to the dense one.
        missing: by what its expected errors would have to be multiplied to be those found.
    """

    spent: float
    reached: float
    missing: float


def _planned(test: HeldOut, costs: Sequence[float], share: float = 0.0) -> Planned:
    """A crop by its table, and `share` of its dense cost for measuring it."""
    own, table = test.cells, test.table
    expected, areas = table.expected(own.scores), own.cells.areas()
    decision, target = Decision(table, base=test.base), Target(fidelity=table.fidelity)
    plan = choose(decision, target, own.cells, costs, own.scores, None, searches=test.searches)
    # What was measured of the cheaper classes, and what is expected of regions.
    found = error_of(plan, torch.cat([own.errors, expected[-1:]]), replace(table, margin=1.0), areas)
    predicted = error_of(plan, expected, table, areas)
    missing = found / predicted if predicted > 0 else 1.0
    return Planned(plan.cost + share * float(areas.sum()), -10 * math.log10(max(found, EXACT)), missing)


def least_margin(tests: Sequence[HeldOut], costs: Sequence[float]) -> float:
    """A margin at which `KEPT` of the crops keep what their tables promise, and none misses it by more than `WORST` dB.

    It begins with what `KEPT` of them would have needed, and the worst but for `WORST` dB, rises until promises are kept, since
    another margin makes another plan, and falls while they are.
    """
    fidelity = tests[0].table.fidelity

    def planned(margin: float) -> list[Planned]:
        return list(pool.map(lambda test: _planned(test.by(replace(test.table, margin=margin)), costs), tests))

    def kept(margin: float) -> bool:
        reached = [plan.reached for plan in planned(margin)]
        return sum(value >= fidelity for value in reached) >= KEPT * len(reached) and min(reached) >= fidelity - WORST

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        needed = torch.tensor([plan.missing for plan in planned(1.0)], dtype=torch.float64)
        margin = max(1.0, float(torch.quantile(needed, KEPT)), float(needed.max()) / 10 ** (WORST / 10))
        while margin < LARGEST and not kept(margin):
            margin /= LOWER**4
        while margin > 1 and kept(lower := max(margin * LOWER, 1.0)):
            margin = lower
    return margin
