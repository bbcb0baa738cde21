"""What the papers print of ClassSR: FLOPs of the branches, mean FLOPs and seconds per test set.

Source: ClassSR (Kong et al., CVPR 2021) for the FLOPs; the CDNSR report, table I, for the seconds, taken on an RTX 2080 Ti.
FLOPs are per 32 x 32 patch at x4, a transposed convolution counted at every output pixel, the classifier left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

TEST_SETS = ("test2k", "test4k", "test8k")
BRANCH_FLOPS = {
    "fsrcnn": (141e6, 304e6, 468e6),
    "carn": (0.38e9, 0.77e9, 1.15e9),
    "srresnet": (1.66e9, 3.44e9, 5.20e9),
    "rcan": (10.33e9, 19.90e9, 32.60e9),
}


@dataclass(frozen=True)
class Published:
    """One test set: mean FLOPs per patch, seconds per image, and seconds of the network that is not routed."""

    flops: float
    seconds: float
    dense_seconds: float

    @property
    def time_ratio(self) -> float:
        """Routed over dense."""
        return self.seconds / self.dense_seconds


CLASSSR = {
    "fsrcnn": (Published(311e6, 0.321, 0.374), Published(286e6, 1.302, 1.549), Published(238e6, 7.218, 8.932)),
    "carn": (Published(841e6, 1.750, 1.892), Published(742e6, 7.074, 7.831), Published(608e6, 39.695, 45.472)),
    "srresnet": (Published(3.62e9, 1.094, 1.232), Published(3.30e9, 4.395, 5.096), Published(2.70e9, 24.222, 29.593)),
    "rcan": (Published(21.22e9, 21.790, 24.173), Published(19.49e9, 89.146, 100.133), Published(16.19e9, 498.078, 581.526)),
}


def mix_of(mean: float, flops: Sequence[float]) -> list[float]:
    """Shares of the classes at which the FLOPs have this mean.

    The papers print the mean alone, which many mixes have; this is the one of largest entropy, shares proportional to
    exp(-t · FLOPs).
    """
    if not min(flops) < mean < max(flops):
        raise ValueError(f"mix_of: mean must lie between the FLOPs of the branches, {min(flops)} and {max(flops)}; got {mean}")

    def shares(t: float) -> list[float]:
        # Relative to the cheapest, so that nothing overflows.
        weights = [math.exp(-t * (f - (min(flops) if t > 0 else max(flops))) / max(flops)) for f in flops]
        return [w / sum(weights) for w in weights]

    low, high = -1000.0, 1000.0
    for _ in range(200):
        middle = (low + high) / 2
        found = sum(s * f for s, f in zip(shares(middle), flops, strict=True))
        low, high = (middle, high) if found > mean else (low, middle)
    return shares((low + high) / 2)
