"""The speed of the patch path on this machine: measured on a picture of noise, and corrected by the times of later calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from fastroute.budget.speed import RUNS, Speed, noise
from fastroute.grid import TileGrid
from fastroute.runtime.devices import on_device
from fastroute.runtime.results import RoutingStats, Stopwatch
from fastroute.runtime.rows import Source, TensorSource

# Columns of the picture on which the speed is measured, and its least number of patches: those of a band, to keep a GPU busy.
COLUMNS = 8
PATCHES = {"cpu": 16, "cuda": 1024}


@dataclass(frozen=True)
class Measured:
    """The parts of a patch router that are measured.

    Attributes:
        run: upscales an image with a class map.
        classify: scores all patches of an image; None if nothing is classified.
        num_classes: number of classes.
        batch: number of patches that pass together through the slowest branch.
    """

    run: Callable[[Tensor, Tensor], RoutingStats]
    classify: Callable[[Source, TileGrid], object] | None
    num_classes: int
    batch: int


@torch.inference_mode()
def measure_patch_speed(parts: Measured, channels: int, tile: TileGrid, dtype: torch.dtype, device: torch.device) -> Speed:
    """The speed of every part of a router on images of `dtype`.

    Args:
        parts: the parts that are measured.
        channels: number of channels of the images.
        tile: the router's grid, for an image of any size.
        dtype: type of the images.
        device: device on which the router runs.
    """
    rows = -(-max(parts.batch, on_device(PATCHES, device)) // COLUMNS)
    height, width = (tile.patch + (n - 1) * tile.stride for n in (rows, COLUMNS))
    image, number = noise((1, channels, height, width), dtype, device), rows * COLUMNS
    branches: list[list[float]] = [[] for _ in range(parts.num_classes)]
    rest = []
    # The parts take turns, so that whatever slows the machine for a while slows all of them.
    for run in range(RUNS * parts.num_classes):
        c = run % parts.num_classes
        stats = parts.run(image, torch.full((1, rows, COLUMNS), c, device=device))
        seconds, work = stats.seconds, sum(stats.work_per_class or stats.counts_per_class)
        branches[c].append(seconds["branches"] * number / work)
        rest.append(seconds["total"] - seconds["branches"] - seconds["tune"])
    classify = 0.0
    if parts.classify is not None:
        source, grid = TensorSource(image, device), TileGrid(height, width, tile.patch, tile.stride, tile.scale)
        times = []
        for _ in range(RUNS):
            watch = Stopwatch(device)
            with watch.stage("classify"):
                parts.classify(source, grid)
            times.append(watch.finish()["classify"])
        classify = median(times)
    milliseconds = 1e3 / number
    each = [max(median(times), 1e-9) * milliseconds for times in branches]
    return Speed(each, classify * milliseconds, median(rest) * milliseconds)


def learn_patch_speed(speed: Speed, stats: RoutingStats, branches: Mapping[int, float]) -> None:
    """Correct `speed` by the times of a run.

    Args:
        speed: the speed to correct.
        stats: statistics of the run.
        branches: seconds in the branch of each class.
    """
    seconds = stats.seconds
    rest = seconds["total"] - seconds["tune"] - seconds["classify"] - seconds["branches"]
    each = [branches.get(c, 0.0) for c in range(len(speed.branches))]
    work, number = stats.work_per_class or stats.counts_per_class, sum(stats.counts_per_class)
    speed.learn(work, each, seconds["classify"] or None, rest, number=number)
