"""Conversion between integer images and numbers in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

# Integer images represent [0, 1] in steps of 1 / MAXIMUM.
MAXIMUM = {torch.uint8: 255, torch.uint16: 65535}


def to_float(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert pixels to `dtype`. Integers become numbers in [0, 1]."""
    if x.dtype not in MAXIMUM:
        return x.to(dtype)
    # 65535 is more than float16 holds.
    return (x.to(torch.float64 if dtype == torch.float64 else torch.float32) / MAXIMUM[x.dtype]).to(dtype)


def quantise(image: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert sums to the output type. Integers are clamped and rounded half to even. The result is contiguous."""
    if dtype not in MAXIMUM:
        return image.to(dtype).contiguous()
    value = (image.clamp(0, 1) * MAXIMUM[dtype]).round().nan_to_num(0)
    # Casts to uint16 go through int32, the route that every backend of PyTorch implements.
    return value.to(torch.int32).to(dtype).contiguous()
