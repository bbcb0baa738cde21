"""The benchmark of cascades: borders on made-up pictures, tables, and a run over tiny networks."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from support import random

import fastroute
from benchmarks import cascades
from benchmarks.cascade_tables import ROUTED, pictures_table, savings_table, today_table
from fastroute import io
from fastroute.cascades import score
from fastroute.cascades.cells import CELL
from fastroute.cascades.run import FADE
from fastroute.models.checkpoints import save_checkpoint
from fastroute.models.compact import Compact
from fastroute.models.rrdbnet import RRDBNet

SCALE = 2
CLASSES = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]])


def made(step: float, fade: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A dense result and one that differs by noise and `step` in the cells of class 0, which is faded out or not."""
    side = CELL * SCALE
    cheap = (CLASSES == 0).float().repeat_interleave(side, 0).repeat_interleave(side, 1)
    if fade:
        width = FADE * SCALE
        # The distance to the better cells, up to the width of the fading.
        grown = [torch.nn.functional.max_pool2d(1 - cheap[None, None], 2 * n + 1, 1, n)[0, 0] for n in range(width)]
        cheap = 1 - sum(grown) / width
    dense = 0.5 + 0.1 * random((3, *cheap.shape), seed=1).clamp(-1, 1)
    noise = 0.02 * random((3, *cheap.shape), seed=2).clamp(-2, 2)
    return (dense + cheap * (noise + step)).clamp(0, 1), dense


def test_faded_noise_has_no_border_and_a_step_has_one():
    routed, dense = made(0.0, True)
    assert 0.3 < cascades.borders(routed, dense, CLASSES, SCALE) < 1.0
    steps = ((0.002, True), (0.1, True), (0.1, False))
    slight, plain, hard = (cascades.borders(made(*step)[0], dense, CLASSES, SCALE) for step in steps)
    # A colour that differs is seen through any fading, if it differs enough.
    assert slight < 1.2 < plain and hard > 1.2
    assert cascades.borders(routed, dense, torch.zeros_like(CLASSES), SCALE) == 0.0


def test_tiles_of_today_are_those_of_the_whole_where_nothing_is_seen_beyond_them():
    network = Compact(4, 1, SCALE).eval()
    image = random((1, 3, 300, 280), seed=3)
    with torch.inference_mode():
        torch.testing.assert_close(cascades.tiles_of_today(network, image), network(image), rtol=0, atol=1e-6)


def row(picture: str, size: str, cheap: str, fidelity: float, time: float, psnr: float, edges: float) -> dict:
    return {"kind": "picture", "picture": picture, "size": size, "cheap": cheap, "fidelity": fidelity, "time": time,
            "psnr": psnr, "edges": edges, "flops": 0.5, "border": 0.9}  # fmt: skip


def test_tables():
    whole = {"PyTorch, whole": 8.0, "PyTorch, tiles of 256": 9.0, "engine": 6.0, "fastroute dense": 5.0}
    half = {"engine": 4.0, "fastroute dense": 5.0}
    rows: list[dict] = [
        {"kind": "dense", "precision": name, "fastest": "engine", "times": {way: {"median": t} for way, t in times.items()}}
        for name, times in (("float32", whole), ("bfloat16", half))
    ]
    rows += [
        row("sky", "native", *ROUTED, 0.1, 41.0, 1.0),
        row("leaves", "native", *ROUTED, 0.9, 39.5, 30.0),
        row("sky", "reduced", *ROUTED, 0.5, 40.5, 9.0),
    ]
    expected = "| 40 dB | student | **0.50** | 0.10 | **0.50** | 0.90 | 2 of 3 | 39.5 dB | 0.90 |"
    assert savings_table(rows).splitlines()[2] == expected
    assert pictures_table(rows).splitlines()[2] == "| sky | native | 1.0 | 41.0 dB | 0.10 | 0.50 |"
    today = today_table(rows).splitlines()
    # Half of the faster dense run in bfloat16, four seconds.
    assert today[-1] == "| fastroute, routed within 40 dB of its dense result, mean | bfloat16 | 2.0 s | 4.00 x |"
    assert today[2] == "| PyTorch, whole | float32 | 8.0 s | 1.00 x |" and len(today) == 9


@pytest.mark.slow
def test_a_run_over_tiny_networks(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(score, "STEPS", 5)
    torch.manual_seed(0)
    for name, network in (("heavy.pth", RRDBNet(8, 1, 8, 4)), ("light.safetensors", Compact(4, 1, 4))):
        save_checkpoint(tmp_path / name, network)
    for folder in ("train", "test"):
        (tmp_path / folder).mkdir()
        for seed in range(2):
            picture = random((3, 288, 320), seed=seed).clamp(0, 1) * torch.linspace(0, 1, 320)
            io.write_image(tmp_path / folder / f"{seed}.png", (picture * 255).round().to(torch.uint8))
    named = {"model": "heavy.pth", "student": "light.safetensors", "train": "train", "images": "test", "cache": "cells"}
    words = [word for option, name in named.items() for word in (f"--{option}", str(tmp_path / name))]
    asked = cascades.arguments([*words, "--size", "96", "128", "--precision", "float32", "--fidelity", "30"])
    rows = json.loads(json.dumps(cascades.run(asked), default=asdict))
    pictures = [row for row in rows if row["kind"] == "picture"]
    assert len(pictures) == 2 * 2 * 3 and all(row["time"] > 0 and row["psnr"] > 10 for row in pictures)
    assert savings_table(rows).count("\n") == 2 + 3 and "fastroute dense" in today_table(rows)
    # What was measured is read again.
    router = fastroute.cascade(["bicubic", tmp_path / "light.safetensors", tmp_path / "heavy.pth"])
    monkeypatch.setattr(cascades, "measured", None)
    assert len(cascades.calibrated(router, io.list_images(asked.train), asked.cache, 0.0, cascades.CONTEXTS)) == 4
