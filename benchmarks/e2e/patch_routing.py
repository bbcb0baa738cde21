"""ClassSR over FSRCNN end to end: is the FLOPs saving a saving of time?

The headline is the realised saving: routed time over dense time beside routed FLOPs over dense FLOPs. Dense is every patch in
the dearest branch, by the same machinery.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor

import fastroute
from benchmarks.baselines.classsr_published import batch_per_class, loop_over_patches
from benchmarks.measure import alternate, save
from fastroute import io
from fastroute.grid import TileGrid
from fastroute.models.checkpoints import load_weights, read_checkpoint
from fastroute.models.classsr import ClassSR
from fastroute.routing.load import DEFAULT_MODEL, WEIGHTS
from fastroute.training.data import make_pair

# Time of the published ClassSR-FSRCNN over the plain network in the CDNSR report, table I: Test2K, Test4K, Test8K.
PUBLISHED_TIME_RATIO = {"test2k": 0.321 / 0.374, "test4k": 1.302 / 1.549, "test8k": 7.218 / 8.932}


def shipped_model() -> ClassSR:
    """The default model as a plain PyTorch module."""
    path = WEIGHTS / f"{DEFAULT_MODEL}.safetensors"
    state, _ = read_checkpoint(path)
    model = ClassSR.fsrcnn()
    load_weights(model, state, path)
    return model.eval()


def low_resolution(path: Path, smoke: bool) -> Tensor:  # [1, 3, H, W]
    """The LR image of a photograph, uint8 as files hold it; a corner of it for a smoke run."""
    lr, _ = make_pair(io.read_image(path), 4)
    lr = lr[None]
    return lr[:, :, :96, :160].contiguous() if smoke else lr


def run_image(name: str, image: Tensor, rounds: int) -> dict:
    """All variants on one image, after their agreement is checked.

    fastroute goes from uint8 to uint8, conversions included; the others get float32 and leave float32, conversions not counted.
    """
    model = shipped_model()
    batched = copy.deepcopy(model).to(memory_format=torch.channels_last)
    router = fastroute.load()
    grid = TileGrid(image.shape[2], image.shape[3], scale=4)
    result = router.upscale(image)
    pixels = image.float() / 255
    for other in (loop_over_patches(model, pixels, grid), batch_per_class(batched, pixels, grid)):
        # Equal but for values that lie on the edge of two levels.
        levels = (other.clamp(0, 1) * 255).round() - result.image.float()
        assert levels.abs().max() <= 1 and (levels != 0).float().mean() < 1e-3
    largest = model.branches[-1]
    overheads, stages = [], []

    def routed() -> None:
        stats = router.upscale(image).stats
        overheads.append(stats.overhead)
        stages.append(stats.seconds)

    times = alternate(
        {
            "routed": routed,
            "dense, same machinery": lambda: router.upscale(image, budget=1.0),
            "largest branch, one pass": lambda: largest(pixels),
            "published way": lambda: loop_over_patches(model, pixels, grid),
            "plain PyTorch, batched per class": lambda: batch_per_class(batched, pixels, grid),
        },
        rounds,
    )
    ours = times["routed"].median
    overhead = sorted(overheads)[len(overheads) // 2]
    mean_stages = {k: sum(s[k] for s in stages) / len(stages) for k in stages[0]}
    ratio = ours / times["dense, same machinery"].median
    stats = result.stats
    shares = [n / sum(stats.patches_per_class) for n in stats.patches_per_class]
    print(f"\n{name}: {image.shape[3]} x {image.shape[2]}, classes {'/'.join(f'{100 * s:.0f}' for s in shares)} %")
    for label, timing in times.items():
        print(f"  {label:<34} {timing}   {timing.median / ours:6.2f} x routed")
    print(
        f"  realised saving: time {ratio:.3f} of dense at {stats.flops.fraction:.3f} of its FLOPs "
        f"({stats.paper_flops.fraction:.3f} as the papers count); routing overhead {100 * overhead:.1f} %"
    )
    return {
        "image": name,
        "lr_size": [image.shape[3], image.shape[2]],
        "class_shares": shares,
        "times": times,
        "time_ratio": ratio,
        "flops_ratio": stats.flops.fraction,
        "paper_flops_ratio": stats.paper_flops.fraction,
        "overhead": overhead,
        "stages": mean_stages,
    }


def test_patch_routing(data_folder: Path, smoke: bool, saving: bool) -> None:
    """Routed, dense, published and plain on the 4K photographs (LR about 960 x 540)."""
    paths = io.list_images(data_folder / "images" / "test4k")
    rows = []
    for path in paths[:1] if smoke else paths:
        rows.append(run_image(path.stem, low_resolution(path, smoke), 2 if smoke else 5))
    if saving and not smoke:
        save(
            "patch_routing",
            rows,
            "ClassSR-FSRCNN x4; fastroute from uint8 to uint8, the others float32; medians of alternating runs",
        )


def test_sample(smoke: bool) -> None:
    """The same on the sample photograph that comes with the project, so that the benchmark runs anywhere."""
    sample = io.read_image(Path(__file__).parents[2] / "assets" / "sample.png")[None]
    run_image("sample", sample[:, :, :96, :160].contiguous() if smoke else sample, 2 if smoke else 5)
