"""What the benchmarks of the patch path share: every way to upscale one image, checked against the router."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import fastroute
from benchmarks.baselines import classsr_published as plain
from benchmarks.baselines.packages import sliding_window
from benchmarks.measure import device, exact_result, first
from benchmarks.setting import Setting
from fastroute.grid import TileGrid
from fastroute.models.classsr import ClassSR

# Outputs of the plain ways against the router's, beside the largest value: float32 sums in another order.
TOLERANCE = 1e-4
# Ways that take longer than this are timed once: they are far behind.
SLOW_SECONDS = 0.8
ROUTED, DENSE = "routed", "dense, same machinery"
PUBLISHED, BATCHED = "published way", "plain PyTorch, batched per class"

Run = Callable[[], Tensor]
# Bytes at the peak of a first run, by the name of what ran.
Memory = dict[str, int | None]


@contextmanager
def patchwise(router: fastroute.PatchRouter) -> Iterator[fastroute.PatchRouter]:
    """The router as published, every patch on its own: its result is that of the plain ways, which know no regions."""
    merge, router.merge = router.merge, 1
    try:
        yield router
    finally:
        router.merge = merge


def close(result: Tensor, expected: Tensor) -> None:
    """Equal up to the order of sums."""
    error = (result - expected).abs().max().item() / max(expected.abs().max().item(), 1e-6)
    assert error <= TOLERANCE, f"outputs differ by {error:.1e} of the largest value"


def agreeing(
    runs: dict[str, Run | str], expected: Tensor, missing: dict[str, str], memory: Memory, foreign: bool = False
) -> dict[str, Run]:
    """Run each once, looking at its memory; those that agree with `expected`, which is computed exactly.

    A foreign way that does not is missing, one of ours an error.
    """
    kept = {}
    for name, run in runs.items():
        if isinstance(run, str):
            missing[name] = run
            continue
        try:
            begun = first(run)
            close(exact_result(run, begun), expected)
        except (AssertionError, RuntimeError) as error:
            if not foreign:
                raise
            missing[name] = str(error).splitlines()[0]
            continue
        kept[name], memory[name] = run, begun.peak
    return kept


def dense_runs(
    model: ClassSR,
    pixels: Tensor,
    grid: TileGrid,
    expected: Tensor,
    setting: Setting,
    missing: dict[str, str],
    memory: Memory,
) -> dict[str, Run]:  # [1, C, H, W], [1, C, H·s, W·s]
    """The largest branch everywhere: in one pass, tiled at its best batch, by MONAI, and compiled.

    One pass sees past the edges of patches, so its numbers are others; it is what one does without routing.
    """
    largest = copy.deepcopy(model.branches[-1]).to(memory_format=torch.channels_last)
    batch = plain.best_batch(largest, pixels, grid)
    runs: dict[str, Run | str] = {f"tiled dense, batches of {batch}": lambda: plain.tiled(largest, pixels, grid, batch)}
    window = sliding_window(largest, grid, batch)
    foreign: dict[str, Run | str] = {"MONAI sliding window": window if isinstance(window, str) else lambda: window(pixels)}
    quick = plain.compiled_network(largest, plain.cut(pixels, grid)[:batch], setting)
    foreign["tiled dense, compiled"] = quick if isinstance(quick, str) else lambda: plain.tiled(quick, pixels, grid, batch)
    kept = agreeing(runs, expected, missing, memory) | agreeing(foreign, expected, missing, memory, foreign=True)
    one, label = model.branches[-1], "largest branch, one pass"
    begun = first(lambda: one(pixels))
    memory[label] = begun.peak
    whole = plain.compiled_network(one, pixels, setting)
    if isinstance(whole, str):
        missing[f"{label}, compiled"] = whole
    else:
        expected = exact_result(lambda: one(pixels), begun)
        kept |= agreeing({f"{label}, compiled": lambda: whole(pixels)}, expected, missing, memory)
    return {label: lambda: one(pixels), **kept}


def routed_runs(
    model: ClassSR,
    pixels: Tensor,
    grid: TileGrid,
    expected: Tensor,
    setting: Setting,
    missing: dict[str, str],
    memory: Memory,
    class_ids: list[int] | None = None,
) -> dict[str, Run]:  # [1, C, H, W], [1, C, H·s, W·s]
    """The published way and batches per class, and both compiled, by the classifier's classes or by given ones."""
    batched = copy.deepcopy(model).to(memory_format=torch.channels_last)
    ids = None if class_ids is None else torch.tensor(class_ids, device=device())
    kept = agreeing(
        {
            PUBLISHED: lambda: plain.loop_over_patches(model, pixels, grid, class_ids),
            BATCHED: lambda: plain.batch_per_class(batched, pixels, grid, ids),
        },
        expected,
        missing,
        memory,
    )
    # A loop is given classes one by one, batches all at once.
    for name, network, run, chosen in (
        (BATCHED, batched, plain.batch_per_class, ids),
        (PUBLISHED, model, plain.loop_over_patches, class_ids),
    ):
        label, reason = f"{name}, compiled", setting.compile_reason()
        if reason is not None:
            missing[label] = reason
            continue
        quick = plain.compiled_model(network)
        way = {label: lambda q=quick, r=run, c=chosen: r(q, pixels, grid, c)}
        with setting.compiling():
            found = agreeing(way, expected, missing, {}, foreign=True)
        # The first run compiled.
        kept |= agreeing(found, expected, missing, memory, foreign=True)
    return kept
