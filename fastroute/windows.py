"""Separable weights for merging overlapping patches."""

from __future__ import annotations

import math
from functools import cache, lru_cache

import torch
from torch import Tensor

from fastroute._arguments import LARGEST_SPAN, whole
from fastroute._contexts import is_plain

WINDOWS = ("uniform", "linear", "hann", "gaussian")
CROP = "crop"


def make_window(window: str | Tensor, size: int, stride: int | None = None) -> Tensor:
    """The 1-D weights of `window` for patches of `size` output pixels. The 2-D weight is their outer product.

    Args:
        window: "uniform" (plain average of all patches that cover a pixel), "linear" (a triangle), "hann" (a raised
            cosine), "gaussian" (standard deviation size / 8, as tiled diffusion and nnU-Net use it), "crop" (1 in the middle
            `stride` pixels and 0 in the margins beside them), or a 1-D tensor of `size` positive weights. They need not sum to
            1, because stitching normalises them. With "crop", stitching keeps the margins along the edge of the image, so every
            output pixel is taken from the patch in which it lies deepest. The result is then that of the whole image if the
            network sees no further than the margin, (size - stride) / 2.
        size: side of a patch in output pixels.
        stride: distance of two patches in output pixels, at most `size`; needed only for "crop".

    Returns:
        float32 (size,), on the CPU for a named window, on its own device for a tensor.

    Raises:
        ValueError: an unknown name, "crop" without a stride from 1 to `size`, or weights that have another length or, on the
            CPU, are not all positive and finite.
        TypeError: `window` is neither a name nor a floating tensor, or `size` is not an integer.
    """
    if not torch.compiler.is_compiling():
        size = whole("window", "size", size, LARGEST_SPAN)
        stride = None if stride is None else whole("window", "stride", stride, LARGEST_SPAN, least=-LARGEST_SPAN)
    if isinstance(window, str):
        if window == CROP:
            return _crop(size, stride)
        if window not in WINDOWS:
            raise ValueError(f"window: must be one of {(*WINDOWS, CROP)} or a 1-D tensor; got {window!r}")
        # The compiler ignores the cache, and would warn about that.
        values = _named.__wrapped__(window, size) if torch.compiler.is_compiling() else _named(window, int(size))
        return torch.tensor(values, dtype=torch.float32, device="cpu")
    if not isinstance(window, Tensor) or not window.is_floating_point():
        raise TypeError(f"window: must be one of {(*WINDOWS, CROP)} or a floating 1-D tensor; got {type(window).__name__}")
    if window.shape != (size,):
        raise ValueError(
            f"window: must have shape ({size},), one weight per output pixel of a patch; got {tuple(window.shape)}"
        )
    # Checked only where this costs no wait. A trace knows no values.
    seen = window.device.type == "cpu" and not torch.compiler.is_compiling()
    if seen and not bool(((window > 0) & window.isfinite()).all()):
        raise ValueError("window: weights must be positive and finite, or a pixel could end up with no weight")
    return window


def window_on(window: str | Tensor, size: int, stride: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """:func:`make_window` on `device`. A named window is copied there once, because a copy waits and cannot be captured."""
    if isinstance(window, Tensor) or device.type == "cpu" or not is_plain():
        return make_window(window, size, stride).to(device=device, dtype=dtype)
    return _named_on(window, int(size), int(stride), device, dtype)


# The only cache of tensors. None is ever freed, since a graph may read it, and none is added except in plain contexts.
@cache
def _named_on(window: str, size: int, stride: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    # An ordinary tensor, whatever the context of the first caller is.
    with torch.inference_mode(False):
        return make_window(window, size, stride).to(device=device, dtype=dtype)


# Numbers, not a tensor: a tensor made on fake tensors, in a transform or in inference mode would not suit any other call.
@lru_cache(maxsize=64)
def _named(window: str, size: int) -> tuple[float, ...]:
    # Sample points lie at pixel centres, so that no weight is 0 and the window is symmetric.
    positions = [(i + 0.5) / size for i in range(size)]
    if window == "uniform":
        return (1.0,) * size
    if window == "linear":
        return tuple(1 - abs(2 * x - 1) for x in positions)
    if window == "hann":
        return tuple(math.sin(math.pi * x) ** 2 for x in positions)
    return tuple(math.exp(-0.5 * ((x - 0.5) * 8) ** 2) for x in positions)


def _crop(size: int, stride: int | None) -> Tensor:
    if stride is None or not 1 <= stride <= size:
        raise ValueError(f"window: 'crop' needs the stride of the patches, from 1 to {size} output pixels; got {stride}")
    place = torch.arange(size, device="cpu") - (size - stride) // 2
    # As wide as the stride, so that every pixel between the margins of the first and the last patch has a weight.
    return ((place >= 0) & (place < stride)).to(torch.float32)
