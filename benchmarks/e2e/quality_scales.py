"""PSNR of the shipped models at the factors 2 and 3 on the 2K photographs, dense and routed, beside bicubic."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from torch import Tensor

import fastroute
from benchmarks import images
from benchmarks.e2e.quality import variants
from benchmarks.measure import device
from benchmarks.report import BUDGET
from benchmarks.setting import Setting
from fastroute import io
from fastroute.catalogue import ANY_SCALE, default_model
from fastroute.degradation import make_pair
from fastroute.quality import compare
from fastroute.runtime.results import Upscaled

SCALES = (2, 3)
BICUBIC = "bicubic"
TITLES = {**{default_model(scale): "ClassSR-FSRCNN" for scale in SCALES}, ANY_SCALE: "PCSR-FSRCNN, trained for 2, 3 and 4"}


def networks(scale: int) -> dict[str, Callable[[Tensor], Upscaled]]:
    """What enlarges an 8-bit image `scale` times, by name."""
    found: dict[str, Callable[[Tensor], Upscaled]] = {}
    for model in fastroute.list_models():
        router = fastroute.load(model, device=device(), **({"scale": scale} if model == ANY_SCALE else {}))
        if router.scale == scale and router.num_classes > 1:
            runs = variants(TITLES.get(model, model), router)
            found |= {name: run for name, run in runs.items() if BUDGET not in name}
    return found


def test_quality_of_scales(setting: Setting) -> None:
    """The mean over photographs of every network's PSNR, RGB, in 8 bits."""
    paths, rows = images.photographs("test2k"), []
    for scale in SCALES:
        known = networks(scale)
        scores: dict[str, list[float]] = {name: [] for name in (BICUBIC, *known)}
        flops: dict[str, list[float]] = {name: [] for name in known}
        for path in paths[:1] if setting.smoke else paths:
            lr, hr = make_pair(io.read_image(path), scale)
            if setting.smoke:
                lr, hr = lr[:, :64, :64].contiguous(), hr[:, : 64 * scale, : 64 * scale]
            scores[BICUBIC].append(compare(images.bicubic(lr, scale), hr, scale)["psnr"])
            for name, run in known.items():
                result = run(lr.to(device()))
                scores[name].append(compare(result.image.cpu(), hr, scale)["psnr"])
                flops[name].append(result.stats.flops.fraction)
        base = statistics.mean(scores[BICUBIC])
        for name, values in scores.items():
            value = statistics.mean(values)
            share = statistics.mean(flops[name]) if name in flops else None
            row = {"scale": scale, "network": name, "psnr": value, "gain": value - base, "flops": share, "per_image": values}
            rows.append(row)
            print(f"x{scale}  {name:<48} {value:.3f} dB  {value - base:+.3f}  {share or 0:.3f}")
            assert value > 10
    count = len(rows[0]["per_image"])
    setting.save("quality_scales", rows, f"{count} of {images.source('test2k')}, 8-bit, a border of the factor left out")
