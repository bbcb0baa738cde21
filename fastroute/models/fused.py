"""Layers with what follows them, in one call: networks written so run by fused kernels once their layers are replaced.

:func:`fastroute.rewrite.optimize.optimize` replaces convolutions by layers that have a method `fused`. All other layers run one
after the other, as PyTorch has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Bytes of activations for each thread that stay in the caches.
CACHED = 4 << 20


def cached_bytes() -> int:
    """Bytes of activations that stay in the caches: layers that take more for an image run in bands of rows."""
    return CACHED * torch.get_num_threads()


class Fused(Protocol):
    """A convolution that runs together with what follows it."""

    in_channels: int
    out_channels: int

    def fused(self, x: Any, **following: Any) -> Tensor:
        """The layer and what follows, see :func:`convolve` and :func:`merge_pixels`."""

    def has_kernel(self, x: Tensor) -> bool:  # [B, C, H, W]
        """Whether `x` runs by a kernel, which can write into a given tensor."""


def is_fused(layer: nn.Module) -> TypeGuard[Fused]:
    """Whether `layer` is such a convolution. To ask a protocol takes longer than some layers."""
    return hasattr(type(layer), "fused")


def convolve(
    layer: nn.Module,
    x: Tensor,  # [B, C, H, W]
    slope: float | None = None,
    shuffle: int = 1,
    residual: Tensor | None = None,  # [B, O / s / s, H s, W s]
) -> Tensor:  # [B, O / s / s, H s, W s]
    """A convolution, a leaky ReLU with `slope`, a pixel shuffle by `shuffle` and a sum with `residual`; each if it is given."""
    if is_fused(layer):
        return layer.fused(x, slope=slope, shuffle=shuffle, residual=residual)
    y = layer(x)
    if slope is not None:
        y = rectify_(y, slope)
    if shuffle > 1:
        y = F.pixel_shuffle(y, shuffle)
    if residual is None:
        return y
    # The gradient of a rectifier needs its result.
    return y.add_(residual) if slope is None else y + residual


def merge_pixels(
    layer: nn.Module,
    parts: Sequence[Tensor],  # [B, C, H, W] each
    residual: Tensor | None = None,  # [B, O, H, W]
    slope: float | None = None,
) -> Tensor:  # [B, O, H, W]
    """A 1 x 1 convolution of the joined channels of `parts`, a sum with `residual` and a leaky ReLU; each if it is given."""
    if is_fused(layer):
        return layer.fused(parts, slope=slope, residual=residual)
    y = layer(parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1))
    if residual is not None:
        y = y + residual
    return y if slope is None else rectify_(y, slope)


def rectify_(y: Tensor, slope: float) -> Tensor:  # [B, C, H, W]
    """A leaky ReLU with `slope`, in place."""
    return F.leaky_relu_(y, slope) if slope else F.relu_(y)
