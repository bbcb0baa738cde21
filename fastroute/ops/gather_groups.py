"""`gather_groups`: rows into class order."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastroute.ops import _checks as check
from fastroute.ops._library import call, register
from fastroute.ops.group_by_class import ClassGroups
from fastroute.reference.gather_groups import gather_groups_reference

SCHEMAS = ["gather_groups(Tensor x, Tensor order, Tensor inverse) -> Tensor"]


def gather_groups(x: Tensor, groups: ClassGroups) -> Tensor:  # [N, ...] -> [N, ...]
    """Permute the rows of `x` into class order: ``y[i] = x[groups.order[i]]``.

    Args:
        x: (N, ...), any dtype; rows of any shape.
        groups: from :func:`group_by_class` on N items.

    Returns:
        (N, ...), contiguous, the same dtype.

    Raises:
        ValueError: `x` has no dimension or another number of rows, is on another device, or an entry of
            `groups.order` is out of range.
        TypeError: `x` is no tensor, or `groups` no :class:`ClassGroups`.

    Differentiable: with respect to `x`; the gradient is :func:`scatter_groups`.
    Deterministic: yes, bit for bit.
    Synchronises: no.
    CUDA-graph safe: yes.
    Memory layout: contiguous output; a non-contiguous input is copied first.
    """
    op = "gather_groups"
    check_rows(op, "x", x, groups)
    return call(op, _checked_reference, x.device, x, groups.order, groups.inverse)


def check_rows(op: str, name: str, rows: Tensor, groups: ClassGroups) -> None:
    """`rows` has one row per grouped item."""
    check.tensor(op, name, rows)
    if not isinstance(groups, ClassGroups):
        raise TypeError(f"{op}: groups must be ClassGroups, as group_by_class returns; got {type(groups).__name__}")
    if rows.ndim < 1:
        raise ValueError(f"{op}: {name} must have at least one dimension; got a scalar")
    check.index(op, "groups.order", groups.order, rows.shape[0])
    check.index(op, "groups.inverse", groups.inverse, rows.shape[0])
    check.same_device(op, name, rows, "groups.order", groups.order)
    check.same_device(op, name, rows, "groups.inverse", groups.inverse)


def fake_rows(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Shape of a permutation of rows; shared with `scatter_groups`."""
    return rows.new_empty(rows.shape)


def save_permutation(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """Keep what the opposite movement needs; shared with `scatter_groups`."""
    ctx.save_for_backward(inputs[1], inputs[2])


def _checked_reference(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    check.in_range("gather_groups", "groups.order", order, x.shape[0])
    return gather_groups_reference(x, order, inverse)


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple:
    return ops.scatter_groups(grad, *ctx.saved_tensors), None, None


register("gather_groups", _checked_reference, fake_rows, _backward, save_permutation)
