"""`upscale_file`: from file to file, without holding either in memory as a whole."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastroute.cascades.router import CascadeRouter
from fastroute.catalogue import DEFAULT_MODEL
from fastroute.files.readers import PictureReader, open_twice
from fastroute.files.writers import ResultWriter, check_result, check_target, left_of, lost, open_writer
from fastroute.io.write import check_quality
from fastroute.loading import load
from fastroute.patch.patch_router import PatchRouter
from fastroute.pixel.pixel_router import PixelRouter
from fastroute.runtime.memory_plan import AUTO, Limit, check_limit, limit_on
from fastroute.runtime.progress import Progress
from fastroute.runtime.results import RoutingStats


@dataclass(frozen=True)
class UpscaledFile:
    """A file that :func:`upscale_file` wrote.

    Attributes:
        path: path of the file.
        size: height and width of the result.
        seconds: wall time, including reading and writing.
        class_map: int64 (rows, cols), the branch of every patch; None for a router of pixels.
        stats: counts, FLOPs, times, and the working set.
        notes: what was left out or changed on the way from file to file, in whole sentences.
    """

    path: Path
    size: tuple[int, int]
    seconds: float
    class_map: Tensor | None
    stats: RoutingStats
    notes: tuple[str, ...] = ()

    @property
    def megapixels_per_second(self) -> float:
        """The output pixels per second, in millions."""
        return self.size[0] * self.size[1] / 1e6 / self.seconds

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.size[1]} x {self.size[0]} in {self.seconds:.1f} s, {self.megapixels_per_second:.2f} "
            f"megapixels per second, working set {self.stats.working_set / 1e6:.0f} MB"
        )


def upscale_file(
    source: str | Path,
    target: str | Path,
    model: str | Path | PatchRouter | PixelRouter | CascadeRouter = DEFAULT_MODEL,
    memory_limit: Limit = AUTO,
    progress: Progress = False,
    device: str | torch.device = "cpu",
    *,
    max_pixels: int | str | None = AUTO,
    white: float = 1.0,
    drop_alpha: bool = False,
    quality: int | None = None,
    **routing: Any,
) -> UpscaledFile:
    """Super-resolve a file without holding it in memory as a whole.

    The result is the same as that of reading, :func:`fastroute.files.pictures.upscale_picture` and writing: the same pixels,
    transparency and metadata.

    Args:
        source: a TIFF file, which is read by its strips or tiles; a zarr array (H, W, C) or (H, W); or any other image file,
            which is decoded as a whole.
        target: .tif or .tiff for a tiled BigTIFF file, .zarr for a zarr array (H, W, C), or .png; these are written while the
            result is computed. Other formats are encoded as a whole, so their results must fit into the limit. Depth is kept as
            far as the format supports it. The file appears when it is complete; an interrupted run leaves the old file.
        model: a name or a checkpoint, see :func:`fastroute.load`, or a router.
        memory_limit: bytes to hold beside the program, or None for no limit. By default, "auto", it is 512 MiB, or 8 GiB for a
            router on a GPU, or the least that is possible where that is more.
        progress: show a progress bar, or call a function with how much is done and how much there is, see the router's
            `upscale`. If it raises, or after Ctrl-C, nothing is left behind.
        device: device of a model that is given by name.
        max_pixels, white: see :func:`fastroute.io.read_picture`. By default, strips and tiles have no limit on pixels.
        drop_alpha: leave transparency out.
        quality: see :func:`fastroute.io.write_picture`.
        **routing: options of the router's `stream`, such as `budget`, or `scale` and `penalty` for PCSR.

    Raises:
        ValueError, TypeError: an argument is wrong, or a file cannot be read or written. Nothing is written then.
        ImportError: zarr, which the extra ``large`` installs, is needed and missing.
        MemoryError, torch.OutOfMemoryError: memory ran out. The message names a limit that would fit.

    Example:
        >>> print(fastroute.upscale_file("scan.tif", "scan-x4.tif", budget=0.7, memory_limit=300_000_000))
    """
    target = Path(target)
    check_target(target)
    router = model if isinstance(model, (PatchRouter, PixelRouter, CascadeRouter)) else load(model, device=device)
    start = time.perf_counter()
    limit = limit_on(router.device, memory_limit)
    check_limit("upscale_file", limit)
    check_quality("upscale_file", quality)
    with open_twice(source, max_pixels=max_pixels, white=white, memory=limit) as (opened, again):
        if drop_alpha:
            opened, again = opened.without_alpha(), again.without_alpha()
        reader = PictureReader(opened, router.channels)
        chosen = {name: routing[name] for name in ("scale", "size") if name in routing}
        size = router.output_size(reader.shape[1], reader.shape[2], **chosen)
        check_result(target, size, again)
        gray = opened.kind == "gray" and router.channels == 3
        channels = (1 if gray else router.channels) + opened.alpha
        shape = (channels, *size)
        held = opened.held + (again.held if again.pixels is not opened.pixels else 0)
        rest = None if limit is None else left_of(limit, held, target, shape, opened.dtype)
        with open_writer(target, shape, opened, quality) as writer, whole_limit("upscale_file", limit, rest):
            writer = ResultWriter(writer, again, gray, size)
            result = router.stream(reader, writer, progress=progress, memory_limit=rest, **routing)
        notes = (*opened.origin.notes, *lost(target, opened))
    return UpscaledFile(target, size, time.perf_counter() - start, result.class_map, result.stats, notes)


@contextmanager
def whole_limit(op: str, limit: int | None, rest: int | None) -> Iterator[None]:
    """Name the limit that the user gave in errors of the router, which knows only what is left of it."""
    try:
        yield
    except ValueError as error:
        found = re.search(r"memory_limit must be at least (\d+) bytes", str(error))
        if found is None or limit is None or rest is None or rest == limit:
            raise
        least = int(found[1]) + limit - rest
        raise ValueError(
            f"{op}: memory_limit must be at least {least} bytes ({least / 1e6:.0f} MB) here, of which "
            f"{(limit - rest) / 1e6:.0f} MB hold what is decoded or encoded whole; got {limit}"
        ) from error
