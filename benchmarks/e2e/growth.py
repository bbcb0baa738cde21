"""How cost grows: time and peak memory against pixels, patches, classes and class mix, with fitted slopes.

Routing should cost in proportion to the pixels, and hold no more memory than input, output and a band of fixed size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import fastroute
from benchmarks import images
from benchmarks.e2e.patch_routing import shipped_model
from benchmarks.e2e.pixel_routing import pcsr
from benchmarks.measure import alternate, device, first, peak_memory
from benchmarks.setting import Setting
from fastroute.grid import TileGrid
from fastroute.models.fsrcnn import FSRCNN
from fastroute.pixel.pixel_router import PixelRouter

# LR height and width: 0.5 to 33 megapixels of output at x4.
SIZES = ((136, 240), (270, 480), (384, 680), (540, 960), (764, 1358), (1080, 1920))
SMOKE_SIZES = ((64, 96), (96, 128))
MIDDLE, SMOKE_MIDDLE = (540, 960), (64, 96)
STRIDES = (32, 28, 24, 20, 16)
CLASSES = (1, 2, 3, 4, 6, 8)
DEAR_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
ROUNDS, SECONDS = 5, 6.0
# Below this a run is repeated before its memory is looked at; above that the network without routing is timed once.
QUICK_SECONDS, SLOW_SECONDS = 0.5, 1.5
WHOLE = "largest branch, one pass"

Run = Callable[[], object]


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Least squares: slope, intercept and the share of the variance that the line explains."""
    n = len(x)
    mean_x, mean_y = sum(x) / n, sum(y) / n
    var = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / var
    intercept = mean_y - slope * mean_x
    rest = sum((b - slope * a - intercept) ** 2 for a, b in zip(x, y, strict=True))
    total = sum((b - mean_y) ** 2 for b in y)
    return slope, intercept, 1 - rest / total if total else 1.0


def measured(kind: str, points: dict[float, dict[str, Run]], setting: Setting, **facts: dict) -> list[dict]:
    """One row per point: times and peak memory of its variants."""
    rows = []
    for x, runs in points.items():
        memory = {}
        for name, run in runs.items():
            begun = first(run)
            memory[name] = peak_memory(run) if begun.seconds < QUICK_SECONDS else begun.peak
        rounds, ours = 1 if setting.smoke else ROUNDS, [name for name in runs if name != WHOLE]
        times = alternate(runs, rounds, warm_up=0, limit=SECONDS, slow=SLOW_SECONDS, kept=ours)
        more = {name: values[x] for name, values in facts.items()}
        rows.append({"kind": kind, "x": x, "times": times, "peak_bytes": memory, **more})
        said = ", ".join(f"{n} {1e3 * t.median:.1f} ms, {(memory[n] or 0) / 1e6:.0f} MB" for n, t in times.items())
        print(f"{kind} {x:g}: {said}", flush=True)
    return rows


def fits(rows: list[dict], what: str) -> list[dict]:
    """For every variant the exponent of time ~ x^e and the straight line of seconds over x; memory beyond the result too."""
    made = []
    for name in rows[0]["times"]:
        x = [row["x"] for row in rows]
        seconds = [row["times"][name].median for row in rows]
        slope, start, r2 = line(x, seconds)
        fit = {"kind": "fit", "of": rows[0]["kind"], "variant": name, "unit": what, "seconds_per_unit": slope}
        fit |= {"seconds_at_zero": start, "r2": r2}
        if min(x) > 0:
            fit["exponent"] = line([math.log(v) for v in x], [math.log(v) for v in seconds])[0]
        if all(row["peak_bytes"][name] is not None and "result_bytes" in row for row in rows):
            extra = [row["peak_bytes"][name] - row["result_bytes"] for row in rows]
            fit |= {"extra_bytes_per_unit": line(x, extra)[0], "extra_bytes": [min(extra), max(extra)]}
        made.append(fit)
        print(f"  {sentence(fit)}", flush=True)
    return made


def sentence(fit: dict) -> str:
    """A fit in words."""
    text = f"{fit['variant']}: {1e3 * fit['seconds_per_unit']:.3g} ms per {fit['unit']}, R² {fit['r2']:.3f}"
    if "exponent" in fit:
        text += f"; time grows as the power {fit['exponent']:.2f}"
    if "extra_bytes_per_unit" in fit:
        low, high = (n / 1e6 for n in fit["extra_bytes"])
        per = fit["extra_bytes_per_unit"] / 1e6
        text += f"; memory beyond the result {low:.0f} to {high:.0f} MB, {per:+.2f} MB per {fit['unit']}"
    return text


def test_pixels(setting: Setting) -> None:
    """The whole of both paths, and the largest branch in one pass, from half a megapixel of output to 33."""
    source = images.photographs("test4k")[0]
    largest = shipped_model().branches[-1]
    router = fastroute.load(device=device())
    sample = images.low_resolution(source, (64, 64)).to(device()).float() / 255
    pixel_router = PixelRouter(pcsr("fsrcnn", sample))
    points, results = {}, {}
    for height, width in SMOKE_SIZES if setting.smoke else SIZES:
        lr = images.low_resolution(source, (height, width)).to(device())
        megapixels = 16 * height * width / 1e6
        results[megapixels] = 3 * 16 * height * width
        points[megapixels] = {
            "routed patches": lambda lr=lr: router.upscale(lr),
            "all patches expensive": lambda lr=lr: router.upscale(lr, budget=1.0),
            "routed pixels": lambda lr=lr: pixel_router.upscale(lr),
            WHOLE: lambda lr=lr: as_uint8(largest(lr.float() / 255)),
        }
    rows = measured("megapixels", points, setting, result_bytes=results)
    setting.save(
        "growth_pixels",
        rows + fits(rows, "megapixel"),
        f"uint8 to uint8, {source.stem} tiled or cut to size; pixels by PCSR-FSRCNN; medians of alternating runs, "
        f"of one where a single pass takes more than {SLOW_SECONDS:g} s",
    )


def as_uint8(image: Tensor) -> Tensor:
    """Rounded to 8 bits, as an upscaler leaves it."""
    return image.clamp(0, 1).mul(255).round().to(torch.uint8)


@pytest.mark.parametrize("kind", ["patches", "classes", "expensive_share"])
def test_growth(kind: str, setting: Setting) -> None:
    """One thing grows, the image stays."""
    torch.manual_seed(0)
    height, width = SMOKE_MIDDLE if setting.smoke else MIDDLE
    lr = images.low_resolution(images.photographs("test4k")[0], (height, width)).to(device())
    branches = shipped_model().branches

    def classes(grid: TileGrid, shares: Sequence[float]) -> Tensor:
        return torch.multinomial(torch.tensor(shares), grid.num_patches, replacement=True).view(grid.rows, grid.cols)

    points: dict[float, dict[str, Run]] = {}
    if kind == "patches":
        unit, what = "patch", "overlap grows: the stride falls from 32 to 16"
        for stride in STRIDES[:2] if setting.smoke else STRIDES:
            router = fastroute.PatchRouter(branches, stride=stride)
            grid = TileGrid(height, width, stride=stride)
            mix = classes(grid, [1 / 3] * 3).to(device())
            points[grid.num_patches] = {"routed patches": lambda r=router, m=mix: r.upscale(lr, class_map=m)}
    elif kind == "classes":
        unit, what = "class", "so many equal branches of width 16, patches spread evenly"
        grid = TileGrid(height, width)
        for count in CLASSES[:3] if setting.smoke else CLASSES:
            router = fastroute.PatchRouter([FSRCNN(16) for _ in range(count)]).to(device())
            mix = classes(grid, [1 / count] * count).to(device())
            points[count] = {"routed patches": lambda r=router, m=mix: r.upscale(lr, class_map=m)}
    else:
        unit, what = "whole image", "share of the patches in the most expensive of three branches, the rest in the cheapest"
        grid = TileGrid(height, width)
        router = fastroute.PatchRouter(branches)
        for share in DEAR_SHARES:
            mix = classes(grid, [1 - share, 0.0, share]).to(device())
            points[share] = {"routed patches": lambda m=mix: router.upscale(lr, class_map=m)}
    rows = measured(kind, points, setting, result_bytes=dict.fromkeys(points, 3 * 16 * height * width))
    setting.save(f"growth_{kind}", rows + fits(rows, unit), f"{width} x {height} to x4; {what}; medians of alternating runs")
