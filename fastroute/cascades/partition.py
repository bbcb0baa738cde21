"""An image cut into rectangles of one class each, so that their cost and the error of their results are least together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastroute.cascades.cells import Cells, Rectangle
from fastroute.cascades.guillotine import Values, cheapest, parts

# What a pass costs beside its pixels, in pixels.
PASS = 256
# Of the context and that, how much counts in the choice of a cut. With all of it hardly any price gives a cut between the
# dense run and none: each region makes its neighbours cheaper, so that all or nothing is cheapest. With nothing, regions are
# too small.
COUNTED = 0.5
# Cells along the sides of a block, at most: cuts are the cheapest within blocks.
BLOCK = 16
# Values that are worked on at a time, and prices for which an image that is small enough is cut together.
VALUES, PRICES = 1 << 21, 7
Index = NDArray[np.int64]
# Its rows and its columns.
Block = tuple["Span", "Span"]


@dataclass(frozen=True)
class Cut:
    """An image as it is cut at one price.

    Attributes:
        regions: of each class, in cells.
        error: squared error that is expected, in the mean over the image.
        cost: in pixels of the most expensive class.
    """

    regions: tuple[tuple[Rectangle, ...], ...]
    error: float
    cost: float


@dataclass(frozen=True)
class Span:
    """Rows or columns of a block, and all ranges of them.

    Attributes:
        first: where the block begins, in cells.
        size: cells of the block; those beyond the image hold nothing.
        total: cells of the image.
        length: pixels of the image.
        side: pixels of a cell.
    """

    first: int
    size: int
    total: int
    length: int
    side: int

    @cached_property
    def begin(self) -> Index:  # [size]
        """Where ranges begin, in cells of the block."""
        return np.arange(self.size)

    @cached_property
    def end(self) -> Index:  # [size, size]
        """Where ranges of 1 and more cells end."""
        return self.begin + np.arange(1, self.size + 1)[:, None]

    @cached_property
    def inner(self) -> tuple[Index, Index]:  # [size], [size, size]
        """Ranges without their outermost cells, but for those at the border of the image."""
        begin = self.begin + (self.first + self.begin > 0)
        return begin, np.maximum(self.end - (self.first + self.end < self.total), begin)

    def pixels(self, margin: int) -> NDArray[np.float64]:  # [size, size]
        """Pixels of ranges with a margin, where the image has any; 0 of those beyond it, infinite of those beyond the block."""
        begin, end = (self.side * (self.first + index) for index in (self.begin, self.end))
        found = np.minimum(end + margin, self.length) - np.maximum(begin - margin, 0).astype(np.float64)
        found[:, begin >= self.length] = 0
        found[self.end > self.size] = np.inf
        return found


class Blocks:
    """The cells of an image in blocks of equal sizes, the last ones of which may reach beyond it."""

    def __init__(self, cells: Cells) -> None:
        self.rows, self.cols = (_spans(*both, cells.side) for both in ((cells.rows, cells.height), (cells.cols, cells.width)))
        self.values = (self.rows[0].size * self.cols[0].size) ** 2

    def __len__(self) -> int:
        return len(self.rows) * len(self.cols)

    def groups(self, more: int = 1) -> Iterator[list[Block]]:
        """Blocks that are worked on together, where each has `more` sets of values."""
        every = [(row, col) for row in self.rows for col in self.cols]
        together = max(VALUES // (more * self.values), 1)
        for n in range(0, len(every), together):
            yield every[n : n + together]


def _spans(total: int, length: int, side: int) -> list[Span]:
    count = -(-total // BLOCK)
    size = -(-total // count)
    return [Span(first, size, total, length, side) for first in range(0, total, size)]


def _placed(part: Rectangle, row: Span, col: Span) -> Rectangle:
    """A rectangle of a block in the image, as far as that reaches."""
    top, bottom = row.first + part.top, min(row.first + part.bottom, row.total)
    return Rectangle(top, col.first + part.left, bottom, min(col.first + part.right, col.total))


def work(blocks: Sequence[Block], context: int | None) -> Values:
    """What a pass over every rectangle costs, in pixels, or with None its own pixels alone; 0 beyond the image, infinitely many
    beyond a block."""
    found = []
    for row, col in blocks:
        high, wide = row.pixels(context or 0), col.pixels(context or 0)
        # Nothing times infinity is a rectangle that there is not.
        with np.errstate(invalid="ignore"):
            area = high[:, None, :, None] * wide[None, :, None, :]
        area[np.isnan(area)] = np.inf
        found.append(area if context is None else np.where(area > 0, area + PASS, 0.0))
    return np.stack(found)


def sums(blocks: Sequence[Block], values: NDArray[np.float64], inner: bool = False) -> Values:  # [rows, cols]
    """Sums of `values` over every rectangle, or over its cells that are not at its border or are at that of the image."""
    found = []
    for row, col in blocks:
        own = values[row.first : row.first + row.size, col.first : col.first + col.size]
        total = np.zeros((row.size + 1, col.size + 1))
        total[1 : own.shape[0] + 1, 1 : own.shape[1] + 1] = own.cumsum(0).cumsum(1)
        # Beyond the image nothing is added.
        total[own.shape[0] + 1 :] = total[own.shape[0]]
        total[:, own.shape[1] + 1 :] = total[:, [own.shape[1]]]
        (top, bottom), (left, right) = (span.inner if inner else (span.begin, span.end) for span in (row, col))
        bottom, right = bottom.clip(max=row.size), right.clip(max=col.size)
        bottom, right = bottom[:, None, :, None], right[None, :, None, :]
        top, left = np.minimum(top[None, None, :, None], bottom), np.minimum(left[None, None, None, :], right)
        found.append(total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left])
    return np.stack(found)


@dataclass(frozen=True)
class Region:
    """What the most expensive class errs by in regions, as the wide ones of the cheaper classes do beside their own errors.

    Attributes:
        border, inner: by what its errors are multiplied in the cells along a region's border, and further in.
        wide: of each cheaper class, see :class:`fastroute.cascades.decision.Table`.
    """

    border: float
    inner: float
    wide: tuple[bool, ...] = ()

    def is_wide(self, k: int) -> bool:
        """Whether class `k` sees farther than a context reaches."""
        return k < len(self.wide) and self.wide[k]


EXACT = Region(0.0, 0.0)


class Partition:
    """All cuts of an image, at any price of a pass.

    Args:
        cells: of the image.
        costs: of a pixel in each class, rising.
        context: pixels around a region that are computed and cropped.
        errors: [K, rows, cols] expected of every class.
        region: of the last class; by default its regions have no errors.
        base: see :class:`fastroute.cascades.plan.Plan`.
    """

    def __init__(
        self,
        cells: Cells,
        costs: Sequence[float],
        context: int,
        errors: Tensor,  # [K, rows, cols]
        region: Region = EXACT,
        base: int | None = None,
    ) -> None:
        self.cells, self.context, self.region, self.base = cells, context, region, base
        self.shares = [cost / costs[-1] for cost in costs]
        areas = cells.areas()
        self.area = float(areas.sum())
        self.errors = (errors.double() * areas / self.area).numpy()
        self.blocks = Blocks(cells)
        self.together = max(min(PRICES, VALUES // (self.blocks.values * len(self.blocks))), 1)
        self.lowest = base or 0
        # The lowest class lies below all others; where it does not run on the whole image, it costs less than that.
        self.fixed = self.shares[self.lowest] * self.area
        self._kept: Terms | None = None

    @property
    def largest(self) -> float:
        """A price from which on the lowest class runs everywhere."""
        worst = self.errors[self.lowest] / (self.cells.areas().numpy() / self.area)
        return float(worst.max()) / max(self.shares[min(self.lowest + 1, len(self.shares) - 1)], 1e-9)

    def at(self, prices: Sequence[float]) -> list[Cut]:
        """The best cuts where a run of the most expensive class over the whole image is worth so much error, the same number of
        blocks at each."""
        regions = [[list[Rectangle]() for _ in self.shares] for _ in prices]
        errors, costs = [0.0] * len(prices), [self.fixed] * len(prices)
        for blocks in self.blocks.groups(len(prices)):
            terms = self._terms(blocks)
            whole = np.concatenate([terms.values(price / self.area) for price in prices])
            best = cheapest(whole)
            for n, p, (row, col) in [(n, p, block) for p in range(len(prices)) for n, block in enumerate(blocks)]:
                for part in parts(whole, best, p * len(blocks) + n):
                    at = (n, part.bottom - part.top - 1, part.right - part.left - 1, part.top, part.left)
                    if terms.pixels[-1][at] == 0:
                        # Beyond the image.
                        continue
                    k, error, cost = terms.chosen(at, prices[p] / self.area)
                    errors[p] += error
                    costs[p] += cost
                    regions[p][self.lowest + k].append(_placed(part, row, col))
        return [Cut(*of_one) for of_one in zip((tuple(map(tuple, every)) for every in regions), errors, costs, strict=True)]

    def _terms(self, blocks: Sequence[Block]) -> Terms:
        if self._kept is not None:
            return self._kept
        pixels, alone = work(blocks, self.context), work(blocks, None)
        beyond = np.isinf(pixels)
        last = self._of_regions(blocks)
        errors = []
        for k in range(self.lowest, len(self.shares) - 1):
            own = sums(blocks, self.errors[k])
            errors.append(own + last if k != self.base and self.region.is_wide(k) else own)
        errors.append(last)
        for own in errors:
            own[beyond] = np.inf
        counted = COUNTED * pixels + (1 - COUNTED) * alone
        shares = [0.0, *self.shares[self.lowest + 1 :]]
        pixels[beyond] = counted[beyond] = 0.0
        found = Terms(errors, [pixels * share for share in shares], [counted * share for share in shares])
        if len(blocks) == len(self.blocks):
            self._kept = found
        return found

    def _of_regions(self, blocks: Sequence[Block]) -> Values:
        """What the last class errs by in every rectangle, as a region."""
        everything, within = (sums(blocks, self.errors[-1], inner) for inner in (False, True))
        return self.region.border * (everything - within) + self.region.inner * within


@dataclass(frozen=True)
class Terms:
    """What every rectangle of some blocks costs and errs by in each class.

    Attributes:
        errors: of the classes that may be chosen.
        pixels: of their passes, in those of the most expensive class.
        counted: of these, what counts in a choice.
    """

    errors: Sequence[Values]
    pixels: Sequence[Values]
    counted: Sequence[Values]

    def values(self, price: float) -> Values:
        """The least of errors and costs, at a price of a pixel."""
        found = self.errors[0] + price * self.counted[0]
        for errors, counted in zip(self.errors[1:], self.counted[1:], strict=True):
            np.minimum(found, errors + price * counted, out=found)
        return found

    def chosen(self, at: tuple[int, ...], price: float) -> tuple[int, float, float]:
        """The class of one rectangle, its error and its pixels."""
        values = [float(errors[at] + price * counted[at]) for errors, counted in zip(self.errors, self.counted, strict=True)]
        k = values.index(min(values))
        return k, float(self.errors[k][at]), float(self.pixels[k][at])


def covering(needed: NDArray[np.bool_], cells: Cells, context: int) -> list[Rectangle]:  # [rows, cols]
    """Rectangles that hold all `needed` cells, at the least cost within blocks."""
    found = []
    blocks = Blocks(cells)
    for group in blocks.groups():
        pixels = work(group, context)
        wanted = sums(group, needed.astype(np.float64))
        # A rectangle without such a cell is not computed.
        whole = np.where((wanted > 0) | np.isinf(pixels), pixels, 0.0)
        best = cheapest(whole)
        for n, (row, col) in enumerate(group):
            for part in parts(whole, best, n):
                if whole[n, part.bottom - part.top - 1, part.right - part.left - 1, part.top, part.left] > 0:
                    found.append(_placed(part, row, col))
    return found
