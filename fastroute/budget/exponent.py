"""The exponent at which pixels keep a budget: the classes argmax(probability / cost^exponent) cost less as it grows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastroute.ops.assign_classes import BUDGET_SLACK

# The number of pixels on which the exponent is searched first. Most of the others are then classified only twice.
FIRST = 1 << 15


class Sample(NamedTuple):
    """Scores of some pixels of an image.

    Attributes:
        scores: [K - 1, n] float32, logits of all classes but the first, relative to the first one's.
        weight: number of output pixels that each of them stands for.
    """

    scores: Tensor
    weight: float


def only_class(costs: Sequence[float], most: int, pixels: int, unclassified: float, classified: float) -> int | None:
    """The class of all pixels if there is nothing to choose, else None.

    It is the most expensive class if the budget suffices for it everywhere, and the cheapest class if classifying leaves too
    little for any other.

    Args:
        costs: cost of a pixel in each class.
        most: the most expensive class.
        pixels: number of pixels.
        unclassified, classified: what all pixels together may cost if they are not classified, and if they are.
    """
    cheapest = min(range(len(costs)), key=costs.__getitem__)
    if len(costs) == 1 or unclassified >= pixels * max(costs) * (1 - BUDGET_SLACK):
        return most
    return cheapest if classified < pixels * costs[cheapest] else None


def logarithms(cost: Sequence[float]) -> list[float]:
    """Logarithms of the costs, relative to the first one's."""
    return [math.log(c / cost[0]) for c in cost]


def classes_at(scores: Tensor, penalty: float, logs: Sequence[float]) -> Tensor:  # [K - 1, n] -> uint8 [n]
    """The classes argmax(probability / cost^penalty); the lowest class wins a tie."""
    if len(logs) == 2:
        # In this order a pixel changes its class once as the exponent grows, whatever is rounded.
        return (scores[0] > penalty * logs[1]).view(torch.uint8)
    ids = torch.zeros(scores.shape[1], dtype=torch.uint8, device=scores.device)
    best = torch.zeros_like(scores[0])
    for c in range(1, len(logs)):
        value = scores[c - 1] - penalty * logs[c]
        ids.masked_fill_(value > best, c)
        best = torch.maximum(best, value)
    return ids


def spent(ids: Tensor, cost: Sequence[float]) -> float:  # [n]
    """The cost of all pixels with the classes `ids`."""
    counts = [int(torch.count_nonzero(ids if len(cost) == 2 else ids == c)) for c in range(1, len(cost))]
    return (ids.numel() - sum(counts)) * cost[0] + sum(n * c for n, c in zip(counts, cost[1:], strict=True))


def solve(samples: Sequence[Sample], cost: Sequence[float], allowed: float) -> tuple[float, float]:
    """The smallest exponent at which all pixels together cost at most `allowed`, and what they cost at this exponent.

    If even the cheapest class costs more, this is the exponent that sends everything to it.
    """
    gaps = [b - a for a, b in pairwise(sorted(set(logarithms(cost)))) if b > a]
    spread = 2 * max((max(map(abs, map(float, s.scores.aminmax()))) for s in samples), default=0.0) + 1
    # Beyond this exponent scores no longer matter.
    bound = spread / min(gaps) if gaps else 1.0
    limit = allowed * (1 + BUDGET_SLACK)
    low, high = -bound, bound
    number = sum(s.scores.shape[1] for s in samples)
    if number > FIRST:
        # An odd distance, so that columns of an image take turns.
        step = number // FIRST | 1
        few = [Sample(s.scores[:, ::step], s.weight * s.scores.shape[1] / -(-s.scores.shape[1] // step)) for s in samples]
        # The exponents at which one percent more or fewer of the pixels are expensive. The solution most likely lies between.
        margin = 0.01 * (max(cost) - min(cost)) * sum(s.weight * s.scores.shape[1] for s in samples)
        low, high = (_narrow(few, cost, limit + sign * margin, -bound, bound, bound)[0] for sign in (1, -1))
    return _narrow(samples, cost, limit, low, high, bound)


def _narrow(
    samples: Sequence[Sample], cost: Sequence[float], limit: float, low: float, high: float, bound: float
) -> tuple[float, float]:
    """Solve as :func:`solve` does, for an exponent in [-bound, bound] that most likely lies in [low, high]."""
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
        # The cost of a pixel falls as the exponent grows, so pixels whose class is the same at both ends are settled.
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
