"""PSNR and time of the shipped models on the 2K photographs, dense and routed, beside bicubic and published networks."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import fastroute
from benchmarks import images
from benchmarks.measure import device, synchronise
from benchmarks.setting import Setting
from fastroute import io
from fastroute.catalogue import DEFAULT_MODEL
from fastroute.degradation import make_pair
from fastroute.models.arm import WIDTHS
from fastroute.runtime.results import Upscaled
from fastroute.training import arm
from fastroute.training.data import Pool
from fastroute.training.start import Start

BORDER = 4
BUDGETS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Published weights that the data folder may hold, by the name of a row.
PUBLISHED = {
    "published FSRCNN-56": "fsrcnn-x4.pth",
    "published PCSR-FSRCNN": "pcsr-fsrcnn-x4.pth",
    "published PCSR-CARN": "pcsr-carn-x4.pth",
}
# Published supernets of ARM: weights without the table from edge scores to PSNR, which is measured on data.
SUPERNETS = {"published ARM-FSRCNN": ("fsrcnn", "arm-fsrcnn.pth"), "published ARM-CARN": ("carn", "arm-carn.pth")}
# Every so many training photographs, and patches of them, for that table.
EVERY, TABLE_PATCHES = 8, 2000
LONG = 1.0  # seconds
# Photographs on a CPU whose time is taken in a second run; the PSNR is that of all, and --full times all.
TIMED = 3
TITLES = {
    DEFAULT_MODEL: "ClassSR-FSRCNN",
    "cdnsr-fsrcnn-x4": "CDNSR-FSRCNN",
    "arm-fsrcnn-x4": "ARM-FSRCNN",
    "pcsr-fsrcnn-x4": "PCSR-FSRCNN",
}


def psnr(image: Tensor, hr: Tensor) -> float:  # uint8 [3, H, W]
    """RGB PSNR in dB of 8-bit images, without a border of 4 pixels."""
    error = (image.float() - hr.float())[:, BORDER:-BORDER, BORDER:-BORDER].square().mean().item()
    return 10 * math.log10(255**2 / max(error, 1e-10))


def left_out(file: str, setting: Setting) -> bool:
    """CARN takes minutes on a CPU, which only --full spends."""
    return "carn" in file and device().type == "cpu" and not (setting.full or setting.smoke)


def supernets(setting: Setting) -> dict[str, fastroute.PatchRouter]:
    """ARM with published weights, and tables measured on some training photographs."""
    folder = images.data_folder()
    if folder is None or not (folder / "images" / "train").is_dir():
        return {}
    paths = io.list_images(folder / "images" / "train")
    others = [path.name for number, path in enumerate(paths) if number % (len(paths) if setting.smoke else EVERY)]
    found = {}
    with tempfile.TemporaryDirectory() as work:
        pool = Pool.build(folder / "images" / "train", images.SCALE, exclude=others)
        for name, (backbone, file) in SUPERNETS.items():
            if left_out(file, setting) or not (folder / "weights" / file).exists():
                continue
            recipe = arm.Recipe(backbone, WIDTHS[backbone], steps=0, table_patches=60 if setting.smoke else TABLE_PATCHES)
            state = Path(work, f"{backbone}.pt")
            model = arm.Trainer(pool, recipe, state, Start.read(folder / "weights" / file), device=device()).run()
            found[name] = fastroute.PatchRouter(model.branches, model.classifier, costs=model.costs(recipe.patch))
    return found


def variants(title: str, router: fastroute.PatchRouter | fastroute.PixelRouter) -> dict[str, Callable[[Tensor], Upscaled]]:
    """A routed model everywhere expensive, by its own choice, and at every budget that it can keep."""
    if isinstance(router, fastroute.PixelRouter):
        costs: Sequence[float] = router.class_cost(images.SCALE)
    else:
        costs = router.costs
    found = {f"{title}, largest branch everywhere": partial(router.upscale, budget=1.0)}
    if len(costs) > 1:
        found[f"{title}, routed by its classifier"] = router.upscale
        for budget in BUDGETS:
            if min(costs) <= budget * max(costs):
                found[f"{title}, budget {budget}"] = partial(router.upscale, budget=budget)
    return found


def networks(setting: Setting) -> dict[str, Callable[[Tensor], Tensor | Upscaled]]:
    """What enlarges an 8-bit image four times, by name."""
    found: dict[str, Callable[[Tensor], Tensor | Upscaled]] = {"bicubic": images.bicubic}
    folder = images.data_folder()
    for name, file in PUBLISHED.items():
        if folder is not None and (folder / "weights" / file).exists() and not left_out(file, setting):
            found[name] = fastroute.load(folder / "weights" / file, device=device()).upscale
    for name, router in supernets(setting).items():
        found |= {key: run for key, run in variants(name, router).items() if "budget" not in key}
    for model in fastroute.list_models():
        router = fastroute.load(model, device=device())
        # A student is judged by its teacher.
        if router.num_classes > 1 and router.scale == images.SCALE:
            found |= variants(TITLES.get(model, model), router)
    return found


def test_quality(setting: Setting) -> None:
    """The mean over photographs of every network's PSNR, and its median time per megapixel of output."""
    scores: dict[str, list[float]] = {}
    flops: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    paths, known = images.photographs("test2k"), networks(setting)
    timed = len(paths) if setting.full or device().type == "cuda" else TIMED
    for number, path in enumerate(paths[:1] if setting.smoke else paths):
        lr, hr = make_pair(io.read_image(path), images.SCALE)
        if setting.smoke:
            lr, hr = lr[:, :96, :96].contiguous(), hr[:, :384, :384]
        lr, hr = lr.to(device()), hr.to(device())
        for name, run in known.items():
            for _ in range(2):
                synchronise()
                begin = time.perf_counter()
                result = run(lr)
                synchronise()
                taken = time.perf_counter() - begin
                # What takes seconds is not run twice to be warm.
                if taken > LONG or number >= timed:
                    break
            if number < timed:
                seconds.setdefault(name, []).append(taken * 1e6 / hr[0].numel())
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
        f"of two runs, or the only one of those above a second, median over {len(seconds['bicubic'])} of the images",
    )
