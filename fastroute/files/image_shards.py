"""One large image that several processes upscale, each a share of its rows, without knowing of each other.

The steps are functions, which another driver may call: `begin`, `classify_blocks`, `agree_on_classes` and `upscale_bands`. What
they hand on to each other lies in :class:`fastroute.files.parts.Parts` beside the result. `upscale_share` runs all of them, and
:func:`fastroute.files.joining.join` makes the result of what they leave. A band is a row of shards of the array that they
write, and a block is as much of a band as is computed at a time: all of it, unless the image is very wide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastroute._contexts import ordinarily
from fastroute.budget.limits import Budget
from fastroute.cascades.router import CascadeRouter
from fastroute.files.arrays import ArrayRows, Layout, create, is_zarr, zarr3
from fastroute.files.file_to_file import whole_limit
from fastroute.files.parts import Parts, runs
from fastroute.files.readers import PictureReader, open_twice
from fastroute.files.shards import Shard
from fastroute.files.writers import ENCODING, ResultWriter, check_result, check_target
from fastroute.io.files import ImageError
from fastroute.io.read import AUTO, OpenPicture
from fastroute.io.write import format_of
from fastroute.patch.assignment import ClassRequest, PatchCosts, assign_scores, check_request, only_class
from fastroute.patch.classify import Scores, block_rows, classifying_flops, score_rows
from fastroute.patch.patch_router import PatchRouter
from fastroute.patch.regions import Merging
from fastroute.pixel.pixel_router import PixelRouter
from fastroute.runtime.border import refuse_edge
from fastroute.runtime.memory_plan import AUTO as AUTO_LIMIT
from fastroute.runtime.memory_plan import Limit, check_limit, limit_on
from fastroute.runtime.progress import Progress, shown
from fastroute.runtime.results import RoutingStats
from fastroute.runtime.rows import ReaderSource

OP = "upscale"
# What the work needs beside the router's share of a limit, in shards: one is cut out, encoded, and compressed.
SHARDS_HELD = 4
# A source is known by this many samples of so many bytes: of a small file all of it.
SAMPLES, SAMPLE = 64, 64 << 10


@dataclass(frozen=True)
class LargeImage:
    """One image and what is asked for, the same in all processes.

    Attributes:
        source, target: paths of the image and of the result.
        limit: what the classes of the whole image may cost: a fraction or FLOPs.
        penalty: exponent of the cost, if there is no budget.
        reading: `max_pixels` and `white`, see :func:`fastroute.io.read_picture`.
        drop_alpha: leave transparency out.
        settings: what else the result depends on, such as the model, by name.
    """

    source: Path
    target: Path
    limit: Budget = field(default_factory=Budget)
    penalty: float = 0.0
    reading: Mapping[str, Any] = field(default_factory=dict)
    drop_alpha: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def opened(self, memory: int | None = None) -> Iterator[tuple[OpenPicture, OpenPicture]]:
        """The picture, opened for the colours and for the transparency, see :func:`fastroute.files.readers.open_twice`."""
        options = {"max_pixels": AUTO, "white": 1.0, **self.reading}
        with open_twice(self.source, **options, memory=memory) as (first, again):
            yield (first.without_alpha(), again.without_alpha()) if self.drop_alpha else (first, again)

    def merging(self, router: PatchRouter, height: int, width: int) -> Merging:
        """The grid of the image, and how its patches merge."""
        return Merging(router.grid(height, width), router.merge)

    @property
    def request(self) -> ClassRequest:
        """How classes are chosen."""
        return ClassRequest(self.limit, self.penalty)


@dataclass(frozen=True)
class ShareDone:
    """What a process has done of one image.

    Attributes:
        written: the number of bands that it has written.
        before: the number of bands of its share that were there already.
        left: the number of bands of the whole image that are missing.
        bands: the number of bands of the whole image.
        stats: of every part of the image that was computed as a whole.
    """

    written: int
    before: int
    left: int
    bands: int
    stats: tuple[RoutingStats, ...] = ()


def check_router(router: PatchRouter | PixelRouter | CascadeRouter) -> PatchRouter:
    """Refuse a router whose work on one image cannot be shared.

    Raises:
        ValueError: it routes no patches, or sees beyond the edge.
    """
    if not isinstance(router, PatchRouter):
        kind = "pixels one after the other" if isinstance(router, PixelRouter) else "regions of the whole image"
        raise ValueError(
            f"{OP}: shards of one image need a model that routes patches, and this one runs on {kind}; upscale the image in "
            "one process"
        )
    refuse_edge(OP, router)
    return router


def begin(image: LargeImage, router: PatchRouter) -> Layout:
    """Make the folder of the parts of the result, unless another process has. Nothing is computed.

    Raises:
        ValueError: an argument is wrong, a file cannot be read or written, or others began with other settings.
        ImportError: zarr 3 is missing.
    """
    check_router(router)
    zarr3()
    check_target(image.target)
    if not is_zarr(image.target) and format_of(image.target) in ENCODING:
        raise ImageError(
            f"cannot write {image.target}: its format is encoded whole; shards of one image go to .zarr, .ome.zarr, .tif or "
            ".png"
        )
    if image.limit.ms is not None:
        raise ValueError(f"{OP}: budget_ms must be left out with shards, whose machines differ; give budget or budget_flops")
    with image.opened() as (opened, again):
        size = router.output_size(opened.height, opened.width)
        check_result(image.target, size, again)
        merging = image.merging(router, opened.height, opened.width)
        costs = PatchCosts(router.costs, router.flop_costs)
        check_request(image.limit, image.penalty, None, merging, 1, costs, router.classifier is not None)
        channels = (1 if opened.kind == "gray" and router.channels == 3 else router.channels) + opened.alpha
        parts = Parts(image.target)
        rows = router.merge * router.stride * router.scale
        layout = Layout.of(image.target, (channels, *size), opened.dtype, rows)
        facts = {
            "source": {"name": image.source.name, "size": [opened.height, opened.width], "content": digest_of(image.source)},
            **image.settings,
            "layout": layout.json(),
            "columns": layout.columns,
        }

        def fill(folder: Path) -> None:
            create(folder / "image", layout)
            reading = {"source": str(image.source.resolve()), "reading": dict(image.reading), "drop_alpha": image.drop_alpha}
            parts.note(folder, "origin", reading)

        parts.begin(facts, fill)
        if not parts.path("image").is_dir():
            raise ValueError(parts.damaged("image is not there"))
    return layout


@ordinarily
@torch.inference_mode()
def classify_blocks(image: LargeImage, router: PatchRouter, shard: Shard, progress: Progress = False) -> None:
    """Store the scores of all patches, by blocks of tile rows, those of the shard first.

    What others have stored by the time its turn comes is left out. So processes that run side by side share the work, and none
    waits for another.
    """
    parts = Parts(image.target)
    with image.opened() as (opened, _):
        reader = PictureReader(opened, router.channels)
        merging = image.merging(router, *reader.shape[1:])
        if parts.path("classes").is_dir() or _only_class(image, router, merging) is not None:
            return
        grid, classifier = merging.grid, router.classifier
        assert classifier is not None  # for the type checker; check_request has seen it
        step, source = block_rows(grid), ReaderSource(reader, router.device)
        blocks = -(-grid.rows // step)
        first = blocks * (shard.number - 1) // shard.count
        with shown(progress, blocks, "block") as bar:
            for block in (*range(first, blocks), *range(first)):
                if not parts.has(_scores(block)):
                    rows = block * step, min((block + 1) * step, grid.rows)
                    parts.put(_scores(block), score_rows(classifier, source, grid, rows).float().cpu().numpy())
                bar.update()


@ordinarily
@torch.inference_mode()
def agree_on_classes(image: LargeImage, router: PatchRouter) -> np.ndarray:  # [rows, cols]
    """The class of every patch, uint8, under one budget over the whole image: those of the first process that has them.

    Raises:
        ValueError: the budget is less than the classifier and the cheapest class take.
    """
    parts = Parts(image.target)
    with image.opened() as (opened, _):
        height, width = opened.height, opened.width
    merging = image.merging(router, height, width)
    grid, costs = merging.grid, PatchCosts(router.costs, router.flop_costs)

    def make() -> np.ndarray:
        only = _only_class(image, router, merging)
        if only is not None:
            return np.full((grid.rows, grid.cols), only, dtype=np.uint8)
        blocks = -(-grid.rows // block_rows(grid))
        score = torch.from_numpy(np.concatenate([parts.get(_scores(block)) for block in range(blocks)]))
        assert router.classifier is not None  # for the type checker
        scores = Scores(score.to(router.device), classifying_flops(router.classifier, router.channels, grid))
        ids = assign_scores(scores, 1, merging, image.request, costs)
        return ids.to("cpu", torch.uint8).view(grid.rows, grid.cols).numpy()

    return parts.agreed("classes", make)


def upscale_bands(
    image: LargeImage,
    router: PatchRouter,
    classes: np.ndarray,  # [rows, cols]
    layout: Layout,
    bands: tuple[int, int],
    memory_limit: Limit = AUTO_LIMIT,
    progress: Progress = False,
) -> list[RoutingStats]:
    """Upscale and store `bands`, the first and one past the last. Every block is noted as done once the disk has it.

    Blocks that are done, of bands that are not, are left out.

    Returns:
        Statistics of every part of the image that was computed as a whole.

    Raises:
        ValueError: another process works on one of them, or `memory_limit` is less than is needed; the message names the least.
    """
    parts, memory_limit, stats = Parts(image.target), limit_on(router.device, memory_limit), []
    with image.opened(memory_limit) as (opened, again), parts.claimed(*bands, "bands"):
        held = opened.held + (again.held if again.pixels is not opened.pixels else 0) + SHARDS_HELD * layout.shard_bytes
        rest = None if memory_limit is None else type(memory_limit)(max(memory_limit - held, 1))
        gray = opened.kind == "gray" and router.channels == 3
        known, before = torch.from_numpy(np.array(classes)), parts.done()
        complete = layout.complete(before)
        for column, columns in enumerate(layout.columns):
            done = partial(_mark, parts, layout, column)
            writer = ResultWriter(ArrayRows(parts.path("image"), layout, done), again, gray, layout.shape[1:])
            there = layout.bands_at(before, column)
            for first, end in runs([band for band in range(*bands) if band in complete or band not in there]):
                with whole_limit(OP, memory_limit, rest):
                    streamed = router.stream(
                        PictureReader(opened, router.channels), writer, class_map=known, promote=True,
                        rows=layout.rows(first, end), columns=columns, progress=progress, memory_limit=rest,
                    )  # fmt: skip
                stats.append(streamed.stats)
    return stats


def upscale_share(
    image: LargeImage,
    router: PatchRouter,
    shard: Shard,
    resume: bool = False,
    memory_limit: Limit = AUTO_LIMIT,
    progress: Progress = False,
) -> ShareDone:
    """The share of one process, from the first step to the last.

    Args:
        image: the image and what is asked for.
        router: its networks.
        shard: the share. Shares are neighbouring bands, and as large as each other, but for a band.
        resume: leave out bands that are done, by whomever.
        memory_limit: see :meth:`fastroute.PatchRouter.stream`.
        progress: see :meth:`fastroute.PatchRouter.upscale`.

    Raises:
        ValueError, ImportError: see the steps. Nothing has been computed then.
    """
    check_limit(OP, limit_on(router.device, memory_limit))
    layout, parts = begin(image, router), Parts(image.target)
    own = range(layout.bands * (shard.number - 1) // shard.count, layout.bands * shard.number // shard.count)
    if not resume and own:
        # The same shard may be running, whose work is not to be forgotten.
        with parts.claimed(own.start, own.stop, "bands"):
            for column in range(len(layout.columns)):
                parts.forget(layout.blocks(own, column))
    before = layout.complete(parts.done())
    todo, stats = [band for band in own if band not in before], []
    if todo:
        classify_blocks(image, router, shard, progress)
        classes = agree_on_classes(image, router)
        for first, end in runs(todo):
            stats += upscale_bands(image, router, classes, layout, (first, end), memory_limit, progress)
    left = layout.bands - len(layout.complete(parts.done()))
    return ShareDone(len(todo), len(own) - len(todo), left, layout.bands, tuple(stats))


def _only_class(image: LargeImage, router: PatchRouter, merging: Merging) -> int | None:
    return only_class(image.request, PatchCosts(router.costs, router.flop_costs), 1, merging)


def _mark(parts: Parts, layout: Layout, column: int, bands: Sequence[int]) -> None:
    """Note that the blocks of some bands are done."""
    parts.mark(layout.blocks(bands, column))


def _scores(block: int) -> str:
    return f"scores/{block:06}"


def digest_of(path: Path) -> str | None:
    """A digest of the length of a file and of samples of its content. A folder, such as an array, has none."""
    if not path.is_file():
        return None
    size, found = path.stat().st_size, hashlib.sha256()
    found.update(str(size).encode())
    with open(path, "rb") as file:
        for number in range(SAMPLES):
            file.seek(max(size - SAMPLE, 0) * number // (SAMPLES - 1))
            found.update(file.read(SAMPLE))
    return found.hexdigest()[:16]
