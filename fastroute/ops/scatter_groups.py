"""`scatter_groups`: rows from class order back to their places."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastroute.ops import _checks as check
from fastroute.ops._library import call, register
from fastroute.ops.gather_groups import as_blocks, check_rows, fake_rows, save_permutation
from fastroute.ops.group_by_class import ClassGroups
from fastroute.reference.scatter_groups import scatter_groups_reference

SCHEMAS = ["scatter_groups(Tensor y, Tensor order, Tensor inverse) -> Tensor"]


def scatter_groups(y: Tensor, groups: ClassGroups) -> Tensor:  # [N, ...] -> [N, ...]
    """Put class-ordered rows back where they came from: ``x[groups.order[i]] = y[i]``.

    Args:
        y: (N, ...), any dtype; rows of any shape.
        groups: from :func:`group_by_class` on N items.

    Returns:
        (N, ...), the same dtype.

    Raises:
        ValueError: `y` has no dimension or another number of rows, is on another device, or an entry of
            `groups.inverse` is out of range.
        TypeError: `y` is no tensor, or `groups` no :class:`ClassGroups`.

    Differentiable: with respect to `y`; the gradient is :func:`gather_groups`.
    Deterministic: yes, bit for bit.
    Synchronises: no.
    CUDA-graph safe: yes.
    Memory layout: that of :func:`gather_groups`.
    """
    op = "scatter_groups"
    device = check_rows(op, "y", y, groups)
    blocks, back = as_blocks(y)
    moved = call(op, _checked_reference, device, blocks, groups.order, groups.inverse)
    return moved.permute(*back) if back else moved


def _checked_reference(y: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # [N, ...], [N], [N]
    check.in_range("scatter_groups", "groups.inverse", inverse, y.shape[0])
    return scatter_groups_reference(y, order, inverse)


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple:  # [N, ...]
    return ops.gather_groups(grad, *ctx.saved_tensors), None, None


register("scatter_groups", _checked_reference, fake_rows, _backward, save_permutation)
