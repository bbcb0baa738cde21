"""Budgets in FLOPs and in milliseconds: what a patch costs here, and the classes that fit."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from fastroute._arguments import LARGEST_EXPONENT, real
from fastroute.ops.assign_classes import assign_classes
from fastroute.runtime.json_cache import JsonCache

logger = logging.getLogger("fastroute")

# Share of the newest run in what is known of the speed: the machine may have become slower or faster.
NEWEST = 0.5
# Told before a speed is measured, which takes seconds, or minutes on a slow device.
MEASURING = "measuring how fast this device is, once for each model and type of image"
# Runs of which the median counts, where a speed is measured.
RUNS = 3
# Times that a run may take as long as expected before the excess is ignored: what else the machine does only adds time.
SLOWEST = 2.0
# Patches of a class from which its own time counts for more than that of all classes.
FEW = 16
# Milliseconds per patch or pixel of which no machine takes less, or more.
PLAUSIBLE = (1e-15, 1e9)

CACHE = JsonCache("pace.json")


@dataclass(frozen=True)
class Budget:
    """What the classes of one call may cost; at most one of the three.

    Attributes:
        fraction: mean cost as a fraction of the dearest class's.
        flops: floating-point operations of the whole call, classifier included.
        ms: milliseconds of the whole call.
    """

    fraction: float | None = None
    flops: float | None = None
    ms: float | None = None

    def __post_init__(self) -> None:
        # An integer may be larger than any float, of which messages and products are made.
        for name, value in vars(self).items():
            if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**1000:
                object.__setattr__(self, name, math.inf if value > 0 else -math.inf)

    @property
    def given(self) -> list[str]:
        """The names of those that are given."""
        values = {"budget": self.fraction, "budget_flops": self.flops, "budget_ms": self.ms}
        return [name for name, value in values.items() if value is not None]

    def check(self, op: str, penalty: float = 0.0) -> None:
        """At most one is given, FLOPs and milliseconds positive.

        Raises:
            ValueError: otherwise.
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
    """An impossible budget.

    Args:
        asked: what was asked for.
        least: what everything in the cheapest class takes.
        text: `least` with its unit.

    Raises:
        ValueError: `asked` is less.
    """
    if asked < least:
        raise ValueError(f"{op}: {name} must be at least {text}, with everything in the cheapest class; got {asked:g}")


def check_possible(costs: Sequence[float], fraction: float | None, penalty: float = 0.0) -> None:
    """Refuse costs, a budget or a penalty that no classes can keep, before anything is classified.

    Raises:
        ValueError: as :func:`fastroute.assign_classes` says.
    """
    assign_classes(torch.ones(1, len(costs), dtype=torch.float32), costs, penalty, fraction)


def dearest(costs: Sequence[float]) -> int:
    """The class that costs most; of several alike the last, since classes go from the cheapest to the dearest."""
    return max(range(len(costs)), key=lambda c: (costs[c], c))


def assign_within(score: Tensor, costs: Sequence[float], allowed: float) -> Tensor:  # [N, K] -> [N]
    """Classes whose costs sum to at most `allowed`, spent where the scores gain most; the cheapest where that is too little."""
    most, number = max(costs), max(score.shape[0], 1)
    share = min(max(allowed / (number * most), min(costs) / most), 1.0)
    return assign_classes(score, costs, budget=share)


@dataclass
class Pace:
    """Milliseconds of one patch, or of one output pixel, by what is done with it.

    Attributes:
        branches: in each branch or upsampler.
        classify: in the classifier.
        rest: in everything else: cutting, sorting, merging.
        encode: of one pixel of the image, in the encoder of a pixel router.
        solve: of one pixel of a sample, to find the exponent of the cost.
    """

    branches: list[float]
    classify: float
    rest: float
    encode: float = 0.0
    solve: float = 0.0

    def fixed(self, number: int) -> float:
        """Of `number` patches, whatever their classes."""
        return number * (self.classify + self.rest)

    def learn(
        self, counts: Sequence[float], branches: Sequence[float] | float, classify: float | None, rest: float,
        encode: float = 0.0, encoded: int = 0, solve: float = 0.0, searched: int = 0, number: int | None = None,
    ) -> None:  # fmt: skip
        """Move towards a run that was measured.

        Args:
            counts: patches or pixels per class; regions of patches count by their area.
            branches: seconds in each branch, or in all together.
            classify: seconds in the classifier; None when it did not run.
            rest: seconds in everything else.
            encode: seconds in the encoder.
            encoded: pixels that passed it.
            solve: seconds that the exponent took.
            searched: pixels on which it was found.
            number: of patches, where `counts` do not tell.
        """
        total, expected = number or sum(counts), sum(n * ms for n, ms in zip(counts, self.branches, strict=True))
        if not total:
            return

        def moved(known: float, seconds: float, count: float) -> float:
            taken = 1e3 * seconds / count
            return (1 - NEWEST) * known + NEWEST * (min(taken, SLOWEST * known) if known else taken)

        apart = None if isinstance(branches, float) else branches
        overall = 1e3 * (branches if isinstance(branches, float) else sum(branches)) / expected
        for c, count in enumerate(counts):
            # A class of a few patches says little about its own speed: then that of all classes counts.
            trust = count / (count + FEW) if apart is not None else 0.0
            own = 1e3 * apart[c] / (count * self.branches[c]) if apart is not None and count else 0.0
            self.branches[c] *= 1 - NEWEST + NEWEST * min(trust * own + (1 - trust) * overall, SLOWEST)
        self.rest = moved(self.rest, rest, total)
        if classify is not None:
            self.classify = moved(self.classify, classify, total)
        if encoded:
            self.encode = moved(self.encode, encode, encoded)
        if searched:
            self.solve = moved(self.solve, solve, searched)


class Paces:
    """The speed of a router at every place that it has met: what decides it, and may differ from call to call."""

    def __init__(self) -> None:
        self.known: dict[tuple[object, ...], Pace] = {}
        self._measured: dict[int, Pace] = {}

    def find(
        self, place: tuple[object, ...], num_classes: int, facts: Callable[[], Sequence[object]], measure: Callable[[], Pace]
    ) -> Pace:
        """The pace at `place`; on the first call what is remembered of such a router, else measured and then remembered.

        Args:
            facts: what decides the speed, by which it is remembered.
        """
        if place not in self.known:
            key = pace_key(facts())
            pace = recall(key, num_classes)
            if pace is None:
                logger.info(MEASURING)
                pace = remember(key, measure())
            self.known[place] = pace
            self._measured[id(pace)] = replace(pace, branches=list(pace.branches))
        return self.known[place]

    def measured(self, pace: Pace) -> Pace:
        """What `pace` was before it learned: one slow run must not make the next ones impossible."""
        return self._measured.get(id(pace), pace)


def duration(ms: float) -> str:
    """Milliseconds as messages name them."""
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.3g} ms"


def noise(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A picture of noise of `dtype`, on which speeds are measured."""
    image = torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    if not dtype.is_floating_point:
        image = (image * (255 if dtype == torch.uint8 else 65535)).int()
    return image.to(device, dtype)


def pace_key(facts: Sequence[object]) -> str:
    """A name for what decides the speed: networks, sizes, device."""
    return hashlib.sha256(json.dumps([torch.__version__, *map(str, facts)]).encode()).hexdigest()[:24]


def recall(key: str, num_classes: int) -> Pace | None:
    """What is remembered of this machine under `key`."""
    entry = CACHE.read().get(key)
    if entry is None or set(entry) != set(Pace.__dataclass_fields__) or not isinstance(entry["branches"], list):
        return None
    branches, others = entry["branches"], [entry[name] for name in entry if name != "branches"]
    sound = len(branches) == num_classes and all(map(_is_time, branches))
    return Pace(**entry) if sound and all(x == 0 or _is_time(x) for x in others) else None


def _is_time(value: object) -> bool:
    """Whether these can be milliseconds per patch or pixel; sums and products of them are then finite numbers too."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and PLAUSIBLE[0] <= value <= PLAUSIBLE[1]


def remember(key: str, pace: Pace) -> Pace:
    """Keep `pace` for later processes; returns it."""
    CACHE.remember(key, asdict(pace))
    return pace
