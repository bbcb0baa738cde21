"""PSNR and time of the shipped models on the 2K photographs, dense and routed, beside bicubic and published networks."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import fastroute
from benchmarks import images
from benchmarks.measure import device, synchronise
from benchmarks.setting import Setting
from fastroute import io
from fastroute.routing.load import DEFAULT_MODEL
from fastroute.routing.result import Upscaled
from fastroute.training.data import make_pair

BORDER = 4
BUDGETS = (0.5, 0.6, 0.7, 0.8, 0.9)
# Published weights that the data folder may hold, by the name of a row.
PUBLISHED = {
    "published FSRCNN-56": "fsrcnn-x4.pth",
    "published PCSR-FSRCNN": "pcsr-fsrcnn-x4.pth",
    "published PCSR-CARN": "pcsr-carn-x4.pth",
}
TITLES = {DEFAULT_MODEL: "ClassSR-FSRCNN"}


def psnr(image: Tensor, hr: Tensor) -> float:  # uint8 [3, H, W]
    """RGB PSNR in dB of 8-bit images, without a border of 4 pixels."""
    error = (image.float() - hr.float())[:, BORDER:-BORDER, BORDER:-BORDER].square().mean().item()
    return 10 * math.log10(255**2 / max(error, 1e-10))


def networks() -> dict[str, Callable[[Tensor], Tensor | Upscaled]]:
    """What enlarges an 8-bit image four times, by name."""
    found: dict[str, Callable[[Tensor], Tensor | Upscaled]] = {"bicubic": images.bicubic}
    folder = images.data_folder()
    for name, file in PUBLISHED.items():
        if folder is not None and (folder / "weights" / file).exists():
            found[name] = fastroute.load(folder / "weights" / file, device()).upscale
    for model in fastroute.list_models():
        router = fastroute.load(model, device())
        if getattr(router, "scale", images.SCALE) != images.SCALE:
            continue
        title = TITLES.get(model, model)
        routed = isinstance(router, fastroute.PixelRouter) or router.num_classes > 1
        found[f"{title}, largest branch everywhere"] = lambda lr, r=router: r.upscale(lr, budget=1.0)
        if routed:
            found[f"{title}, routed by its classifier"] = router.upscale
            for budget in BUDGETS:
                found[f"{title}, budget {budget}"] = lambda lr, r=router, b=budget: r.upscale(lr, budget=b)
    return found


def test_quality(setting: Setting) -> None:
    """The mean over photographs of every network's PSNR, and its median time per megapixel of output."""
    scores: dict[str, list[float]] = {}
    flops: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    paths, known = images.photographs("test2k"), networks()
    for path in paths[:1] if setting.smoke else paths:
        lr, hr = make_pair(io.read_image(path), images.SCALE)
        if setting.smoke:
            lr, hr = lr[:, :96, :96].contiguous(), hr[:, :384, :384]
        lr, hr = lr.to(device()), hr.to(device())
        for name, run in known.items():
            result = run(lr)
            synchronise()
            begin = time.perf_counter()
            run(lr)
            synchronise()
            seconds.setdefault(name, []).append((time.perf_counter() - begin) * 1e6 / hr[0].numel())
            image = result.image if isinstance(result, Upscaled) else result
            scores.setdefault(name, []).append(psnr(image, hr))
            if isinstance(result, Upscaled) and name not in PUBLISHED:
                flops.setdefault(name, []).append(result.stats.flops.fraction)
    mean = {name: sum(values) / len(values) for name, values in scores.items()}
    rows = [
        {
            "network": name,
            "psnr": value,
            "gain": value - mean["bicubic"],
            "flops": sum(flops[name]) / len(flops[name]) if name in flops else None,
            "seconds_per_megapixel": statistics.median(seconds[name]),
            "per_image": scores[name],
        }
        for name, value in mean.items()
    ]
    for row in rows:
        print(
            f"{row['network']:<44} {row['psnr']:.3f} dB  {row['gain']:+.3f}  {row['flops'] or 0:.3f}  "
            f"{1e3 * row['seconds_per_megapixel']:.1f} ms per megapixel"
        )
    assert all(torch.isfinite(torch.tensor(row["psnr"])) for row in rows)
    setting.save(
        "quality",
        rows,
        f"x4, {len(rows[0]['per_image'])} of {images.source('test2k')}, 8-bit, border of 4 pixels left out; time: the second "
        "of two runs, median over images",
    )
