"""`upscale_many`: several images that share one budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from fastroute import buffers, io
from fastroute.budget.limits import Budget
from fastroute.files.shared_budget import SharedBudget, share_budget
from fastroute.patch.patch_router import PatchRouter
from fastroute.pixel.pixel_router import PixelRouter
from fastroute.runtime.progress import Progress, shown
from fastroute.runtime.results import Upscaled

Image = Tensor | str | Path | Callable[[], Tensor]


def upscale_many(
    router: PatchRouter | PixelRouter,
    images: Sequence[Image],
    budget: float | None = None,
    budget_flops: float | None = None,
    budget_ms: float | None = None,
    progress: Progress = False,
    scale: float | None = None,
    refine: bool = True,
    memory_limit: int | None = None,
) -> Iterator[Upscaled]:
    """Super-resolve several images that share one budget, which is spent where it helps most.

    All images are classified first, then the budget is divided, then the images are super-resolved one by one. So each image is
    read twice, and only one at a time is in memory. Of the others only class scores are kept: all scores with a patch router,
    those of a sample of rows with a pixel router. A pixel router encodes each image twice. If an image spends more or less than
    its sample predicted, the images after it make up for that, and the budget is kept.

    Args:
        router: a router with a classifier.
        images: tensors as `upscale` takes them, files, or functions without arguments that return a tensor and are called
            twice. For a folder, use ``fastroute.io.list_images(folder)``. Sizes may differ.
        budget: FLOPs of the chosen classes for all images, as a fraction of what the most expensive class takes for all of
            them, as in `upscale`.
        budget_flops: instead of `budget`, FLOPs of all images together, as their `stats.flops` count them.
        budget_ms: instead of `budget`, milliseconds of all images together, without reading them; see `upscale` of the router.
        progress: show a progress bar, or call this function with the number of images done and the number of all images. Each
            image counts twice: when it has been classified and when it has been upscaled.
        scale, refine: see :meth:`fastroute.PixelRouter.upscale`.
        memory_limit: see `upscale` of the router.

    Returns:
        An iterator over one :class:`fastroute.Upscaled` per image, in their order. The work is done as it advances.

    Raises:
        ValueError: there are no images, not exactly one budget, an impossible one, or a router without a classifier.
        MemoryError, torch.OutOfMemoryError: memory ran out; the message says what to do.
    """
    op = "upscale_many"
    if not len(images):
        raise ValueError(f"{op}: images must hold at least one image; got none")
    limit = Budget(budget, budget_flops, budget_ms)
    options = {"scale": scale, "refine": refine, "memory_limit": memory_limit}
    return _upscale_many(share_budget(router, limit, len(images), op, **options), images, progress)


def _upscale_many(shared: SharedBudget, images: Sequence[Image], progress: Progress) -> Iterator[Upscaled]:
    remedy = "give a smaller memory_limit, or smaller images"
    with shown(progress, 2 * len(images), "image") as bar, buffers.explained("upscale_many", remedy):
        for image in images:
            shared.look(_read(image))
            bar.update()
        shared.settle()
        for number, image in enumerate(images):
            result = shared.upscale(number, _read(image))
            bar.update()
            yield result


def _read(image: Image) -> Tensor:
    if isinstance(image, (str, Path)):
        return io.read_image(image)
    return image() if callable(image) else image
