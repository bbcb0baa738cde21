"""Which rectangles of an image each network of a cascade runs on, at the least cost."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastroute.cascades.cells import Cells, Rectangle

# What a pass costs beside its pixels, in pixels.
PASS = 256


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
    most = costs[-1]
    shares = [cost / most for cost in costs]
    executed, regions = class_ids.clone(), []
    done = torch.zeros_like(class_ids, dtype=torch.bool)
    area = float(cells.pixels(cells.whole).area)
    scored = 0.0 if base is None else shares[base] * area
    total = scored
    for k in reversed(range(len(costs))):
        if base is not None and k <= base:
            # Its result is there, and better than those below.
            regions.append(tuple([cells.whole] if k == base else []))
            executed = torch.where(done, executed, base)
            continue
        found = cover((class_ids == k) & ~done, cells, context)
        for region in found:
            inside = slice(region.top, region.bottom), slice(region.left, region.right)
            executed[inside] = torch.where(done[inside], executed[inside], k)
            done[inside] = True
        regions.append(tuple(found))
        total += shares[k] * spent(found, cells, context)
    whole = area + PASS + scored
    if len(costs) > 1 and total >= whole:
        nothing: tuple[Rectangle, ...] = ()
        everywhere = torch.full_like(class_ids, len(costs) - 1)
        return Plan(cells, (*(nothing,) * (len(costs) - 1), (cells.whole,)), context, everywhere, whole, base=base)
    return Plan(cells, tuple(reversed(regions)), context, executed, total, base=base)


def spent(regions: Sequence[Rectangle], cells: Cells, context: int) -> float:
    """Pixels of `regions` with their context, and the cost of their passes."""
    return float(sum(cells.pixels(region, context).area + PASS for region in regions))


def cover(needed: Tensor, cells: Cells, context: int) -> list[Rectangle]:  # bool [rows, cols]
    """Rectangles that hold all `needed` cells, and others where that costs less than going around them.

    It begins with rectangles of nothing but needed cells, and joins two as long as one around both costs less than they do.
    """
    if bool(needed.all()):
        return [cells.whole] if needed.numel() else []
    regions = dict(enumerate(exact_cover(needed)))
    costs = {n: spent([region], cells, context) for n, region in regions.items()}
    heap = [gain for n in regions for gain in _gains(n, regions, costs, cells, context) if gain[2] > n]
    heapq.heapify(heap)
    following = len(regions)
    while heap:
        _, a, b = heapq.heappop(heap)
        if a not in regions or b not in regions:
            continue
        joined = regions[a].joined(regions[b])
        # What else lies within is computed with it.
        for n in [n for n, region in regions.items() if joined.holds(region)]:
            del regions[n], costs[n]
        regions[following], costs[following] = joined, spent([joined], cells, context)
        for gain in _gains(following, regions, costs, cells, context):
            heapq.heappush(heap, gain)
        following += 1
    return sorted(regions.values())


def _gains(
    n: int, regions: dict[int, Rectangle], costs: dict[int, float], cells: Cells, context: int
) -> Iterator[tuple[float, int, int]]:
    """Negative gains of joining region `n` with each other one, where there is any."""
    own = regions[n]
    # Joined regions cost less only where their contexts meet, or where one pass less is worth more than what lies between.
    reach = 2 * context // cells.side + 2
    for m, other in regions.items():
        apart = max(own.top - other.bottom, other.top - own.bottom, own.left - other.right, other.left - own.right)
        if m != n and apart <= reach:
            joined = own.joined(other)
            gain = costs[n] + costs[m] - spent([joined], cells, context)
            if gain >= 0:
                yield -gain, min(n, m), max(n, m)


def exact_cover(needed: Tensor) -> list[Rectangle]:  # bool [rows, cols]
    """Rectangles of needed cells alone that hold all of them: runs along rows, joined where those of the next row are alike."""
    found: list[Rectangle] = []
    open_runs: dict[tuple[int, int], int] = {}  # columns to the first row
    for row, line in enumerate([*needed.tolist(), []]):
        runs: set[tuple[int, int]] = set()
        start = None
        for col, wanted in enumerate([*line, False]):
            if wanted and start is None:
                start = col
            elif not wanted and start is not None:
                runs.add((start, col))
                start = None
        for run in [run for run in open_runs if run not in runs]:
            found.append(Rectangle(open_runs.pop(run), run[0], row, run[1]))
        for run in runs:
            open_runs.setdefault(run, row)
    return sorted(found)
