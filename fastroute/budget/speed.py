"""How fast a router is on a device: measured once, remembered, and corrected by what later calls take."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

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

CACHE = JsonCache("speed.json")


@dataclass
class Speed:
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


class Speeds:
    """The speed of a router at every place that it has met: what decides it, and may differ from call to call."""

    def __init__(self) -> None:
        self.known: dict[tuple[object, ...], Speed] = {}
        self._measured: dict[int, Speed] = {}

    def find(
        self, place: tuple[object, ...], num_classes: int, facts: Callable[[], Sequence[object]], measure: Callable[[], Speed]
    ) -> Speed:
        """The speed at `place`; on the first call what is remembered of such a router, else measured and then remembered.

        Args:
            facts: what decides the speed, by which it is remembered.
        """
        if place not in self.known:
            key = speed_key(facts())
            speed = recall(key, num_classes)
            if speed is None:
                logger.info(MEASURING)
                speed = remember(key, measure())
            self.known[place] = speed
            self._measured[id(speed)] = replace(speed, branches=list(speed.branches))
        return self.known[place]

    def measured(self, speed: Speed) -> Speed:
        """What `speed` was before it learned: one slow run must not make the next ones impossible."""
        return self._measured.get(id(speed), speed)


def noise(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A picture of noise of `dtype`, on which speeds are measured."""
    image = torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    if not dtype.is_floating_point:
        image = (image * (255 if dtype == torch.uint8 else 65535)).int()
    return image.to(device, dtype)


def speed_key(facts: Sequence[object]) -> str:
    """A name for what decides the speed: networks, sizes, device."""
    return hashlib.sha256(json.dumps([torch.__version__, *map(str, facts)]).encode()).hexdigest()[:24]


def recall(key: str, num_classes: int) -> Speed | None:
    """What is remembered of this machine under `key`."""
    entry = CACHE.read().get(key)
    if entry is None or set(entry) != set(Speed.__dataclass_fields__) or not isinstance(entry["branches"], list):
        return None
    branches, others = entry["branches"], [entry[name] for name in entry if name != "branches"]
    sound = len(branches) == num_classes and all(map(_is_time, branches))
    return Speed(**entry) if sound and all(x == 0 or _is_time(x) for x in others) else None


def _is_time(value: object) -> bool:
    """Whether these can be milliseconds per patch or pixel; sums and products of them are then finite numbers too."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and PLAUSIBLE[0] <= value <= PLAUSIBLE[1]


def remember(key: str, speed: Speed) -> Speed:
    """Keep `speed` for later processes; returns it."""
    CACHE.remember(key, asdict(speed))
    return speed
