"""`gather_groups`: rows into class order."""

from __future__ import annotations

from typing import Any

import torch
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
        (N, ...), the same dtype.

    Raises:
        ValueError: `x` has no dimension or another number of rows, is on another device, or an entry of
            `groups.order` is out of range.
        TypeError: `x` is no tensor, or `groups` no :class:`ClassGroups`.

    Differentiable: with respect to `x`; the gradient is :func:`scatter_groups`.
    Deterministic: yes, bit for bit.
    Synchronises: no.
    CUDA-graph safe: yes.
    Memory layout: rows that are dense, such as those of channels_last patches, keep their strides, and rows of the output
        lie one behind the other; otherwise, the output is contiguous. Unless rows of the input lie so, it is copied first.
    """
    op = "gather_groups"
    device = check_rows(op, "x", x, groups)
    blocks, back = as_blocks(x)
    moved = call(op, _checked_reference, device, blocks, groups.order, groups.inverse)
    return moved.permute(*back) if back else moved


def as_blocks(rows: Tensor) -> tuple[Tensor, list[int]]:  # [N, ...]
    """Dense rows as contiguous ones, a view, and the dimensions that undo it; shared with `scatter_groups`.

    To a kernel a row is a block of memory, whatever its shape.
    """
    if rows.is_contiguous() or (order := dense_rows(rows)) is None:
        return rows, []
    return rows.permute(*order), [order.index(d) for d in range(rows.ndim)]


def dense_rows(rows: Tensor) -> list[int] | None:  # [N, ...]
    """The dimensions of `rows` by which each row is contiguous; None where its elements do not fill one block of memory."""
    shape, strides = rows.shape, rows.stride()
    left, order, step = list(range(1, len(shape))), [0], 1
    while left:
        for d in reversed(left):
            if strides[d] == step or shape[d] == 1:
                break
        else:
            return None
        left.remove(d)
        order.insert(1, d)
        step *= shape[d]
    return order


def check_rows(op: str, name: str, rows: Tensor, groups: ClassGroups) -> torch.device:  # [N, ...]
    """`rows` has one row per grouped item; returns its device."""
    check.tensor(op, name, rows)
    if not isinstance(groups, ClassGroups):
        raise TypeError(f"{op}: groups must be ClassGroups, as group_by_class returns; got {type(groups).__name__}")
    if rows.ndim < 1:
        raise ValueError(f"{op}: {name} must have at least one dimension; got a scalar")
    order, inverse, _ = groups
    count, device = rows.shape[0], rows.device
    check.index(op, "groups.order", order, count)
    check.index(op, "groups.inverse", inverse, count)
    if order.device != device or inverse.device != device:
        check.same_device(op, name, rows, "groups.order", order)
        check.same_device(op, name, rows, "groups.inverse", inverse)
    return device


def fake_rows(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # [N, ...], [N], [N]
    """Shape of a permutation of rows; shared with `scatter_groups`."""
    return rows.new_empty(rows.shape)


def save_permutation(ctx: Any, inputs: tuple, output: Tensor) -> None:  # [N, ...]
    """Keep what the opposite movement needs; shared with `scatter_groups`."""
    ctx.save_for_backward(inputs[1], inputs[2])


def _checked_reference(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # [N, ...], [N], [N]
    check.in_range("gather_groups", "groups.order", order, x.shape[0])
    return gather_groups_reference(x, order, inverse)


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple:  # [N, ...]
    return ops.scatter_groups(grad, *ctx.saved_tensors), None, None


register("gather_groups", _checked_reference, fake_rows, _backward, save_permutation)
