"""assign_classes on a map of two classes, under a penalty and under a budget, beside argmax and beside a sort."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastroute
from benchmarks.measure import device
from benchmarks.ops._common import OURS, SCALE, Case, Variant, cases, compare, compiled, known, same_classes
from benchmarks.setting import Setting
from fastroute.reference.assign_classes import assign_classes_budget_reference, assign_classes_reference

# The expensive upsampler of PCSR-FSRCNN costs about this much more than the cheap one.
COST = (1.0, 4.0)
PENALTY, BUDGET = 0.5, 0.6
DTYPES = (torch.float32, torch.float16)
# The reference solves for the penalty in about a hundred passes of float64, seconds each for an image of full size.
LARGEST_FOR_REFERENCE = 500_000


def by_argmax(score: Tensor) -> Tensor:  # [B, 2, H, W] -> [B, H, W]
    """Divide by the costs, take the largest."""
    weights = torch.tensor(COST, device=score.device).pow(PENALTY).view(1, -1, 1, 1)
    return (score.float() / weights).argmax(dim=1).to(torch.uint8)


def by_sort(score: Tensor) -> Tensor:  # [B, 2, H, W] -> [B, H, W]
    """With two classes: as many of those that gain most are expensive as the budget pays for."""
    gain = (score[:, 1].float().log2() - score[:, 0].float().log2()).flatten()
    share = (BUDGET * COST[1] - COST[0]) / (COST[1] - COST[0])
    classes = torch.zeros_like(gain, dtype=torch.uint8)
    classes[gain.argsort(descending=True)[: int(share * len(gain))]] = 1
    return classes.view(score[:, 0].shape)


def run_case(decision: str, case: Case, setting: Setting) -> dict:
    """A decision per output pixel of one image, or of a batch."""
    torch.manual_seed(0)
    shape = (case.batch, 2, case.height * SCALE, case.width * SCALE)
    score = torch.rand(shape, device=device()).softmax(dim=1).to(case.dtype).contiguous(memory_format=case.memory_format)
    cost = torch.tensor(COST, dtype=torch.float64, device=device())
    penalty, budget = (PENALTY, None) if decision == "penalty" else (0.0, BUDGET)
    args = (score, cost, penalty, budget, torch.uint8)
    result, ours = known(lambda: fastroute.assign_classes(*args))
    variants: dict[str, Variant | str] = {OURS: ours}
    if decision == "penalty":
        plain = (score, cost, penalty, torch.uint8)
        expected, variants["reference"] = known(lambda: assign_classes_reference(*plain))
        close = same_classes(expected)
        close(result)
        variants["reference, compiled"] = compiled(assign_classes_reference, *plain, check=close, setting=setting, case=case)
        peer = "divide and argmax"
        variants[peer] = Variant(lambda: by_argmax(score), close)
    else:
        mean = cost[result.long()].mean().item() / max(COST)
        assert mean <= BUDGET + 1e-9, f"the budget is {BUDGET}, {mean} was spent"
        # Scores that are exactly alike change class together here; a sort parts them. In half precision many are alike.
        close = same_classes(result, 1e-5 if case.dtype == torch.float32 else 1e-2)
        if result.numel() <= LARGEST_FOR_REFERENCE:
            searched = (score, cost, BUDGET, None, False, torch.uint8)
            variants["reference"] = Variant(lambda: assign_classes_budget_reference(*searched)[1], same_classes(result))
        else:
            variants["reference"] = "too slow to be timed at this size: its search is a hundred passes"
        variants["reference, compiled"] = "reads counts back at every step of its search, where a compiled graph ends"
        peer = "sort"
        variants[peer] = Variant(lambda: by_sort(score), close)
    label = f"assign_classes by {decision}, {shape[3]} x {shape[2]}, {case.suffix}"
    # A quotient and a comparison per score.
    flops, moved = 2 * score.numel(), score.nbytes + result.nbytes
    return compare(label, variants, moved, peer, setting, flops, decision=decision, **case.facts)


@pytest.mark.parametrize("decision", ["penalty", "budget"])
def test_assign_classes(decision: str, setting: Setting) -> None:
    """The floor reads the scores once; under a budget they must be read several times."""
    # A sort of a whole batch takes seconds and says nothing that one of an image does not.
    chosen = [case for case in cases(setting, DTYPES, alike=True) if decision == "penalty" or case.plain]
    rows = [run_case(decision, case, setting) for case in chosen]
    setting.save(f"assign_classes_{decision}", rows, "2 classes, to uint8; medians of alternating runs, warm")
