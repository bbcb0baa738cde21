"""The losses of ClassSR (Kong et al., CVPR 2021, section 3.3) and of CDNSR (Wang et al., ICASSP 2023), and our own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastroute.training.distributed import process_mean


def class_loss(probability: Tensor) -> Tensor:  # [N, K]
    """ClassSR's class loss, equation 4: rewards confident choices.

    K - 1 minus the sum over class pairs of the absolute difference of their probabilities, averaged over patches: 0 where
    one class has all the probability, K - 1 where all classes share it equally.

    Args:
        probability: (N, K), rows summing to 1.

    Returns:
        A scalar tensor.
    """
    probability = _checked(probability, "class_loss")
    k = probability.shape[1]
    pairs = (probability[:, :, None] - probability[:, None, :]).abs().sum(dim=(1, 2)) / 2
    return (k - 1 - pairs).mean()


def average_loss(probability: Tensor) -> Tensor:  # [N, K]
    """ClassSR's average loss, equation 5: keeps every class in use.

    The sum over classes of |total probability - N / K|, divided by 4 N / K as in the published training code. The totals are
    those of all processes.

    Args:
        probability: (N, K), rows summing to 1.

    Returns:
        A scalar tensor.
    """
    probability = _checked(probability, "average_loss")
    n, k = probability.shape
    return (process_mean(probability.sum(dim=0)) - n / k).abs().sum() / (4 * n / k)


def routing_loss(probability: Tensor, errors: Tensor, cost: Tensor, price: float) -> Tensor:  # [N, K], [N, K], [K]
    """Cross-entropy to the class of least regret, error and compute counted together, weighted by what is at stake.

    The best class of a patch has the least errors + price * cost; the regret of another is its excess in units of `price`, at
    most 10, so that a few extreme patches do not decide everything. The target is the softmax of -2 times the regrets, and a
    patch weighs as much as its worst regret, plus a half. The class and average losses balance the classes whatever
    they are worth; this one spends compute where it buys most. It is ours, in the spirit of CDNSR's FLOPs-regularised loss.

    Args:
        probability: (N, K), rows summing to 1.
        errors: (N, K), mean squared error of every branch on every patch.
        cost: (K,), cost of every class as a fraction of the most expensive.
        price: squared error that a cost of 1 must save.

    Returns:
        A scalar tensor, least where the probabilities are the targets.
    """
    probability = _checked(probability, "routing_loss")
    if errors.shape != probability.shape or cost.shape != probability.shape[1:]:
        raise ValueError(
            f"routing_loss: errors must be {tuple(probability.shape)} and cost {tuple(probability.shape[1:])}; got "
            f"{tuple(errors.shape)} and {tuple(cost.shape)}"
        )
    total = errors + price * cost
    regret = ((total - total.amin(dim=1, keepdim=True)) / price).clamp(max=10)
    target, stake = torch.softmax(-2 * regret, dim=1), regret.amax(dim=1) + 0.5
    entropy = -(target * probability.clamp(min=1e-12).log()).sum(dim=1)
    weighted, weight = process_mean(torch.stack([(stake * entropy).sum(), stake.sum()]))
    return weighted / weight


def expected_cost(probability: Tensor, cost: Tensor) -> Tensor:  # [N, K], [K]
    """E(F) / C_max: the mean cost of the choices, CDNSR, equation 2, as a fraction of the most expensive class's."""
    probability = _checked(probability, "expected_cost")
    # On a GPU the numbers could only be looked at by waiting for all work before.
    if cost.shape != probability.shape[1:] or (cost.device.type == "cpu" and not bool((cost > 0).all())):
        raise ValueError(f"expected_cost: cost must be {tuple(probability.shape[1:])} positive numbers; got {cost.tolist()}")
    return (probability @ (cost / cost.max()).to(probability)).mean()


def flops_loss(probability: Tensor, cost: Tensor, alpha: float) -> Tensor:  # [N, K], [K]
    """CDNSR's regularisation, equation 3: max(0, E(F) / C_max - alpha), what the expected cost is above its target.

    E(F) is that of all processes, see :func:`expected_cost`.

    Args:
        probability: (N, K), rows summing to 1; in training those of the Gumbel softmax.
        cost: (K,), FLOPs of each branch, in any unit.
        alpha: target, as a fraction of the most expensive branch, in [0, 1].

    Returns:
        A scalar tensor.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"flops_loss: alpha must lie in [0, 1]; got {alpha}")
    return (process_mean(expected_cost(probability, cost)) - alpha).clamp(min=0)


def cdnsr_loss(
    output: Tensor,  # [N, C, P, P]
    target: Tensor,  # [N, C, P, P]
    probability: Tensor,  # [N, K]
    cost: Tensor,  # [K]
    alpha: float,
    lambda_reg: float,
    image_weight: float = 1000.0,
) -> Tensor:
    """CDNSR's loss, equations 1 to 4: absolute error of the mixture, and the price of its FLOPs.

    image_weight * mean |output - target| + lambda_reg * :func:`flops_loss`. `image_weight` is that of the published training.
    """
    return image_weight * F.l1_loss(output, target) + lambda_reg * flops_loss(probability, cost, alpha)


def _checked(probability: Tensor, name: str) -> Tensor:
    """`probability`, in a type with the digits that sums over a batch need."""
    if probability.ndim != 2 or 0 in probability.shape:
        raise ValueError(f"{name}: probability must be (N, K) with N and K at least 1; got {tuple(probability.shape)}")
    return at_least_single(probability)


def at_least_single(x: Tensor) -> Tensor:
    """Half types as float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
