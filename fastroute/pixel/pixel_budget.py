"""One budget over the pixels of a call, or of several: what a class costs, what may be spent, and the exponent that fits.

The images of a budget are looked at first, all but the one that comes next, on a sample of rows. The one that comes next is
classified whole where it is small, else on more rows. Then the smallest exponent of the cost is taken at which the pixels of
all images to come are within what is left; so what an image spent more or less than its sample said is made good by the next.
The last bands of an image are held to what is left: a budget is never overdrawn.
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
class PixelBudget:
    """What the pixels of some images may cost.

    Attributes:
        cost: of a pixel in each class: a share, FLOPs or milliseconds.
        left: for the pixels that have no class yet; of milliseconds, known when an image begins.
        speed: of milliseconds, what all else takes.
        total, before: milliseconds of all images, and those that earlier calls took.
        waiting: the images to come.
        pixels: those that have no class yet, from the first search on.
        mean: what they cost on average by their samples.
        searched: pixels on which exponents were found.
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
        """Image `number` is the next, and those before it that failed are passed over; its sample where that is all of it."""
        whole = [image.sample for image in self.waiting if image.number == number and image.whole]
        self.waiting = [image for image in self.waiting if image.number > number]
        return whole[0] if whole else None

    def solve(self, sample: Sample, work: Work, elapsed: float) -> float:
        """The exponent for the image that has begun.

        Args:
            sample: of its pixels.
            work: what is yet to do for it.
            elapsed: milliseconds since the call began.
        """
        ahead = (dataclasses.replace(image.work, classified=0) if image.whole else image.work for image in self.waiting)
        rest = sum(ahead, start=work)
        samples = [sample, *(image.sample for image in self.waiting)]
        searched = sum(s.scores.shape[1] for s in samples)
        if self.speed is not None:
            # This search is yet to be made too.
            self.left = self.total - self.before - elapsed - fixed_ms(self.speed, rest) - self.speed.solve * searched
        self.searched += searched
        penalty, cost = solve(samples, self.cost, self.left)
        self.pixels, self.mean = rest.pixels, cost / max(rest.pixels, 1)
        return penalty

    def tight(self, pixels: int) -> bool:
        """Whether so many pixels more, at their most expensive, would leave too little for the others at their cheapest."""
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


def fixed_ms(speed: Speed, work: Work) -> float:
    """Milliseconds of all but the pixels in their upsamplers."""
    return speed.encode * work.encoded + speed.classify * work.classified + speed.rest * work.pixels
