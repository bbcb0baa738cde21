"""One budget for the pixels of one call or several: what a class costs, what may be spent, and the exponent that fits.

At first, all images that share the budget but the next one are sampled on some rows. The next image is classified as a whole if
it is small, else on more rows. Then the smallest exponent of the cost is taken at which the pixels of all images to come stay
within what is left. So if an image spends more or less than its sample predicted, the images after it make up for that. The
last bands of an image are held to what is left, so that the budget is never exceeded.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from torch import Tensor

from fastroute.budget.exponent import BUDGET_SLACK, Sample, classes_at, logarithms, solve, spent
from fastroute.budget.speed import Speed
from fastroute.pixel.pixel_stats import Work


@dataclass(frozen=True)
class WaitingImage:
    """An image that has not begun.

    Attributes:
        number: number of the image among those that share the budget.
        work: the work that is still to be done for it.
        sample: scores of a sample of its pixels.
    """

    number: int
    work: Work
    sample: Sample

    @property
    def whole(self) -> bool:
        """Whether all pixels are in the sample, so that the image need not be classified again."""
        return self.sample.scores.shape[1] == self.work.pixels


@dataclass
class PixelBudget:
    """What the pixels of some images may cost.

    Attributes:
        cost: cost of a pixel in each class: a share, FLOPs or milliseconds.
        left: what is left for the pixels without a class. Milliseconds are known only when an image begins.
        speed: for milliseconds, the time of everything else.
        total, before: milliseconds of all images, and the milliseconds that earlier calls took.
        waiting: the images to come.
        pixels: number of pixels without a class, from the first search on.
        mean: average cost of these pixels according to their samples.
        searched: number of pixels on which exponents were found.
    """

    cost: list[float]
    left: float = 0.0
    speed: Speed | None = None
    total: float = 0.0
    before: float = 0.0
    waiting: list[WaitingImage] = field(default_factory=list)
    pixels: int = 0
    mean: float = 0.0
    searched: int = 0

    def begin(self, number: int) -> Sample | None:
        """Begin image `number`, skipping failed images before it. Returns its sample if that covers the whole image."""
        whole = [image.sample for image in self.waiting if image.number == number and image.whole]
        self.waiting = [image for image in self.waiting if image.number > number]
        return whole[0] if whole else None

    def solve(self, sample: Sample, work: Work, elapsed: float) -> float:
        """The exponent for the image that has begun.

        Args:
            sample: scores of a sample of its pixels.
            work: the work that is still to be done for it.
            elapsed: milliseconds since the call began.
        """
        ahead = (dataclasses.replace(image.work, classified=0) if image.whole else image.work for image in self.waiting)
        rest = sum(ahead, start=work)
        samples = [sample, *(image.sample for image in self.waiting)]
        searched = sum(s.scores.shape[1] for s in samples)
        if self.speed is not None:
            # The time of this search is still to come too.
            self.left = self.total - self.before - elapsed - fixed_ms(self.speed, rest) - self.speed.solve * searched
        self.searched += searched
        penalty, cost = solve(samples, self.cost, self.left)
        self.pixels, self.mean = rest.pixels, cost / max(rest.pixels, 1)
        return penalty

    def tight(self, pixels: int) -> bool:
        """Whether `pixels` more in the most expensive class would leave too little for the others in the cheapest one."""
        return self.left - pixels * max(self.cost) < (self.pixels - pixels) * min(self.cost)

    def take(self, scores: Tensor, penalty: float, reserve: float) -> Tensor:  # [K - 1, n] -> uint8 [n]
        """The classes of the next pixels at the exponent `penalty`, or at a larger one if they would cost too much.

        Args:
            scores: scores of these pixels.
            penalty: the exponent.
            reserve: the cost that is reserved for each of the pixels that follow.
        """
        logs, number = logarithms(self.cost), scores.shape[1]
        allowed = max(self.left - (self.pixels - number) * reserve, number * min(self.cost))
        ids = classes_at(scores, penalty, logs)
        if spent(ids, self.cost) > allowed * (1 + BUDGET_SLACK):
            penalty = solve([Sample(scores, 1.0)], self.cost, allowed)[0]
            ids = classes_at(scores, penalty, logs)
        self.spend(ids)
        return ids

    def spend(self, ids: Tensor) -> None:  # [...]
        """Record that these pixels have their classes."""
        self.left -= spent(ids, self.cost)
        self.pixels -= ids.numel()


def fixed_ms(speed: Speed, work: Work) -> float:
    """The milliseconds of everything except the upsamplers."""
    return speed.encode * work.encoded + speed.classify * work.classified + speed.rest * work.pixels
