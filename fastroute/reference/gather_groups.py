"""Reference of `gather_groups`: indexing."""

from __future__ import annotations

from torch import Tensor


def gather_groups_reference(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # [N, ...], [N], [N] -> [N, ...]
    """See :func:`fastroute.gather_groups`."""
    return x.contiguous()[order]
