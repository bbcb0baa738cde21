"""Reference of `assign_classes`: argmax of the cost-penalised score."""

from __future__ import annotations

import torch
from torch import Tensor

# Scores below this count as this much, so that a class that the classifier rules out entirely still has a finite price.
SMALLEST = 2.0**-126
# Mean cost and budget are both sums of rounded fractions: a budget is met when it is missed by no more than this.
BUDGET_SLACK = 1e-9


def assign_classes_reference(
    score: Tensor,  # [N, K, ...]
    cost: Tensor,  # [K]
    penalty: float,
    budget: float | None,
    dtype: torch.dtype,
) -> Tensor:  # [N, ...]
    """See :func:`fastroute.assign_classes`."""
    if budget is None:
        return penalised_argmax(score, cost, penalty).to(dtype)
    log_score, log_cost = logarithms(score, cost)
    share = (cost.double() / cost.double().max()).tolist()

    def spent(k: float) -> tuple[float, Tensor]:
        ids = (log_score - k * log_cost).argmax(dim=1)
        counts = torch.bincount(ids.flatten(), minlength=len(share)).tolist()
        return sum(n * s for n, s in zip(counts, share, strict=True)) / max(ids.numel(), 1), ids

    # At the ends every item is in the most expensive or the cheapest class. Equal items switch class at the same penalty, so
    # the most expensive affordable assignment is the limit from above.
    low, high = penalty_range(cost)
    used, ids = spent(low)
    if used <= budget + BUDGET_SLACK:
        return ids.to(dtype)
    answer = spent(high)[1]
    while (middle := 0.5 * (low + high)) not in (low, high):
        used, ids = spent(middle)
        if used <= budget + BUDGET_SLACK:
            high, answer = middle, ids
        else:
            low = middle
    return answer.to(dtype)


def penalty_range(cost: Tensor) -> tuple[float, float]:  # [K]
    """Penalties at which every possible score is overruled by the cost: towards the most expensive and the cheapest class."""
    log_cost = cost.double().log2().sort().values.unique()
    gap = log_cost.diff().min().item() if log_cost.numel() > 1 else 1.0
    # log2 of a finite clamped float lies in [-126, 1024).
    bound = 1152 / gap
    return -bound, bound


def penalised_argmax(score: Tensor, cost: Tensor, penalty: float) -> Tensor:  # [N, K, ...], [K] -> [N, ...]
    """argmax of score / cost^penalty over dim 1, the lowest class on a tie; the plain argmax at penalty 0."""
    work = torch.float64 if score.dtype == torch.float64 else torch.float32
    value = score.to(work)
    if penalty != 0:
        shape = (1, -1) + (1,) * (score.ndim - 2)
        # Relative to the class that gains most, so that no unit of cost overflows.
        gain = -penalty * cost.double().log()
        value = value * (gain - gain.max()).exp().to(work).to(score.device).view(shape)
    return value.argmax(dim=1)


def logarithms(score: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:  # [N, K, ...], [K]
    """log2 of the clamped score [N, K, ...] and of the cost [1, K, 1 ...], float64."""
    shape = (1, -1) + (1,) * (score.ndim - 2)
    # An infinite score counts as the largest number; NaN, where nobody could look, as the smallest.
    return score.double().nan_to_num(nan=0.0).clamp(min=SMALLEST).log2(), cost.double().to(score.device).log2().view(shape)
