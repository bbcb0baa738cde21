"""How a cascade chooses the class of every cell: by a table of errors, or by an order of difficulty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastroute.cascades.cells import Cells, Score
from fastroute.cascades.partition import Cut, Partition, Region
from fastroute.cascades.plan import Plan, aligned, make_plan, plan_of

# Without a calibration: pixels of context, and how the expected error of a class falls from one to the next.
CONTEXT, FALL = 16, 0.1
# Cells of a picture that are measured at least, see :mod:`fastroute.cascades.samples`.
FEWEST = 3
# Prices that are tried, and the e-folds that they span; at the highest every cell is cheap.
NUMBER, RANGE = 512, 19.0
# Sums of one order and of another differ by no more than this share.
SLACK = 1e-9


@dataclass(frozen=True)
class Sampling:
    """What a promise needs where errors were corrected by measuring cells of the picture itself.

    Attributes:
        margins: by what it multiplies the corrected errors, after measuring `FEWEST` cells, one more and so on.
        least: by what the errors of pictures whose networks are nearest to each other are corrected.
    """

    margins: tuple[float, ...]
    least: float

    def margin(self, number: int) -> float:
        """That after measuring `number` cells; that of the largest number known, where they are more."""
        return self.margins[min(max(number - FEWEST, 0), len(self.margins) - 1)]


@dataclass(frozen=True)
class Table:
    """Errors against the most expensive network over the whole image, learnt from images.

    Attributes:
        scores: [bins], rising.
        errors: [K, bins], expected squared error in [0, 1] of each class in a cell of a score; of the last class that of being
            computed in regions, at the first of `contexts`.
        contexts: pixels of context that may be chosen from, rising.
        shares: of the last class's error, by context: 1 for the first.
        inner: share of that error for a cell that lies within its region.
        margin: by what a promise multiplies all errors.
        fidelity: in dB, by default.
        sampling: None where pictures are not measured.
        wide: of each cheaper class, whether it sees farther than a context reaches: computed in regions, it errs by what the
            last class does beside its own errors. Empty for none.
    """

    scores: Tensor
    errors: Tensor
    contexts: tuple[int, ...] = (CONTEXT,)
    shares: tuple[float, ...] = (1.0,)
    inner: float = 0.25
    margin: float = 1.0
    fidelity: float = 40.0
    sampling: Sampling | None = None
    wide: tuple[bool, ...] = ()

    def share(self, context: int) -> float:
        """By what the last class's error is multiplied with that context."""
        least = max(context, self.contexts[0])
        return self.shares[max(n for n, each in enumerate(self.contexts) if each <= least)]

    def corrected(self, ratios: Tensor, margin: float) -> Table:  # [K - 1]
        """The table of a picture on which the errors of the cheaper classes are `ratios` times those of others, as measured."""
        errors = torch.cat([self.errors[:-1] * ratios.to(self.errors)[:, None], self.errors[-1:]])
        return replace(self, errors=errors, margin=margin, sampling=None)

    def expected(self, scores: Tensor) -> Tensor:  # [...] -> [K, ...]
        """Errors at `scores`: linear in their logarithms between the bins, constant beyond."""
        at = scores.clamp(min=1e-3).log()
        known = self.scores.clamp(min=1e-3).log()
        right = torch.searchsorted(known, at.contiguous()).clamp(1, len(known) - 1)
        share = ((at - known[right - 1]) / (known[right] - known[right - 1]).clamp(min=1e-9)).clamp(0, 1)
        logs = self.errors.clamp(min=1e-12).log()
        return torch.lerp(logs[:, right - 1], logs[:, right], share).exp()


@dataclass(frozen=True)
class Target:
    """What one call asks for: one of a share of the dense cost, a fidelity in dB, or everything in the most expensive class.

    Attributes:
        budget, fidelity: as asked for.
        everywhere: the most expensive class everywhere.
        context: as asked for.
    """

    budget: float | None = None
    fidelity: float | None = None
    everywhere: bool = False
    context: int | None = None


@dataclass(frozen=True)
class Decision:
    """By what classes are chosen.

    Attributes:
        table: of errors; None before a calibration.
        thresholds: of scores, one less than there are classes; a cell's class is the number of those that its score exceeds.
        context: pixels, without a table.
        score: of cells; None for the strength of their edges.
        base: the class whose result is scored instead, see :func:`fastroute.cascades.output_score.strengths`.
    """

    table: Table | None = None
    thresholds: tuple[float, ...] | None = None
    context: int = CONTEXT
    score: Score | None = None
    base: int | None = None

    def target(self, classes: int, budget: float | None, fidelity: float | None, mapped: bool, context: int | None) -> Target:
        """What a call asks for.

        Raises:
            ValueError: a fidelity without a calibration, or nothing to decide by.
        """
        if fidelity is not None and self.table is None and classes > 1:
            raise ValueError("upscale: fidelity needs a calibrated cascade; calibrate it on images, or give a budget")
        if classes == 1 or budget == 1:
            return Target(everywhere=True, context=context)
        if budget is None and fidelity is None and not mapped:
            if self.table is not None:
                fidelity = self.table.fidelity
            elif self.thresholds is None:
                raise ValueError(
                    "upscale: this cascade is not calibrated and has no thresholds; give a budget, such as budget=0.5, or a "
                    "class_map"
                )
        return Target(budget, fidelity, False, context)


def choose(
    decision: Decision,
    target: Target,
    cells: Cells,
    costs: Sequence[float],
    scores: Tensor | None,  # [rows, cols]
    class_ids: Tensor | None,  # [rows, cols]
    align: int = 1,
    searches: dict[int, Search] | None = None,
) -> Plan:
    """The cheapest plan found that meets `target`.

    Args:
        decision: by what classes are chosen.
        target: of the call.
        cells: of the image.
        costs: of a pixel in each class, rising.
        scores: [rows, cols] of the cells; None where every class is known.
        class_ids: int64 [rows, cols], where they are known.
        align: contexts are rounded up to its multiples: networks that fold pixels see them as they do in the whole image.
        searches: what was found before, by the context, and is to be used again with another margin or fidelity.
    """
    context = aligned(decision.context if target.context is None else target.context, align)
    last = len(costs) - 1
    if class_ids is not None:
        return make_plan(class_ids, cells, costs, context)
    if target.everywhere or scores is None:
        return make_plan(torch.full((cells.rows, cells.cols), last), cells, costs, context)
    if target.budget is None and target.fidelity is None and decision.thresholds is not None:
        limits = torch.tensor(decision.thresholds, dtype=scores.dtype)
        return make_plan((scores[..., None] > limits).sum(-1), cells, costs, context, decision.base)
    table = decision.table
    free = table is not None and target.context is None
    contexts = [aligned(each, align) for each in table.contexts] if free and table is not None else [context]
    known = {} if searches is None else searches
    for each in contexts:
        if each not in known:
            known[each] = Search(decision, cells, costs, scores, each)
    margin = 1.0 if table is None else table.margin
    found = [known[each].found(target, margin) for each in contexts]
    if target.fidelity is not None:
        return min(found, key=lambda one: one[1].cost)[1]
    return min(found, key=lambda one: one[0])[1]


class Search:
    """Plans of an image with one context, by the price of an error.

    Args:
        decision, cells, costs, scores, context: see :func:`choose`.
    """

    def __init__(
        self,
        decision: Decision,
        cells: Cells,
        costs: Sequence[float],
        scores: Tensor,  # [rows, cols]
        context: int,
    ) -> None:
        self.table, self.cells, self.costs, self.context, self.base = decision.table, cells, costs, context, decision.base
        self.expected = _expected(self.table, scores, len(costs))
        self.areas, region = cells.areas(), None
        if self.table is not None:
            share = self.table.share(context)
            region = Region(share, share * self.table.inner, self.table.wide)
        self.partition = Partition(cells, costs, context, self.expected, region, self.base)
        self.highest = math.log(max(self.partition.largest, 1e-11)) + 1.0
        self.cuts: dict[int, Cut] = {}
        self.plans: dict[Cut, tuple[float, Plan]] = {}

    def at(self, numbers: Sequence[int]) -> list[Cut]:
        """The cuts at some of `NUMBER` prices, which rise evenly in their logarithms.

        A margin makes all errors larger, which is as if all prices were lower: the cuts are the same.
        """
        missing = [n for n in numbers if n not in self.cuts]
        if missing:
            prices = [math.exp(self.highest - RANGE * (1 - n / NUMBER)) for n in missing]
            self.cuts.update(zip(missing, self.partition.at(prices), strict=True))
        return [self.cuts[n] for n in numbers]

    def found(self, target: Target, margin: float = 1.0) -> tuple[float, Plan]:
        """The plan that meets `target`, and `margin` times its expected error."""
        everywhere = self._same(len(self.costs) - 1)
        allowed = 0.0 if target.fidelity is None else 10 ** (-target.fidelity / 10) / margin
        budget = float(target.budget or 1.0) * self.partition.area
        met: list[Cut] = []
        low, high, parts = 0, NUMBER, self.partition.together + 1
        while high - low > 1:
            numbers = sorted({low + max((high - low) * n // parts, 1) for n in range(1, parts)} - {high})
            cuts = self.at(numbers)
            if target.fidelity is not None:
                # What costs as much as the dense run is that run.
                fit = [n for n, cut in enumerate(cuts) if cut.error <= allowed or cut.cost >= everywhere.cost]
                below = max(fit, default=-1)
            else:
                fit = [n for n, cut in enumerate(cuts) if cut.cost <= budget]
                below = min(fit, default=len(cuts)) - 1
            met += [cuts[n] for n in fit]
            low, high = ([low, *numbers][below + 1], [*numbers, high][below + 1])
        if target.fidelity is not None:
            for cut in sorted(met, key=lambda cut: cut.cost):
                error, plan = self._plan(cut)
                if error <= allowed * (1 + SLACK):
                    return margin * error, min(plan, everywhere, key=lambda one: one.cost)
            return 0.0, everywhere
        error, plan = self._plan(min(met, key=lambda cut: cut.error)) if met else self._with_error(self._same(0))
        return margin * error, plan

    def _same(self, k: int) -> Plan:
        """The plan of class `k` everywhere."""
        class_ids = torch.full((self.cells.rows, self.cells.cols), k)
        return make_plan(class_ids, self.cells, self.costs, self.context, self.base)

    def _plan(self, cut: Cut) -> tuple[float, Plan]:
        if cut not in self.plans:
            self.plans[cut] = self._with_error(plan_of(cut, self.cells, self.costs, self.context, self.base))
        return self.plans[cut]

    def _with_error(self, plan: Plan) -> tuple[float, Plan]:
        table = None if self.table is None else replace(self.table, margin=1.0)
        return error_of(plan, self.expected, table, self.areas), plan


def _expected(table: Table | None, scores: Tensor, classes: int) -> Tensor:  # [rows, cols] -> [K, rows, cols]
    if table is not None:
        return table.expected(scores)
    # An error that grows as the square of the score, as that of interpolation does, and falls from class to class.
    own = (scores.clamp(min=0.01) / 255).square()
    falls = torch.tensor([FALL**k for k in range(classes - 1)] + [0.0], dtype=own.dtype)
    return own * falls[:, None, None]


def error_of(plan: Plan, expected: Tensor, table: Table | None, areas: Tensor) -> float:  # [K, rows, cols], [rows, cols]
    """The mean squared error that is expected of a plan."""
    classes = plan.class_ids
    own = expected.gather(0, classes[None])[0]
    last = len(expected) - 1
    if table is not None and last > 0:
        heavy = classes == last
        if bool(heavy.all()) and plan.regions[last] == (plan.cells.whole,):
            return 0.0
        own = torch.where(heavy, own * region_shares(plan, table, last), own)
        for k in (k for k, wide in enumerate(table.wide) if wide):
            own = torch.where(classes == k, own + expected[last] * region_shares(plan, table, k), own)
        own = own * table.margin
    return float((own * areas).sum() / areas.sum())


def region_shares(plan: Plan, table: Table, k: int) -> Tensor:  # [rows, cols]
    """By what the error of being computed in the regions of class `k` is multiplied in every cell of these.

    Less with more context, and far from a border; 0 where one region is the whole image.
    """
    shares = torch.zeros_like(plan.class_ids, dtype=torch.float64)
    if plan.regions[k] == (plan.cells.whole,):
        return shares
    share = table.share(plan.context)
    rows, cols = shares.shape
    for region in plan.regions[k]:
        # Cells along a border that is not the image's see least of what lies beyond.
        inside = torch.full((region.bottom - region.top, region.right - region.left), share * table.inner, dtype=torch.float64)
        if region.top > 0:
            inside[0] = share
        if region.bottom < rows:
            inside[-1] = share
        if region.left > 0:
            inside[:, 0] = share
        if region.right < cols:
            inside[:, -1] = share
        place = shares[region.top : region.bottom, region.left : region.right]
        place.copy_(torch.where(place > 0, torch.minimum(place, inside), inside))
    return shares
