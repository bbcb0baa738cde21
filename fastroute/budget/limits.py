"""Budgets as a fraction, in FLOPs and in milliseconds: what a call may spend, and the classes that fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastroute._arguments import LARGEST_EXPONENT, real
from fastroute.ops.assign_classes import assign_classes


@dataclass(frozen=True)
class Budget:
    """What the classes of one call may cost. At most one of the three is given.

    Attributes:
        fraction: mean cost as a fraction of the most expensive class's.
        flops: floating-point operations of the whole call, classifier included.
        ms: milliseconds of the whole call.
    """

    fraction: float | None = None
    flops: float | None = None
    ms: float | None = None

    def __post_init__(self) -> None:
        # An integer may be larger than any float, but messages and products need floats.
        for name, value in vars(self).items():
            if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**1000:
                object.__setattr__(self, name, math.inf if value > 0 else -math.inf)

    @property
    def given(self) -> list[str]:
        """The names of the limits that are given."""
        values = {"budget": self.fraction, "budget_flops": self.flops, "budget_ms": self.ms}
        return [name for name, value in values.items() if value is not None]

    def check(self, op: str, penalty: float = 0.0) -> None:
        """Check that at most one limit is given, and that FLOPs and milliseconds are positive.

        Raises:
            ValueError: this does not hold.
        """
        given = {"budget": self.fraction, "budget_flops": self.flops, "budget_ms": self.ms}
        used = {name: real(op, name, value) for name, value in given.items() if value is not None}
        real(op, "penalty", penalty, LARGEST_EXPONENT)
        if len(used) > 1:
            raise ValueError(f"{op}: give one of budget, budget_flops and budget_ms; got {', '.join(used)}")
        if penalty != 0 and (self.flops is not None or self.ms is not None):
            raise ValueError(f"{op}: give either penalty or a budget; got penalty={penalty} and {', '.join(used)}")
        for name, value in used.items():
            if name != "budget" and not 0 < value < math.inf:
                raise ValueError(f"{op}: {name} must be positive and finite; got {value}")


def refuse_below(op: str, name: str, asked: float, least: float, text: str) -> None:
    """Refuse a budget that cannot be kept.

    Args:
        op: the function that the user called.
        name: name of the argument.
        asked: the budget.
        least: what everything in the cheapest class takes.
        text: `least` with its unit.

    Raises:
        ValueError: `asked` is less than `least`.
    """
    if asked < least:
        raise ValueError(f"{op}: {name} must be at least {text}, with everything in the cheapest class; got {asked:g}")


def check_possible(costs: Sequence[float], fraction: float | None, penalty: float = 0.0) -> None:
    """Refuse invalid costs, and a budget or penalty that cannot be kept, before anything is classified.

    Raises:
        ValueError: see :func:`fastroute.assign_classes`.
    """
    assign_classes(torch.ones(1, len(costs), dtype=torch.float32), costs, penalty, fraction)


def most_expensive(costs: Sequence[float]) -> int:
    """The most expensive class; the last one of several that cost the same, because classes are ordered by cost."""
    return max(range(len(costs)), key=lambda c: (costs[c], c))


def assign_within(score: Tensor, costs: Sequence[float], allowed: float) -> Tensor:  # [N, K] -> [N]
    """Classes that together cost at most `allowed`, spent where scores gain most; all the cheapest if that is too little."""
    return assign_classes(score, costs, budget=affordable_share(costs, allowed, score.shape[0]))


def affordable_share(costs: Sequence[float], allowed: float, number: int) -> float:
    """The mean cost of `number` items that cost `allowed` together, as a fraction of the most expensive class's.

    It is at least that of the cheapest class, and at most 1.
    """
    most = max(costs)
    return min(max(allowed / (max(number, 1) * most), min(costs) / most), 1.0)


def duration(ms: float) -> str:
    """Milliseconds as text for messages."""
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.3g} ms"
