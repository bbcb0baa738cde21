"""PSNR of the shipped model on the 2K photographs, dense and routed, beside bicubic and the published FSRCNN."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import fastroute
from benchmarks.measure import save
from fastroute import io
from fastroute.training.data import make_pair, to_uint8

BORDER = 4
BUDGETS = (0.5, 0.6, 0.7, 0.8, 0.9)


def psnr(image: Tensor, hr: Tensor) -> float:  # uint8 [3, H, W]
    """RGB PSNR in dB of 8-bit images, without a border of 4 pixels."""
    error = (image.float() - hr.float())[:, BORDER:-BORDER, BORDER:-BORDER].square().mean().item()
    return 10 * math.log10(255**2 / max(error, 1e-10))


def test_quality(data_folder: Path, smoke: bool, saving: bool) -> None:
    """The mean over photographs of every network's PSNR."""
    shipped = fastroute.load()
    published = fastroute.load(data_folder / "weights" / "fsrcnn-x4.pth")
    scores: dict[str, list[float]] = {}
    flops: dict[str, list[float]] = {}

    def record(name: str, image: Tensor, hr: Tensor, fraction: float | None = None) -> None:
        scores.setdefault(name, []).append(psnr(image, hr))
        if fraction is not None:
            flops.setdefault(name, []).append(fraction)

    paths = io.list_images(data_folder / "images" / "test2k")
    for path in paths[:1] if smoke else paths:
        lr, hr = make_pair(io.read_image(path), 4)
        if smoke:
            lr, hr = lr[:, :96, :96].contiguous(), hr[:, :384, :384]
        record("bicubic", to_uint8(F.interpolate(lr[None].float() / 255, scale_factor=4, mode="bicubic")[0]), hr)
        record("published FSRCNN-56", published.upscale(lr).image, hr)
        for name, budget in [("largest branch everywhere", 1.0), ("routed by its classifier", None)]:
            result = shipped.upscale(lr, budget=budget)
            record(f"ClassSR-FSRCNN, {name}", result.image, hr, result.stats.flops.fraction)
        for budget in BUDGETS:
            result = shipped.upscale(lr, budget=budget)
            record(f"ClassSR-FSRCNN, budget {budget}", result.image, hr, result.stats.flops.fraction)
    mean = {name: sum(values) / len(values) for name, values in scores.items()}
    rows = [
        {
            "network": name,
            "psnr": value,
            "gain": value - mean["bicubic"],
            "flops": sum(flops[name]) / len(flops[name]) if name in flops else None,
            "per_image": scores[name],
        }
        for name, value in mean.items()
    ]
    for row in rows:
        print(f"{row['network']:<44} {row['psnr']:.3f} dB  {row['gain']:+.3f}  {row['flops'] or 0:.3f}")
    assert all(torch.isfinite(torch.tensor(row["psnr"])) for row in rows)
    if saving and not smoke:
        save("quality", rows, f"x4, {len(paths)} photographs of about 2560 x 1600, 8-bit, border of 4 pixels left out")
