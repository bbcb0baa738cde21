"""PCSR end to end, with published checkpoints, beside its published formulation and the plain network.

`rest` is everything after the encoder: classifier, decision, upsamplers, refinement. The published formulation times its two
parts itself; fastroute's are stages of its own stopwatch.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.baselines.pcsr_published import PublishedRun, time_pcsr_published
from benchmarks.measure import alternate, save
from fastroute import io
from fastroute.models.carn import CARN
from fastroute.models.checkpoints import load_weights, read_checkpoint
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR
from fastroute.routing.pixel_router import PixelRouter
from fastroute.routing.result import Upscaled
from fastroute.training.data import make_pair

SCALE = 4
ROUNDS = {"fsrcnn": 3, "carn": 2}
# Against the reference model, whose coordinates are exact: sums of a few dozen float32 products in another order.
TOLERANCE = 2e-5
# Against the published formulation: its float32 coordinates are off by up to 1e-7 times the size of the image.
PUBLISHED_TOLERANCE = 1e-3


def low_resolution(path: Path, smoke: bool) -> Tensor:  # [1, 3, h, w]
    """The LR image of a photograph, float32; a corner of it for a smoke run."""
    lr, _ = make_pair(io.read_image(path), SCALE)
    pixels = lr[None].float() / 255
    return pixels[:, :, :40, :56].contiguous() if smoke else pixels


def plain_network(name: str, folder: Path) -> nn.Module:
    """The network without routing, as published."""
    path = folder / f"{name}-x4.pth"
    state, _ = read_checkpoint(path)
    network = CARN() if name == "carn" else FSRCNN()
    load_weights(network, state["model"]["sd"], path)
    return network.eval()


def check_agreement(ours: Upscaled, image: Tensor, class_map: Tensor, tolerance: float) -> None:
    """Equal but beside the pixels whose class is a matter of rounding, of which there may be one in a thousand."""
    other = ours.class_map != class_map
    share = other.float().mean().item()
    assert share <= 1e-3, f"class maps differ at {share:.2%} of pixels"
    near = nn.functional.max_pool2d(other[:, None].float(), 3, 1, 1) > 0
    error = ((ours.image - image).abs() * ~near).max().item()
    assert error <= tolerance, f"outputs differ by {error:.1e}"


def run_image(name: str, label: str, lr: Tensor, model: PCSR, plain: nn.Module, rounds: int) -> dict:
    """One image through all variants."""
    size = (lr.shape[2] * SCALE, lr.shape[3] * SCALE)
    router = PixelRouter(model)
    published_runs: list[PublishedRun] = []
    our_runs: list[Upscaled] = []
    corner = lr[:, :, :96, :96]
    exact = model(corner, scale=SCALE)
    check_agreement(router.upscale(corner, scale=SCALE), exact.image, exact.class_map, TOLERANCE)
    published = time_pcsr_published(model, lr, size)
    check_agreement(router.upscale(lr, scale=SCALE), published.image, published.class_map, PUBLISHED_TOLERANCE)
    times = alternate(
        {
            "fastroute": lambda: our_runs.append(router.upscale(lr, scale=SCALE)),
            "dense, same machinery": lambda: router.upscale(lr, scale=SCALE, budget=1.0),
            "published formulation": lambda: published_runs.append(time_pcsr_published(model, lr, size)),
            "plain network, one pass": lambda: plain(lr),
        },
        rounds,
        warm_up=0,
    )
    stages = {stage: statistics.median(run.stats.seconds[stage] for run in our_runs) for stage in our_runs[0].stats.seconds}
    rest = statistics.median(run.stats.seconds["total"] - run.stats.seconds["encode"] for run in our_runs)
    published_rest = statistics.median(run.rest_seconds for run in published_runs)
    heavy = our_runs[0].class_map.float().mean().item()
    ours = times["fastroute"].median
    row = {
        "model": name,
        "image": label,
        "lr_size": [lr.shape[3], lr.shape[2]],
        "heavy_share": heavy,
        "times": times,
        "stages": stages,
        "time_ratio": ours / times["dense, same machinery"].median,
        "rest": rest,
        "published_rest": published_rest,
        "rest_speedup": published_rest / rest,
        "speedup": times["published formulation"].median / ours,
        "over_plain": times["plain network, one pass"].median / ours,
        "flops_ratio": our_runs[0].stats.flops.fraction,
        "paper_flops_ratio": our_runs[0].stats.paper_flops.fraction,
    }
    print(
        f"\nPCSR-{name}, {label}: {lr.shape[3]} x {lr.shape[2]}, {100 * heavy:.0f} % heavy; fastroute {1e3 * ours:.0f} ms, "
        f"{row['speedup']:.1f} x the published formulation, {row['over_plain']:.1f} x the plain network; after the encoder "
        f"{1e3 * rest:.0f} ms, {row['rest_speedup']:.1f} x; {row['time_ratio']:.3f} of the dense time at "
        f"{row['flops_ratio']:.3f} of its FLOPs"
    )
    print("  " + ", ".join(f"{stage} {1e3 * seconds:.1f}" for stage, seconds in stages.items()) + " ms", flush=True)
    return row


@pytest.mark.parametrize("name", ["fsrcnn", "carn"])
def test_pixel_routing(name: str, data_folder: Path, smoke: bool, saving: bool) -> None:
    """All photographs of Test2K at x4."""
    weights = data_folder / "weights"
    model = PCSR.from_published(torch.load(weights / f"pcsr-{name}-x4.pth", map_location="cpu", weights_only=True))
    plain = plain_network(name, weights)
    paths = io.list_images(data_folder / "images" / "test2k")
    rows = []
    for path in paths[:1] if smoke else paths:
        rows.append(run_image(name, path.stem, low_resolution(path, smoke), model, plain, 1 if smoke else ROUNDS[name]))
    if not smoke:
        for key in ("rest_speedup", "speedup", "over_plain"):
            values = sorted(row[key] for row in rows)
            print(f"{key}: least {values[0]:.2f}, median {statistics.median(values):.2f}, most {values[-1]:.2f}")
    if saving and not smoke:
        save(f"pixel_routing_{name}", rows, f"PCSR-{name.upper()} x4, float32; medians of alternating runs")
