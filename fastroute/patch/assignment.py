"""The class of every patch: by the classifier alone, or within a budget of cost, FLOPs or time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastroute.budget.limits import Budget, assign_within, check_possible, duration, most_expensive, refuse_below
from fastroute.budget.speed import Speed
from fastroute.grid import TileGrid
from fastroute.ops import _checks as check
from fastroute.ops.assign_classes import assign_classes
from fastroute.patch.bands import Band
from fastroute.patch.classify import Scores, classify_patches
from fastroute.patch.regions import Merging, assign_merged
from fastroute.runtime.progress import Progress
from fastroute.runtime.results import Stopwatch
from fastroute.runtime.rows import Source


@dataclass(frozen=True)
class PatchCosts:
    """The cost of a patch in each class.

    Attributes:
        own: cost in the user's unit, which fractions and penalties refer to.
        flops: cost in FLOPs.
    """

    own: list[float]
    flops: list[float]


@dataclass(frozen=True)
class ClassRequest:
    """Validated arguments by which a call of :class:`fastroute.PatchRouter` chooses classes.

    Attributes:
        limit: what the call may spend.
        penalty: exponent of the cost, if there is no budget.
        class_map: given classes, (B, rows, cols) or (rows, cols), which overrule the others.
        speed: milliseconds of a patch in each class, if `limit` is in milliseconds.
    """

    limit: Budget
    penalty: float = 0.0
    class_map: Tensor | None = None
    speed: Speed | None = None

    def unit_costs(self, costs: PatchCosts) -> list[float]:
        """The cost of a patch in each class, in the unit of the limit."""
        if self.speed is not None:
            # The run will correct the times, but is planned by the present ones.
            return list(self.speed.branches)
        return costs.own if self.limit.flops is None else costs.flops


@dataclass(frozen=True)
class PatchCall:
    """Validated arguments of a :class:`PatchRouter` call.

    Attributes:
        merging: the grid of the images, and how its patches run in regions.
        classes: how classes are chosen.
        memory_limit: the largest number of bytes to hold, or None for no limit.
        progress: see :meth:`PatchRouter.upscale`.
        bands: the bands of a section, which are those of the image of which it is a part; None for images as a whole.
    """

    merging: Merging
    classes: ClassRequest
    memory_limit: int | None = None
    progress: Progress = False
    bands: list[Band] | None = None


def check_request(
    limit: Budget,
    penalty: float,
    class_map: Tensor | None,  # [B, rows, cols] or [rows, cols]
    merging: Merging,
    images: int,
    costs: PatchCosts,
    classifies: bool,
) -> None:
    """Refuse arguments of `upscale` that exclude each other or cannot be kept, before anything runs.

    Args:
        limit, penalty, class_map: the arguments.
        merging: the grid and how its patches merge.
        images: number of images.
        costs: cost of a patch in each class.
        classifies: whether the router has a classifier.

    Raises:
        ValueError, TypeError: see :meth:`fastroute.PatchRouter.upscale`.
    """
    op, grid = "upscale", merging.grid
    limit.check(op, penalty)
    if class_map is not None:
        if limit != Budget() or penalty != 0:
            raise ValueError(f"{op}: give either class_map or budget and penalty")
        check.tensor(op, "class_map", class_map)
        check.dtype(op, "class_map", class_map.dtype, (*check.INDEX, torch.uint8))
        shape = (images, grid.rows, grid.cols)
        if tuple(class_map.shape) not in ((shape[1:], shape) if images == 1 else (shape,)):
            raise ValueError(f"{op}: class_map must be {shape} for this image; got {tuple(class_map.shape)}")
        return
    check_possible(costs.own, limit.fraction, penalty)
    if not classifies and limit.fraction != 1 and len(costs.own) > 1:
        raise ValueError(f"{op}: this router has no classifier; give a class_map or budget=1")
    if limit.flops is not None:
        least = images * merging.patches() * min(costs.flops)
        refuse_below(op, "budget_flops", limit.flops, least, f"{least:.4g}")


def check_least_time(limit_ms: float, speeds: Sequence[Speed], images: int, merging: Merging) -> None:
    """Refuse a budget of milliseconds that is less than the cheapest class takes.

    Args:
        limit_ms: the budget.
        speeds: speed of the router as it is estimated now, and as it was measured.
        images: number of images.
        merging: the grid and how its patches merge.

    Raises:
        ValueError: the budget is too small.
    """
    number, whole = images * merging.grid.num_patches, images * merging.patches()
    classify = [s.classify if len(s.branches) > 1 else 0.0 for s in speeds]
    least = min(whole * min(s.branches) + number * (s.rest + c) for s, c in zip(speeds, classify, strict=True))
    refuse_below("upscale", "budget_ms", limit_ms, least, f"{duration(least)} on this device")


def assign_patches(
    classifier: nn.Module | None, source: Source, merging: Merging, request: ClassRequest, costs: PatchCosts, watch: Stopwatch
) -> tuple[Tensor, int]:  # [N]
    """Classes of all patches, and the FLOPs of the classifier.

    Raises:
        ValueError: the budget of FLOPs is less than the classifier and the cheapest class take.
    """
    if request.class_map is not None:
        return request.class_map.reshape(-1).to(source.device, torch.int64), 0
    limit, speed, unit = request.limit, request.speed, request.unit_costs(costs)
    number = source.shape[0] * merging.grid.num_patches
    if (only := only_class(request, costs, source.shape[0], merging)) is not None:
        return torch.full((number,), only, dtype=torch.int64, device=source.device), 0
    with watch.stage("classify"):
        scores = score_image(classifier, source, merging.grid, len(unit))
    with watch.stage("assign"):
        if limit.ms is not None and speed is not None:
            # The classifier may still be running.
            spent = 1e3 * (watch.elapsed() - watch.seconds.get("tune", 0.0))
            return within(scores.score, unit, limit.ms - spent - number * speed.rest, merging), scores.flops
        return assign_scores(scores, source.shape[0], merging, request, costs), scores.flops


def only_class(request: ClassRequest, costs: PatchCosts, images: int, merging: Merging) -> int | None:
    """The class of all patches if there is nothing to choose, so that none needs to be classified; else None."""
    limit, unit = request.limit, request.unit_costs(costs)
    whole, number = images * merging.patches(), images * merging.grid.num_patches
    if len(unit) > 1 and not affords_all(limit, whole, number, unit, request.speed):
        return None
    # Decided by the user's cost, not by time: a small network may have been slow when it was measured.
    return most_expensive(costs.own if limit.flops is None else unit)


def assign_scores(scores: Scores, images: int, merging: Merging, request: ClassRequest, costs: PatchCosts) -> Tensor:  # [N]
    """Classes of all patches by their scores, within a budget that is no time.

    Raises:
        ValueError: the budget of FLOPs is less than the classifier and the cheapest class take.
    """
    limit, unit = request.limit, request.unit_costs(costs)
    whole = images * merging.patches()
    if limit.fraction is not None and merging.merge > 1:
        return within(scores.score, unit, limit.fraction * whole * max(unit), merging)
    if limit.flops is not None:
        least = whole * min(unit) + scores.flops
        refuse_below("upscale", "budget_flops", limit.flops, least, f"{least:.4g}")
        return within(scores.score, unit, limit.flops - scores.flops, merging)
    return assign_classes(scores.score, unit, request.penalty, limit.fraction)


def within(score: Tensor, costs: Sequence[float], allowed: float, merging: Merging) -> Tensor:  # [N, K] -> [N]
    """Classes that cost at most `allowed` as they run, in regions."""
    if merging.merge == 1:
        return assign_within(score, costs, allowed)
    return assign_merged(score, costs, allowed, lambda ids: merging.spent(ids, costs))


def score_image(classifier: nn.Module | None, source: Source, grid: TileGrid, num_classes: int) -> Scores:
    """The scores that `classifier` gives all patches.

    Raises:
        ValueError: there is no classifier, or the number of its scores is not `num_classes`.
    """
    if classifier is None:
        raise ValueError("upscale: this router has no classifier; give a class_map or budget=1")
    scores = classify_patches(classifier, source, grid)
    if scores.score.shape[1:] != (num_classes,):
        raise ValueError(
            f"upscale: the classifier must give one score per branch, {num_classes}; got {tuple(scores.score.shape[1:])}"
        )
    return scores


def affords_all(limit: Budget, whole: float, number: int, costs: Sequence[float], speed: Speed | None) -> bool:
    """Whether every patch may have the most expensive class, so that none needs to be classified.

    Args:
        limit: what may be spent.
        whole: area of all patches as they run in one class, in patches.
        number: number of patches.
        costs, speed: cost and speed of a patch.
    """
    if limit.flops is not None:
        return limit.flops >= whole * max(costs)
    if limit.ms is not None and speed is not None:
        return limit.ms >= whole * max(costs) + number * speed.rest
    return limit.fraction == 1
