"""One budget over the pixels of a call, or of several: what a class costs, what may be spent, and the exponent that fits.

The images of a budget are looked at first, all but the one that comes next, on a sample of rows. The one that comes next is
classified whole where it is small, else on more rows. Then the smallest exponent of the cost is taken at which the pixels of
all images to come are within what is left; so what an image spent more or less than its sample said is made good by the next.
The last bands of an image are held to what is left: a budget is never overdrawn.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastroute.budget.limits import Pace
from fastroute.pixel.pixel_stats import Work
from fastroute.reference.assign_classes import BUDGET_SLACK

# Pixels on which the exponent is searched first, so that of all others only those near it are looked at more than twice.
FIRST = 1 << 15


class Sample(NamedTuple):
    """Scores of some pixels of an image.

    Attributes:
        scores: [K - 1, n] float32, logits of all classes but the first, relative to the first one's.
        weight: pixels of the output that each stands for.
    """

    scores: Tensor
    weight: float


@dataclass(frozen=True)
class Ahead:
    """An image that has not begun.

    Attributes:
        number: which of the budget's.
        work: what is yet to do.
        sample: of its pixels.
    """

    number: int
    work: Work
    sample: Sample

    @property
    def whole(self) -> bool:
        """Whether all pixels are in the sample, so that it need not be classified again."""
        return self.sample.scores.shape[1] == self.work.pixels


@dataclass
class Purse:
    """What the pixels of some images may cost.

    Attributes:
        cost: of a pixel in each class: a share, FLOPs or milliseconds.
        left: for the pixels that have no class yet; of milliseconds, known when an image begins.
        pace: of milliseconds, what all else takes.
        total, before: milliseconds of all images, and those that earlier calls took.
        ahead: the images to come.
        pixels: those that have no class yet, from the first search on.
        mean: what they cost on average by their samples.
        searched: pixels on which exponents were found.
    """

    cost: list[float]
    left: float = 0.0
    pace: Pace | None = None
    total: float = 0.0
    before: float = 0.0
    ahead: list[Ahead] = field(default_factory=list)
    pixels: int = 0
    mean: float = 0.0
    searched: int = 0

    def begin(self, number: int) -> Sample | None:
        """Image `number` is the next, and those before it that failed are passed over; its sample where that is all of it."""
        whole = [image.sample for image in self.ahead if image.number == number and image.whole]
        self.ahead = [image for image in self.ahead if image.number > number]
        return whole[0] if whole else None

    def solve(self, sample: Sample, work: Work, elapsed: float) -> float:
        """The exponent for the image that has begun.

        Args:
            sample: of its pixels.
            work: what is yet to do for it.
            elapsed: milliseconds since the call began.
        """
        ahead = (dataclasses.replace(image.work, classified=0) if image.whole else image.work for image in self.ahead)
        rest = sum(ahead, start=work)
        samples = [sample, *(image.sample for image in self.ahead)]
        searched = sum(s.scores.shape[1] for s in samples)
        if self.pace is not None:
            # This search is yet to be made too.
            self.left = self.total - self.before - elapsed - fixed_ms(self.pace, rest) - self.pace.solve * searched
        self.searched += searched
        penalty, cost = solve(samples, self.cost, self.left)
        self.pixels, self.mean = rest.pixels, cost / max(rest.pixels, 1)
        return penalty

    def tight(self, pixels: int) -> bool:
        """Whether so many pixels more, at their dearest, would leave too little for the others at their cheapest."""
        return self.left - pixels * max(self.cost) < (self.pixels - pixels) * min(self.cost)

    def take(self, scores: Tensor, penalty: float, reserve: float) -> Tensor:  # [K - 1, n] -> uint8 [n]
        """Classes of the next pixels at the exponent `penalty`, or at a larger one where they would cost too much.

        Args:
            reserve: what each of the pixels that follow keeps.
        """
        logs, number = logarithms(self.cost), scores.shape[1]
        allowed = max(self.left - (self.pixels - number) * reserve, number * min(self.cost))
        ids = classes_at(scores, penalty, logs)
        if spent(ids, self.cost) > allowed * (1 + BUDGET_SLACK):
            penalty = solve([Sample(scores, 1.0)], self.cost, allowed)[0]
            ids = classes_at(scores, penalty, logs)
        self.spend(ids)
        return ids

    def spend(self, ids: Tensor) -> None:
        """These pixels have their classes."""
        self.left -= spent(ids, self.cost)
        self.pixels -= ids.numel()


def fixed_ms(pace: Pace, work: Work) -> float:
    """Milliseconds of all but the pixels in their upsamplers."""
    return pace.encode * work.encoded + pace.classify * work.classified + pace.rest * work.pixels


def only_class(costs: Sequence[float], most: int, pixels: int, unclassified: float, classified: float) -> int | None:
    """The class of all pixels where there is nothing to choose: the dearest where all may have any, the cheapest where
    classifying leaves too little for more; else None.

    Args:
        most: the dearest class.
        unclassified, classified: what the pixels may cost where they are not classified, and where they are.
    """
    cheapest = min(range(len(costs)), key=costs.__getitem__)
    if len(costs) == 1 or unclassified >= pixels * max(costs) * (1 - BUDGET_SLACK):
        return most
    return cheapest if classified < pixels * costs[cheapest] else None


def logarithms(cost: Sequence[float]) -> list[float]:
    """Logarithms of the costs, relative to the first one's."""
    return [math.log(c / cost[0]) for c in cost]


def classes_at(scores: Tensor, penalty: float, logs: Sequence[float]) -> Tensor:  # [K - 1, n] -> uint8 [n]
    """argmax of probability / cost^penalty, the lowest class on a tie."""
    if len(logs) == 2:
        # So a pixel changes once as the exponent grows, whatever is rounded.
        return (scores[0] > penalty * logs[1]).view(torch.uint8)
    ids = torch.zeros(scores.shape[1], dtype=torch.uint8, device=scores.device)
    best = torch.zeros_like(scores[0])
    for c in range(1, len(logs)):
        value = scores[c - 1] - penalty * logs[c]
        ids.masked_fill_(value > best, c)
        best = torch.maximum(best, value)
    return ids


def spent(ids: Tensor, cost: Sequence[float]) -> float:
    """What pixels of these classes cost."""
    counts = [int(torch.count_nonzero(ids if len(cost) == 2 else ids == c)) for c in range(1, len(cost))]
    return (ids.numel() - sum(counts)) * cost[0] + sum(n * c for n, c in zip(counts, cost[1:], strict=True))


def solve(samples: Sequence[Sample], cost: Sequence[float], allowed: float) -> tuple[float, float]:
    """The smallest exponent at which the pixels cost at most `allowed` together, and what they cost then.

    Where not even the cheapest class is so cheap, the exponent that sends everything there.
    """
    gaps = [b - a for a, b in pairwise(sorted(set(logarithms(cost)))) if b > a]
    spread = 2 * max((max(map(abs, map(float, s.scores.aminmax()))) for s in samples), default=0.0) + 1
    # Exponents at which no score counts any more.
    bound = spread / min(gaps) if gaps else 1.0
    limit = allowed * (1 + BUDGET_SLACK)
    low, high = -bound, bound
    number = sum(s.scores.shape[1] for s in samples)
    if number > FIRST:
        # An odd distance, so that columns of an image take turns.
        step = number // FIRST | 1
        few = [Sample(s.scores[:, ::step], s.weight * s.scores.shape[1] / -(-s.scores.shape[1] // step)) for s in samples]
        # Where a hundredth of the pixels more or fewer were dear; most likely the exponent lies between.
        margin = 0.01 * (max(cost) - min(cost)) * sum(s.weight * s.scores.shape[1] for s in samples)
        low, high = (_narrow(few, cost, limit + sign * margin, -bound, bound, bound)[0] for sign in (1, -1))
    return _narrow(samples, cost, limit, low, high, bound)


def _narrow(
    samples: Sequence[Sample], cost: Sequence[float], limit: float, low: float, high: float, bound: float
) -> tuple[float, float]:
    """See `solve`; the exponent lies in [-bound, bound], and most likely in [low, high]."""
    logs = logarithms(cost)

    def at(parts: Sequence[Sample], penalty: float) -> tuple[list[Tensor], float]:
        ids = [classes_at(part.scores, penalty, logs) for part in parts]
        return ids, sum(part.weight * spent(i, cost) for part, i in zip(parts, ids, strict=True))

    width = max(high - low, 1e-6 * bound)
    at_low, at_high = at(samples, low), at(samples, high)
    while at_low[1] <= limit and low > -bound:
        high, at_high, width = low, at_low, 4 * width
        low = max(low - width, -bound)
        at_low = at(samples, low)
    while at_high[1] > limit and high < bound:
        low, at_low, width = high, at_high, 4 * width
        high = min(high + width, bound)
        at_high = at(samples, high)
    if at_low[1] <= limit:
        return low, at_low[1]
    if at_high[1] > limit:
        return high, at_high[1]
    ids_low, (ids_high, cost_high) = at_low[0], at_high
    while (middle := 0.5 * (low + high)) not in (low, high) and high - low > 1e-9 * bound:
        # The cost of a pixel falls as the exponent grows: where both ends agree, it is settled.
        differs = [a != b for a, b in zip(ids_low, ids_high, strict=True)]
        samples = [Sample(s.scores[:, d], s.weight) for s, d in zip(samples, differs, strict=True)]
        ids_low, ids_high = ([i[d] for i, d in zip(ids, differs, strict=True)] for ids in (ids_low, ids_high))
        settled = cost_high - sum(s.weight * spent(i, cost) for s, i in zip(samples, ids_high, strict=True))
        ids, price = at(samples, middle)
        if settled + price <= limit:
            high, ids_high, cost_high = middle, ids, settled + price
        else:
            low, ids_low = middle, ids
    return high, cost_high
