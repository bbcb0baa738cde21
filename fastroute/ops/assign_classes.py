"""`assign_classes`: from scores to classes, under a cost penalty or a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastroute.ops import _checks as check
from fastroute.ops._library import call, register
from fastroute.reference.assign_classes import BUDGET_SLACK, assign_classes_budget_reference, assign_classes_reference

SCHEMAS = [
    "assign_classes(Tensor score, Tensor cost, float penalty, int id_bytes) -> Tensor",
    "assign_classes.budget(Tensor score, Tensor cost, float budget, float? penalty, bool logits, int id_bytes) -> "
    "(Tensor, Tensor)",
]
OP = "assign_classes"


def assign_classes(
    score: Tensor,  # [N, K] or [B, K, H, W]
    cost: Tensor | Sequence[float],  # [K]
    penalty: float = 0.0,
    budget: float | None = None,
    dtype: torch.dtype = torch.int64,
    logits: bool = False,
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
        logits: whether `score` are logits, whose softmax are the probabilities. They have more digits than these: a class
            of a probability near 1 is still told from a more probable one. Under a penalty or a budget, probabilities below
            2^-1024 of an item's largest count as much.

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
    costs = _checked_costs(score, cost, penalty, dtype)
    if budget is not None and penalty != 0:
        raise ValueError(f"{OP}: give either penalty or budget; got penalty={penalty} and budget={budget}")
    _check_values(cost, budget)
    if budget is not None:
        return _solved(score, costs, budget, None, logits, dtype)[1]
    if logits and penalty != 0:
        # Any mean cost is affordable, so this is the smallest penalty that may be tried.
        return _solved(score, costs, 1.0, penalty, logits, dtype)[1]
    return call(OP, _checked_reference, score.device, score, costs, float(penalty), dtype.itemsize)


def solve_classes(
    score: Tensor,  # [N, K] or [B, K, H, W]
    cost: Sequence[float],  # [K]
    budget: float,
    penalty: float | None = None,
    dtype: torch.dtype = torch.int64,
    logits: bool = False,
) -> tuple[Tensor, Tensor]:  # [], [N] or [B, H, W]
    """The penalty of :func:`assign_classes` within a budget, and the classes that it gives.

    Args:
        score, cost, budget, dtype, logits: see :func:`assign_classes`.
        penalty: no smaller one is considered.

    Returns:
        the penalty, float64, on the device of `score`, for which there is no wait; and class ids.

    Raises:
        ValueError, TypeError: see :func:`assign_classes`.
    """
    costs = _checked_costs(score, cost, penalty or 0.0, dtype)
    _check_values(cost, budget)
    return _solved(score, costs, budget, penalty, logits, dtype)


def _solved(
    score: Tensor,  # [N, K] or [B, K, H, W]
    costs: Tensor,  # [K]
    budget: float,
    penalty: float | None,
    logits: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    least = None if penalty is None else float(penalty)
    arguments = (score, costs, budget, least, logits, dtype.itemsize)
    solved, ids = call(f"{OP}.budget", _checked_budget_reference, score.device, *arguments)
    return solved, ids


def _checked_costs(score: Tensor, cost: Tensor | Sequence[float], penalty: float, dtype: torch.dtype) -> Tensor:
    # [N, K] or [B, K, H, W], [K] -> [K]
    """The costs as a tensor; everything but the values of the costs is checked."""
    check.tensor(OP, "score", score)
    if score.ndim < 2:
        raise ValueError(f"{OP}: score must be (N, K) or (B, K, H, W); got {tuple(score.shape)}")
    check.dtype(OP, "score", score.dtype, check.FLOATING)
    check.dtype(OP, "dtype", dtype, check.ID_TYPES.values())
    if isinstance(cost, Tensor) and cost.device.type != "cpu":
        raise ValueError(f"{OP}: cost must be on the CPU, it is read before the kernel runs; got {cost.device}")
    costs = torch.as_tensor(cost, dtype=torch.float64, device="cpu")
    if costs.ndim != 1 or costs.shape[0] != score.shape[1]:
        raise ValueError(
            f"{OP}: cost must have one entry per class, {score.shape[1]} as score has; got shape {tuple(costs.shape)}"
        )
    if not 1 <= score.shape[1] <= 256:
        raise ValueError(f"{OP}: score must have 1 to 256 classes; got {score.shape[1]}")
    if not -math.inf < penalty < math.inf:
        raise ValueError(f"{OP}: penalty must be finite; got {penalty}")
    return costs


def _check_values(cost: Tensor | Sequence[float], budget: float | None) -> None:  # [K]
    # The values of a tensor are unknown while compiling; numbers are checked all the same.
    if torch.compiler.is_compiling() and isinstance(cost, Tensor):
        return
    costs = [float(c) for c in cost]
    if not all(0 < c < math.inf for c in costs):
        raise ValueError(f"{OP}: cost must be positive and finite; got {costs}; give a free class its small true cost")
    possible = min(costs) / max(costs)
    if budget is not None and not possible - BUDGET_SLACK <= budget <= 1 + BUDGET_SLACK:
        raise ValueError(
            f"{OP}: budget must lie in [{possible:.4g}, 1], from everything in the cheapest class to everything in the "
            f"most expensive; got {budget}"
        )


def _checked_reference(
    score: Tensor,  # [N, K] or [B, K, H, W]
    cost: Tensor,  # [K]
    penalty: float,
    id_bytes: int,
) -> Tensor:
    if score.device.type == "meta":
        return _fake(score, cost, penalty, id_bytes)
    _check_no_nan(score)
    return assign_classes_reference(score, cost, penalty, check.ID_TYPES[id_bytes])


def _checked_budget_reference(
    score: Tensor,  # [N, K] or [B, K, H, W]
    cost: Tensor,  # [K]
    budget: float,
    penalty: float | None,
    logits: bool,
    id_bytes: int,
) -> tuple[Tensor, Tensor]:
    if score.device.type == "meta":
        return _budget_fake(score, cost, budget, penalty, logits, id_bytes)
    _check_no_nan(score)
    return assign_classes_budget_reference(score, cost, budget, penalty, logits, check.ID_TYPES[id_bytes])


def _check_no_nan(score: Tensor) -> None:  # [...]
    if check.looks_at(score) and bool(score.isnan().any()):
        raise ValueError(f"{OP}: score must not be NaN")


def _fake(
    score: Tensor,  # [N, K] or [B, K, H, W]
    cost: Tensor,  # [K]
    penalty: float,
    id_bytes: int,
) -> Tensor:
    return score.new_empty((score.shape[0], *score.shape[2:]), dtype=check.ID_TYPES[id_bytes])


def _budget_fake(
    score: Tensor,  # [N, K] or [B, K, H, W]
    cost: Tensor,  # [K]
    budget: float,
    penalty: float | None,
    logits: bool,
    id_bytes: int,
) -> tuple[Tensor, Tensor]:
    return score.new_empty((), dtype=torch.float64), _fake(score, cost, 0.0, id_bytes)


register("assign_classes", _checked_reference, _fake)
register("assign_classes.budget", _checked_budget_reference, _budget_fake)
