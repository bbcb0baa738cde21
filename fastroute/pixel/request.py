"""Validated arguments of a :class:`fastroute.PixelRouter` call, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from fastroute._arguments import LARGEST_IMAGE, real, whole
from fastroute.budget.limits import Budget, check_possible, duration, most_expensive, refuse_below
from fastroute.budget.speed import Speed
from fastroute.ops.assign_classes import BUDGET_SLACK
from fastroute.pixel import pixel_rows
from fastroute.pixel.pixel_budget import PixelBudget, fixed_ms
from fastroute.pixel.pixel_networks import PixelNetworks
from fastroute.pixel.pixel_rows import PixelGrid, budget_sample, sampled_rows
from fastroute.pixel.pixel_stats import Work
from fastroute.runtime.memory_plan import check_limit
from fastroute.runtime.progress import Progress


@dataclass(frozen=True)
class ClassRule:
    """How classes are chosen: by the exponent `penalty` of their cost, by 2-means, within a budget, or one for all pixels.

    Attributes:
        cost: relative cost of each class.
        budgeted: whether the exponent is searched for.
        only: the class of all pixels, none of which is then classified.
    """

    cost: list[float]
    penalty: float = 0.0
    adaptive: bool = False
    budgeted: bool = False
    only: int | None = None

    @property
    def solved(self) -> bool:
        """Whether some pixels of the image are sampled first."""
        return self.adaptive or self.budgeted

    def sampled(self, grid: PixelGrid) -> int:
        """The bytes of the sample on which the decision is solved."""
        pixels = grid.size[0] * grid.size[1]
        if self.adaptive:
            return pixel_rows.ADAPTIVE_BYTES * min(pixels, pixel_rows.ADAPTIVE_SAMPLE + grid.size[1])
        if self.budgeted:
            return pixel_rows.BUDGET_BYTES * len(self.cost) * min(pixels, budget_sample(grid) + grid.size[1])
        return 0

    def work(self, grid: PixelGrid) -> Work:
        """The work for an image."""
        (h, w), (height, width) = grid.lr, grid.size
        work = Work(h * w, height * width, h * w)
        if self.only is not None:
            return work
        work += Work(classified=height * width, products=h * w)
        if not self.solved:
            return work
        looked = looking(grid, pixel_rows.ADAPTIVE_SAMPLE if self.adaptive else budget_sample(grid))
        # If the sample is the whole image, it is classified only once.
        return work if looked.classified == height * width else work + looked


def looking_ahead(grid: PixelGrid, pixels: int) -> Work:
    """The additional work for sampling an image before its turn: nothing if the sample is the whole image."""
    return Work() if grid.size[0] * grid.size[1] <= pixels else looking(grid, pixels)


def looking(grid: PixelGrid, pixels: int) -> Work:
    """The work for a sample of about `pixels` pixels on features that are already held."""
    rows = sum(map(len, sampled_rows(grid, pixels)))
    return Work(classified=rows * grid.size[1], products=min(rows, grid.lr[0]) * grid.lr[1])


@dataclass(frozen=True)
class Request:
    """The validated arguments of a call.

    Attributes:
        grid: rows of the image and of the output.
        rule: how classes are chosen.
        budget: what classes may cost, if there is a budget.
        first: number of the first image among those that share the budget.
        looked: whether all images that share the budget have been sampled.
    """

    grid: PixelGrid
    rule: ClassRule
    budget: PixelBudget | None = None
    refine: bool = True
    progress: Progress = False
    memory_limit: int | None = None
    first: int = 0
    looked: bool = False

    @property
    def band_parts(self) -> tuple[int, ...]:
        """The numbers by which the size of a band may be divided to save memory, without an influence on the result."""
        grid = self.grid
        if grid.device.type == "cpu":
            return (1,)
        # Bands of a sampled image are held to the budget one by one.
        bound = self.rule.budgeted and grid.size[0] * grid.size[1] > budget_sample(grid)
        return pixel_rows.BAND_PARTS[-1:] if bound else pixel_rows.BAND_PARTS

    def in_parts(self, parts: int) -> Request:
        """The same request with bands of a size divided by `parts`."""
        return replace(self, grid=replace(self.grid, parts=parts))


def make_grid(
    lr: Sequence[int], scale: float | None, size: tuple[int, int] | None, device: torch.device, default: float = 4.0
) -> tuple[PixelGrid, float]:
    """The rows of an image of height and width `lr` and of its output on `device`, and the factor that costs refer to.

    Raises:
        ValueError: both a scale and a size, or an impossible one.
    """
    op, (h, w) = "upscale", lr
    if scale is not None and size is not None:
        raise ValueError(f"{op}: give either scale or size; got scale={scale} and size={size}")
    if size is None:
        factor = default if scale is None else real(op, "scale", scale)
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"{op}: scale must be positive and finite; got {scale}")
        if max(h, w) * factor > LARGEST_IMAGE:
            raise ValueError(f"{op}: scale must give an image of at most {LARGEST_IMAGE:.3g} pixels; got {scale}")
        size = (round(h * factor), round(w * factor))
    else:
        low = -LARGEST_IMAGE
        size = (whole(op, "size", size[0], LARGEST_IMAGE, low), whole(op, "size", size[1], LARGEST_IMAGE, low))
        # The published code takes the mean factor of a size, rounded to one decimal.
        factor = max(round((size[0] / h + size[1] / w) / 2, 1), 0.1)
    if min(size) < 1:
        wanted = f"size must be at least 1 x 1; got {size}"
        raise ValueError(f"{op}: {wanted if scale is None else f'scale must give a size at least 1 x 1; got {scale:g}'}")
    if size[0] * size[1] > LARGEST_IMAGE:
        raise ValueError(f"{op}: size must be of at most {LARGEST_IMAGE:.3g} pixels; got {size[0]} x {size[1]}")
    return PixelGrid((h, w), (int(size[0]), int(size[1])), device), factor


@dataclass(frozen=True)
class PixelOptions:
    """The options of a call as the user gave them, see :meth:`fastroute.PixelRouter.upscale`."""

    scale: float | None = None
    size: tuple[int, int] | None = None
    penalty: float = 0.0
    adaptive: bool = False
    refine: bool = True
    progress: Progress = False
    memory_limit: int | None = None


# The speed of a router at a factor, as estimated now and as measured.
SpeedsAt = Callable[[float], tuple[Speed, Speed]]


def make_request(
    networks: PixelNetworks, shape: Sequence[int], limit: Budget, options: PixelOptions, default: float, speeds: SpeedsAt
) -> Request:
    """Check the arguments of a call for images of `shape` (B, C, h, w).

    Args:
        networks: networks of the router.
        shape: shape of the images.
        limit: what the call may spend.
        options: the other arguments of the call.
        default: upscaling factor if none is given.
        speeds: speeds of the router.

    Raises:
        ValueError: see :meth:`fastroute.PixelRouter.upscale`.
    """
    op, penalty, adaptive = "upscale", options.penalty, options.adaptive
    check_limit(op, options.memory_limit)
    grid, factor = make_grid(shape[2:], options.scale, options.size, networks.device, default)
    if not math.isfinite(real(op, "penalty", penalty)):
        raise ValueError(f"{op}: penalty must be finite; got {penalty}")
    limit.check(op)
    deciding = [*([f"penalty={penalty:g}"] if penalty else []), *(["adaptive"] if adaptive else []), *limit.given]
    if len(deciding) > 1:
        raise ValueError(f"{op}: give one of penalty, adaptive and a budget; got {', '.join(deciding)}")
    if adaptive and networks.num_classes != 2:
        raise ValueError(f"{op}: adaptive needs exactly 2 classes; got {networks.num_classes}; use penalty instead")

    def asked_for(rule: ClassRule, budget: PixelBudget | None) -> Request:
        return Request(grid, rule, budget, options.refine, options.progress, options.memory_limit)

    if limit == Budget() and networks.num_classes == 1:
        return asked_for(ClassRule([1.0], only=0), None)
    if limit == Budget():
        cost = networks.costs.at(factor) if penalty else [1.0] * networks.num_classes
        return asked_for(ClassRule(cost, penalty, adaptive), None)
    everything, samples = Work(), Work()
    for number in range(shape[0]):
        everything += ClassRule([], budgeted=True).work(grid)
        samples += looking_ahead(grid, pixel_rows.waiting_sample(shape[0])) if number else Work()
    return asked_for(*plan(networks, op, limit, everything, samples, factor, speeds))


def plan(
    networks: PixelNetworks,
    op: str,
    limit: Budget,
    work: Work,
    samples: Work,
    factor: float,
    speeds: SpeedsAt,
    seconds: float | None = None,
) -> tuple[ClassRule, PixelBudget | None]:
    """How classes are chosen within a budget, and what their pixels may cost.

    Args:
        networks: networks of the router.
        op: name of the function, for messages.
        limit: the budget.
        work: the work if pixels are classified.
        samples: the work of sampling images whose turn is still to come.
        factor: upscaling factor.
        speeds: speeds of the router.
        seconds: seconds that the samples took. None if they have not been taken, which is unnecessary if there is nothing to
            choose.

    Raises:
        ValueError: an impossible budget.
    """
    pixels, speed, classes = work.pixels, None, range(networks.num_classes)
    if limit.flops is not None:
        flops, cost = networks.flops, networks.flops.costs
        done = 0.0 if seconds is None else flops.fixed(samples)
        least = min(flops.all_in(c, work) for c in classes) + done
        refuse_below(op, "budget_flops", limit.flops, least, f"{least:.4g}")
        most = most_expensive(cost)
        unclassified = limit.flops - done - flops.all_in(most, work) + pixels * cost[most]
        classified = limit.flops - flops.fixed(work + samples)
    elif limit.ms is not None:
        speed, measured = speeds(factor_of(work))
        cost, done = speed.branches, 1e3 * (seconds or 0.0)
        # Decided by the user's cost, not by time: a small network may have been slow when it was measured.
        most, bare = most_expensive(networks.costs.at(factor)), Work(pixels=pixels, encoded=work.features)
        unclassified = limit.ms - done - fixed_ms(speed, bare)
        least = min(fixed_ms(s, bare) + pixels * min(s.branches) for s in (speed, measured))
        refuse_below(op, "budget_ms", limit.ms, least, f"{duration(least)} on this device")
        classified = limit.ms - done - fixed_ms(speed, work if seconds is not None else work + samples)
    else:
        cost = networks.costs.at(factor)
        check_possible(cost, limit.fraction)
        most, unclassified = most_expensive(cost), (limit.fraction or 0.0) * max(cost) * pixels
        classified = unclassified
    only = only_class(cost, most, pixels, unclassified, classified)
    if only is not None:
        return ClassRule(cost, only=only), None
    shares = [c / max(cost) for c in cost]
    return ClassRule(shares, budgeted=True), PixelBudget(list(cost), classified, speed, limit.ms or 0.0, 1e3 * (seconds or 0.0))


def only_class(costs: Sequence[float], most: int, pixels: int, unclassified: float, classified: float) -> int | None:
    """The class of all pixels if there is nothing to choose, else None.

    It is the most expensive class if the budget suffices for it everywhere, and the cheapest class if classifying leaves too
    little for any other.

    Args:
        costs: cost of a pixel in each class.
        most: the most expensive class.
        pixels: number of pixels.
        unclassified, classified: what all pixels together may cost if they are not classified, and if they are.
    """
    cheapest = min(range(len(costs)), key=costs.__getitem__)
    if len(costs) == 1 or unclassified >= pixels * max(costs) * (1 - BUDGET_SLACK):
        return most
    return cheapest if classified < pixels * costs[cheapest] else None


def factor_of(work: Work) -> float:
    """The upscaling factor to one decimal, found from the pixels. It decides the speed."""
    return max(round(math.sqrt(work.pixels / max(work.features, 1)), 1), 0.1)
