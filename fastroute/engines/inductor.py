"""torch.compile, which fuses the operations between the convolutions. It needs a C++ compiler, or Triton on a GPU."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from fastroute.engines import Compiled

# The compilers that torch.compile looks for, unless CXX names one.
COMPILERS = ("g++", "clang++", "cl")

FLOAT32_ENDS, PARALLEL = False, False


def unsupported_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """See :class:`fastroute.engines.Engine`."""
    if device.type == "cpu" and not any(map(shutil.which, COMPILERS)):
        return ["torch.compile needs a C++ compiler, and there is none"]
    if device.type == "cpu" and " " in torch.__path__[0]:
        return [
            f"torch.compile does not quote its compiler's arguments, and torch lies at a path with spaces, {torch.__path__[0]}"
        ]
    if device.type == "cuda" and find_spec("triton") is None:
        return ["torch.compile needs Triton, which is not installed"]
    return []


def compile(branch: nn.Module, shapes: Sequence[tuple[int, ...]], precision: torch.dtype, threads: int) -> Compiled:
    """See :class:`fastroute.engines.Engine`. Sizes stay dynamic, so that regions of all shapes share one program."""
    function = torch.compile(branch, dynamic=True)

    def run(batches: Sequence[Tensor]) -> list[Tensor]:
        # Routers work in inference mode, but programs are made for ordinary tensors.
        with torch.inference_mode(False), torch.no_grad():
            return [function(batch.clone() if batch.is_inference() else batch) for batch in batches]

    return run
