"""`scatter_groups`: rows from class order back to their places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastroute.ops._library import call, register
from fastroute.ops.gather_groups import check_rows, fake_rows, save_permutation
from fastroute.ops.group_by_class import ClassGroups
from fastroute.reference.scatter_groups import scatter_groups_reference

SCHEMAS = ["scatter_groups(Tensor y, Tensor order, Tensor inverse) -> Tensor"]


def scatter_groups(y: Tensor, groups: ClassGroups) -> Tensor:  # [N, ...] -> [N, ...]
    """Put class-ordered rows back where they came from: ``x[groups.order[i]] = y[i]``.

    Args:
        y: (N, ...), any dtype; rows of any shape.
        groups: from :func:`group_by_class` on N items.

    Returns:
        (N, ...), contiguous, the same dtype.

    Raises:
        ValueError: `y` has no dimension or another number of rows, or is on another device.
        TypeError: `y` is no tensor.

    Differentiable: with respect to `y`; the gradient is :func:`gather_groups`.
    Deterministic: yes, bit for bit.
    Synchronises: no.
    CUDA-graph safe: yes.
    Memory layout: contiguous output; a non-contiguous input is copied first.
    """
    op = "scatter_groups"
    check_rows(op, "y", y, groups)
    return call(op, scatter_groups_reference, y.device, y, groups.order, groups.inverse)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    return torch.ops.fastroute.gather_groups(grad, *ctx.saved_tensors), None, None


register("scatter_groups", scatter_groups_reference, fake_rows, _backward, save_permutation)
