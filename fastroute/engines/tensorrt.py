"""TensorRT on NVIDIA GPUs, through torch_tensorrt, which falls back to PyTorch for layers that it does not know."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from fastroute._extras import remedy
from fastroute.engines import Compiled

# The largest number of patches that pass together, and of pixels along a side. Larger batches run in parts.
MOST_PATCHES, MOST_PIXELS = 1024, 256

FLOAT32_ENDS, PARALLEL = False, False


def unsupported_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """See :class:`fastroute.engines.Engine`."""
    reasons = [] if device.type == "cuda" else [f"tensorrt runs on NVIDIA GPUs only; the networks are on {device}"]
    if find_spec("torch_tensorrt") is None:
        reasons.append(f"torch_tensorrt is not installed: {remedy('tensorrt')}")
    return reasons


def compile(branch: nn.Module, shapes: Sequence[tuple[int, ...]], precision: torch.dtype, threads: int) -> Compiled:
    """See :class:`fastroute.engines.Engine`. One program serves all sizes up to the largest."""
    import torch_tensorrt

    dtype = next((p.dtype for p in branch.parameters()), precision)
    most, (_, channels, height, width) = max(MOST_PIXELS, *(max(s[2:]) for s in shapes)), shapes[0]
    least = min(8, height, width)
    sizes = torch_tensorrt.Input(
        min_shape=(1, channels, least, least),
        opt_shape=(max(s[0] for s in shapes), channels, height, width),
        max_shape=(MOST_PATCHES, channels, most, most),
        dtype=dtype,
    )
    program = torch_tensorrt.compile(branch, ir="dynamo", inputs=[sizes], enabled_precisions={precision})

    def run(batches: Sequence[Tensor]) -> list[Tensor]:
        parts = [[program(part.contiguous()) for part in batch.split(MOST_PATCHES)] for batch in batches]
        return [some[0] if len(some) == 1 else torch.cat(some) for some in parts]

    return run
