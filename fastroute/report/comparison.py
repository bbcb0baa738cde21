"""Measures bicubic, dense and routed results of an image side by side. :mod:`fastroute.report.comparison_page` shows them."""

from __future__ import annotations

import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastroute import buffers, quality
from fastroute._arguments import real, whole
from fastroute.budget.limits import check_possible
from fastroute.cascades.router import CascadeRouter
from fastroute.degradation import make_pair
from fastroute.loading import load
from fastroute.patch.patch_router import PatchRouter
from fastroute.pixel.pixel_router import PixelRouter
from fastroute.runtime.progress import Progress, shown
from fastroute.runtime.results import RoutingStats, Stopwatch, Upscaled
from fastroute.runtime.tuning import cpu_name
from fastroute.visualize import class_overlay

BICUBIC, DENSE = "bicubic", "dense"
# A picture of differences shows this many times their size.
STRONGER = 8


@dataclass(frozen=True)
class Variant:
    """One result and its cost.

    Attributes:
        name: "bicubic", "MODEL, dense", "MODEL, routed" or "MODEL, budget B".
        image: uint8 (3, H, W).
        seconds: median over the runs, without the measurements of a first call.
        quality: PSNR and SSIM as :func:`fastroute.quality.compare` returns them; empty without a reference.
        stats: statistics of the last run; None for bicubic interpolation.
        class_map: the class map, as in :class:`fastroute.Upscaled`; None if nothing was routed.
        classes: picture of the class map, uint8 (3, H, W).
        dense: the variant of the same model with everything in the most expensive class.
        near: PSNR in dB to `dense`, which is what a cascade is to come near to; infinite where they are equal. None for others.
        difference: picture of the difference between the two, `STRONGER` times as strong, uint8 (3, H, W); None like `near`.
    """

    name: str
    image: Tensor
    seconds: float
    quality: dict[str, float] = field(default_factory=dict)
    stats: RoutingStats | None = None
    class_map: Tensor | None = None
    classes: Tensor | None = None
    dense: Variant | None = None
    near: float | None = None
    difference: Tensor | None = None


@dataclass(frozen=True)
class Comparison:
    """All results of one image, bicubic first, then the models in order, each dense and routed.

    Attributes:
        source: uint8 (3, h, w), the image that was enlarged.
        reference: uint8 (3, H, W), the correct result, if it is known.
        scale: upscaling factor.
        runs: how often each variant was timed.
        device: description of the device.
    """

    source: Tensor
    reference: Tensor | None
    scale: float
    variants: list[Variant]
    runs: int
    device: str


@buffers.explained("compare", "use a smaller image, or cut it")
def compare(
    image: Tensor,  # [3, h, w]
    models: Sequence[str | Path],
    budgets: Sequence[float] = (),
    reference: Tensor | None = None,  # [3, H, W]
    downscale: bool = False,
    scale: float | None = None,
    device: str | torch.device = "cpu",
    runs: int = 3,
    progress: Progress = False,
    dtype: torch.dtype = torch.float32,
    tune: bool = True,
    engine: str = "torch",
) -> Comparison:
    """Super-resolve an image by bicubic interpolation and by every model, dense and routed.

    The variants take turns, round after round, so that whatever slows the machine down slows all of them.

    Args:
        image: uint8 (3, h, w).
        models: names or files, as :func:`fastroute.load` takes them. A network without classes is dense only. Beside the
            network alone, a cascade whose most expensive network it is does not run dense again.
        budgets: route within each of these. Default: the model decides.
        reference: uint8 image of the result's size to compare with.
        downscale: reduce `image` by the factor first. The image, cut to a multiple of the factor, is then the reference.
        scale: upscaling factor, for models that take any (PCSR) or do not state it. Default: that of the others.
        device: device to run on.
        runs: how often to time each variant, after a first run that does not count.
        progress: show a progress bar, or call this function with the number of runs done and the number of all runs.
        dtype: type in which the networks compute, see :func:`fastroute.load`.
        tune: find out on the work how branches run fastest, see :class:`fastroute.PatchRouter`.
        engine: engine that executes the branches, see :meth:`fastroute.PatchRouter.compile`.

    Raises:
        TypeError: an image is not uint8.
        ValueError: an image of another shape or too small, no model, models of different factors, an impossible budget, a
            reference of another size or together with `downscale`, a factor that is not whole with `downscale`, or
            scikit-image is missing where PSNR is needed.
        fastroute.CheckpointError: a model cannot be loaded.
    """
    for name, given in (("image", image), ("reference", reference)):
        if given is None:
            continue
        if given.dtype != torch.uint8:
            raise TypeError(f"compare: {name} must be uint8; got {given.dtype}")
        if given.ndim != 3 or given.shape[0] != 3 or 0 in given.shape:
            raise ValueError(f"compare: {name} must be (3, H, W) with at least one pixel; got {tuple(given.shape)}")
    if not models:
        raise ValueError("compare: models must name at least one model; got none")
    whole("compare", "runs", runs, sys.maxsize)
    budgets = [real("compare", "budgets", budget) for budget in budgets]
    if reference is not None and downscale:
        raise ValueError("compare: give either reference or downscale; with downscale the image itself is the reference")
    routers = {
        name: load(model, device=device, scale=scale, dtype=dtype, tune=tune, engine=engine)
        for name, model in zip(labels(models), models, strict=True)
    }
    factor = common_scale(routers, scale)
    if downscale:
        if factor != int(factor):
            raise ValueError(f"compare: downscale needs a whole factor; got {factor:g}")
        if min(image.shape[1:]) < factor:
            raise ValueError(f"compare: downscale needs an image of at least {factor:g} x {factor:g}; got {shown_size(image)}")
        image, reference = make_pair(image, int(factor))
    height, width = (round(side * factor) for side in image.shape[1:])
    if min(height, width) < 1:
        raise ValueError(
            f"compare: scale must leave at least one pixel; {factor:g} makes {width} x {height} of {shown_size(image)}"
        )
    if reference is not None and tuple(reference.shape[1:]) != (height, width):
        raise ValueError(f"compare: reference must be {width} x {height}, as the result is; got {shown_size(reference)}")
    if reference is not None:
        # Fail early if scikit-image is missing or the image is smaller than SSIM's window.
        least = quality.SSIM_WINDOW + 2 * math.ceil(factor)
        if min(height, width) < least:
            raise ValueError(f"compare: PSNR and SSIM need a result of at least {least} x {least}; got {width} x {height}")
        quality.compare(reference, reference, math.ceil(factor))

    lr = image.to(device)
    calls: dict[str, Callable[[], Upscaled]] = {}
    known = {name: alone_of(routers, name) for name in routers}
    own = {name: choices(router, budgets) for name, router in routers.items()}
    for name in known:
        if known[name] != name:
            del own[name][DENSE]
    for name, router in routers.items():
        for label, options in own[name].items():
            check_budget(router, options.get("budget"), factor, f"{name}, {label}")
            calls[f"{name}, {label}"] = caller(router, lr, factor, options, f"{name}, {label}")
    enlarged = bicubic(lr, (height, width))
    results = {}
    seconds: dict[str, list[float]] = {name: [] for name in (BICUBIC, *calls)}
    with shown(progress, (runs + 1) * len(calls), "run", "compare") as bar:
        for turn in range(runs + 1):
            watch = Stopwatch(lr.device)
            bicubic(lr, (height, width))
            if turn:
                seconds[BICUBIC].append(watch.finish()["total"])
            for name, call in calls.items():
                results[name] = result = call()
                if turn:
                    seconds[name].append(result.stats.seconds["total"] - result.stats.seconds.get("tune", 0.0))
                bar.update()

    def measured(result: Tensor) -> dict[str, float]:
        return {} if reference is None else quality.compare(result.cpu(), reference, math.ceil(factor))

    variants = [Variant(BICUBIC, enlarged.cpu(), statistics.median(seconds[BICUBIC]), measured(enlarged))]
    dense: dict[str, Variant] = {}
    # A cascade that goes without a dense run of its own comes after the network that has it.
    for name in sorted(routers, key=lambda name: known[name] != name):
        router = routers[name]
        for label in own[name]:
            key = f"{name}, {label}"
            result = results.pop(key)
            picture, median = result.image.cpu(), statistics.median(seconds[key])
            if label == DENSE:
                dense[name] = Variant(key, picture, median, measured(picture), result.stats)
                variants.append(dense[name])
                continue
            target = dense[known[name]]
            grid = None
            if isinstance(router, PatchRouter):
                grid = router.grid(*lr.shape[1:])
            class_map, near, difference = result.class_map.cpu(), None, None
            if isinstance(router, CascadeRouter):
                class_map = router.pixel_map(class_map, picture.shape[1:])
                near, difference = nearness(picture, target.image)
            overlay = class_overlay(picture, class_map, grid, router.num_classes)
            found = measured(picture)
            variants.append(Variant(key, picture, median, found, result.stats, class_map, overlay, target, near, difference))
    return Comparison(image, reference, factor, variants, runs, machine(torch.device(device)))


def nearness(image: Tensor, dense: Tensor) -> tuple[float, Tensor]:  # [3, H, W] uint8 twice
    """PSNR in dB of one to the other, and a picture of their difference."""
    # In 8 bits: wider integers would take eight times the memory of the images.
    apart = torch.maximum(image, dense) - torch.minimum(image, dense)
    counts = torch.bincount(apart.flatten().int(), minlength=256).double()
    square = float((counts * torch.arange(256).double().square()).sum() / counts.sum())
    return 10 * math.log10(255**2 / square) if square else math.inf, apart.clamp_(max=255 // STRONGER).mul_(STRONGER)


def alone_of(routers: dict[str, PatchRouter | PixelRouter | CascadeRouter], name: str) -> str:
    """The name of the model that is the most expensive network of cascade `name` alone, or `name`."""
    router = routers[name]
    if not isinstance(router, CascadeRouter) or router.num_classes == 1:
        return name
    weights = router.networks.members[-1].state_dict()
    for other, alone in routers.items():
        if isinstance(alone, CascadeRouter) and alone.num_classes == 1 and weights:
            state = alone.networks.members[0].state_dict()
            if state.keys() == weights.keys() and all(torch.equal(value, weights[key]) for key, value in state.items()):
                return other
    return name


def labels(models: Sequence[str | Path]) -> list[str]:
    """A short name for each model: that of its file without folder and ending, unless two would be equal."""
    short = [Path(model).stem if Path(model).suffix else str(model) for model in models]
    names = [name if short.count(name) == 1 else str(model) for name, model in zip(short, models, strict=True)]
    if len(set(names)) < len(names):
        raise ValueError(f"compare: models must differ; got {', '.join(names)}")
    return names


def machine(device: torch.device) -> str:
    """A description of the device of the times."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{cpu_name() or device.type}, {threads} thread{'s' if threads > 1 else ''}"


def shown_size(image: Tensor) -> str:  # [3, H, W]
    """Width and height as text."""
    return f"{image.shape[2]} x {image.shape[1]}"


def common_scale(routers: dict[str, PatchRouter | PixelRouter | CascadeRouter], scale: float | None) -> float:
    """The common factor of all models: their own, else the requested one, else that for which the first was trained."""
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"compare: scale must be positive and finite; got {scale:g}")
    own = {name: router.scale for name, router in routers.items() if not isinstance(router, PixelRouter)}
    if len({*own.values(), *([] if scale is None else [scale])}) > 1:
        told = ", ".join(f"{name} {factor}" for name, factor in own.items())
        asked = "" if scale is None else f"; asked for was {scale:g}"
        raise ValueError(f"compare: all results must have one size, but the models' factors are {told}{asked}")
    return float(next(iter(own.values()), next(iter(routers.values())).scale if scale is None else scale))


def choices(router: PatchRouter | PixelRouter | CascadeRouter, budgets: Sequence[float]) -> dict[str, dict[str, Any]]:
    """The arguments of `upscale` by the name of the variant, dense first."""
    dense: dict[str, dict[str, Any]] = {DENSE: {"budget": 1.0}}
    undecided = isinstance(router, PatchRouter) and router.classifier is None
    if isinstance(router, CascadeRouter):
        undecided = not budgets and not router.decides
    if router.num_classes == 1 or undecided:
        return dense
    return {**dense, **({f"budget {b:g}": {"budget": b} for b in budgets} or {"routed": {}})}


def check_budget(router: PatchRouter | PixelRouter | CascadeRouter, budget: float | None, scale: float, name: str) -> None:
    """Refuse a budget that `router` cannot keep, before anything runs."""
    costs = router.class_cost(scale) if isinstance(router, PixelRouter) else router.costs
    with named(name):
        check_possible(costs, budget)


@contextmanager
def named(name: str) -> Iterator[None]:
    """Within the block, errors name the variant."""
    try:
        yield
    except ValueError as error:
        # The name of the variant replaces that of the function that refused.
        reason = re.sub(r"^[a-z_]+: ", "", str(error))
        raise ValueError(f"compare: {name}: {reason}") from error


def caller(
    router: PatchRouter | PixelRouter | CascadeRouter, image: Tensor, scale: float, options: dict[str, Any], name: str
) -> Callable[[], Upscaled]:
    """A function without arguments that runs one upscale and whose errors name the variant."""

    def call() -> Upscaled:
        with named(name):
            if not isinstance(router, PixelRouter):
                return router.upscale(image, **options)
            return router.upscale(image, scale=scale, **options)

    return call


def bicubic(image: Tensor, size: tuple[int, int]) -> Tensor:  # [3, h, w] uint8 -> [3, H, W] uint8
    """Bicubic interpolation, rounded to 8 bits."""
    return F.interpolate(image[None].float(), size=size, mode="bicubic")[0].clamp(0, 255).round().to(torch.uint8)
