"""Copies of networks for inference."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def inference_copy(module: nn.Module, share: bool = False) -> nn.Module:
    """A copy in evaluation mode that needs no gradients. The original is not changed.

    Args:
        module: the network.
        share: share the weights with the original instead of copying them. They then keep their need of gradients.
    """
    memo: dict[int, Any] = {}
    if share:
        held = (x for m in module.modules() for x in (*vars(m).values(), *m._parameters.values(), *m._buffers.values()))
        memo = {id(x): x for x in held if isinstance(x, Tensor)}
    # TorchScript copies weights by an operation that would be differentiated.
    with torch.no_grad():
        result = copy.deepcopy(module, memo)
    # One by one, because modules of TorchScript have no `requires_grad_`.
    for parameter in () if share else result.parameters():
        parameter.requires_grad_(False)
    return evaluating(result)


def evaluating(module: nn.Module) -> nn.Module:
    """Set `module` to evaluation mode and return it. Frozen modules of TorchScript have no mode any more."""
    try:
        return module.eval()
    except (AttributeError, RuntimeError):
        for part in module.modules():
            if hasattr(part, "training"):
                part.training = False
        return module
