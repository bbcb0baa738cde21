"""The losses of ClassSR (Kong et al., CVPR 2021, section 3.3)."""

from __future__ import annotations

import torch
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


def routing_loss(probability: Tensor, errors: Tensor, cost: Tensor, price: float) -> Tensor:  # [N, K], [N, K], [K]
    """Cross-entropy to the class of least regret, error and compute counted together, weighted by what is at stake.

    The best class of a patch has the least errors + price * cost; the regret of another is its excess in units of `price`, at
    most 10, so that a few extreme patches do not decide everything. The target is the softmax of -2 times the regrets, and a
    patch weighs as much as its worst regret, plus a half. The class and average losses balance the classes whatever
    they are worth; this one spends compute where it buys most. It is ours, in the spirit of CDNSR's FLOPs-regularised loss.

    Args:
        probability: (N, K), rows summing to 1.
        errors: (N, K), mean squared error of every branch on every patch.
        cost: (K,), cost of every class as a fraction of the dearest.
        price: squared error that a cost of 1 must save.

    Returns:
        A scalar tensor, least where the probabilities are the targets.
    """
    _check(probability, "routing_loss")
    if errors.shape != probability.shape or cost.shape != probability.shape[1:]:
        raise ValueError(
            f"routing_loss: errors must be {tuple(probability.shape)} and cost {tuple(probability.shape[1:])}; got "
            f"{tuple(errors.shape)} and {tuple(cost.shape)}"
        )
    total = errors + price * cost
    regret = ((total - total.amin(dim=1, keepdim=True)) / price).clamp(max=10)
    target, stake = torch.softmax(-2 * regret, dim=1), regret.amax(dim=1) + 0.5
    entropy = -(target * probability.clamp(min=1e-12).log()).sum(dim=1)
    return (stake * entropy).sum() / stake.sum()


def _check(probability: Tensor, name: str) -> None:
    if probability.ndim != 2 or 0 in probability.shape:
        raise ValueError(f"{name}: probability must be (N, K) with N and K at least 1; got {tuple(probability.shape)}")
