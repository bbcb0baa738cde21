"""A few cases that every version has, timed in this process: run by ``benchmarks.compare`` with the package of one commit.

Prints one JSON object: the backend, and by case seconds or the reason why there are none. Imports nothing but torch and
fastroute, of which PYTHONPATH says where.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

import fastroute
from fastroute.backends import select

LR, SMOKE_LR = (540, 960), (64, 96)
PATCH, STRIDE, SCALE, CLASSES = 32, 28, 4, 3
RUNS = 7


def build(place: torch.device, lr: tuple[int, int]) -> dict[str, Callable[[], Callable[[], object]]]:
    """What makes each case, by name: called once, it returns what is timed."""
    torch.manual_seed(0)
    grid = fastroute.TileGrid(*lr, PATCH, STRIDE, SCALE)
    span, (height, width) = PATCH * SCALE, grid.output_size

    def extract() -> Callable[[], object]:
        image = torch.randint(0, 256, (1, 3, *lr), dtype=torch.uint8, device=place)
        return lambda: fastroute.extract_patches(image, grid, dtype=torch.float32)

    def group() -> Callable[[], object]:
        ids = torch.randint(0, CLASSES, (10**6 if lr == LR else 10**4,), device=place)
        return lambda: fastroute.group_by_class(ids, CLASSES)

    def merge() -> Callable[[], object]:
        ids = (torch.rand(grid.rows // 3 + 1, grid.cols // 3 + 1, device=place) * CLASSES).long()
        ids = ids.repeat_interleave(3, 0).repeat_interleave(3, 1)[: grid.rows, : grid.cols].flatten()
        costs = torch.tensor([1.0, 2.0, 3.0], device=place)[:CLASSES]
        return lambda: fastroute.merge_regions(ids, grid, costs)

    def gather() -> Callable[[], object]:
        rows = torch.rand(grid.num_patches, 3, PATCH, PATCH, device=place)
        groups = fastroute.group_by_class(torch.randint(0, CLASSES, (grid.num_patches,), device=place), CLASSES)
        return lambda: fastroute.scatter_groups(fastroute.gather_groups(rows, groups), groups)

    def stitch() -> Callable[[], object]:
        patches = torch.rand(grid.num_patches, 3, span, span, device=place)
        return lambda: fastroute.stitch_patches(patches, grid)

    def assign() -> Callable[[], object]:
        score = torch.rand(1, 2, height, width, device=place)
        return lambda: fastroute.assign_classes(score, [1.0, 4.0], 0.5, None, torch.uint8)

    def threshold() -> Callable[[], object]:
        score = torch.rand(1, height, width, device=place)
        return lambda: fastroute.adaptive_threshold(score, torch.uint8)

    def refine() -> Callable[[], object]:
        image = torch.rand(1, 3, height, width, device=place)
        blocks = (torch.rand(1, height // 16, width // 16) < 0.3).to(torch.uint8)
        class_map = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2).contiguous().to(place)
        image = image[:, :, : class_map.shape[1], : class_map.shape[2]].contiguous()
        return lambda: fastroute.refine_boundaries(image, class_map)

    def mlp() -> Callable[[], object]:
        features = torch.randn(1, 48, lr[0] // 4, lr[1] // 4, device=place).contiguous(memory_format=torch.channels_last)
        sizes = [52, 58, 58, 58, 58, 3]
        layers = [(torch.randn(b, a, device=place) / a**0.5, torch.zeros(b, device=place)) for a, b in pairwise(sizes)]
        return lambda: fastroute.pixel_mlp(features, [layers], (lr[0], lr[1]))

    def upscale() -> Callable[[], object]:
        router = fastroute.load(device=place)
        image = torch.randint(0, 256, (3, lr[0] // 2, lr[1] // 2), dtype=torch.uint8, device=place)
        return lambda: router.upscale(image, budget=0.7)

    made = (extract, merge, group, gather, stitch, assign, threshold, refine, mlp, upscale)
    names = ("extract_patches", "merge_regions", "group_by_class", "gather_groups, scatter_groups", "stitch_patches",
             "assign_classes", "adaptive_threshold", "refine_boundaries", "pixel_mlp", "upscale, budget 0.7")  # fmt: skip
    return dict(zip(names, made, strict=True))


def main() -> None:
    """Time every case: the median of some runs after two untimed ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tree", type=Path, help="where fastroute must come from")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    found = Path(fastroute.__file__).resolve()
    if not found.is_relative_to(args.tree.resolve()):
        sys.exit(f"fastroute was imported from {found}, not from {args.tree}")
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wait = torch.cuda.synchronize if place.type == "cuda" else lambda: None
    results: dict[str, float | str] = {}
    with torch.inference_mode():
        for name, prepare in build(place, SMOKE_LR if args.smoke else LR).items():
            try:
                run = prepare()
                run()
                run()
            except (AttributeError, TypeError, ValueError, RuntimeError) as error:
                # A version from before the operator, or of another signature.
                results[name] = f"does not run: {str(error).splitlines()[0]}"
                continue
            seconds = []
            for _ in range(2 if args.smoke else RUNS):
                wait()
                start = time.perf_counter()
                run()
                wait()
                seconds.append(time.perf_counter() - start)
            results[name] = statistics.median(seconds)
    print(json.dumps({"backend": select("stitch_patches", place), "cases": results}))


if __name__ == "__main__":
    main()
