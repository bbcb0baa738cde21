"""Several images under one budget."""

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
    """Super-resolve several images under one budget, which is spent where it helps most.

    All images are classified first, then they share the budget, then they are super-resolved one by one. So each image is read
    twice, and one at a time is in memory; of the others only class scores are kept: of a router of patches all, of one of
    pixels those of a sample of rows. The latter encodes each image twice; what an image spent more or less than its sample said
    is made good by those after it, and the budget is kept.

    Args:
        router: with a classifier.
        images: each a tensor as `upscale` takes it, a file, or a function without arguments that gives a tensor, called
            twice; a folder is ``fastroute.io.list_images(folder)``. Sizes may differ.
        budget: FLOPs of the chosen classes over all images, as a fraction of what the most expensive class takes for all of
            them, as `upscale` takes it.
        budget_flops: instead: FLOPs of all images together, as their `stats.flops` count them.
        budget_ms: instead: milliseconds of all images together, without reading them; see `upscale` of the router.
        progress: show a progress bar, or call this function with how many images are done and how many there are, each counted
            twice: once when it was classified.
        scale, refine: see :meth:`fastroute.PixelRouter.upscale`.
        memory_limit: see `upscale` of the router.

    Returns:
        An iterator over one :class:`fastroute.Upscaled` per image, in their order; the work is done as it is asked for.

    Raises:
        ValueError: no images, not exactly one budget, an impossible one, or a router without a classifier.
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
