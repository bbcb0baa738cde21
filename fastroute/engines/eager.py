"""Plain PyTorch, the engine that is always available. Routers run it without going through this module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastroute.engines import Compiled

FLOAT32_ENDS, PARALLEL = False, False


def unsupported_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """None."""
    return []


def compile(branch: nn.Module, shapes: Sequence[tuple[int, ...]], precision: torch.dtype, threads: int) -> Compiled:
    """See :class:`fastroute.engines.Engine`."""

    def run(batches: Sequence[Tensor]) -> list[Tensor]:
        return [branch(batch) for batch in batches]

    return run
