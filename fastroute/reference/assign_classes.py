"""Reference of `assign_classes`: argmax of the cost-penalised score, and the search for the penalty of a budget."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Scores below this count as this much, so that a class that the classifier rules out entirely still has a finite price.
SMALLEST = 2.0**-126
# The same for logits: the least logarithm, relative to that of the item's largest score.
LEAST_LOG = -1024.0
# Logits that are nearer than this to the item's largest count as equal, as their probabilities do.
EQUAL_LOGS = 2.0**-53
# Mean cost and budget are both sums of rounded fractions: a budget is met when it is missed by no more than this.
BUDGET_SLACK = 1e-9


def assign_classes_reference(
    score: Tensor,  # [N, K, ...]
    cost: Tensor,  # [K]
    penalty: float,
    dtype: torch.dtype,
) -> Tensor:  # [N, ...]
    """See :func:`fastroute.assign_classes`."""
    return penalised_argmax(score, cost, penalty).to(dtype)


def assign_classes_budget_reference(
    score: Tensor,  # [N, K, ...]
    cost: Tensor,  # [K]
    budget: float,
    penalty: float | None,
    logits: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # [], [N, ...]
    """See :func:`fastroute.ops.assign_classes.solve_classes`."""
    log_score = logarithms_(score.to(torch.float64, copy=True), 1, logits)
    log_cost = cost.double().to(score.device).log2().view(1, -1, *[1] * (score.ndim - 2))
    share = (cost.double() / cost.double().max()).tolist()

    def spent(k: float) -> tuple[float, Tensor]:
        ids = (log_score - k * log_cost).argmax(dim=1)
        counts = torch.bincount(ids.flatten(), minlength=len(share)).tolist()
        return sum(n * s for n, s in zip(counts, share, strict=True)) / max(ids.numel(), 1), ids

    def found(k: float, ids: Tensor) -> tuple[Tensor, Tensor]:  # [N, ...]
        return torch.full((), k, dtype=torch.float64, device=score.device), ids.to(dtype)

    # At the widest ends every item is in the most expensive or the cheapest class. Equal items switch class at the same
    # penalty, so the most expensive affordable assignment is the limit from above.
    low, high = penalty_range(cost, penalty)
    used, ids = spent(low)
    if used <= budget + BUDGET_SLACK:
        return found(low, ids)
    answer = spent(high)[1]
    while (middle := 0.5 * (low + high)) not in (low, high):
        used, ids = spent(middle)
        if used <= budget + BUDGET_SLACK:
            high, answer = middle, ids
        else:
            low = middle
    return found(high, answer)


def penalty_range(cost: Tensor, least: float | None) -> tuple[float, float]:  # [K]
    """The penalties to search.

    They end where the cost overrules all possible scores in favour of the cheapest class. They begin at `least`, or where it
    does so in favour of the most expensive one.
    """
    log_cost = cost.double().log2().sort().values.unique()
    gap = log_cost.diff().min().item() if log_cost.numel() > 1 else 1.0
    # log2 of a finite clamped float lies in [-126, 1024), that of a logit in [-1024, 0].
    bound = 1152 / gap
    return -bound if least is None else min(max(least, -bound), bound), bound


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


def logarithms_(score: Tensor, dim: int, logits: bool) -> Tensor:  # [...] float64
    """log2 of scores, in place; of logits, relative to the largest of each item. `dim` is that of the classes."""
    if not logits:
        # An infinite score counts as the largest number; NaN, where nobody could look, as the smallest.
        return score.nan_to_num_(nan=0.0).clamp_(min=SMALLEST).log2_()
    score.nan_to_num_(nan=-math.inf).clamp_(min=torch.finfo(torch.float64).min)
    score.sub_(score.amax(dim, keepdim=True)).mul_(math.log2(math.e)).clamp_(min=LEAST_LOG)
    return score.masked_fill_(score > -EQUAL_LOGS, 0.0)
