"""From file to file, neither ever in memory as a whole."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastroute.catalogue import DEFAULT_MODEL
from fastroute.progress import Progress
from fastroute.routing.load import load
from fastroute.routing.patch_router import PatchRouter
from fastroute.routing.pixel_router import PixelRouter
from fastroute.routing.result import RoutingStats
from fastroute.routing.working_set import AUTO, Limit
from fastroute.streaming.files import check_target, open_reader, open_writer


@dataclass(frozen=True)
class UpscaledFile:
    """A file that :func:`upscale_file` wrote.

    Attributes:
        path: where it is.
        size: its height and width.
        seconds: wall time, reading and writing included.
        class_map: int64 (rows, cols), the branch of every patch; None for a router of pixels.
        stats: counts, FLOPs, times, and the working set.
    """

    path: Path
    size: tuple[int, int]
    seconds: float
    class_map: Tensor | None
    stats: RoutingStats

    @property
    def megapixels_per_second(self) -> float:
        """Output pixels per second, in millions."""
        return self.size[0] * self.size[1] / 1e6 / self.seconds

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.size[1]} x {self.size[0]} in {self.seconds:.1f} s, {self.megapixels_per_second:.2f} "
            f"megapixels per second, working set {self.stats.working_set / 1e6:.0f} MB"
        )


def upscale_file(
    source: str | Path,
    target: str | Path,
    model: str | Path | PatchRouter | PixelRouter = DEFAULT_MODEL,
    memory_limit: Limit = AUTO,
    progress: Progress = False,
    device: str | torch.device = "cpu",
    **routing: Any,
) -> UpscaledFile:
    """Super-resolve a file that need not fit in memory.

    Args:
        source: a TIFF file, read by its strips or tiles; a zarr array (H, W, C); or any other image file, which is decoded
            whole. Alpha and metadata are left out.
        target: .tif or .tiff for a BigTIFF file of tiles, .zarr for a zarr array (H, W, C), of the type of the source. It
            appears when it is whole; an interrupted run leaves what was there.
        model: a name or a checkpoint, see :func:`fastroute.load`, or a router.
        memory_limit: bytes to hold beside the program, None for no limit; by default, "auto", 512 MiB, and 8 GiB where the
            router is on a GPU.
        progress: show a progress bar, or call a function with what is done and how much there is, see the router's `upscale`;
            where it raises, and at Ctrl-C, nothing is left behind.
        device: where a model that is given by name runs.
        **routing: what the router's `stream` takes, such as `budget`, or `scale` and `k` of PCSR.

    Raises:
        ValueError, TypeError: a wrong argument, or a file that cannot be read or written. Nothing is written then.
        ImportError: tifffile or zarr, which the extra ``large`` installs, is needed and missing.
        MemoryError, torch.OutOfMemoryError: memory ran out; the message names a limit that would fit.

    Example:
        >>> print(fastroute.upscale_file("scan.tif", "scan-x4.tif", budget=0.7, memory_limit=300_000_000))
    """
    check_target(target)
    router = model if isinstance(model, (PatchRouter, PixelRouter)) else load(model, device)
    start = time.perf_counter()
    with open_reader(source, router.channels) as reader:
        chosen = {name: routing[name] for name in ("scale", "size") if name in routing}
        size = router.output_size(reader.shape[1], reader.shape[2], **chosen)
        with open_writer(target, (router.channels, *size), reader.dtype) as writer:
            result = router.stream(reader, writer, progress=progress, memory_limit=memory_limit, **routing)
    return UpscaledFile(Path(target), size, time.perf_counter() - start, result.class_map, result.stats)
