"""`warmup`: what the first images would otherwise wait for, done before they come."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastroute._arguments import whole
from fastroute.budget.speed import noise
from fastroute.ops import _checks as check
from fastroute.patch.patch_router import PatchRouter
from fastroute.runtime.kernels import choose_kernels
from fastroute.runtime.router import Router

# The options of a call that choose classes, in the place of which a class map is given.
CHOOSING = ("budget", "budget_flops", "budget_ms", "penalty", "class_map")
# The largest number of images of one class on which the fastest way to run its branch is searched for.
MOST_IMAGES = 64


@dataclass(frozen=True)
class Warmed:
    """The result of :func:`warmup`.

    Attributes:
        images: number of images that were upscaled.
        seconds: time that all of them took.
        measured: for each class of a patch router, whether it is known how its branch runs fastest; empty for other routers.
        kernels: on a GPU, the backend of each operator of which two have kernels: the one that was faster on these images, and
            runs the operator on this GPU from now on, in this process.
    """

    images: int
    seconds: float
    measured: tuple[bool, ...] = ()
    kernels: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        left = [str(c) for c, done in enumerate(self.measured) if not done]
        missing = f"; still to be measured: class {', '.join(left)}" if left else ""
        by = "".join(f"; {op} by {backend}" for op, backend in self.kernels.items())
        return f"{self.images} images in {self.seconds:.1f} s{missing}{by}"


def warmup(router: Router, size: tuple[int, int], *, dtype: torch.dtype = torch.uint8, **options: Any) -> Warmed:
    """Prepare `router` for images of a size, so that the first one does not wait.

    Pictures of noise are upscaled. So Triton and `torch.compile` compile their kernels, which their caches keep, for all
    classes and for mixtures of them; memory is mapped; and the search for the fastest way to run each branch, which otherwise
    takes place on the first images, comes to its end and is kept in `tuning.json`. Under a budget of milliseconds the speed is
    measured too. On a GPU the kernels of CUDA and Triton are compared, operator by operator, and the faster ones used from then
    on, where no backend is requested. Other processes on the same machine find all that is kept when they warm up.

    Args:
        router: any router. An engine that its `compile` has chosen has compiled its programs then; here they run.
        size: (H, W) of the images to come. The search needs images of enough patches for a trial; its outcome holds for all
            sizes.
        dtype: type of the images, uint8, uint16 or floating.
        options: those of the calls to come, such as `budget` or `scale`, see `upscale`.

    Returns:
        :class:`Warmed`, once the device has finished.

    Raises:
        TypeError: `router` is none, or an unsupported dtype.
        ValueError: an impossible size, or options that `upscale` refuses.

    Example:
        >>> router = fastroute.load("classsr-fsrcnn-x4", device="cuda", dtype=torch.float16)
        >>> print(fastroute.warmup(router, (1080, 1920), budget=0.7))
    """
    op = "warmup"
    if not isinstance(router, Router):
        raise TypeError(f"{op}: router must be a router; got {type(router).__name__}")
    height, width = (whole(op, "size", side, 1 << 20) for side in size)
    check.dtype(op, "dtype", dtype, check.FLOATING + check.INTEGER_IMAGE)
    begin, images = time.perf_counter(), 1
    picture = noise((router.channels, height, width), dtype, router.device)
    # The options are refused before anything takes long.
    result = router.upscale(picture, **options)
    measured: tuple[bool, ...] = ()
    if isinstance(router, PatchRouter):
        images += _search(router, picture, {name: value for name, value in options.items() if name not in CHOOSING})
        measured = tuple(router.networks.settled(c, router.device) for c in range(router.num_classes))
    runs = 0

    def run() -> None:
        nonlocal runs
        runs += 1
        router.upscale(picture, **options)

    shapes = [list(x.shape) for x in router.parameters()]
    about = [type(router).__name__, str(router.dtype), shapes, [height, width], str(dtype), sorted(options)]
    kernels = choose_kernels(router.device, run, about)
    for _ in range(2):  # with the settings found; the second image finds memory where the first one left it
        result = router.upscale(picture, **options)
    _ = result.stats.seconds  # waits for the device
    return Warmed(images + runs + 2, time.perf_counter() - begin, measured, kernels)


def _search(router: PatchRouter, picture: Tensor, options: dict[str, Any]) -> int:  # [C, H, W]
    """Upscale `picture` in every class until it is known how its branch runs fastest, and in a mixture of all classes.

    Returns:
        The number of images.
    """
    grid, images = router.grid(*picture.shape[1:]), 0
    like = torch.zeros((grid.rows, grid.cols), dtype=torch.int64, device=router.device)
    for c in range(router.num_classes):
        for _ in range(MOST_IMAGES):
            before = router.networks.trials(c, router.device)
            _ = router.upscale(picture, class_map=like + c, **options).stats.seconds
            images += 1
            # An image of few patches measures nothing, however often it comes.
            if router.networks.trials(c, router.device) <= before:
                break
    # Blocks of one class and of several make regions of all shapes.
    row, column = (torch.arange(n, device=router.device) for n in (grid.rows, grid.cols))
    mixed = (row[:, None] // 2 + column // 3 + (row[:, None] * column // 32)) % router.num_classes
    _ = router.upscale(picture, class_map=mixed, **options).stats.seconds
    return images + 1
