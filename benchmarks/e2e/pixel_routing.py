"""PCSR end to end beside its published formulation and the plain network, whole, tiled and compiled.

`rest` is everything after the encoder: classifier, decision, upsamplers, refinement. The published formulation times its two
parts itself; fastroute's are stages of its own stopwatch. Weights are the published ones where the data folder has them, else
random ones with as many expensive pixels as cheap ones.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import images
from benchmarks.baselines import classsr_published
from benchmarks.baselines.pcsr_published import PublishedRun, time_pcsr_published
from benchmarks.measure import First, Timing, alternate, device, exact_result, exactly, first, summary
from benchmarks.setting import Setting
from fastroute.grid import TileGrid
from fastroute.models.carn import CARN, RGB_MEAN
from fastroute.models.checkpoints import load_weights, read_checkpoint
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR
from fastroute.pixel.pixel_router import PixelRouter
from fastroute.runtime.results import Upscaled

SCALE = 4
ROUNDS, SECONDS = 5, 10.0
# Ways that take longer than this are timed once, as they are checked.
SLOW_SECONDS = 2.0
# Photographs on a CPU; --full takes all.
PHOTOGRAPHS = {"fsrcnn": 2, "carn": 1}
# LR height and width of the corner that CARN gets of its photograph then: the whole takes it 12 s in one pass.
CORNER = (240, 360)
# Hidden widths as published: of the cheap and the expensive upsampler, and of the classifier.
WIDTHS = {"fsrcnn": ([10] * 3, [58] * 4, []), "carn": ([20] * 3, [74] * 4, [10] * 2)}
# Exponents of the cost, from mostly expensive to mostly cheap, and a budget, for which the exponent is searched.
PENALTIES = (-2.0, -1.0, 1.0, 2.0)
BUDGET = 0.75
# Against the reference model, whose coordinates are exact: sums of a few dozen float32 products in another order.
TOLERANCE = 2e-5
# Against the published formulation: its float32 coordinates are off by up to 1e-7 times the size of the image.
PUBLISHED_TOLERANCE = 1e-3
OURS, DENSE = "fastroute", "dense, same machinery"
PUBLISHED, PLAIN = "published formulation", "plain network, one pass"
PUBLISHED_COMPILED, PLAIN_COMPILED = f"{PUBLISHED}, compiled", f"{PLAIN}, compiled"

Run = Callable[[], Any]


def plain_network(name: str) -> nn.Module:
    """The network without routing, with published weights where there are any."""
    network = CARN() if name == "carn" else FSRCNN()
    path = weights_file(f"{name}-x4.pth")
    if path is not None:
        state, _ = read_checkpoint(path)
        load_weights(network, state["model"]["sd"], path)
    return network.eval().to(device())


def weights_file(name: str) -> Path | None:
    """A file of published weights, or None."""
    folder = images.data_folder()
    path = None if folder is None else folder / "weights" / name
    return path if path is not None and path.exists() else None


def pcsr(name: str, lr: Tensor) -> PCSR:  # [1, 3, h, w]
    """The routed network; a random classifier is balanced on this image."""
    path = weights_file(f"pcsr-{name}-x4.pth")
    if path is not None:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return PCSR.from_published(content).to(device())
    torch.manual_seed(0)
    light, heavy, classifier = WIDTHS[name]
    encoder = CARN(upsample=False) if name == "carn" else FSRCNN(upsample=False)
    model = PCSR.build(encoder, [light, heavy], classifier, RGB_MEAN if name == "carn" else None).eval().to(device())
    corner = lr[:, :, :64, :64]
    logits = model.probability(model.features(corner), (4 * corner.shape[2], 4 * corner.shape[3])).log()
    last = [layer for layer in model.classifier.layers if isinstance(layer, nn.Linear)][-1]
    # The median difference of the scores becomes zero.
    last.bias[0] += (logits[:, 1] - logits[:, 0]).median()
    return model


def check_agreement(ours: Upscaled, image: Tensor, class_map: Tensor, tolerance: float) -> None:
    """Equal but beside the pixels whose class is a matter of rounding, of which there may be one in a thousand."""
    other = ours.class_map != class_map
    share = other.float().mean().item()
    assert share <= 1e-3, f"class maps differ at {share:.2%} of pixels"
    near = nn.functional.max_pool2d(other[:, None].float(), 3, 1, 1) > 0
    error = ((ours.image - image).abs() * ~near).max().item()
    assert error <= tolerance, f"outputs differ by {error:.1e}"


def compiled_pcsr(model: PCSR) -> PCSR:
    """A copy whose encoder and MLPs are compiled on their first call, for any number of queries."""
    quick = copy.deepcopy(model)
    for mlp in (*quick.upsamplers, quick.classifier):
        mlp.compile(dynamic=True)
    quick.encoder.compile()
    return quick


def peers(model: PCSR, plain: nn.Module, lr: Tensor, setting: Setting, missing: dict[str, str]) -> dict[str, Run]:
    """What PCSR and its network are without fastroute; compiled where time allows."""
    size = (lr.shape[2] * SCALE, lr.shape[3] * SCALE)
    grid = TileGrid(lr.shape[2], lr.shape[3], scale=SCALE)
    tiles = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    batch = classsr_published.best_batch(tiles, lr, grid)
    runs = {
        PUBLISHED: lambda: time_pcsr_published(model, lr, size),
        PLAIN: lambda: plain(lr),
        f"plain network, tiled, batches of {batch}": lambda: classsr_published.tiled(tiles, lr, grid, batch),
    }
    whole = classsr_published.compiled_network(plain, lr, setting)
    if isinstance(whole, str):
        missing[PLAIN_COMPILED] = whole
    else:
        runs[PLAIN_COMPILED] = lambda: whole(lr)
    reason = setting.compile_reason()
    if reason is not None:
        missing[PUBLISHED_COMPILED] = reason
        return runs
    quick = compiled_pcsr(model)
    try:
        with setting.compiling():
            time_pcsr_published(quick, lr, size)
        runs[PUBLISHED_COMPILED] = lambda: time_pcsr_published(quick, lr, size)
    except (RuntimeError, AttributeError) as error:
        missing[PUBLISHED_COMPILED] = str(error).splitlines()[0]
    return runs


def begin(runs: dict[str, Run], missing: dict[str, str]) -> tuple[dict[str, First], dict[str, Timing]]:
    """The first run of each, compared with ours or the network's; and the times of those that are too slow for more.

    A compiled one that disagrees is taken out of `runs`.
    """
    begun = {OURS: first(runs[OURS])}
    ours = exact_result(runs[OURS], begun[OURS])
    for label in [label for label in runs if label != OURS]:
        begun[label] = first(runs[label])
        try:
            if isinstance(begun[label].result, PublishedRun):
                result = exact_result(runs[label], begun[label])
                check_agreement(ours, result.image, result.class_map, PUBLISHED_TOLERANCE)
            elif label == PLAIN_COMPILED:
                both = [exact_result(runs[name], begun[name]) for name in (label, PLAIN)]
                torch.testing.assert_close(*both, rtol=1e-3, atol=1e-3)
        except AssertionError as error:
            if label not in (PLAIN_COMPILED, PUBLISHED_COMPILED):
                raise
            missing[label] = str(error).splitlines()[0]
            del runs[label], begun[label]
    slow = {label: summary([run.seconds]) for label, run in begun.items() if run.seconds > SLOW_SECONDS}
    return begun, {label: timing for label, timing in slow.items() if label not in (OURS, DENSE)}


def run_image(name: str, label: str, lr: Tensor, model: PCSR, plain: nn.Module, setting: Setting) -> dict:
    """One image through all variants."""
    router = PixelRouter(model)
    published_runs: list[PublishedRun] = []
    our_runs: list[Upscaled] = []

    def kept(run: Run, results: list) -> Run:
        """The run, its results collected."""

        def collecting() -> Any:
            results.append(run())
            return results[-1]

        return collecting

    corner = lr[:, :, :96, :96]
    exact, routed = (exactly(lambda way=way: way(corner, scale=SCALE)) for way in (model, router.upscale))
    check_agreement(routed, exact.image, exact.class_map, TOLERANCE)
    missing: dict[str, str] = {}
    others = peers(model, plain, lr, setting, missing)
    runs: dict[str, Run] = {
        OURS: kept(lambda: router.upscale(lr, scale=SCALE), our_runs),
        DENSE: lambda: router.upscale(lr, scale=SCALE, budget=1.0),
        f"budget {BUDGET}": lambda: router.upscale(lr, scale=SCALE, budget=BUDGET),
        **{f"k = {k:g}": lambda k=k: router.upscale(lr, scale=SCALE, penalty=k) for k in PENALTIES},
        **others,
        PUBLISHED: kept(others[PUBLISHED], published_runs),
    }
    begun, slow = begin(runs, missing)
    memory = {label: run.peak for label, run in begun.items()}
    timed = {label: run for label, run in runs.items() if label not in slow}
    # The first runs of what is not slow are not among the times.
    for label, results in ((OURS, our_runs), (PUBLISHED, published_runs)):
        if label in timed:
            results.clear()
    times = alternate(timed, 1 if setting.smoke else ROUNDS, warm_up=0, limit=SECONDS) | slow
    stages = {stage: statistics.median(run.stats.seconds[stage] for run in our_runs) for stage in our_runs[0].stats.seconds}
    rest = statistics.median(run.stats.seconds["total"] - run.stats.seconds["encode"] for run in our_runs)
    published_rest = statistics.median(run.rest_seconds for run in published_runs)
    heavy = our_runs[0].class_map.float().mean().item()
    ours, dense = times[OURS].median, times[DENSE].median
    at = {k: begun[f"k = {k:g}"].result for k in PENALTIES}
    points = [
        {
            "k": k,
            "heavy_share": result.class_map.float().mean().item(),
            "time_ratio": times[f"k = {k:g}"].median / dense,
            "flops_ratio": result.stats.flops.fraction,
        }
        for k, result in at.items()
    ]
    row = {
        "model": name,
        "image": label,
        "lr_size": [lr.shape[3], lr.shape[2]],
        "heavy_share": heavy,
        "times": times,
        "peak_bytes": memory,
        "missing": missing,
        "stages": stages,
        "time_ratio": ours / dense,
        "rest": rest,
        "published_rest": published_rest,
        "rest_speedup": published_rest / rest,
        "speedup": times[PUBLISHED].median / ours,
        "over_plain": times[PLAIN].median / ours,
        "flops_ratio": our_runs[0].stats.flops.fraction,
        "paper_flops_ratio": our_runs[0].stats.paper_flops.fraction,
        "mixes": points,
    }
    print(
        f"\nPCSR-{name}, {label}: {lr.shape[3]} x {lr.shape[2]}, {100 * heavy:.0f} % heavy; fastroute {1e3 * ours:.0f} ms, "
        f"{row['speedup']:.1f} x the published formulation, {row['over_plain']:.1f} x the plain network; after the encoder "
        f"{1e3 * rest:.0f} ms, {row['rest_speedup']:.1f} x; {row['time_ratio']:.3f} of the dense time at "
        f"{row['flops_ratio']:.3f} of its FLOPs"
    )
    for variant, timing in times.items():
        print(f"  {variant:<42} {timing}   {timing.median / ours:6.2f} x fastroute {(memory[variant] or 0) / 1e6:7.0f} MB")
    for variant, reason in missing.items():
        print(f"  {variant:<42} not timed: {reason}")
    print("  " + ", ".join(f"{stage} {1e3 * seconds:.1f}" for stage, seconds in stages.items()) + " ms", flush=True)
    return row


@pytest.mark.parametrize("name", ["fsrcnn", "carn"])
def test_pixel_routing(name: str, setting: Setting) -> None:
    """Photographs of Test2K at x4."""
    paths = images.photographs("test2k")
    if not setting.full and device().type == "cpu":
        paths = paths[: PHOTOGRAPHS[name]]
    paths = paths[:1] if setting.smoke else paths
    some = name == "carn" and not setting.full and device().type == "cpu"
    size = (40, 56) if setting.smoke else CORNER if some else None
    plain = plain_network(name)
    rows = []
    for path in paths:
        lr = images.low_resolution(path, size).to(device()).float() / 255
        rows.append(run_image(name, path.stem, lr, pcsr(name, lr), plain, setting))
        setting.compiled_enough = "compiled on the first photograph only; --full compiles on all"
        torch.compiler.reset()
    if not setting.smoke:
        for key in ("rest_speedup", "speedup", "over_plain"):
            values = sorted(row[key] for row in rows)
            print(f"{key}: least {values[0]:.2f}, median {statistics.median(values):.2f}, most {values[-1]:.2f}")
    weights = "published weights" if weights_file(f"pcsr-{name}-x4.pth") else "random weights, half of the pixels expensive"
    notes = f"PCSR-{name.upper()} x4, float32, {weights}, {len(rows)} of {images.source('test2k')}"
    notes += f", a corner of {size[1]} x {size[0]}" if size else ""
    setting.save(f"pixel_routing_{name}", rows, f"{notes}; medians of alternating runs, or one above {SLOW_SECONDS:g} s")
