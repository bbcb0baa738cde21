"""`adaptive_threshold`: two classes by the 2-means of a score, without a number to choose."""

from __future__ import annotations

import torch
from torch import Tensor

from fastroute.ops import _checks as check
from fastroute.ops._library import call, register
from fastroute.reference.adaptive_threshold import adaptive_threshold_reference

SCHEMAS = ["adaptive_threshold(Tensor score, int id_bytes) -> Tensor"]


def adaptive_threshold(
    score: Tensor,  # [B, ...]
    dtype: torch.dtype = torch.int64,
) -> Tensor:  # [B, ...]
    """Class 1 where an image's score is nearer to the upper of its two cluster centres, else class 0.

    The centres of each image start at its mean and its smallest score and follow Lloyd's iteration, at most 19 times. A
    flat image is of class 0. Sums are float64.

    Args:
        score: (B, ...), in any unit: only its order and proportions count; floating.
        dtype: int64, or uint8 to keep a pixel map small.

    Returns:
        class ids of the shape of `score`.

    Raises:
        ValueError: fewer than 2 dimensions, or, on the CPU, a score that is NaN or infinite, or whose range is.
        TypeError: an unsupported dtype.

    Differentiable: no, its output is an index.
    Deterministic: yes, bit for bit, for any number of threads.
    Synchronises: no, except for the reference, which asks whether it is done.
    CUDA-graph safe: yes with the kernels of a GPU, which always launch all iterations; no with the reference.
    Memory layout: any strides; contiguous output.

    Source: PCSR (Jeong et al., ECCV 2024), section 3.4, the adaptive decision making of its public code.
    """
    op = "adaptive_threshold"
    check.tensor(op, "score", score)
    if score.ndim < 2:
        raise ValueError(f"{op}: score must be (B, ...) with at least 2 dimensions; got {tuple(score.shape)}")
    check.dtype(op, "score", score.dtype, check.FLOATING)
    check.dtype(op, "dtype", dtype, check.ID_TYPES.values())
    return call(op, _checked_reference, score.device, score, dtype.itemsize)


def _checked_reference(score: Tensor, id_bytes: int) -> Tensor:  # [B, ...]
    if score.device.type == "meta":
        return _fake(score, id_bytes)
    if check.looks_at(score):
        check_finite(score)
    return adaptive_threshold_reference(score, check.ID_TYPES[id_bytes])


def check_finite(score: Tensor) -> None:  # [B, ...]
    """Scores, and the range of each image's, are finite; for a CPU, where looking costs no wait."""
    if score.numel() == 0:
        return
    low, high = score.flatten(1).aminmax(dim=1)
    if not bool((high.double() - low.double()).isfinite().all()):
        raise ValueError("adaptive_threshold: score must be finite, and so must its range")


def _fake(score: Tensor, id_bytes: int) -> Tensor:  # [B, ...]
    return torch.empty(score.shape, dtype=check.ID_TYPES[id_bytes], device=score.device)


register("adaptive_threshold", _checked_reference, _fake)
