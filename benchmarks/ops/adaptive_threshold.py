"""adaptive_threshold on one score per output pixel, beside PCSR's published iteration."""

from __future__ import annotations

import torch

import fastroute
from benchmarks.baselines.pcsr_published import two_means
from benchmarks.measure import save
from benchmarks.ops._common import OURS, SCALE, Variant, compare, compiled, same_classes, sizes
from fastroute.reference.adaptive_threshold import adaptive_threshold_reference

DTYPES = (torch.float32, torch.float16)


def run_case(name: str, height: int, width: int, dtype: torch.dtype, smoke: bool) -> dict:
    """Scores of two overlapping populations, as of a classifier that is mostly sure."""
    torch.manual_seed(0)
    shape = (1, height * SCALE, width * SCALE)
    centre = torch.where(torch.rand(shape) < 0.3, 1.5, -1.5)
    score = (centre + torch.randn(shape)).sigmoid().to(dtype)
    expected = adaptive_threshold_reference(score, torch.uint8)
    # Published centres are means in float32, which move the threshold by some rounding errors.
    close = same_classes(expected, 1e-4)
    variants: dict[str, Variant | str] = {
        OURS: Variant(lambda: fastroute.adaptive_threshold(score, torch.uint8), same_classes(expected)),
        "reference": Variant(lambda: adaptive_threshold_reference(score, torch.uint8), same_classes(expected)),
        "reference, compiled": compiled(adaptive_threshold_reference, score, torch.uint8, check=close, smoke=smoke),
        "published": Variant(lambda: two_means(score.float().flatten()).to(torch.uint8).view(shape), close),
    }
    kind = str(dtype)[6:]
    label = f"adaptive_threshold, {width * SCALE} x {height * SCALE}, {kind}"
    facts = {"size": name, "dtype": kind, "output_pixels": expected.numel()}
    return compare(label, variants, score.nbytes + expected.nbytes, "published", smoke, **facts)


def test_adaptive_threshold(smoke: bool, saving: bool) -> None:
    """The floor reads the scores once, where each step of the iteration must read them."""
    rows = [run_case(name, *size, dtype, smoke) for name, size in sizes(smoke).items() for dtype in DTYPES]
    if saving and not smoke:
        save("adaptive_threshold", rows, "to uint8; medians of alternating runs, warm")
