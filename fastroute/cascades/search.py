"""The cheapest plan that meets what a call asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from fastroute.cascades.cells import Cells
from fastroute.cascades.decision import Decision, Target, error_of, expected_errors
from fastroute.cascades.partition import EXACT, Cut, Partition, Region
from fastroute.cascades.plan import Plan, aligned, make_plan, plan_of

# Prices that are tried, and the e-folds that they span; at the highest every cell is cheap.
NUMBER, RANGE = 512, 19.0
# A plan that errs by no more than this share of what is allowed, or takes no more than this share of a budget, may be far from
# the best.
TIGHT = 0.9
# Sums of one order and of another differ by no more than this share.
SLACK = 1e-9


def choose(
    decision: Decision,
    target: Target,
    cells: Cells,
    costs: Sequence[float],
    scores: Tensor | None,  # [rows, cols]
    class_ids: Tensor | None,  # [rows, cols]
    align: int = 1,
    searches: dict[int, Search] | None = None,
    coarse: bool = False,
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
        coarse: whether the best cut will do: a plan that costs somewhat more, in a quarter of the time.
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
    found = [known[each].found(target, margin, coarse) for each in contexts]
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
        self.expected = expected_errors(self.table, scores, len(costs))
        self.areas, region = cells.areas(), EXACT
        if self.table is not None:
            share = self.table.share(context)
            region = Region(share, share * self.table.inner, self.table.wide)
        self.partition = Partition(cells, costs, context, self.expected, region, self.base)
        self.highest = math.log(max(self.partition.largest, 1e-11)) + 1.0
        self.cuts: dict[int, Cut] = {}
        self.plans: dict[Cut, tuple[float, Plan]] = {}
        self.apart: dict[int, tuple[float, Plan]] = {}

    @cached_property
    def gains(self) -> Tensor:  # [rows, cols]
        """What the last class is better by in every cell than the lowest one."""
        return self.expected[self.partition.lowest] - self.expected[-1]

    @cached_property
    def order(self) -> Tensor:  # [rows * cols]
        """The cells from the one that gains most on."""
        return self.gains.flatten().argsort(descending=True, stable=True)

    def at(self, numbers: Sequence[int]) -> list[Cut]:
        """The cuts at some of `NUMBER` prices, which rise evenly in their logarithms.

        A margin makes all errors larger, which is as if all prices were lower: the cuts are the same.
        """
        missing = [n for n in numbers if n not in self.cuts]
        if missing:
            prices = [math.exp(self.highest - RANGE * (1 - n / NUMBER)) for n in missing]
            self.cuts.update(zip(missing, self.partition.at(prices), strict=True))
        return [self.cuts[n] for n in numbers]

    def found(self, target: Target, margin: float = 1.0, coarse: bool = False) -> tuple[float, Plan]:
        """The plan that meets `target`, and `margin` times its expected error; `coarse`: among cuts alone."""
        if target.fidelity is not None:
            allowed = 10 ** (-target.fidelity / 10) / margin
            error, plan = self._near(allowed)
            if error < TIGHT * allowed and not coarse:
                error, plan = min([(error, plan), *self._fewest(allowed)], key=lambda one: one[1].cost)
        else:
            budget = float(target.budget or 1.0) * self.partition.area
            error, plan = self._within(budget)
            if plan.cost < TIGHT * budget and not coarse:
                error, plan = min([(error, plan), *self._most(budget)], key=lambda one: one[0])
        return margin * error, plan

    def _near(self, allowed: float) -> tuple[float, Plan]:
        """The cheapest cut with an error of at most `allowed`."""
        dense, met = self._same(len(self.costs) - 1), list[Cut]()

        def far(cuts: Sequence[Cut]) -> list[bool]:
            # What costs as much as the dense run is that run.
            near = [cut.error <= allowed or cut.cost >= dense.cost for cut in cuts]
            met.extend(cut for cut, is_near in zip(cuts, near, strict=True) if is_near)
            return [not is_near for is_near in near]

        self._search(far)
        for cut in sorted(met, key=lambda cut: cut.cost):
            error, plan = self._plan(cut)
            if error <= allowed * (1 + SLACK) and plan.cost <= dense.cost:
                return error, plan
        return 0.0, dense

    def _within(self, budget: float) -> tuple[float, Plan]:
        """The cut of the least error that costs at most `budget`; the cheapest plan where none does."""
        met = list[Cut]()

        def cheap(cuts: Sequence[Cut]) -> list[bool]:
            found = [cut.cost <= budget for cut in cuts]
            met.extend(cut for cut, is_cheap in zip(cuts, found, strict=True) if is_cheap)
            return found

        self._search(cheap)
        return self._plan(min(met, key=lambda cut: cut.error)) if met else self._with_error(self._same(0))

    def _search(self, beyond: Callable[[Sequence[Cut]], list[bool]]) -> None:
        """Look for the lowest of all prices whose cut is `beyond` what is asked for, as those of all higher prices are."""
        low, high, parts = 0, NUMBER, self.partition.together + 1
        while high - low > 1:
            numbers = sorted({low + max((high - low) * n // parts, 1) for n in range(1, parts)} - {high})
            found = beyond(self.at(numbers))
            first = len(found) - found[::-1].index(False) if False in found else 0
            low, high = [low, *numbers][first], [*numbers, high][first]

    def _fewest(self, allowed: float) -> list[tuple[float, Plan]]:
        """The plan of the fewest cells in the last class with an error of at most `allowed`, decided cell by cell.

        Cuts leave gaps: often none lies between a cheap one that is a little too far off and one that is much nearer.
        """
        low, high = 0, self.partition.errors[0].size
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.cell_by_cell(middle)[0] <= allowed else (middle + 1, high)
        found = self.cell_by_cell(low)
        return [found] if found[0] <= allowed else []

    def _most(self, budget: float) -> list[tuple[float, Plan]]:
        """The plan of the most cells in the last class that costs at most `budget`, decided cell by cell."""
        low, high = 0, self.partition.errors[0].size
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.cell_by_cell(middle)[1].cost <= budget else (low, middle - 1)
        found = self.cell_by_cell(low)
        return [found] if found[1].cost <= budget else []

    def cell_by_cell(self, number: int) -> tuple[float, Plan]:
        """A plan with the last class for the `number` cells that gain most by it, and its error."""
        if number not in self.apart:
            lowest, last = self.partition.lowest, len(self.costs) - 1
            gains, order = self.gains, self.order
            shares = torch.tensor(self.partition.shares, dtype=gains.dtype)
            # What an error is worth there is what the others decide by.
            price = float(gains.flatten()[order[min(number, len(order) - 1)]].clamp(min=0)) / max(
                1 - float(shares[lowest]), 1e-9
            )
            values = self.expected[lowest:last] + price * shares[lowest:last, None, None]
            class_ids = (lowest + values.argmin(dim=0)).flatten()
            class_ids[order[:number]] = last
            plan = make_plan(class_ids.view_as(gains), self.cells, self.costs, self.context, self.base)
            self.apart[number] = self._with_error(plan)
        return self.apart[number]

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
