"""`assign_classes`: from scores to classes, under a cost penalty or a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastroute.ops import _checks as check
from fastroute.ops._library import call, register
from fastroute.reference.assign_classes import BUDGET_SLACK, assign_classes_reference

SCHEMAS = ["assign_classes(Tensor score, Tensor cost, float penalty, float? budget, int id_bytes) -> Tensor"]


def assign_classes(
    score: Tensor,  # [N, K] or [B, K, H, W]
    cost: Tensor | Sequence[float],  # [K]
    penalty: float = 0.0,
    budget: float | None = None,
    dtype: torch.dtype = torch.int64,
) -> Tensor:  # [N] or [B, H, W]
    """The class of largest score / cost^penalty; with `budget`, the penalty is solved for.

    With a budget b the penalty is the smallest, negative ones included, at which the mean cost of the chosen classes is at
    most b times that of the most expensive class: the budget is spent as far as whole items allow, first where the score
    gains most per cost. Items whose scores are exactly alike change class together. b = 1 sends everything to the most
    expensive class.

    Args:
        score: class scores along dim 1, (N, K) per patch or (B, K, H, W) per pixel; floating. Probabilities, when a
            penalty or a budget is given; under a budget those below 2^-126 count as 2^-126, and infinite ones, as
            float16 makes of large numbers, as the largest float64.
        cost: (K,) positive cost of each class, in any unit (FLOPs, milliseconds); numbers or a tensor on the CPU.
        penalty: exponent of the cost; PCSR's k. 0 is the plain argmax.
        budget: mean cost allowed, as a fraction of the most expensive class's, in [min(cost) / max(cost), 1].
        dtype: int64 or int32, or uint8 to keep a pixel map small.

    Returns:
        class ids, `score` without dim 1. On equal values the lowest class wins.

    Raises:
        ValueError: shapes that do not match, K above 256, a cost that is not positive and finite, a score that is NaN, an
            impossible budget (the message says what is possible), or both `penalty` and `budget`.
        TypeError: an unsupported dtype.

    Differentiable: no, its output is an index.
    Deterministic: yes.
    Synchronises: no.
    CUDA-graph safe: yes.
    Memory layout: any strides; contiguous output.

    Source: PCSR (Jeong et al., ECCV 2024), section 3.4: argmax of p / cost^k; the budget is ours.
    """
    op = "assign_classes"
    check.tensor(op, "score", score)
    if score.ndim < 2:
        raise ValueError(f"{op}: score must be (N, K) or (B, K, H, W); got {tuple(score.shape)}")
    check.dtype(op, "score", score.dtype, check.FLOATING)
    check.dtype(op, "dtype", dtype, check.ID_TYPES.values())
    if isinstance(cost, Tensor) and cost.device.type != "cpu":
        raise ValueError(f"{op}: cost must be on the CPU, it is read before the kernel runs; got {cost.device}")
    costs = torch.as_tensor(cost, dtype=torch.float64, device="cpu")
    if costs.ndim != 1 or costs.shape[0] != score.shape[1]:
        raise ValueError(
            f"{op}: cost must have one entry per class, {score.shape[1]} as score has; got shape {tuple(costs.shape)}"
        )
    if not 1 <= score.shape[1] <= 256:
        raise ValueError(f"{op}: score must have 1 to 256 classes; got {score.shape[1]}")
    if not -math.inf < penalty < math.inf:
        raise ValueError(f"{op}: penalty must be finite; got {penalty}")
    if budget is not None and penalty != 0:
        raise ValueError(f"{op}: give either penalty or budget; got penalty={penalty} and budget={budget}")
    # The values of a tensor are unknown while compiling; numbers are checked all the same.
    if not (torch.compiler.is_compiling() and isinstance(cost, Tensor)):
        _check_values(op, [float(c) for c in cost], budget)
    return call(op, _checked_reference, score.device, score, costs, float(penalty), budget, dtype.itemsize)


def _check_values(op: str, cost: list[float], budget: float | None) -> None:
    if not all(0 < c < math.inf for c in cost):
        raise ValueError(f"{op}: cost must be positive and finite; got {cost}; give a free class its small true cost")
    possible = min(cost) / max(cost)
    if budget is not None and not possible - BUDGET_SLACK <= budget <= 1 + BUDGET_SLACK:
        raise ValueError(
            f"{op}: budget must lie in [{possible:.4g}, 1], from everything in the cheapest class to everything in the "
            f"most expensive; got {budget:g}"
        )


def _checked_reference(
    score: Tensor,  # [N, K] or [B, K, H, W]
    cost: Tensor,  # [K]
    penalty: float,
    budget: float | None,
    id_bytes: int,
) -> Tensor:
    if score.device.type == "meta":
        return _fake(score, cost, penalty, budget, id_bytes)
    if check.looks_at(score) and bool(score.isnan().any()):
        raise ValueError("assign_classes: score must not be NaN")
    return assign_classes_reference(score, cost, penalty, budget, check.ID_TYPES[id_bytes])


def _fake(
    score: Tensor,  # [N, K] or [B, K, H, W]
    cost: Tensor,  # [K]
    penalty: float,
    budget: float | None,
    id_bytes: int,
) -> Tensor:
    return score.new_empty((score.shape[0], *score.shape[2:]), dtype=check.ID_TYPES[id_bytes])


register("assign_classes", _checked_reference, _fake)
