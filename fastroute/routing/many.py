"""Several images under one budget."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastroute import io
from fastroute.grid import TileGrid
from fastroute.ops import _checks as check
from fastroute.ops.assign_classes import assign_classes
from fastroute.profiling import RoutedFlops
from fastroute.routing.budgets import Budget, assign_within, refuse_below
from fastroute.routing.choose import score_patches
from fastroute.routing.patch_router import PatchRouter
from fastroute.routing.result import Upscaled
from fastroute.streaming.ends import home
from fastroute.streaming.rows import TensorSource

Image = Tensor | str | Path | Callable[[], Tensor]


def upscale_many(
    router: PatchRouter,
    images: Sequence[Image],
    budget: float | None = None,
    budget_flops: float | None = None,
    budget_ms: float | None = None,
    progress: bool = False,
) -> Iterator[Upscaled]:
    """Super-resolve several images under one budget, which is spent where it helps most.

    All images are classified first, then their patches share the budget, then they are super-resolved one by one. So each image
    is read twice, and one at a time is in memory; of the others only the class scores are kept.

    Args:
        router: with a classifier.
        images: each a tensor as `upscale` takes it, a file, or a function without arguments that gives a tensor, called
            twice; a folder is ``fastroute.io.list_images(folder)``. Sizes may differ.
        budget: mean FLOPs of the chosen branches over all patches of all images, as a fraction of the dearest branch's.
        budget_flops: instead: FLOPs of all images together, branches and classifier.
        budget_ms: instead: milliseconds of all images together, without reading them; see `PatchRouter.upscale`.
        progress: show a progress bar.

    Returns:
        An iterator over one :class:`fastroute.Upscaled` per image, in their order; the work is done as it is asked for.

    Raises:
        ValueError: no images, not exactly one budget, an impossible one, or a router without a classifier.
    """
    op = "upscale_many"
    limit = Budget(budget, budget_flops, budget_ms)
    limit.check(op)
    if limit == Budget():
        raise ValueError(f"{op}: give one of budget, budget_flops and budget_ms")
    if not len(images):
        raise ValueError(f"{op}: images must hold at least one image; got none")
    if router.classifier is None:
        raise ValueError(f"{op}: this router has no classifier, by which a budget could be shared")
    # Refuses an impossible budget before anything is read.
    assign_classes(torch.ones(1, router.num_classes), router.costs, budget=limit.fraction)
    return _upscale_many(router, images, limit, progress)


def _upscale_many(router: PatchRouter, images: Sequence[Image], limit: Budget, progress: bool) -> Iterator[Upscaled]:
    sizes, scores, flops, seconds, dtype = [], [], [], [], torch.uint8
    for item in tqdm(images, desc="classify", unit="image", disable=not progress):
        image = _read(item)
        pixels = check.images("upscale_many", image, router.channels, home(image, router.device))
        source, dtype = TensorSource(pixels, router.device), image.dtype
        grid = TileGrid(pixels.shape[2], pixels.shape[3], router.patch, router.stride, router.scale)
        begin = time.perf_counter()
        with torch.inference_mode():
            found = score_patches(router, source, grid)
        seconds.append(time.perf_counter() - begin)
        sizes.append((pixels.shape[0], grid.rows, grid.cols))
        scores.append(found.score)
        flops.append(found.flops)
    maps = _share(router, torch.cat(scores), limit, sum(flops), sum(seconds), dtype).split([len(score) for score in scores])
    entries = zip(images, sizes, maps, flops, seconds, strict=True)
    for item, size, class_ids, classifier, taken in tqdm(
        entries, total=len(images), desc="upscale", unit="image", disable=not progress
    ):
        image = _read(item)
        class_map = class_ids.view(size)
        result = router.upscale(image, class_map=class_map if image.ndim == 4 else class_map[0])
        stats = result.stats
        done = RoutedFlops(stats.flops.routed + classifier, stats.flops.dense)
        times = {**stats.seconds, "classify": taken, "total": stats.seconds["total"] + taken}
        yield dataclasses.replace(result, stats=dataclasses.replace(stats, flops=done, seconds=times))


def _share(router: PatchRouter, score: Tensor, limit: Budget, flops: int, seconds: float, dtype: torch.dtype) -> Tensor:  # [N]
    """Classes of the patches of all images."""
    number = score.shape[0]
    if limit.flops is not None:
        least = number * min(router.flop_costs) + flops
        refuse_below("upscale_many", "budget_flops", limit.flops, least, f"{least:.4g}")
        return assign_within(score, router.flop_costs, limit.flops - flops)
    if limit.ms is not None:
        pace = router.paces.of(router, dtype)
        fixed = 1e3 * seconds + number * pace.rest
        least = fixed + number * min(pace.branches)
        refuse_below("upscale_many", "budget_ms", limit.ms, least, f"{least:.3g} ms on this device")
        return assign_within(score, pace.branches, limit.ms - fixed)
    return assign_classes(score, router.costs, budget=limit.fraction)


def _read(image: Image) -> Tensor:
    if isinstance(image, (str, Path)):
        return io.read_image(image)
    return image() if callable(image) else image
