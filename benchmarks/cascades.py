"""What a calibrated cascade saves on pictures that it has not seen, and how near it stays to the dense result.

    python -m benchmarks.cascades routed.safetensors --images DIR [--fidelity 36 40] [--precision bfloat16]

For every picture, a crop of 640 x 400 from its middle, as it is and reduced four times: PSNR to one pass of the most expensive
network over the crop, and time relative to it, both taken in turn in one process. The last lines are means and the share of
promises kept, as Markdown.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

import fastroute
from fastroute import io
from fastroute.degradation import downscale, to_uint8
from fastroute.models.precision import PRECISIONS

HEIGHT, WIDTH = 400, 640
SIZES = {"native": 1, "reduced": 4}


def crops(folder: Path) -> Iterator[tuple[str, str, Tensor]]:
    """Name, size and crop of every picture."""
    for path in io.list_images(folder):
        image = io.read_image(path)
        for size, shrink in SIZES.items():
            smaller = image if shrink == 1 else to_uint8(downscale(image[None].float() / 255, shrink)[0])
            y, x = max(smaller.shape[1] - HEIGHT, 0) // 2, max(smaller.shape[2] - WIDTH, 0) // 2
            yield path.stem, size, smaller[:, y : y + HEIGHT, x : x + WIDTH]


def timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What `call` gives, and its seconds."""
    begin = time.perf_counter()
    result = call()
    return result, time.perf_counter() - begin


def psnr(a: Tensor, b: Tensor) -> float:
    """In dB, of values in [0, 1]."""
    return -10 * math.log10(max(float((a.clamp(0, 1) - b.clamp(0, 1)).square().mean()), 1e-12))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--fidelity", type=float, nargs="+", default=[40.0])
    parser.add_argument("--precision", choices=PRECISIONS, default="bfloat16")
    parser.add_argument("--turns", type=int, default=1, help="runs of each, of which the fastest counts")
    asked = parser.parse_args()
    router = fastroute.load(asked.model, dtype=PRECISIONS[asked.precision])
    rows: dict[tuple[float, str], list[tuple[float, float]]] = {}
    print("| picture | size | fidelity | PSNR to dense | time | FLOPs |\n| --- | --- | --- | --- | --- | --- |")
    for name, size, crop in crops(asked.images):
        image = crop.float() / 255
        dense, dense_seconds = timed(lambda image=image: router.upscale(image, budget=1).image)
        for _ in range(asked.turns - 1):
            dense_seconds = min(dense_seconds, timed(lambda image=image: router.upscale(image, budget=1).image)[1])
        for fidelity in asked.fidelity:
            seconds = math.inf
            for _ in range(asked.turns):
                begin = time.perf_counter()
                result = router.upscale(image, fidelity=fidelity)
                seconds = min(seconds, time.perf_counter() - begin)
            near, share = psnr(result.image, dense), seconds / dense_seconds
            rows.setdefault((fidelity, size), []).append((near, share))
            flops = result.stats.flops.of_one_pass or 0.0
            print(f"| {name} | {size} | {fidelity:g} dB | {near:.1f} dB | {share:.2f} | {flops:.2f} |", flush=True)
    print("\n| fidelity | size | mean time | smoother half | kept | worst |\n| --- | --- | --- | --- | --- | --- |")
    for (fidelity, size), found in sorted(rows.items()):
        times = sorted(share for _, share in found)
        kept = sum(near >= fidelity for near, _ in found)
        half = statistics.mean(times[: max(len(times) // 2, 1)])
        worst, mean = min(near for near, _ in found), statistics.mean(times)
        print(f"| {fidelity:g} dB | {size} | {mean:.2f} | {half:.2f} | {kept} of {len(found)} | {worst:.1f} dB |")


if __name__ == "__main__":
    main()
