"""`conv3x3`: a 3 x 3 convolution, with what follows it, by Winograd's minimal filtering."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastroute.backends import select
from fastroute.ops import _checks as check
from fastroute.ops._library import call, is_transformed, register
from fastroute.reference.conv3x3 import PAD, SIDE, TAPS, conv3x3_reference, transformed_weight

SCHEMAS = [
    "conv3x3(Tensor image, Tensor weight, Tensor? bias, Tensor? slope, Tensor? residual, SymInt channels) -> Tensor",
]


class Conv3x3Weight(NamedTuple):
    """What :func:`conv3x3_weight` gives. O output channels, C input channels, G groups, P = O / G in whole vectors of 16.

    Attributes:
        weight: (O, C / G, 3, 3), as it was given.
        transformed: (36, G, C / G, P), its values at the 36 points of a tile.
    """

    weight: Tensor
    transformed: Tensor


def conv3x3_weight(weight: Tensor, groups: int = 1) -> Conv3x3Weight:  # [O, C / G, 3, 3]
    """Transform the weight of a convolution once, for many calls of :func:`conv3x3`.

    Args:
        weight: (O, C / groups, 3, 3) float32.
        groups: groups of channels; a divisor of O.

    Raises:
        ValueError, TypeError: another shape or dtype.
    """
    op = "conv3x3_weight"
    check.rank(op, "weight", weight, "(O, C / groups, 3, 3)", 4)
    check.dtype(op, "weight", weight.dtype, (torch.float32,))
    check.at_least(op, 1, groups=groups)
    if weight.shape[2:] != (TAPS, TAPS) or 0 in weight.shape or weight.shape[0] % groups:
        raise ValueError(f"{op}: weight must be (O, C / groups, 3, 3), O a multiple of {groups}; got {tuple(weight.shape)}")
    return Conv3x3Weight(weight, transformed_weight(weight.detach(), groups))


def conv3x3(
    image: Tensor,  # [B, C, H, W]
    weight: Tensor | Conv3x3Weight,  # [O, C / G, 3, 3]
    bias: Tensor | None = None,  # [O]
    slope: Tensor | None = None,  # [O]
    residual: Tensor | None = None,  # [B, O, H, W]
) -> Tensor:  # [B, O, H, W]
    """A 3 x 3 convolution at a stride of 1 with zeros around the image, then a rectifier and a sum, in one pass.

    By Winograd's minimal filtering F(4 x 4, 3 x 3): 36 products for every 16 outputs and input channel, where a direct
    convolution needs 144. The result is as exact as a direct float32 convolution up to a factor of about 3: errors are some
    1e-6 of the largest value. Transforms, products and what follows happen tile by tile inside the caches.

    >>> prepared = fastroute.conv3x3_weight(layer.weight)  # once
    >>> y = fastroute.conv3x3(x, prepared, layer.bias, slope=torch.zeros(64))  # leaky_relu(layer(x), 0) = relu(layer(x))

    Args:
        image: (B, C, H, W) float32.
        weight: what :func:`conv3x3_weight` gives, or (O, C / G, 3, 3) float32 in G groups, which is then transformed in every
            call.
        bias: (O,) float32, added to the sums. Default: none.
        slope: (O,) float32, the factor of negative numbers: zeros for ReLU, one number for a leaky ReLU, the weight of a
            PReLU. Default: no rectifier.
        residual: (B, O, H, W) float32, added last. Default: none.

    Returns:
        (B, O, H, W) float32, channels_last.

    Raises:
        ValueError: shapes that do not match, tensors on several devices.
        TypeError: another dtype.

    Differentiable: yes, in plain PyTorch: where a gradient is needed, PyTorch's own convolution runs.
    Deterministic: yes, bit for bit, for any number of threads. A number that is not finite spreads over its tile.
    Synchronises: no.
    CUDA-graph safe: yes; on a GPU PyTorch's own convolution runs.
    Memory layout: any strides, channels_last images are read fastest; writes channels_last.

    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4; points of evaluation after
    Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks", 2018.
    """
    op = "conv3x3"
    check.rank(op, "image", image, "(B, C, H, W)", 4)
    prepared = weight if isinstance(weight, Conv3x3Weight) else None
    kernel = prepared.weight if prepared is not None else weight
    assert isinstance(kernel, Tensor)
    check.rank(op, "weight", kernel, "(O, C / G, 3, 3)", 4)
    outputs, inputs = kernel.shape[:2]
    if kernel.shape[2:] != (TAPS, TAPS) or outputs < 1 or inputs < 1 or image.shape[1] % inputs:
        raise ValueError(
            f"{op}: weight must be (O, C / G, 3, 3) for an image of C = {image.shape[1]} channels; got {tuple(kernel.shape)}"
        )
    groups = image.shape[1] // inputs
    if groups < 1 or outputs % groups:
        raise ValueError(f"{op}: the {outputs} output channels of weight must be a multiple of its {groups} groups")
    shape = (image.shape[0], outputs, *image.shape[2:])
    for name, x, expected in (("bias", bias, (outputs,)), ("slope", slope, (outputs,)), ("residual", residual, shape)):
        if x is not None and tuple(check.tensor(op, name, x).shape) != tuple(expected):
            raise ValueError(f"{op}: {name} must be {tuple(expected)}; got {tuple(x.shape)}")
    for name, x in (("image", image), ("weight", kernel), ("bias", bias), ("slope", slope), ("residual", residual)):
        if x is not None:
            check.dtype(op, name, x.dtype, (torch.float32,))
            check.same_device(op, "image", image, name, x)
    given = [x for x in (image, kernel, bias, slope, residual) if x is not None]
    plain = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    if plain or is_transformed(given) or (image.device.type != "cpu" and select(op, image.device) != "reference"):
        return conv3x3_plain(image, kernel, bias, slope, residual, groups)
    transformed = prepared.transformed if prepared is not None else transformed_weight(kernel.detach(), groups)
    return call(op, conv3x3_reference, image.device, image, transformed, bias, slope, residual, outputs)


def conv3x3_plain(
    image: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [O, C / G, 3, 3]
    bias: Tensor | None,  # [O]
    slope: Tensor | None,  # [O]
    residual: Tensor | None,  # [B, O, H, W]
    groups: int,
) -> Tensor:  # [B, O, H, W]
    """The same by PyTorch's own layers."""
    y = F.conv2d(image, weight, bias, padding=1, groups=groups)
    if slope is not None:
        y = F.prelu(y, slope)
    return y if residual is None else y + residual


def _fake(
    image: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [36, G, C / G, P]
    bias: Tensor | None,  # [O]
    slope: Tensor | None,  # [O]
    residual: Tensor | None,  # [B, O, H, W]
    channels: int,
) -> Tensor:  # [B, O, H, W]
    size = (image.shape[0], channels, image.shape[2], image.shape[3])
    return image.new_empty(size).contiguous(memory_format=torch.channels_last)


def _checked_reference(
    image: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [36, G, C / G, P]
    bias: Tensor | None,  # [O]
    slope: Tensor | None,  # [O]
    residual: Tensor | None,  # [B, O, H, W]
    channels: int,
) -> Tensor:  # [B, O, H, W]
    op = "conv3x3"
    check.rank(op, "image", image, "(B, C, H, W)", 4), check.rank(op, "weight", weight, "(36, G, C / G, P)", 4)
    check.at_least(op, 1, channels=channels)
    groups = weight.shape[1]
    whole = groups >= 1 and channels % groups == 0 and image.shape[1] % groups == 0 and weight.shape[2] >= 1
    expected = (SIDE**2, groups, image.shape[1] // max(groups, 1), -(-channels // max(groups, 1) // PAD) * PAD)
    if not whole or tuple(weight.shape) != expected:
        raise ValueError(f"{op}: weight must be (36, groups, C / groups, O / groups in whole vectors of {PAD})")
    return conv3x3_reference(image, weight, bias, slope, residual, channels)


register("conv3x3", _checked_reference, _fake)
