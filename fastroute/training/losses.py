"""The losses of ClassSR (Kong et al., CVPR 2021, section 3.3)."""

from __future__ import annotations

from torch import Tensor


def class_loss(probability: Tensor) -> Tensor:  # [N, K]
    """ClassSR's class loss, equation 4: rewards confident choices.

    K - 1 minus the sum over class pairs of the absolute difference of their probabilities, averaged over patches: 0 where
    one class has all the probability, K - 1 where all classes share it equally.

    Args:
        probability: (N, K), rows summing to 1.

    Returns:
        A scalar tensor.
    """
    _check(probability, "class_loss")
    k = probability.shape[1]
    pairs = (probability[:, :, None] - probability[:, None, :]).abs().sum(dim=(1, 2)) / 2
    return (k - 1 - pairs).mean()


def average_loss(probability: Tensor) -> Tensor:  # [N, K]
    """ClassSR's average loss, equation 5: keeps every class in use.

    The sum over classes of |total probability - N / K|, divided by 4 N / K as in the published training code.

    Args:
        probability: (N, K), rows summing to 1.

    Returns:
        A scalar tensor.
    """
    _check(probability, "average_loss")
    n, k = probability.shape
    return (probability.sum(dim=0) - n / k).abs().sum() / (4 * n / k)


def _check(probability: Tensor, name: str) -> None:
    if probability.ndim != 2 or 0 in probability.shape:
        raise ValueError(f"{name}: probability must be (N, K) with N and K at least 1; got {tuple(probability.shape)}")
