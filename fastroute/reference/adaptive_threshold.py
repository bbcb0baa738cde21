"""Reference of `adaptive_threshold`: PCSR's 2-means of one score per pixel."""

from __future__ import annotations

import torch
from torch import Tensor

# The published iteration: at most this many assignments, and none after the centres have moved by this little (sum of
# squares, on a scale on which the score covers [0, 1]).
MAX_ASSIGNMENTS = 19
TOLERANCE = 1e-4


def adaptive_threshold_reference(score: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:  # [B, ...] -> [B, ...]
    """See :func:`fastroute.adaptive_threshold`.

    Per image, v = score - min(score), r = max(v); the centres start at (mean(v), 0). A pixel is of class 1 when v is at
    least half the sum of the centres (nearest centre, ties to class 1). Then each centre becomes the mean of its class,
    and the iteration ends when the squared moves of both centres sum to at most 1e-4 · r², or after 19 assignments. The
    classes are those of the last assignment, made with the centres before the last move. A flat image is of class 0.
    Sums are float64.
    """
    if score.numel() == 0:
        return torch.empty(score.shape, dtype=dtype, device=score.device)
    value = score.flatten(1).double()
    value = value - value.amin(dim=1, keepdim=True)
    spread = value.amax(dim=1, keepdim=True)
    upper, lower = value.mean(dim=1, keepdim=True), torch.zeros_like(spread)
    done = spread == 0
    classes = torch.zeros_like(value, dtype=torch.bool)
    for _ in range(MAX_ASSIGNMENTS):
        is_upper = value >= 0.5 * (upper + lower)
        classes = torch.where(done, classes, is_upper)
        new_upper, new_lower = masked_mean(value, is_upper), masked_mean(value, ~is_upper)
        moved = (new_upper - upper).square() + (new_lower - lower).square()
        done = done | (moved <= TOLERANCE * spread.square())
        upper, lower = new_upper, new_lower
        if bool(done.all()):
            break
    return classes.to(dtype).view(score.shape)


def masked_mean(value: Tensor, mask: Tensor) -> Tensor:  # [B, M], [B, M] -> [B, 1]
    """Mean of the masked values of each row; 0 where there are none."""
    return (value * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
