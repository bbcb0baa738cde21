"""`group_by_class`: a stable counting sort of items by class."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastroute.ops import _checks as check
from fastroute.ops._library import call, register
from fastroute.reference.group_by_class import group_by_class_reference

SCHEMAS = ["group_by_class(Tensor class_ids, int num_classes) -> (Tensor, Tensor, Tensor)"]


MOST_CLASSES = 2**46


class ClassGroups(NamedTuple):
    """Items sorted by class; the order within a class is that of the input.

    Attributes:
        order: int64 (N,); order[i] is the item at place i, so class c's items are order[offsets[c]:offsets[c + 1]].
        inverse: int64 (N,); inverse[n] is the place of item n.
        offsets: int64 (K + 1,), on the same device: reading it on the host is the caller's one wait.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor


def group_by_class(class_ids: Tensor, num_classes: int) -> ClassGroups:  # [N]
    """Sort items by class, stably.

    Args:
        class_ids: (N,), int64, int32, int16 or uint8, each in [0, num_classes).
        num_classes: number of classes K, at least 1.

    Returns:
        :class:`ClassGroups`.

    Raises:
        ValueError: `class_ids` is not 1-D, an id is out of range, or `num_classes` is below 1.
        TypeError: `class_ids` is not an integer tensor.

    Differentiable: no, its outputs are indices.
    Deterministic: yes.
    Synchronises: no.
    CUDA-graph safe: yes.
    Memory layout: any strides; contiguous outputs.
    """
    op = "group_by_class"
    check.rank(op, "class_ids", class_ids, "(N,)", 1)
    check.dtype(op, "class_ids", class_ids.dtype, check.INDEX)
    _check_number(num_classes)
    return ClassGroups(*call(op, _checked_reference, class_ids.device, class_ids, num_classes))


def _check_number(num_classes: int) -> None:
    check.at_least("group_by_class", 1, num_classes=num_classes)
    # Every thread of a kernel has its own counts.
    if num_classes > MOST_CLASSES:
        raise ValueError(f"group_by_class: num_classes is too large, above 2^46; got {num_classes}")


def _checked_reference(class_ids: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:  # [N]
    _check_number(num_classes)
    check.in_range("group_by_class", "class_ids", class_ids, num_classes)
    return group_by_class_reference(class_ids, num_classes)


def _fake(class_ids: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:  # [N]
    _check_number(num_classes)
    order = class_ids.new_empty(class_ids.shape, dtype=torch.int64)
    return order, torch.empty_like(order), class_ids.new_empty((num_classes + 1,), dtype=torch.int64)


register("group_by_class", _checked_reference, _fake)
