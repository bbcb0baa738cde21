"""The ways in which people use the package on whole images, each in this process or, for its peak memory, in a fresh one."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import tifffile
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastroute
from benchmarks.e2e.patch_routing import shipped_model
from benchmarks.measure import ROOT, device, peak_memory, use_device
from fastroute import io
from fastroute.catalogue import DEFAULT_MODEL
from fastroute.files import many_files
from fastroute.models.arm import edge_score
from fastroute.runtime.results import Upscaled

PIXEL_MODEL = "pcsr-fsrcnn-x4"
MB = 1_000_000
# What is held where memory is limited: little for a CPU, and what keeps a GPU busy.
LIMITS = {"cpu": 300 * MB, "cuda": 2000 * MB}
# Side of the tiles of the TIFF file that is read.
TIFF_TILE = 256
# Memory that is freed goes back at once: what the allocator keeps differs from run to run and hides what is used again.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

Run = Callable[[], Any]


@dataclass(frozen=True)
class Way:
    """One way to upscale.

    Attributes:
        model: what runs.
        prepare: from a folder that `write_inputs` filled to a call that does all of the work.
        scale: factor between output and input.
        folder: its input is the folder's small pictures, not the one large image.
    """

    model: str
    prepare: Callable[[Path], Run]
    scale: int = 4
    folder: bool = False


class Denoiser(nn.Module):
    """A small network such as users bring: predicts noise and takes it away; sees 4 pixels around each."""

    def __init__(self, width: int = 16, depth: int = 4) -> None:
        super().__init__()
        sizes = [3, *[width] * (depth - 1), 3]
        layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(sizes)]
        self.noise = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))[:-1]

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, H, W]
        return x - self.noise(x)


def mean(x: Tensor) -> Tensor:  # [N, 3, H, W]
    """The mean of 3 x 3 neighbours, the cheap class beside the denoiser."""
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def denoiser() -> Denoiser:
    """The same random weights every time."""
    torch.manual_seed(0)
    return Denoiser().eval().to(device())


def image_of(folder: Path) -> Tensor:  # [3, h, w]
    """The image of a folder, where the networks are."""
    return torch.load(folder / "image.pt", weights_only=True).to(device())


def limit() -> int:
    """Bytes for this device."""
    return LIMITS[device().type]


def _upscale(model: str, limited: bool = False) -> Callable[[Path], Run]:
    def prepare(folder: Path) -> Run:
        router, image = fastroute.load(model, device=device()), image_of(folder)
        return lambda: router.upscale(image, memory_limit=limit() if limited else None)

    return prepare


def _upscale_file(model: str, name: str) -> Callable[[Path], Run]:
    def prepare(folder: Path) -> Run:
        router = fastroute.load(model, device=device())
        return lambda: fastroute.upscale_file(folder / "image.tif", folder / name, router, memory_limit=limit())

    return prepare


def _tiled(folder: Path) -> Run:
    upscale, image = fastroute.tiled(shipped_model().branches[-1]), image_of(folder)
    return lambda: upscale(image)


def _denoise(folder: Path) -> Run:
    image = image_of(folder)
    grid = fastroute.TileGrid(*image.shape[1:], 32, 24)
    scores = edge_score(fastroute.extract_patches(image[None], grid, dtype=torch.float32))
    # Half of the patches go through the network.
    classifier = fastroute.ScoreClassifier(edge_score, thresholds=[scores.median().item()])
    router = fastroute.PatchRouter(
        [mean, denoiser()], classifier, patch=grid.patch, stride=grid.stride, scale=1, window="crop"
    ).to(device())
    return lambda: router.upscale(image)


def _folder(folder: Path) -> Run:
    router = fastroute.load(DEFAULT_MODEL, device=device())

    def run() -> list[many_files.Outcome]:
        outcomes = list(many_files.run_jobs(router, many_files.plan_jobs([folder / "pictures"], folder / "upscaled")))
        assert not any(outcome.error for outcome in outcomes), outcomes
        return outcomes

    return run


IN_MEMORY, LIMITED = "upscale", "upscale, memory_limit"
TO_TIFF, TO_ZARR = (f"upscale_file, memory_limit, TIFF to {kind}" for kind in ("BigTIFF of tiles", "zarr"))
TILED = "tiled, the largest branch alone"
PIXELS, PIXELS_TO_TIFF = f"pixel path: {IN_MEMORY}", f"pixel path: {TO_TIFF}"
FOLDER, DENOISER = "a folder of PNG files", "a network of one's own, a denoiser at scale 1"
WAYS = {
    IN_MEMORY: Way(DEFAULT_MODEL, _upscale(DEFAULT_MODEL)),
    LIMITED: Way(DEFAULT_MODEL, _upscale(DEFAULT_MODEL, limited=True)),
    TO_TIFF: Way(DEFAULT_MODEL, _upscale_file(DEFAULT_MODEL, "patches.tif")),
    TO_ZARR: Way(DEFAULT_MODEL, _upscale_file(DEFAULT_MODEL, "patches.zarr")),
    TILED: Way(DEFAULT_MODEL, _tiled),
    PIXELS: Way(PIXEL_MODEL, _upscale(PIXEL_MODEL)),
    PIXELS_TO_TIFF: Way(PIXEL_MODEL, _upscale_file(PIXEL_MODEL, "pixels.tif")),
    FOLDER: Way(DEFAULT_MODEL, _folder, folder=True),
    DENOISER: Way("mean, or 4 layers of width 16", _denoise, scale=1),
}


def write_inputs(folder: Path, image: Tensor, count: int, side: int) -> None:  # uint8 [3, h, w]
    """The image in the forms that the ways read, and `count` squares of it as PNG files."""
    (folder / "pictures").mkdir(parents=True)
    torch.save(image, folder / "image.pt")
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    tifffile.imwrite(folder / "image.tif", pixels, tile=(TIFF_TILE, TIFF_TILE), photometric="rgb")
    for number in range(count):
        left = number * (image.shape[2] - side) // max(count - 1, 1)
        io.write_image(folder / "pictures" / f"{number}.png", image[:, :side, left : left + side].contiguous())


def result_bytes(result: Any) -> int:
    """What a call leaves in memory: image and class map, or nothing where files are written."""
    parts = [result.image, result.class_map] if isinstance(result, Upscaled) else [result]
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))


def memory_of(names: Sequence[str], small: Path, large: Path) -> dict[str, dict[str, int | None]]:
    """For each way the peak bytes beyond what is held before, and those of its result, in a process that has run it small."""
    command = [sys.executable, "-m", "benchmarks.e2e._ways", str(small), str(large), str(device()), *names]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **GIVE_BACK}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring memory failed:\n{done.stderr}")
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(names, told, strict=True))


@torch.inference_mode()
def tell_memory(way: Way, small: Path, large: Path) -> None:
    """Print what one way needs, as JSON."""
    sizes: list[int] = []
    way.prepare(small)()
    run = way.prepare(large)
    peak = peak_memory(lambda: sizes.append(result_bytes(run())))
    print(json.dumps({"peak": peak, "result": sizes[0]}), flush=True)


def main() -> None:
    """What `memory_of` runs: imports once, then forks a process for every way, before torch has any threads."""
    small, large, place, *names = sys.argv[1:]
    use_device(place)
    for name in names:
        process = multiprocessing.get_context("fork").Process(target=tell_memory, args=(WAYS[name], Path(small), Path(large)))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{name}: exit status {process.exitcode}")


if __name__ == "__main__":
    main()
