"""One budget for several images that are not in memory together: all are classified first, then each is upscaled."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastroute._contexts import CallLock, ordinarily
from fastroute.budget.limits import Budget, assign_within, check_possible, duration, refuse_below
from fastroute.grid import TileGrid
from fastroute.ops import _checks as check
from fastroute.patch.assignment import score_image
from fastroute.patch.classify import Scores
from fastroute.patch.patch_router import PatchRouter
from fastroute.patch.regions import Merging, assign_merged
from fastroute.pixel.pixel_budget import PixelBudget, WaitingImage
from fastroute.pixel.pixel_image import PixelImage
from fastroute.pixel.pixel_router import PixelRouter
from fastroute.pixel.pixel_rows import PixelGrid, waiting_sample
from fastroute.pixel.pixel_stats import Work
from fastroute.pixel.request import ClassRule, Request, looking_ahead, make_grid, plan
from fastroute.runtime.border import refuse_edge
from fastroute.runtime.endpoints import home
from fastroute.runtime.memory_plan import check_limit
from fastroute.runtime.progress import Progress
from fastroute.runtime.results import Stopwatch, Upscaled
from fastroute.runtime.rows import TensorSource


class SharedBudget(ABC):
    """A budget that several images share.

    Call `look` for each image, `settle` once, and `upscale` for each image again, in the same order.

    Args:
        limit: the budget of all images.
        op: name of the function, for messages.
    """

    def __init__(self, limit: Budget, op: str) -> None:
        self.limit, self.op, self.lock = limit, op, CallLock()

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the networks."""

    @abstractmethod
    def look(self, image: Tensor) -> None:  # [B, C, H, W] or [C, H, W]
        """Record the classifier's scores of the next image."""

    @abstractmethod
    def settle(self) -> None:
        """Called after all images have been classified.

        Raises:
            ValueError: the images need more than the budget.
        """

    @abstractmethod
    def upscale(self, number: int, image: Tensor) -> Upscaled:  # [B, C, H, W] or [C, H, W]
        """Upscale image number `number`, in the order of `look`, within its part of the budget."""


class SharedPatchBudget(SharedBudget):
    """For a patch router: the scores of all patches are kept, and all classes are known when the first image is upscaled."""

    def __init__(self, router: PatchRouter, limit: Budget, op: str, **options: Any) -> None:
        super().__init__(limit, op)
        if router.classifier is None:
            raise ValueError(f"{op}: this router has no classifier, by which a budget could be shared")
        # This refuses an impossible budget before anything is read.
        check_possible(router.costs, limit.fraction)
        check_limit(op, options.get("memory_limit"))
        self.router, self.options, self.dtype, self.classifier = router, options, torch.uint8, router.classifier
        self.sizes: list[tuple[int, int, int]] = []
        self.grids: list[TileGrid] = []
        self.scores: list[Tensor] = []
        self.flops: list[int] = []
        self.seconds: list[float] = []
        self.maps: list[Tensor] = []

    @property
    def device(self) -> torch.device:
        """See :class:`SharedBudget`."""
        return self.router.device

    @ordinarily
    @torch.inference_mode()
    def look(self, image: Tensor) -> None:  # [B, C, H, W] or [C, H, W]
        """See :class:`SharedBudget`."""
        router = self.router
        pixels = check.images(self.op, image, router.channels, home(image, router.device), bounded=router.bounded)
        grid = router.grid(*pixels.shape[2:])
        watch = Stopwatch(router.device)
        found = score_image(self.classifier, TensorSource(pixels, router.device), grid, router.num_classes)
        self.add(pixels.shape[0], grid, found, watch.finish()["total"])
        self.dtype = image.dtype

    def add(self, images: int, grid: TileGrid, found: Scores, seconds: float = 0.0) -> None:
        """Record scores that :meth:`look` has found, perhaps in another process.

        Args:
            images: number of images of the batch.
            grid: where their patches lie.
            found: the scores of their patches.
            seconds: time that this took.
        """
        self.seconds.append(seconds)
        self.sizes.append((images, grid.rows, grid.cols))
        self.grids.append(grid)
        self.scores.append(found.score)
        self.flops.append(found.flops)

    @ordinarily
    def settle(self) -> None:
        """See :class:`SharedBudget`."""
        classes = self._classes(torch.cat(self.scores)) if self.scores else torch.empty(0)
        self.maps = list(classes.split([len(score) for score in self.scores]))
        self.scores = []

    def _classes(self, score: Tensor) -> Tensor:  # [N, K] -> [N]
        router, limit, number = self.router, self.limit, score.shape[0]
        if limit.flops is not None:
            least = self._dense() * min(router.flop_costs) + sum(self.flops)
            refuse_below(self.op, "budget_flops", limit.flops, least, f"{least:.4g}")
            return self._within(score, router.flop_costs, limit.flops - sum(self.flops))
        if limit.ms is not None:
            speed = router.speed(self.dtype)
            fixed = 1e3 * sum(self.seconds) + number * speed.rest
            speeds, whole = (speed, router.speeds.measured(speed)), self._dense()
            least = min(whole * min(p.branches) + number * (p.rest + p.classify) for p in speeds)
            refuse_below(self.op, "budget_ms", limit.ms, least, f"{duration(least)} on this device")
            return self._within(score, speed.branches, limit.ms - fixed)
        return self._within(score, router.costs, (limit.fraction or 0.0) * self._dense() * max(router.costs))

    def _mergings(self) -> list[Merging]:
        return [Merging(grid, self.router.merge) for grid in self.grids]

    def _dense(self) -> float:
        """The area of all images as they run in one class, in patches."""
        return sum(size[0] * merging.patches() for size, merging in zip(self.sizes, self._mergings(), strict=True))

    def _within(self, score: Tensor, costs: Sequence[float], allowed: float) -> Tensor:  # [N, K] -> [N]
        """Classes for all images whose regions cost at most `allowed`."""
        if self.router.merge == 1:
            return assign_within(score, costs, allowed)
        numbers, mergings = [size[0] * size[1] * size[2] for size in self.sizes], self._mergings()

        def spent(ids: Tensor) -> Tensor:  # [N]
            parts = ids.split(numbers)
            return torch.stack([merging.spent(part, costs) for part, merging in zip(parts, mergings, strict=True)]).sum()

        return assign_merged(score, costs, allowed, spent)

    @ordinarily
    def upscale(self, number: int, image: Tensor) -> Upscaled:  # [B, C, H, W] or [C, H, W]
        """See :class:`SharedBudget`."""
        class_map = self.maps[number].view(self.sizes[number])
        class_map = class_map if image.ndim == 4 else class_map[0]
        result = self.router.upscale(image, class_map=class_map, promote=True, **self.options)
        stats, taken = result.stats, self.seconds[number]
        done = dataclasses.replace(stats.flops, routed=stats.flops.routed + self.flops[number])
        times = {**stats.seconds, "classify": taken, "total": stats.seconds["total"] + taken}
        return dataclasses.replace(result, stats=dataclasses.replace(stats, flops=done, seconds=times))


class SharedPixelBudget(SharedBudget):
    """For a pixel router: a sample of the scores of every image is kept, and each image is encoded twice.

    Args:
        count: about how many images there are. If they are few, larger samples are taken.
        scale: upscaling factor.
    """

    def __init__(
        self, router: PixelRouter, limit: Budget, op: str, count: int, scale: float | None = None, refine: bool = True,
        memory_limit: int | None = None, progress: Progress = False,
    ) -> None:  # fmt: skip
        super().__init__(limit, op)
        check_limit(op, memory_limit)
        # This refuses an impossible scale, for images of any size, before anything is read.
        factor = make_grid((1 << 16, 1 << 16), scale, None, router.device, router.scale)[1]
        if limit.fraction is not None:
            check_possible(router.class_cost(factor), limit.fraction)
        self.router, self.scale, self.refine, self.factor = router, scale, refine, factor
        self.memory_limit, self.progress, self.sample = memory_limit, progress, waiting_sample(count)
        self.shapes: list[tuple[int, ...]] = []
        self.first: list[int] = []
        self.looks: list[Work] = []
        self.seconds: list[dict[str, float]] = []
        self.waiting: list[WaitingImage] = []
        self.dtype, self.rule = torch.uint8, ClassRule([1.0], budgeted=True)
        self.budget: PixelBudget | None = None

    @property
    def device(self) -> torch.device:
        """See :class:`SharedBudget`."""
        return self.router.device

    @ordinarily
    @torch.inference_mode()
    def look(self, image: Tensor) -> None:  # [B, C, H, W] or [C, H, W]
        """See :class:`SharedBudget`."""
        router, watch = self.router, Stopwatch(self.device)
        images = check.images(self.op, image, router.channels, home(image, self.device), "h, w")
        grid = self._grid(images)
        request, source = Request(grid, self.rule), TensorSource(images, self.device)
        number, work = len(self.waiting), Work()
        for n in range(images.shape[0]):
            keep = grid.overlapping or not router.memory.in_bands
            sample = PixelImage(router.networks, source, n, request, keep, watch).look(self.sample, hold=False)
            self.waiting.append(WaitingImage(number + n, self.rule.work(grid), sample))
            work += looking_ahead(grid, self.sample) + Work(encoded=grid.lr[0] * grid.lr[1])
        self.seconds.append(watch.finish())
        self.dtype = images.dtype
        self.shapes.append(tuple(image.shape))
        self.first.append(number)
        self.looks.append(work)

    @ordinarily
    def settle(self) -> None:
        """See :class:`SharedBudget`."""
        if not self.waiting:
            return
        work = sum((image.work for image in self.waiting), start=Work())
        looks = sum(self.looks, start=Work())
        taken = sum(seconds["total"] for seconds in self.seconds)
        self.rule, self.budget = plan(
            self.router.networks,
            self.op,
            self.limit,
            work,
            looks,
            self.factor,
            partial(self.router.speeds_at, self.dtype),
            taken,
        )
        if self.budget is not None:
            self.budget.waiting = self.waiting

    @ordinarily
    def upscale(self, number: int, image: Tensor) -> Upscaled:  # [B, C, H, W] or [C, H, W]
        """See :class:`SharedBudget`."""
        if tuple(image.shape) != self.shapes[number]:
            what = f"{self.shapes[number]} when it was looked at; got {tuple(image.shape)}"
            raise ValueError(f"{self.op}: image {number + 1} was {what}")
        images = check.images(self.op, image, self.router.channels, home(image, self.device), "h, w")
        request = Request(
            self._grid(images), self.rule, self.budget, self.refine, self.progress, self.memory_limit, self.first[number], True
        )
        result = self.router.answer(images, request)
        if self.budget is not None:
            self.budget.before += 1e3 * result.stats.seconds["total"]
        if image.ndim == 3:
            result = dataclasses.replace(result, image=result.image[0], class_map=result.class_map[0])
        stats, before = result.stats, self.seconds[number]
        times = {name: seconds + before.get(name, 0.0) for name, seconds in stats.seconds.items()}
        done = dataclasses.replace(stats.flops, routed=stats.flops.routed + self.router.flops.fixed(self.looks[number]))
        return dataclasses.replace(result, stats=dataclasses.replace(stats, flops=done, seconds=times))

    def _grid(self, images: Tensor) -> PixelGrid:  # [B, C, h, w]
        return make_grid(images.shape[2:], self.scale, None, self.device, self.router.scale)[0]


def share_budget(router: PatchRouter | PixelRouter, limit: Budget, count: int, op: str, **options: Any) -> SharedBudget:
    """One budget for several images.

    Args:
        router: a router with a classifier.
        limit: the budget of all images.
        count: about how many images there are.
        op: name of the function, for messages.
        options: `memory_limit` and `progress` of the router's `upscale`; for a pixel router also `scale` and `refine`.

    Raises:
        ValueError: there is no budget, it is impossible, or the router cannot share it.
    """
    limit.check(op)
    if not isinstance(router, PatchRouter | PixelRouter):
        raise ValueError(
            f"{op}: networks over regions have no classifier, by which a budget could be shared; give each image one"
        )
    refuse_edge(op, router)
    if limit == Budget():
        raise ValueError(f"{op}: give one of budget, budget_flops and budget_ms")
    if isinstance(router, PixelRouter):
        return SharedPixelBudget(router, limit, op, count, **options)
    scale = options.pop("scale", None)
    if scale is not None and scale != router.scale:
        raise ValueError(f"{op}: scale must be that of the branches, {router.scale}; got {scale:g}")
    if not options.pop("refine", True):
        raise ValueError(f"{op}: refine is for a router of pixels")
    return SharedPatchBudget(router, limit, op, **options)
