"""Reference of `group_by_class`: a stable sort."""

from __future__ import annotations

import torch
from torch import Tensor


def group_by_class_reference(class_ids: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:  # [N]
    """See :func:`fastroute.group_by_class`; returns order [N], inverse [N], offsets [K + 1], all int64."""
    ids = class_ids.long()
    order = torch.argsort(ids, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    counts = (ids[None, :] == torch.arange(num_classes, device=ids.device)[:, None]).sum(dim=1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return order, inverse, offsets
