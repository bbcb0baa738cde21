"""The optimizers of the recipes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import nn

from fastroute._extras import remedy

OPTIMIZERS = ("adam", "soap")
# Largest side of the matrices of gradients that SOAP keeps; neighbouring sides of a weight are joined up to it.
LARGEST_SIDE = 256


def check_optimizer(name: str) -> None:
    """`name` is known, and what it needs is installed.

    Raises:
        ValueError: otherwise.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"train: optimizer must be one of {', '.join(OPTIMIZERS)}; got {name!r}")
    if name == "soap" and find_spec("pytorch_optimizer") is None:
        raise ValueError(f"train: optimizer=soap needs another package: {remedy('train')}")


def make_optimizer(name: str, parameters: Sequence[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """Adam, or SOAP: Adam in the eigenvectors of the gradients' covariance, which the layers of small networks need fewer
    steps with, at about 0.3 of Adam's rate.

    Args:
        name: one of `OPTIMIZERS`.
        parameters: what is trained.
        rate: at the peak.

    Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", ICLR 2025, arXiv:2409.11321.
    """
    if name == "adam":
        return torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.99))
    from pytorch_optimizer import SOAP  # takes seconds to import

    # Sides are joined only where that leaves two: of fewer the package makes nothing that it can use.
    joined = [p for p in parameters if p.ndim > 1 and p.numel() > LARGEST_SIDE]
    others = [p for p in parameters if p.ndim < 2 or p.numel() <= LARGEST_SIDE]
    groups = [{"params": p, "merge_dims": merge} for p, merge in ((joined, True), (others, False)) if p]
    return SOAP(groups, lr=rate, weight_decay=0.0, max_precondition_dim=LARGEST_SIDE)
