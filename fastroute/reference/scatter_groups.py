"""Reference of `scatter_groups`: indexing."""

from __future__ import annotations

from torch import Tensor


def scatter_groups_reference(y: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # [N, ...], [N], [N] -> [N, ...]
    """See :func:`fastroute.scatter_groups`."""
    return y.contiguous()[inverse]
