"""The shipped model end to end on photographs: is the FLOPs saving a saving of time?

The headline is the realised saving: routed time over dense time beside routed FLOPs over dense FLOPs. Dense is every patch in
the most expensive branch, by the same machinery.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fastroute
from benchmarks import images
from benchmarks.e2e._patches import BATCHED, DENSE, PUBLISHED, ROUTED, SLOW_SECONDS, Memory, dense_runs, patchwise, routed_runs
from benchmarks.measure import alternate, device, exactly, peak_memory
from benchmarks.setting import Setting
from fastroute.catalogue import DEFAULT_MODEL, WEIGHTS
from fastroute.grid import TileGrid
from fastroute.models.checkpoints import load_weights, read_checkpoint
from fastroute.models.classsr import ClassSR

ROUNDS, SECONDS = 5, 12.0
# Of the two whose ratio is the headline, after the rounds with all.
MORE_ROUNDS = 9


def shipped_model() -> ClassSR:
    """The default model as a plain PyTorch module."""
    path = WEIGHTS / f"{DEFAULT_MODEL}.safetensors"
    state, _ = read_checkpoint(path)
    model = ClassSR.fsrcnn()
    load_weights(model, state, path)
    return model.eval().to(device())


def run_image(name: str, image: Tensor, setting: Setting) -> dict:
    """All variants on one image, after their agreement is checked.

    fastroute goes from uint8 to uint8, conversions included; the others get float32 and leave float32, conversions not counted.
    """
    model = shipped_model()
    router = fastroute.load(device=device(), window="uniform")
    grid = TileGrid(image.shape[2], image.shape[3], scale=4)
    pixels = image.float() / 255
    missing: dict[str, str] = {}
    with patchwise(router):
        exact = exactly(lambda: router.upscale(pixels))
        result = exactly(lambda: router.upscale(image))
        whole = exactly(lambda: router.upscale(pixels, budget=1.0).image)
    # Equal but for values that lie on the edge of two levels.
    levels = (exact.image.clamp(0, 1) * 255).round() - result.image.float()
    assert levels.abs().max() <= 1 and (levels != 0).float().mean() < 1e-3
    # Classes are given, so that a tie in the classifier's rounding is no disagreement.
    ids = exact.class_map.flatten().tolist()
    memory: Memory = {}
    # What may be compiled is used up by those that come first.
    dense = dense_runs(model, pixels, grid, whole, setting, missing, memory)
    plain = routed_runs(model, pixels, grid, exact.image, setting, missing, memory, ids) | dense
    overheads, stages = [], []

    def routed() -> None:
        stats = router.upscale(image).stats
        overheads.append(stats.overhead)
        stages.append(stats.seconds)

    runs = {ROUTED: routed, DENSE: lambda: router.upscale(image, budget=1.0), **plain}
    memory |= {label: peak_memory(runs[label]) for label in (ROUTED, DENSE)}
    times = alternate(runs, 1 if setting.smoke else ROUNDS, warm_up=0, limit=SECONDS, slow=SLOW_SECONDS, kept=(ROUTED, DENSE))
    headline = {label: runs[label] for label in (ROUTED, DENSE)}
    times |= alternate(headline, 1 if setting.smoke else MORE_ROUNDS, warm_up=0, limit=SECONDS)
    ours = times[ROUTED].median
    overhead = sorted(overheads)[len(overheads) // 2]
    mean_stages = {k: sum(s[k] for s in stages) / len(stages) for k in stages[0]}
    ratio = ours / times[DENSE].median
    stats = router.upscale(image).stats
    shares = [n / sum(stats.counts_per_class) for n in stats.counts_per_class]
    print(f"\n{name}: {image.shape[3]} x {image.shape[2]}, classes {'/'.join(f'{100 * s:.0f}' for s in shares)} %")
    for label, timing in times.items():
        print(f"  {label:<42} {timing}   {timing.median / ours:6.2f} x routed  {(memory[label] or 0) / 1e6:7.0f} MB")
    for label, reason in missing.items():
        print(f"  {label:<42} not timed: {reason}")
    print(
        f"  realised saving: time {ratio:.3f} of dense at {stats.flops.fraction:.3f} of its FLOPs "
        f"({stats.paper_flops.fraction:.3f} as the papers count); routing overhead {100 * overhead:.1f} %",
        flush=True,
    )
    return {
        "image": name,
        "lr_size": [image.shape[3], image.shape[2]],
        "class_shares": shares,
        "times": times,
        "peak_bytes": memory,
        "missing": missing,
        "time_ratio": ratio,
        "flops_ratio": stats.flops.fraction,
        "paper_flops_ratio": stats.paper_flops.fraction,
        "overhead": overhead,
        "stages": mean_stages,
        "speedup": times[PUBLISHED].median / ours,
        "speedup_over_batched": times[BATCHED].median / ours,
    }


def test_patch_routing(setting: Setting) -> None:
    """Routed, dense, published and plain on the 4K photographs (LR about 960 x 540)."""
    paths = images.photographs("test4k")
    rows = []
    for path in paths[:1] if setting.smoke else paths:
        lr = images.low_resolution(path, (96, 160) if setting.smoke else None).to(device())
        rows.append(run_image(path.stem, lr, setting))
        setting.compiled_enough = "compiled on the first photograph only; --full compiles on all"
        torch.compiler.reset()
    setting.save(
        "patch_routing",
        rows,
        f"ClassSR-FSRCNN x4 on {images.source('test4k')}; fastroute from uint8 to uint8, the others float32; medians of "
        f"alternating runs, of one where a run takes more than {SLOW_SECONDS:g} s",
    )
