"""Whole images as people upscale them: time, throughput and peak memory of every way; and whether a time budget is met."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastroute
from benchmarks import images
from benchmarks.e2e import _ways as ways
from benchmarks.e2e._ways import PIXEL_MODEL, WAYS
from benchmarks.e2e.growth import as_uint8
from benchmarks.e2e.patch_routing import shipped_model
from benchmarks.measure import Timing, alternate, device, summary, synchronise
from benchmarks.setting import Setting
from fastroute import io
from fastroute.catalogue import DEFAULT_MODEL
from fastroute.files.readers import open_reader
from fastroute.runtime.results import Upscaled

OURS = "fastroute"
# LR height and width of the large image; side of the corner on which the ways are compared, larger than a tile; number and
# side of pictures.
SIZE, SMOKE_SIZE = (1280, 2048), (160, 192)
CORNER, SMOKE_CORNER = 256, 144
PICTURES, SMOKE_PICTURES = (8, 256), (2, 48)
ROUNDS = 3
# LR height and width of the pixel path's crops, and where a time budget lies between the cheapest and the most expensive time.
CROP, SMOKE_CROP = (240, 320), (120, 160)
SHARES, SMOKE_SHARES = (0.25, 0.5, 0.75), (0.5,)
BUDGET_ROUNDS = 5

# Share of the values that may be of another class on a GPU.
OTHER_CLASS = 1e-3

Router = fastroute.PatchRouter | fastroute.PixelRouter


def image_of(result: Any) -> Tensor:  # -> [3, H, W]
    """What a way made, from memory or from its file."""
    if isinstance(result, fastroute.UpscaledFile):
        with open_reader(result.path, 3) as reader:
            return reader.read(0, result.size[0], 0, result.size[1])
    return (result.image if isinstance(result, Upscaled) else result).cpu()


def check_same(name: str, result: Any, expected: Tensor) -> None:  # [3, H, W]
    """Equal bit for bit; on a GPU up to rounding, which depends on the batch there and may decide the class of a pixel."""
    apart = (image_of(result).int() - expected.cpu().int()).abs()
    if device().type == "cpu":
        assert not apart.any(), f"{name}: another image"
    share = (apart > 1).float().mean().item()
    assert share <= OTHER_CLASS, f"{name}: {share:.2%} of the values are others"


def check_agreement(folder: Path) -> dict[str, str]:
    """All ways on a small image, before any is timed: the same bits, or up to one level those of networks without routing.

    Returns:
        The ways that lack a package, and which.
    """
    found, missing = {}, {}
    for name, way in WAYS.items():
        try:
            found[name] = way.prepare(folder)()
        except ImportError as error:
            missing[name] = str(error)
    for first, *others in ((ways.IN_MEMORY, ways.LIMITED, ways.TO_TIFF, ways.TO_ZARR), (ways.PIXELS, ways.PIXELS_TO_TIFF)):
        for name in (name for name in others if name in found):
            check_same(name, found[name], image_of(found[first]))
    router = fastroute.load(DEFAULT_MODEL, device=device())
    for outcome in found[ways.FOLDER]:
        expected = router.upscale(io.read_image(outcome.job.source).to(device())).image
        check_same(ways.FOLDER, io.read_image(outcome.job.target), expected)
    pixels = ways.image_of(folder)[None].float() / 255
    whole = as_uint8(shipped_model().branches[-1](pixels))[0].cpu().int()
    assert (image_of(found[ways.TILED]).int() - whole).abs().max() <= 1, f"{ways.TILED}: not the network's image"
    # Of one class or the other, or a mean where tiles of both overlap.
    ends = torch.cat([as_uint8(run(pixels)).cpu().int() for run in (ways.denoiser(), ways.mean)])
    denoised = image_of(found[ways.DENOISER]).int()
    assert ((denoised >= ends.amin(dim=0) - 1) & (denoised <= ends.amax(dim=0) + 1)).all(), f"{ways.DENOISER}: another image"
    assert len(found[ways.DENOISER].class_map.unique()) == 2, f"{ways.DENOISER}: one class takes all"
    return missing


def measured(small: Path, large: Path, image: Tensor, missing: dict[str, str], setting: Setting) -> list[dict]:  # [3, h, w]
    """One row per way."""
    names = [name for name in WAYS if name not in missing]
    memory = ways.memory_of(names, small, large)
    times = alternate({name: WAYS[name].prepare(large) for name in names}, 1 if setting.smoke else ROUNDS, warm_up=0)
    rows = []
    for name, way in WAYS.items():
        count, side = (SMOKE_PICTURES if setting.smoke else PICTURES) if way.folder else (1, 0)
        height, width = (side, side) if way.folder else image.shape[1:]
        samples, peak = count * image.shape[0] * height * width, memory[name]["peak"] if name in memory else None
        row = {
            "op": name,
            "model": way.model,
            "images": count,
            "lr_size": [width, height],
            "size": [width * way.scale, height * way.scale],
            "input_bytes": samples,
            "output_bytes": samples * way.scale**2,
            "times": {OURS: times[name]} if name in times else {},
            "peak_bytes": {OURS: peak},
            "missing": {OURS: missing[name]} if name in missing else {},
        }
        if name in times:
            row["beyond_bytes"] = None if peak is None else peak - memory[name]["result"]
            row["megapixels_per_second"] = count * height * width * way.scale**2 / 1e6 / times[name].median
            row["images_per_second"] = count / times[name].median
            speed = f"{row['megapixels_per_second']:6.2f} megapixels/s, {row['images_per_second']:5.2f} images/s"
            held = f"{(peak or 0) / 1e6:6.1f} MB, beyond the result {(row['beyond_bytes'] or 0) / 1e6:6.1f} MB"
            print(f"  {name:<56} {times[name]}  {speed}, peak {held}")
        rows.append(row)
    for name, reason in missing.items():
        print(f"  {name:<56} not timed: {reason}")
    return rows


def test_whole_images(setting: Setting) -> None:
    """A large image, made of mirrored copies of a photograph, in memory and from file to file; a folder; a denoiser."""
    path = images.photographs("test4k")[0]
    image = images.low_resolution(path, SMOKE_SIZE if setting.smoke else SIZE)[0]
    corner = SMOKE_CORNER if setting.smoke else CORNER
    count, side = SMOKE_PICTURES if setting.smoke else PICTURES
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "small"), Path(folder, "large")
        ways.write_inputs(small, image[:, :corner, :corner].contiguous(), 1, min(side, corner))
        ways.write_inputs(large, image, count, side)
        missing = check_agreement(small)
        print(f"\n{path.stem}, {image.shape[2]} x {image.shape[1]}, uint8; {count} PNG files of {side} x {side}")
        rows = measured(small, large, image, missing, setting)
    setting.save(
        "whole_images",
        rows,
        f"uint8, {path.stem} of {images.source('test4k')} mirrored to size; input and output as samples, uncompressed; medians "
        "of alternating runs; peak memory of one call in a process of its own, after a small image, beyond what was held "
        f"before; the result of a call in memory is its image and its class map; memory_limit is {ways.limit() // ways.MB} MB",
    )


def timed(router: Router, image: Tensor, **budget: float) -> tuple[float, Upscaled]:  # [1, 3, h, w]
    """Seconds of one call, and what it gave."""
    synchronise()
    begin = time.perf_counter()
    result = router.upscale(image, **budget)
    synchronise()
    return time.perf_counter() - begin, result


def least_budget(router: Router) -> float:
    """The share of the most expensive class's cost that is the cheapest's."""
    costs = router.costs if isinstance(router, fastroute.PatchRouter) else router.class_cost(images.SCALE)
    return min(costs) / max(costs)


def ask(router: Router, name: str, image: Tensor, setting: Setting) -> list[dict]:  # [1, 3, h, w]
    """One row per time budget between the image's cheapest and most expensive time; the budgets take turns."""
    rounds = 1 if setting.smoke else BUDGET_ROUNDS
    ends = {"cheapest": least_budget(router), "most_expensive": 1.0}
    bounds = alternate({end: lambda b=b: router.upscale(image, budget=b) for end, b in ends.items()}, rounds, warm_up=2)
    low, high = (bounds[end].median for end in ends)
    shares = SMOKE_SHARES if setting.smoke else SHARES
    asked = {share: low + share * (high - low) for share in shares}
    taken: dict[float, list[float]] = {share: [] for share in shares}
    refused: dict[float, str] = {}
    # The first round learns the speed of this image.
    for number in range(rounds + 1):
        for share, seconds in asked.items():
            try:
                spent, result = timed(router, image, budget_ms=1e3 * seconds)
            except ValueError as error:
                # What the machine did before may have made it look too slow for the smallest.
                if "budget_ms must be at least" not in str(error):
                    raise
                if number:
                    refused[share] = str(error)
                continue
            if number:
                taken[share].append(spent)
            elif isinstance(router, fastroute.PatchRouter):
                again = router.upscale(image, class_map=result.class_map)
                assert torch.equal(again.image, result.image), "the budget changed more than the classes"
    return [row_of(name, image, share, asked[share], taken[share], refused.get(share), bounds) for share in shares]


def row_of(
    name: str,
    image: Tensor,
    share: float,
    asked: float,
    taken: list[float],
    refused: str | None,
    bounds: dict[str, Timing],
) -> dict:  # [1, 3, h, w]
    """What one budget came to."""
    label = f"budget {1e3 * asked:.1f} ms"
    row = {"image": name, "lr_size": [image.shape[3], image.shape[2]], "share": share, "asked": asked}
    row |= {name: timing.median for name, timing in bounds.items()} | {"times": {}, "missing": {}}
    if refused is not None:
        row["missing"] = {label: refused}
        print(f"  {name}, {label}: {refused}")
    if taken:
        timing = summary(taken)
        row["times"] = {label: timing}
        row |= {"error": timing.median / asked - 1, "errors": [seconds / asked - 1 for seconds in taken]}
        print(f"  {name + ', ' + label:<32} {timing}  {row['error']:+.1%}", flush=True)
    return row


def overall(rows: list[dict]) -> dict:
    """How far all budgets were missed."""
    errors = [abs(row["error"]) for row in rows if "error" in row]
    calls = [abs(error) for row in rows for error in row.get("errors", [])]
    met = {"kind": "overall", "budgets": len(errors), "refused": sum(bool(row["missing"]) for row in rows)}
    if errors:
        met |= {"median_error": statistics.median(errors), "worst_error": max(errors), "worst_call": max(calls)}
    return met


@pytest.mark.parametrize("kind", ["patches", "pixels"])
def test_time_budgets(kind: str, setting: Setting) -> None:
    """Is `budget_ms` met, on every photograph, and what is the error of the worst?"""
    model = DEFAULT_MODEL if kind == "patches" else PIXEL_MODEL
    router = fastroute.load(model, device=device())
    size = SMOKE_CROP if setting.smoke else None if kind == "patches" else CROP
    paths, rows = images.photographs("test4k"), []
    print(f"\n{model}:")
    for path in paths[:1] if setting.smoke else paths:
        rows += ask(router, path.stem, images.low_resolution(path, size).to(device()), setting)
    met = overall(rows)
    if met["budgets"]:
        worst = f"worst {met['worst_error']:.1%}, worst single call {met['worst_call']:.1%}"
        print(f"  of {met['budgets']} budgets: median error {met['median_error']:.1%}, {worst}; {met['refused']} refused")
    setting.save(
        f"time_budgets_{kind}",
        [*rows, met],
        f"{model} on {images.source('test4k')}{'' if kind == 'patches' else f', corners of {CROP[1]} x {CROP[0]}'}; budgets "
        f"between the time of the cheapest class everywhere and of the most expensive; each asked for {BUDGET_ROUNDS} times in "
        "turn, after once untimed",
    )
