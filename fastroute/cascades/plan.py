"""Which rectangles of an image each network of a cascade runs on, at the least cost."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastroute.cascades.cells import Cells, Rectangle
from fastroute.cascades.partition import BLOCK, PASS, Cut, covering


@dataclass(frozen=True)
class Plan:
    """What runs where.

    Attributes:
        cells: of the image.
        regions: of each class, in cells; those of a higher class lie over those of lower ones.
        context: pixels around a region that are computed and cropped.
        class_ids: int64 [rows, cols], the class in which every cell runs.
        cost: in pixels of the most expensive class.
        sampled: pixels on which all classes ran before, to make it.
        base: the class that runs on the whole image whatever is chosen, since its result is scored; None where the image is.
    """

    cells: Cells
    regions: tuple[tuple[Rectangle, ...], ...]
    context: int
    class_ids: Tensor
    cost: float
    sampled: int = 0
    base: int | None = None

    @property
    def dense(self) -> bool:
        """Whether the most expensive class runs on the whole image."""
        return self.regions[-1] == (self.cells.whole,)

    def work(self) -> list[int]:
        """LR pixels that each class runs on, context included."""
        return [sum(self.cells.pixels(region, self.context).area for region in regions) for regions in self.regions]


def aligned(pixels: int, align: int) -> int:
    """The next multiple of `align`."""
    return -(-pixels // align) * align


def make_plan(
    class_ids: Tensor,  # [rows, cols]
    cells: Cells,
    costs: Sequence[float],
    context: int,
    base: int | None = None,
) -> Plan:
    """The cheapest plan known that gives every cell its class or a higher one.

    Args:
        class_ids: the least class of every cell.
        cells: of the image.
        costs: of a pixel in each class, rising.
        context, base: see :class:`Plan`.
    """

    def regions_of(k: int, done: Tensor) -> list[Rectangle]:  # [rows, cols]
        return cover((class_ids == k) & ~done, cells, context)

    return _assembled(regions_of, cells, costs, context, base)


def plan_of(cut: Cut, cells: Cells, costs: Sequence[float], context: int, base: int | None = None) -> Plan:
    """The plan of an image that was cut, its regions joined where that costs less."""

    def regions_of(k: int, done: Tensor) -> list[Rectangle]:  # [rows, cols]
        if k == 0:
            return cover(~done, cells, context)
        own = [region for region in cut.regions[k] if not bool(_within(done, region).all())]
        # Blocks were cut each by itself.
        return joined(own, cells, context) if max(cells.rows, cells.cols) > BLOCK else own

    return _assembled(regions_of, cells, costs, context, base)


def _within(values: Tensor, region: Rectangle) -> Tensor:  # [rows, cols] -> [h, w]
    return values[region.top : region.bottom, region.left : region.right]


def _assembled(
    regions_of: Callable[[int, Tensor], Sequence[Rectangle]],
    cells: Cells,
    costs: Sequence[float],
    context: int,
    base: int | None,
) -> Plan:
    """The plan of these regions of each class; the highest is asked for first, the others with the cells that are done."""
    shares = [cost / costs[-1] for cost in costs]
    executed = torch.zeros(cells.rows, cells.cols, dtype=torch.int64)
    done = torch.zeros_like(executed, dtype=torch.bool)
    regions: list[tuple[Rectangle, ...]] = []
    area = float(cells.pixels(cells.whole).area)
    scored = 0.0 if base is None else shares[base] * area
    total = scored
    for k in reversed(range(len(costs))):
        if base is not None and k <= base:
            # Its result is there, and better than those below.
            regions.append((cells.whole,) if k == base else ())
            executed[~done] = base
            continue
        found = sorted(regions_of(k, done))
        for region in found:
            inside = _within(done, region)
            _within(executed, region)[~inside] = k
            inside.fill_(True)
        regions.append(tuple(found))
        total += shares[k] * spent(found, cells, context)
    whole = area + PASS + scored
    if len(costs) > 1 and total >= whole:
        everywhere = torch.full_like(executed, len(costs) - 1)
        return Plan(cells, (*((),) * (len(costs) - 1), (cells.whole,)), context, everywhere, whole, base=base)
    return Plan(cells, tuple(reversed(regions)), context, executed, total, base=base)


def spent(regions: Sequence[Rectangle], cells: Cells, context: int) -> float:
    """Pixels of `regions` with their context, and the cost of their passes."""
    return float(sum(cells.pixels(region, context).area + PASS for region in regions))


def cover(needed: Tensor, cells: Cells, context: int) -> list[Rectangle]:  # bool [rows, cols]
    """Rectangles that hold all `needed` cells, and others where that costs less than going around them."""
    if bool(needed.all()):
        return [cells.whole] if needed.numel() else []
    return joined(covering(needed.numpy(), cells, context), cells, context)


def joined(rectangles: Sequence[Rectangle], cells: Cells, context: int) -> list[Rectangle]:
    """The same cells, and others: two rectangles are joined as long as one around both costs less than they do."""
    regions = dict(enumerate(rectangles))
    costs = {n: spent([region], cells, context) for n, region in regions.items()}
    # Where several lie over each other it is the last one; of those before, what is seen is enough to find them.
    owners = np.full((cells.rows, cells.cols), -1)
    # Joined regions cost less only where their contexts meet, or where one pass less is worth more than what lies between.
    reach = 2 * context // cells.side + 2

    def gains(n: int) -> Iterator[tuple[float, int, int]]:
        """Negative gains of joining region `n` with each other one near it, where there is any."""
        own = regions[n]
        window = owners[max(own.top - reach, 0) : own.bottom + reach, max(own.left - reach, 0) : own.right + reach]
        for m in np.unique(window).tolist():
            if m != n and m in regions:
                gain = costs[n] + costs[m] - spent([own.joined(regions[m])], cells, context)
                if gain >= 0:
                    yield -gain, min(n, m), max(n, m)

    for n, own in regions.items():
        owners[own.top : own.bottom, own.left : own.right] = n
    heap = [gain for n in regions for gain in gains(n) if gain[2] > n]
    heapq.heapify(heap)
    following = len(regions)
    while heap:
        _, a, b = heapq.heappop(heap)
        if a not in regions or b not in regions:
            continue
        both = regions[a].joined(regions[b])
        # What else lies within is computed with it.
        for n in {int(n) for n in np.unique(owners[both.top : both.bottom, both.left : both.right])} & regions.keys():
            if both.holds(regions[n]):
                del regions[n], costs[n]
        owners[both.top : both.bottom, both.left : both.right] = following
        regions[following], costs[following] = both, spent([both], cells, context)
        for gain in gains(following):
            heapq.heappush(heap, gain)
        following += 1
    return sorted(regions.values())
