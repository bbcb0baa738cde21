"""How a cascade chooses the class of every cell: by a table of errors, or by an order of difficulty."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastroute.cascades.cells import Score
from fastroute.cascades.plan import Plan

# Without a calibration: pixels of context, and how the expected error of a class falls from one to the next.
CONTEXT, FALL = 16, 0.1
# Cells of a picture that are measured at least, see :mod:`fastroute.cascades.samples`.
FEWEST = 3


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


def expected_errors(table: Table | None, scores: Tensor, classes: int) -> Tensor:  # [rows, cols] -> [K, rows, cols]
    """What every class is expected to err by in cells of these scores, by a table or without one."""
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
        if plan.dense:
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
