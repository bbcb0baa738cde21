"""scatter_groups: out[i] = y[inverse[i]]: a gather through the inverse, so that no two programs write one row."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastroute.ops import _checks as check
from fastroute.triton._common import Variant
from fastroute.triton.gather_groups import gather_groups_kernel, move_rows

# The same kernel; the name is that of the operator.
scatter_groups_kernel = gather_groups_kernel


def scatter_groups_triton(y: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # [N, ...], [N], [N] -> [N, ...]
    """See :func:`fastroute.scatter_groups`."""
    check.in_range("scatter_groups", "groups.inverse", inverse, y.shape[0])
    return move_rows(y, inverse)


def unsupported_reasons(device: torch.device) -> list[str]:
    """Why this kernel cannot run on `device`."""
    return []


def variants() -> Iterator[Variant]:
    """None of its own: those of `gather_groups` serve both."""
    return iter(())
