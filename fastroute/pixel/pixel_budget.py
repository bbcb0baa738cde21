"""One budget for the pixels of one call or several: what a class costs, what may be spent, and the exponent that fits.

At first, all images that share the budget but the next one are sampled on some rows. The next image is classified as a whole if
it is small, else on more rows. Then the smallest exponent of the cost is taken at which the pixels of all images to come stay
within what is left. So if an image spends more or less than its sample predicted, the images after it make up for that. The
last bands of an image are held to what is left, so that the budget is never exceeded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastroute.budget.limits import affordable_share
from fastroute.budget.speed import Speed
from fastroute.ops.assign_classes import solve_classes
from fastroute.pixel.pixel_stats import Work


class Sample(NamedTuple):
    """Scores of some pixels of an image.

    Attributes:
        scores: [1, K, n], logits of all classes relative to the first one's.
        weight: number of output pixels that each of them stands for.
    """

    scores: Tensor
    weight: float


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
        return self.sample.scores.shape[2] == self.work.pixels


@dataclass
class PixelBudget:
    """What the pixels of some images may cost.

    Attributes:
        cost: cost of a pixel in each class: a share, FLOPs or milliseconds.
        left: what is left for the pixels without a class, and for those of `pending`. Milliseconds are known only when an image
            begins.
        speed: for milliseconds, the time of everything else.
        total, before: milliseconds of all images, and the milliseconds that earlier calls took.
        waiting: the images to come.
        pixels: number of pixels without a class, from the first search on.
        mean: average cost of these pixels according to their samples.
        searched: number of pixels on which exponents were found.
        pending: numbers of pixels per class that have been spent on the device, and that nobody has waited for.
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
    pending: list[tuple[Tensor, int]] = field(default_factory=list)

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
        penalty, ids = self._searched(sample, work, elapsed)
        counts = count_classes(ids, len(self.cost))
        found = torch.cat([penalty[None], counts.double()]).tolist()  # waits for the device
        self.mean = self._price(found[1:]) / ids.numel()
        return found[0]

    def classes(self, sample: Sample, work: Work, elapsed: float) -> Tensor:  # [n]
        """The classes of the image that has begun, all of whose pixels are in `sample`; see :meth:`solve`."""
        if self.waiting:
            return self.take(sample.scores, self.solve(sample, work, elapsed), min(self.cost))
        # Nothing comes after it, so nobody asks what it spends.
        return self._searched(sample, work, elapsed)[1][0]

    def _searched(self, sample: Sample, work: Work, elapsed: float) -> tuple[Tensor, Tensor]:  # [], [1, n]
        """The exponent at which the image that has begun and those to come fit what is left; and classes of their samples."""
        ahead = (dataclasses.replace(image.work, classified=0) if image.whole else image.work for image in self.waiting)
        rest = sum(ahead, start=work)
        scores = pooled([sample, *(image.sample for image in self.waiting)])
        self._settle()
        if self.speed is not None:
            # The time of this search is still to come too.
            spent = fixed_ms(self.speed, rest) + self.speed.solve * scores.shape[2]
            self.left = self.total - self.before - elapsed - spent
        self.searched += scores.shape[2]
        self.pixels = rest.pixels
        return self._solved(scores, self.left, rest.pixels)

    def tight(self, pixels: int) -> bool:
        """Whether `pixels` more in the most expensive class would leave too little for the others in the cheapest one."""

        def short(left: float) -> bool:
            return left - pixels * max(self.cost) < (self.pixels - pixels) * min(self.cost)

        # Nobody waits for what has been spent as long as it does not matter.
        if not short(self.left - max(self.cost) * sum(number for _, number in self.pending)):
            return False
        self._settle()
        return short(self.left)

    def take(self, scores: Tensor, penalty: float, reserve: float) -> Tensor:  # [1, K, n] -> [n]
        """The classes of the next pixels at the exponent `penalty`, or at a larger one if they would cost too much.

        Args:
            scores: scores of these pixels.
            penalty: the exponent.
            reserve: the cost that is reserved for each of the pixels that follow.
        """
        number = scores.shape[2]
        self._settle()
        ids = self._solved(scores, self.left - (self.pixels - number) * reserve, number, penalty)[1][0]
        self.spend(ids)
        return ids

    def spend(self, ids: Tensor) -> None:  # [...]
        """Record that these pixels have their classes, without waiting for them."""
        self.pending.append((count_classes(ids, len(self.cost)), ids.numel()))
        self.pixels -= ids.numel()
        if ids.device.type == "cpu":
            self._settle()

    def _settle(self) -> None:
        """Wait for what has been spent, and deduct it."""
        if self.pending:
            for counts in torch.stack([counts for counts, _ in self.pending]).tolist():
                self.left -= self._price(counts)
            self.pending.clear()

    def _solved(self, scores: Tensor, allowed: float, number: int, penalty: float | None = None) -> tuple[Tensor, Tensor]:
        # [1, K, n] -> [], [1, n]
        """The exponent, at least `penalty`, at which `number` pixels cost at most `allowed`; and their classes."""
        share = affordable_share(self.cost, allowed, number)
        return solve_classes(scores, self.cost, share, penalty, torch.uint8, logits=True)

    def _price(self, counts: Sequence[float]) -> float:
        return sum(n * cost for n, cost in zip(counts, self.cost, strict=True))


def pooled(samples: Sequence[Sample]) -> Tensor:  # [1, K, n]
    """The scores of several samples, of which each stands for the same number of pixels: some of the denser samples."""
    most, parts = max(sample.weight for sample in samples), []
    for sample in samples:
        number = sample.scores.shape[2]
        kept = max(round(number * sample.weight / most), 1)
        if kept == number:
            parts.append(sample.scores)
            continue
        at = torch.arange(kept, device=sample.scores.device) * number // kept
        parts.append(sample.scores.index_select(2, at))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def count_classes(ids: Tensor, number: int) -> Tensor:  # [...] -> [K]
    """How many of `ids` belong to each of `number` classes, counted without waiting for the device."""
    if ids.device.type == "cpu":
        return torch.bincount(ids.flatten(), minlength=number)
    # There `bincount` would read back the largest id to find out how many there are.
    return (ids.flatten() == torch.arange(number, device=ids.device)[:, None]).sum(dim=1)


def fixed_ms(speed: Speed, work: Work) -> float:
    """The milliseconds of everything except the upsamplers."""
    return speed.encode * work.encoded + speed.classify * work.classified + speed.rest * work.pixels
