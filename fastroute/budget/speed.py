"""The speed of a router on a device: measured once, remembered, and corrected by the times of later calls."""

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

# Weight of the newest run in the estimate of the speed, because the machine may have become slower or faster.
NEWEST = 0.5
# Logged before a speed is measured, which takes seconds, or minutes on a slow device.
MEASURING = "measuring how fast this device is, once for each model and type of image"
# Number of runs in a measurement, of which the median counts.
RUNS = 3
# A run counts as at most this many times as long as expected: other work on the machine only ever adds time.
SLOWEST = 2.0
# From this many patches on, the time of a class itself counts for more than the time of all classes.
FEW = 16
# No machine takes less or more milliseconds per patch or pixel than these.
PLAUSIBLE = (1e-15, 1e9)

CACHE = JsonCache("speed.json")


@dataclass
class Speed:
    """The milliseconds that one patch or output pixel takes in each part of the work.

    Attributes:
        branches: time in each branch or upsampler.
        classify: time in the classifier.
        rest: time in everything else: cutting, sorting, merging.
        encode: time of one pixel of the image in the encoder of a pixel router.
        solve: time of one pixel of a sample in the search for the exponent of the cost.
    """

    branches: list[float]
    classify: float
    rest: float
    encode: float = 0.0
    solve: float = 0.0

    def fixed(self, number: int) -> float:
        """The milliseconds of `number` patches that do not depend on their classes."""
        return number * (self.classify + self.rest)

    def learn(
        self, counts: Sequence[float], branches: Sequence[float] | float, classify: float | None, rest: float,
        encode: float = 0.0, encoded: int = 0, solve: float = 0.0, searched: int = 0, number: int | None = None,
    ) -> None:  # fmt: skip
        """Move the estimate towards a measured run.

        Args:
            counts: number of patches or pixels per class. Regions of patches count by their area.
            branches: seconds in each branch, or in all of them together.
            classify: seconds in the classifier, or None if it did not run.
            rest: seconds in everything else.
            encode: seconds in the encoder.
            encoded: number of pixels that passed the encoder.
            solve: seconds of the search for the exponent.
            searched: number of pixels on which the exponent was found.
            number: number of patches, if it is not the sum of `counts`.
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
            # A few patches of a class say little about its speed, so the time of all classes counts instead.
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
    """The speeds of a router, one for every combination of what decides the speed and may differ from call to call."""

    def __init__(self) -> None:
        self.known: dict[tuple[object, ...], Speed] = {}
        self._measured: dict[int, Speed] = {}

    def find(
        self, place: tuple[object, ...], num_classes: int, facts: Callable[[], Sequence[object]], measure: Callable[[], Speed]
    ) -> Speed:
        """The speed at `place`. The first call takes it from the cache, or measures it and stores it there.

        Args:
            place: the combination.
            num_classes: number of classes of the router.
            facts: returns everything that decides the speed, which makes the key in the cache.
            measure: measures the speed.
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
        """The measured `speed`, before it was corrected: one slow run must not make the next ones impossible."""
        return self._measured.get(id(speed), speed)


def noise(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A picture of noise with type `dtype`, on which speeds are measured."""
    image = torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    if not dtype.is_floating_point:
        image = (image * (255 if dtype == torch.uint8 else 65535)).int()
    return image.to(device, dtype)


def speed_key(facts: Sequence[object]) -> str:
    """A key for everything that decides the speed: networks, sizes, device."""
    return hashlib.sha256(json.dumps([torch.__version__, *map(str, facts)]).encode()).hexdigest()[:24]


def recall(key: str, num_classes: int) -> Speed | None:
    """The speed that the cache of this machine holds under `key`, if any."""
    entry = CACHE.read().get(key)
    if entry is None or set(entry) != set(Speed.__dataclass_fields__) or not isinstance(entry["branches"], list):
        return None
    branches, others = entry["branches"], [entry[name] for name in entry if name != "branches"]
    sound = len(branches) == num_classes and all(map(_is_time, branches))
    return Speed(**entry) if sound and all(x == 0 or _is_time(x) for x in others) else None


def _is_time(value: object) -> bool:
    """Whether `value` can be milliseconds per patch or pixel, so that sums and products of such values are finite too."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and PLAUSIBLE[0] <= value <= PLAUSIBLE[1]


def remember(key: str, speed: Speed) -> Speed:
    """Store `speed` for later processes and return it."""
    CACHE.remember(key, asdict(speed))
    return speed
