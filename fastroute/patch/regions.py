"""Regions of the patch path: which patches run together, what they cost, and the classes whose regions fit a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fastroute.budget.limits import affordable_share, most_expensive
from fastroute.grid import TileGrid
from fastroute.ops.assign_classes import assign_classes
from fastroute.ops.group_by_class import group_by_class
from fastroute.ops.merge_regions import Regions, merge_regions, region_pixels
from fastroute.patch.bands import Band, band_of_patches
from fastroute.profiling import TABLES, RoutedFlops, mix_flops
from fastroute.runtime.results import RoutingStats, Stopwatch

# The search for merged classes ends when this share of the budget is spent, or after this many steps, each of which assigns and
# merges all patches.
SPENT, STEPS = 0.998, 10
# The number of shares of a budget that are tried at once on a device for which a step would wait.
AT_ONCE = 16
# A step keeps away from the ends of the remaining interval, or the search could creep along one of them.
INSIDE = 0.1

Shape = tuple[int, int]  # height and width in LR pixels


@dataclass(frozen=True)
class Merging:
    """How a router merges the patches of images of one size.

    Attributes:
        grid: where the patches lie.
        merge: side of a block in patches, see :func:`fastroute.merge_regions`; 1 leaves every patch on its own.
        promote: whether patches may run in a higher class than their own if that costs less.
    """

    grid: TileGrid
    merge: int
    promote: bool = True

    @property
    def shapes(self) -> list[Shape]:
        """Height and width of every shape of region, see :meth:`fastroute.TileGrid.region_shapes`."""
        return self.grid.region_shapes(self.merge)

    @property
    def sizes(self) -> list[float]:
        """The area of every shape of region, in patches."""
        return [height * width / self.grid.patch**2 for height, width in self.shapes]

    def table(self, costs: Sequence[float], device: torch.device) -> Tensor:  # [K, S]
        """The cost of every class and shape, given the cost of a patch in each class."""
        # Made on the device: a copy from the host would wait.
        sizes = region_pixels(self.grid, self.merge, device) / self.grid.patch**2
        return torch.stack([sizes * float(cost) for cost in costs]).float()

    def regions(self, class_ids: Tensor, costs: Sequence[float]) -> Regions:  # [N]
        """The cheapest regions of `class_ids` if a patch of each class costs `costs`."""
        return merge_regions(class_ids, self.grid, self.table(costs, class_ids.device), self.merge, self.promote)

    def spent(self, class_ids: Tensor, costs: Sequence[float]) -> Tensor:  # [N] -> []
        """The cost of `class_ids` as regions."""
        table = self.table(costs, class_ids.device).double().flatten()
        each = torch.cat([table, table.new_zeros(1)])  # nothing for a patch within a region
        return each[self.regions(class_ids, costs).group].sum()

    def patches(self) -> float:
        """The area of an image all of whose patches are of one class, in patches."""
        return _one_class(self.grid, self.merge)


@lru_cache(maxsize=256)
def _one_class(grid: TileGrid, merge: int) -> float:
    one_class = torch.zeros(grid.num_patches, dtype=torch.int64, device="cpu")
    return float(Merging(grid, merge).spent(one_class, [1.0]))


def assign_merged(
    score: Tensor, costs: Sequence[float], allowed: float, spent: Callable[[Tensor], Tensor]
) -> Tensor:  # [N, K] -> [N]
    """Classes whose regions cost at most `allowed`, or the cheapest class everywhere if that is too little.

    Regions cost less than the sum of their patches. So patches get a larger budget than `allowed`, which is raised step by step
    as long as their regions stay within it. A step would wait for a GPU, so there several shares are tried at once, and the
    device takes the best.

    Args:
        score: scores of all patches.
        costs: cost of a patch in each class.
        allowed: budget of all patches, in the unit of `costs`.
        spent: computes what classes cost as regions.
    """
    number, low, high = score.shape[0], affordable_share(costs, allowed, score.shape[0]), 1.0
    if score.device.type != "cpu":
        shares = [low + (high - low) * n / (AT_ONCE - 1) for n in range(AT_ONCE)]
        tried = torch.stack([assign_classes(score, costs, budget=share) for share in shares])
        spending = torch.stack([spent(ids) for ids in tried])
        fitting = torch.where(spending <= allowed, spending, -1.0)
        # The first one if none fits.
        return tried.index_select(0, fitting.argmax().view(1))[0]
    best = assign_classes(score, costs, budget=low)
    used = float(spent(best))
    if low == high or used > allowed:
        return best
    everywhere = torch.full_like(best, most_expensive(costs))
    if (above := float(spent(everywhere))) <= allowed:
        return everywhere
    for _ in range(STEPS):
        if used >= SPENT * allowed or (high - low) * number < 1:
            break
        share = (allowed - used) / max(above - used, 1e-300)
        middle = low + (high - low) * min(max(share, INSIDE), 1 - INSIDE)
        ids = assign_classes(score, costs, budget=middle)
        if (cost := float(spent(ids))) <= allowed:
            low, used, best = middle, cost, ids
        else:
            high, above = middle, cost
    return best


@dataclass(frozen=True)
class SortedRegions:
    """All regions of a call, sorted by band, class and shape, so that regions which run together lie together.

    Attributes:
        class_ids: (N,), the class in which every patch runs.
        region: (N,), the first patch of the region of every patch; None if every patch is on its own.
        order, inverse: (N,), see :class:`fastroute.ClassGroups`. In a band, the patches that begin a region come first.
        offsets: where every band, class and shape begins in `order`.
        shapes: all shapes of regions.
        patches: number of patches of each class.
        work: area that each class runs on, in patches.
    """

    class_ids: Tensor
    region: Tensor | None
    order: Tensor
    inverse: Tensor
    offsets: list[int]
    shapes: list[Shape]
    patches: list[int]
    work: list[float]

    @property
    def _groups(self) -> int:
        own = len(self.patches) * len(self.shapes)
        return own if self.region is None else own + 1

    def of_band(self, number: int, patch: int) -> Iterator[tuple[int, Shape, Tensor]]:
        """For each class and shape that band `number` contains: the class, the shape, and the patches that begin a region.

        Patches are numbered from `patch` on, the first one of the band.
        """
        first = number * self._groups
        top = self.offsets[first]
        order = self.order[top : top + self.regions_of(number)]
        order = order - patch if patch else order
        for group in range(len(self.patches) * len(self.shapes)):
            begin, end = self.offsets[first + group], self.offsets[first + group + 1]
            if begin < end:
                yield group // len(self.shapes), self.shapes[group % len(self.shapes)], order[begin - top : end - top]

    def regions_of(self, number: int) -> int:
        """How many regions band `number` has."""
        first = number * self._groups
        return self.offsets[first + len(self.patches) * len(self.shapes)] - self.offsets[first]


def sort_regions(class_ids: Tensor, costs: Sequence[float], merging: Merging, bands: list[Band]) -> SortedRegions:  # [N]
    """The sorted regions of `class_ids`. Waits for the device once.

    Args:
        class_ids: the class of every patch. Given ids may be wrong; those out of range are one above the last class.
        costs: cost of a patch in each class, which decides how patches merge.
        merging: how patches merge.
        bands: the bands that are routed together.

    Raises:
        ValueError: a class is out of range.
    """
    classes, device = len(costs), class_ids.device
    region, shapes, group, groups = None, [(merging.grid.patch, merging.grid.patch)], class_ids, classes
    if merging.merge > 1:
        merged = merging.regions(class_ids, costs)
        class_ids, region, group, shapes = merged.class_ids, merged.region, merged.group, merging.shapes
        groups = classes * len(shapes) + 1
    per_class = group_by_class(class_ids, classes).offsets
    if len(bands) > 1:
        # Band-major: one sort gives the regions of every band.
        group = band_of_patches(bands, merging.grid, device) * groups + group
    sorted_by = group_by_class(group, max(len(bands), 1) * groups)
    read = torch.cat([per_class, sorted_by.offsets]).tolist()  # the one wait for the device
    totals, offsets = read[: classes + 1], read[classes + 1 :]
    sizes, work = [h * w / merging.grid.patch**2 for h, w in shapes], [0.0] * classes
    for band in range(len(bands)):
        for number in range(classes * len(shapes)):
            at = band * groups + number
            work[number // len(shapes)] += (offsets[at + 1] - offsets[at]) * sizes[number % len(shapes)]
    patches = [totals[c + 1] - totals[c] for c in range(classes)]
    return SortedRegions(class_ids, region, sorted_by.order, sorted_by.inverse, offsets, shapes, patches, work)


def patch_stats(
    flops: Sequence[int],
    paper_flops: Sequence[int],
    images: int,
    merging: Merging,
    regions: SortedRegions,
    classifier_flops: int,
    watch: Stopwatch,
    working_set: int,
) -> RoutingStats:
    """The statistics of a call.

    Args:
        flops, paper_flops: FLOPs of a patch in each branch, as done and as the papers count them.
        images: number of images.
        merging, regions: how their patches ran.
        classifier_flops: FLOPs of the classifier.
        watch: has measured the stages.
        working_set: bytes held.
    """
    stages = ("tune", "classify", "assign", "extract", "branches", "stitch")
    most, grid = images * max(flops), merging.grid
    done = RoutedFlops(
        mix_flops(flops, regions.work, classifier_flops).routed,
        most * merging.patches(),
        most * grid.height * grid.width / grid.patch**2,
    )
    paper = mix_flops(paper_flops, regions.patches, paper=TABLES)
    return RoutingStats(
        regions.patches, done, paper, {**dict.fromkeys(stages, 0.0), **watch.finish()}, working_set, regions.work
    )
