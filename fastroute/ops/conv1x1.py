"""`conv1x1`: a 1 x 1 convolution over the channels of several images, with what follows it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastroute.ops import _checks as check
from fastroute.ops._library import by_reference, call, in_own_dtype, in_plain_torch, is_transformed, register, write_result
from fastroute.reference.conv1x1 import conv1x1_reference

SCHEMAS = [
    "conv1x1(Tensor[] images, Tensor weight, Tensor? bias, Tensor? slope, Tensor? residual) -> Tensor",
    "conv1x1.out(Tensor[] images, Tensor weight, Tensor? bias, Tensor? slope, Tensor? residual, *, Tensor(a!) out) -> ()",
]


def conv1x1(
    images: Tensor | Sequence[Tensor],  # [B, C, H, W] each
    weight: Tensor,  # [O, C of all images] or [O, C, 1, 1]
    bias: Tensor | None = None,  # [O]
    slope: Tensor | None = None,  # [O]
    residual: Tensor | None = None,  # [B, O, H, W]
    out: Tensor | None = None,  # [B, O, H, W]
) -> Tensor:  # [B, O, H, W]
    """A 1 x 1 convolution over the joined channels of several images, a sum and a rectifier, in one pass.

    Cascades such as CARN's merge the outputs of all blocks so far: the images are read where they lie and never joined, and
    every output is written once.

    >>> y = fastroute.conv1x1([x, block(x)], layer.weight, layer.bias, slope=torch.zeros(64))  # relu(layer(cat([x, block(x)])))

    Args:
        images: (B, C, H, W) float32 or bfloat16, one or several; their numbers of channels may differ.
        weight: (O, C) or (O, C, 1, 1), C the channels of all images together.
        bias: (O,), also float32. Default: none.
        slope: (O,), also float32, the factor of negative numbers: zeros for ReLU, one number for a leaky ReLU, the weight of a
            PReLU. Default: no rectifier.
        residual: (B, O, H, W), added before the rectifier. Default: none.
        out: write into this tensor, for example some rows of a larger one, whose channels lie side by side (channels_last).
            Of the shape of the result. Default: a new tensor.

    Returns:
        (B, O, H, W), channels_last; `out` when it is given. Sums are float32 and rounded once, at the end.

    Raises:
        ValueError: shapes that do not match, tensors on several devices, no image, or an `out` that shares memory with an
            input.
        TypeError: another dtype, or tensors of several dtypes.

    Differentiable: yes, without `out`: where a gradient is needed, PyTorch's own convolution runs.
    Deterministic: yes, bit for bit, for any number of threads.
    Synchronises: no.
    CUDA-graph safe: yes; on a GPU PyTorch's own convolution runs.
    Memory layout: any strides, channels_last images are read fastest; writes channels_last.

    Source: the merges of Ahn et al., "Fast, Accurate, and Lightweight Super-Resolution with Cascading Residual Network",
    ECCV 2018, section 3.2.
    """
    op = "conv1x1"
    if not isinstance(images, Tensor | Sequence):
        raise TypeError(f"{op}: images must be a torch.Tensor or a sequence of them; got {type(images).__name__}")
    parts = [images] if isinstance(images, Tensor) else list(images)
    if not parts:
        raise ValueError(f"{op}: images must hold at least one")
    for image in parts:
        check.rank(op, "an image", image, "(B, C, H, W)", 4)
    check.tensor(op, "weight", weight)
    if weight.ndim == 4 and weight.shape[2:] == (1, 1):
        weight = weight.flatten(1)
    check.rank(op, "weight", weight, "(O, C) or (O, C, 1, 1)", 2)
    channels = sum(image.shape[1] for image in parts)
    if 0 in weight.shape or weight.shape[1] != channels:
        raise ValueError(
            f"{op}: weight must be (O, C), C the {channels} channels of all images, both at least 1; got {tuple(weight.shape)}"
        )
    batch, _, height, width = parts[0].shape
    outputs = weight.shape[0]
    check.shapes(
        op,
        *(("an image", x, (batch, x.shape[1], height, width)) for x in parts),
        ("bias", bias, (outputs,)),
        ("slope", slope, (outputs,)),
        ("residual", residual, (batch, outputs, height, width)),
        ("out", out, (batch, outputs, height, width)),
    )
    given = [x for x in (*parts, weight, bias, slope, residual, out) if x is not None]
    for x in given:
        name = "bias" if x is bias else "slope" if x is slope else "out" if x is out else "every tensor"
        check.convolution_dtype(op, name, x.dtype, None if x is parts[0] else parts[0].dtype)
        check.same_device(op, "the first image", parts[0], "every tensor", x)
    check.channels_side_by_side(op, out)
    check.without_gradient(op, out)
    arguments = (parts, weight, bias, slope, residual)
    written = {} if out is None else {"out": out}
    if is_transformed(given):
        result: Tensor = in_plain_torch(op, conv1x1_plain, *arguments, **written)
        return result
    if out is not None and parts[0].device.type != "cpu":
        check.written(op, "out", out, given[:-1])
        with torch.no_grad():
            return out.copy_(conv1x1_plain(*arguments))
    differentiated = out is None and torch.is_grad_enabled() and any(x.requires_grad for x in given)
    if parts[0].device.type != "cpu" or differentiated:
        return conv1x1_plain(*arguments)
    found: Tensor = call(op, _reference if out is None else _reference_out, parts[0].device, *arguments, **written)
    return found if out is None else out


@in_own_dtype
def conv1x1_plain(
    images: Sequence[Tensor],  # [B, C, H, W] each
    weight: Tensor,  # [O, C of all images]
    bias: Tensor | None,  # [O]
    slope: Tensor | None,  # [O]
    residual: Tensor | None,  # [B, O, H, W]
) -> Tensor:  # [B, O, H, W]
    """The same by PyTorch's own layers."""
    joined = images[0] if len(images) == 1 else torch.cat(list(images), dim=1)
    # PyTorch's convolutions refuse an image without rows.
    empty = joined.new_zeros(joined.shape[0], weight.shape[0], *joined.shape[2:]) if 0 in joined.shape[2:] else None
    bias = None if bias is None else bias.to(joined.dtype)
    y = F.conv2d(joined, weight[:, :, None, None], bias) if empty is None else empty
    if residual is not None:
        y = y + residual
    return y if slope is None else F.prelu(y, slope.to(y.dtype))


def _fake(
    images: list[Tensor],  # [B, C, H, W] each
    weight: Tensor,  # [O, C of all images]
    bias: Tensor | None,  # [O]
    slope: Tensor | None,  # [O]
    residual: Tensor | None,  # [B, O, H, W]
) -> Tensor:  # [B, O, H, W]
    first = images[0]
    size = (first.shape[0], weight.shape[0], first.shape[2], first.shape[3])
    return torch.empty(size, dtype=first.dtype, device=first.device, memory_format=torch.channels_last)


def _reference(
    images: list[Tensor],  # [B, C, H, W] each
    weight: Tensor,  # [O, C of all images]
    bias: Tensor | None,  # [O]
    slope: Tensor | None,  # [O]
    residual: Tensor | None,  # [B, O, H, W]
) -> Tensor:  # [B, O, H, W]
    op = "conv1x1"
    if not images:
        raise ValueError(f"{op}: images must hold at least one")
    check.rank(op, "weight", weight, "(O, C)", 2)
    for x in images:
        check.rank(op, "an image", x, "(B, C, H, W)", 4)
    shape = (images[0].shape[0], weight.shape[0], *images[0].shape[2:])
    given = {"weight": weight, "bias": bias, "slope": slope, "residual": residual}
    for name, x_or_none in (*(("an image", x) for x in images), *given.items()):
        if x_or_none is not None:
            check.convolution_dtype(op, name, x_or_none.dtype, None if x_or_none is images[0] else images[0].dtype)
    check.shapes(
        op,
        *(("an image", x, (shape[0], x.shape[1], *shape[2:])) for x in images),
        ("bias", bias, shape[1:2]),
        ("slope", slope, shape[1:2]),
        ("residual", residual, shape),
    )
    if 0 in weight.shape or weight.shape[1] != sum(x.shape[1] for x in images):
        raise ValueError(
            f"{op}: weight must have a column for each channel of all images and a row for each output, at least one of both; "
            f"got {tuple(weight.shape)}"
        )
    return conv1x1_reference(images, weight, bias, slope, residual)


def _reference_out(
    images: list[Tensor],  # [B, C, H, W] each
    weight: Tensor,  # [O, C of all images]
    bias: Tensor | None,  # [O]
    slope: Tensor | None,  # [O]
    residual: Tensor | None,  # [B, O, H, W]
    *,
    out: Tensor,  # [B, O, H, W]
) -> None:
    inputs = [x for x in (*images, weight, bias, slope, residual) if x is not None]
    write_result("conv1x1", out, _reference(images, weight, bias, slope, residual), inputs)


register("conv1x1", _reference, _fake, *by_reference(conv1x1_reference))
register("conv1x1.out", _reference_out, lambda *args, out: None)
