"""adaptive_threshold on one score per output pixel, beside PCSR's published iteration."""

from __future__ import annotations

import torch
from torch import Tensor

import fastroute
from benchmarks.baselines.pcsr_published import two_means
from benchmarks.measure import device
from benchmarks.ops._common import OURS, SCALE, Case, Variant, cases, compare, compiled, known, same_classes
from benchmarks.setting import Setting
from fastroute.reference.adaptive_threshold import adaptive_threshold_reference

DTYPES = (torch.float32, torch.float16)
# The least that any step of the iteration does per score: a comparison, a sum and a count.
FLOPS_PER_SCORE = 3


def run_case(case: Case, setting: Setting) -> dict:
    """Scores of two overlapping populations, as of a classifier that is mostly sure."""
    torch.manual_seed(0)
    shape = (case.batch, case.height * SCALE, case.width * SCALE)
    centre = torch.where(torch.rand(shape) < 0.3, 1.5, -1.5)
    score = (centre + torch.randn(shape)).sigmoid().to(device(), case.dtype)
    expected, reference = known(lambda: adaptive_threshold_reference(score, torch.uint8))
    # Published centres are means in float32, which move the threshold by some rounding errors.
    close = same_classes(expected, 1e-4)

    def published() -> Tensor:
        return torch.stack([two_means(image.float().flatten()) for image in score]).to(torch.uint8).view(shape)

    variants: dict[str, Variant | str] = {
        OURS: Variant(lambda: fastroute.adaptive_threshold(score, torch.uint8), same_classes(expected)),
        "reference": reference,
        "reference, compiled": compiled(
            adaptive_threshold_reference, score, torch.uint8, check=close, setting=setting, case=case
        ),
        "published": Variant(published, close),
    }
    label = f"adaptive_threshold, {case.width * SCALE} x {case.height * SCALE}, {case.suffix}"
    flops, moved = FLOPS_PER_SCORE * score.numel(), score.nbytes + expected.nbytes
    return compare(label, variants, moved, "published", setting, flops, **case.facts)


def test_adaptive_threshold(setting: Setting) -> None:
    """The floor reads the scores once, where each step of the iteration must read them."""
    rows = [run_case(case, setting) for case in cases(setting, DTYPES, formats=False, alike=True)]
    setting.save("adaptive_threshold", rows, "to uint8; medians of alternating runs, warm")
