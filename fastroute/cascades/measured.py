"""What a calibration measures of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastroute.cascades.cells import Cells, Rectangle, Score

# Side of the region in the middle of a picture whose errors are measured, in cells.
REGION = 4


@dataclass(frozen=True)
class Seen:
    """Cells of one picture by another score.

    Attributes:
        scores, places, samples: see :class:`Measured`.
    """

    scores: Tensor
    places: tuple[Rectangle, ...]
    samples: Tensor


@dataclass(frozen=True)
class Measured:
    """Cells of one picture.

    Attributes:
        picture: number of the file that it is from: what is learnt from one is not tested on it.
        cells: where they lie.
        scores: [rows, cols].
        errors: [K - 1, rows, cols], mean squared error of each cheaper class against the most expensive one over the whole
            picture.
        border, inner: scores and errors of cells that the most expensive class computed in a region, by the region's context:
            (context, scores [M], errors [M]) of cells along the region's border and within it.
        image: uint8 [C, H, W], its pixels, from which other scores may be computed.
        places, samples: cells that were measured as a call does it, see :mod:`fastroute.cascades.samples`, and [K - 1, N], the
            errors found.
        outputs: of each cheaper class, its cells by the scores of its result; None of one without weights.
    """

    picture: int
    cells: Cells
    scores: Tensor
    errors: Tensor
    border: tuple[tuple[int, Tensor, Tensor], ...] = ()
    inner: tuple[tuple[int, Tensor, Tensor], ...] = ()
    image: Tensor | None = None
    places: tuple[Rectangle, ...] = ()
    samples: Tensor | None = None
    outputs: tuple[Seen | None, ...] = ()

    def of(self, classes: Sequence[int]) -> Measured:
        """What was measured of these of the cheaper classes."""
        own = list(classes)
        samples = None if self.samples is None else self.samples[own]
        seen = [self.outputs[k] for k in own] if self.outputs else []
        outputs = tuple(None if one is None else replace(one, samples=one.samples[own]) for one in seen)
        return replace(self, errors=self.errors[own], samples=samples, outputs=outputs)

    def by(self, scores: Tensor) -> Measured:  # [rows, cols]
        """The same cells by other scores."""
        region = region_of(self.cells)
        if region is None:
            return replace(self, scores=scores)
        border, within = parted(scores, region)
        return replace(
            self, scores=scores, border=tuple((context, border, found) for context, _, found in self.border),
            inner=tuple((context, within, found) for context, _, found in self.inner),
        )  # fmt: skip

    def by_output(self, k: int) -> Measured:
        """The same cells by the result of class `k`, and the cells that a call would measure then."""
        seen = self.outputs[k]
        assert seen is not None  # asked before
        return replace(self.by(seen.scores), places=seen.places, samples=seen.samples)


def region_of(cells: Cells) -> Rectangle | None:
    """The region whose errors are measured, in the middle; None of a crop that is too small."""
    if min(cells.rows, cells.cols) < REGION + 2:
        return None
    top, left = (cells.rows - REGION) // 2, (cells.cols - REGION) // 2
    return Rectangle(top, left, top + REGION, left + REGION)


def parted(values: Tensor, region: Rectangle) -> tuple[Tensor, Tensor]:  # [rows, cols] -> [M] twice
    """Those of the cells of a region along its border, and within it."""
    own = values[region.top : region.bottom, region.left : region.right]
    within = torch.zeros_like(own, dtype=torch.bool)
    within[1:-1, 1:-1] = True
    return own[~within], own[within]


def rescored(cells: Measured, score: Score) -> Measured:
    """The same cells by another score; those without pixels as they are."""
    if cells.image is None:
        return cells
    return cells.by(score(cells.image[None].float() / 255, cells.scores.float()).double())
