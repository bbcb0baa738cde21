"""Which class every patch gets: by the classifier alone, or within a budget of cost, FLOPs or time."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastroute.budget.limits import RUNS, Budget, Pace, Paces, assign_within, dearest, duration, noise, refuse_below
from fastroute.grid import TileGrid
from fastroute.ops.assign_classes import assign_classes
from fastroute.patch.classify import Scores, classify_patches
from fastroute.patch.regions import Merging, assign_merged
from fastroute.runtime.devices import on_device
from fastroute.runtime.results import RoutingStats, Stopwatch
from fastroute.runtime.rows import Source, TensorSource
from fastroute.runtime.tuning import tuning_key

if TYPE_CHECKING:
    from fastroute.patch.patch_router import PatchRouter

# Columns of the picture on which the speed is measured, and patches that it has at least: a GPU is busy with a band of them.
COLUMNS = 8
PATCHES = {"cpu": 16, "cuda": 1024}


class PatchPaces(Paces):
    """The speed of a router of patches for every type of image, device and number of threads."""

    def of(self, router: PatchRouter, dtype: torch.dtype) -> Pace:
        """What a patch of an image of `dtype` takes now; measured on the first call, and remembered."""

        def facts() -> list[object]:
            example = torch.empty(router.networks.size, dtype=router.dtype, device=router.device)
            networks = [tuning_key(n, example) for n in (*router.branches, router.classifier) if n is not None]
            window = router.window if isinstance(router.window, str) else "own"
            return [*networks, router.stride, router.merge, router.scale, router.shuffle, window, dtype, router.networks.batch]

        place = (dtype, router.device, torch.get_num_threads())
        return self.find(place, router.num_classes, facts, lambda: measure_pace(router, dtype))

    def learn(self, router: PatchRouter, dtype: torch.dtype, stats: RoutingStats, branches: dict[int, float]) -> None:
        """What a run says about the speed, once anybody has asked for it.

        Args:
            branches: seconds in the branch of each class.
        """
        pace = self.known.get((dtype, router.device, torch.get_num_threads()))
        if pace is not None:
            seconds = stats.seconds
            rest = seconds["total"] - seconds["tune"] - seconds["classify"] - seconds["branches"]
            each = [branches.get(c, 0.0) for c in range(router.num_classes)]
            pace.learn(stats.work_per_class or stats.patches_per_class, each, seconds["classify"] or None, rest,
                       number=sum(stats.patches_per_class))  # fmt: skip


def choose_classes(
    router: PatchRouter, source: Source, merging: Merging, limit: Budget, penalty: float, watch: Stopwatch
) -> tuple[Tensor, Sequence[float], int]:  # [N]
    """Classes of all patches, what a patch costs in each as far as this limit goes, and the FLOPs of the classifier.

    Raises:
        ValueError: FLOPs that are less than the classifier and the cheapest class take.
    """
    grid = merging.grid
    number, whole = source.shape[0] * grid.num_patches, source.shape[0] * merging.patches()
    pace = None if limit.ms is None else router.paces.of(router, source.dtype)
    # A run corrects the times of its pace.
    costs = list(pace.branches) if pace else router.costs if limit.flops is None else router.flop_costs
    if router.num_classes == 1 or affords_all(limit, whole, number, costs, pace):
        # All patches go to the dearest class: nothing to classify.
        # By its own cost, not by its time: a small network may have been slow when that was measured.
        own = router.costs if limit.flops is None else costs
        return torch.full((number,), dearest(own), device=router.device), costs, 0
    with watch.stage("classify"):
        scores = score_patches(router, source, grid)
    with watch.stage("assign"):
        if pace is not None and limit.ms is not None:
            # The classifier may still be at work.
            spent = 1e3 * (watch.elapsed() - watch.seconds.get("tune", 0.0))
            return within(scores.score, costs, limit.ms - spent - number * pace.rest, merging), costs, scores.flops
        if limit.flops is not None:
            least = whole * min(costs) + scores.flops
            refuse_below("upscale", "budget_flops", limit.flops, least, f"{least:.4g}")
            return within(scores.score, costs, limit.flops - scores.flops, merging), costs, scores.flops
        if limit.fraction is not None and merging.merge > 1:
            allowed = limit.fraction * whole * max(costs)
            return within(scores.score, costs, allowed, merging), costs, scores.flops
        return assign_classes(scores.score, costs, penalty, limit.fraction), costs, scores.flops


def within(score: Tensor, costs: Sequence[float], allowed: float, merging: Merging) -> Tensor:  # [N, K] -> [N]
    """Classes that cost at most `allowed` as they run."""
    if merging.merge == 1:
        return assign_within(score, costs, allowed)
    return assign_merged(score, costs, allowed, lambda ids: merging.spent(ids, costs))


def score_patches(router: PatchRouter, source: Source, grid: TileGrid) -> Scores:
    """What the router's classifier says of all patches.

    Raises:
        ValueError: it gives another number of scores than there are branches, or there is none.
    """
    if router.classifier is None:
        raise ValueError("upscale: this router has no classifier; give a class_map or budget=1")
    scores = classify_patches(router.classifier, source, grid)
    if scores.score.shape[1:] != (router.num_classes,):
        raise ValueError(
            f"upscale: the classifier must give one score per branch, {router.num_classes}; got {tuple(scores.score.shape[1:])}"
        )
    return scores


def check_least(router: PatchRouter, limit: Budget, images: int, merging: Merging, dtype: torch.dtype) -> None:
    """Refuse FLOPs or milliseconds that `images` images of `dtype` need in any case.

    Raises:
        ValueError: see above; what the classifier adds to the FLOPs is known only when it has run.
    """
    if limit.flops is None and limit.ms is None:
        return
    number, whole = images * merging.grid.num_patches, images * merging.patches()
    if limit.flops is not None:
        least = whole * min(router.flop_costs)
        refuse_below("upscale", "budget_flops", limit.flops, least, f"{least:.4g}")
    if limit.ms is not None:
        pace, classified = router.paces.of(router, dtype), router.num_classes > 1
        paces = (pace, router.paces.measured(pace))
        least = min(whole * min(p.branches) + number * (p.rest + (p.classify if classified else 0.0)) for p in paces)
        refuse_below("upscale", "budget_ms", limit.ms, least, f"{duration(least)} on this device")


def affords_all(limit: Budget, whole: float, number: int, costs: Sequence[float], pace: Pace | None) -> bool:
    """Whether every patch may have the most expensive class, so that none need be classified.

    Args:
        limit: what may be spent.
        whole: patches as they run in one class, by their area.
        number: of patches.
        costs, pace: of a patch.
    """
    if limit.flops is not None:
        return limit.flops >= whole * max(costs)
    if limit.ms is not None and pace is not None:
        return limit.ms >= whole * max(costs) + number * pace.rest
    return limit.fraction == 1


@torch.inference_mode()
def measure_pace(router: PatchRouter, dtype: torch.dtype) -> Pace:
    """The speed of every part of `router` on images of `dtype`, from a picture of noise."""
    device = router.device
    batch = max(router.networks.batch_of(c, device) for c in range(router.num_classes))
    rows = -(-max(batch, on_device(PATCHES, device)) // COLUMNS)
    height, width = (router.patch + (n - 1) * router.stride for n in (rows, COLUMNS))
    image = noise((1, router.channels, height, width), dtype, device)
    number = rows * COLUMNS
    branches: list[list[float]] = [[] for _ in range(router.num_classes)]
    rest = []
    # In turn, so that what slows the machine for a while slows all.
    for run in range(RUNS * router.num_classes):
        c = run % router.num_classes
        stats = router.upscale(image, class_map=torch.full((1, rows, COLUMNS), c, device=device)).stats
        seconds, work = stats.seconds, sum(stats.work_per_class or stats.patches_per_class)
        branches[c].append(seconds["branches"] * number / work)
        rest.append(seconds["total"] - seconds["branches"] - seconds["tune"])
    classify = 0.0
    if router.classifier is not None and router.num_classes > 1:
        source, grid = TensorSource(image, device), TileGrid(height, width, router.patch, router.stride, router.scale)
        times = []
        for _ in range(RUNS):
            watch = Stopwatch(device)
            with watch.stage("classify"):
                score_patches(router, source, grid)
            times.append(watch.finish()["classify"])
        classify = median(times)
    milliseconds = 1e3 / number
    each = [max(median(times), 1e-9) * milliseconds for times in branches]
    return Pace(each, classify * milliseconds, median(rest) * milliseconds)
