"""`conv3x3`: a 3 x 3 convolution, with what follows it, by Winograd's minimal filtering."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastroute.ops import _checks as check
from fastroute.ops._library import by_reference, call, in_own_dtype, in_plain_torch, is_transformed, register, write_result
from fastroute.reference.conv3x3 import PAD, SIDE, TAPS, conv3x3_reference, paired_weight, transformed_weight

SCHEMAS = [
    "conv3x3(Tensor image, Tensor weight, Tensor? bias, Tensor? slope, Tensor? residual, SymInt channels, int shuffle, "
    "int context=0) -> Tensor",
    "conv3x3.out(Tensor image, Tensor weight, Tensor? bias, Tensor? slope, Tensor? residual, SymInt channels, int shuffle, "
    "int context=0, *, Tensor(a!) out) -> ()",
]


# With so few channels to sum, or to compute, the transforms of bfloat16 take longer than the products that they save.
FEW_INPUTS, FEW_OUTPUTS = 12, 4


class Conv3x3Weight(NamedTuple):
    """What :func:`conv3x3_weight` gives. O output channels, C input channels, G groups.

    Attributes:
        weight: (O, C / G, 3, 3), as it was given.
        transformed: (36, G, C / G, P) float32, its values at the 36 points of a tile; for few channels of bfloat16, where
            the processor multiplies these, (9, G, pairs, P, 2), the kernel of every tap for the pairs of the C / G channels.
        shuffle: factor of the pixel shuffle behind the convolution; 1 for none.
    """

    weight: Tensor
    transformed: Tensor
    shuffle: int


def conv3x3_weight(weight: Tensor, groups: int = 1, shuffle: int = 1) -> Conv3x3Weight:  # [O, C / G, 3, 3]
    """Transform the weight of a convolution once, for many calls of :func:`conv3x3`.

    Args:
        weight: (O, C / groups, 3, 3) float32 or bfloat16.
        groups: groups of channels. O is a multiple of groups * shuffle².
        shuffle: factor of a pixel shuffle behind the convolution, which then costs nothing.

    Raises:
        ValueError, TypeError: another shape or dtype.
    """
    op = "conv3x3_weight"
    check.rank(op, "weight", weight, "(O, C / groups, 3, 3)", 4)
    check.convolution_dtype(op, "weight", weight.dtype, None)
    check.at_least(op, 1, groups=groups, shuffle=shuffle)
    if weight.shape[2:] != (TAPS, TAPS) or 0 in weight.shape or weight.shape[0] % (groups * shuffle**2):
        raise ValueError(
            f"{op}: weight must be (O, C / groups, 3, 3), O a multiple of groups * shuffle² = {groups * shuffle**2}; got "
            f"{tuple(weight.shape)}"
        )
    return Conv3x3Weight(weight, kernel_weight(weight.detach(), groups, shuffle), shuffle)


def kernel_weight(
    weight: Tensor, groups: int, shuffle: int
) -> Tensor:  # [O, C / G, 3, 3] -> [36, G, C / G, P] or [9, G, pairs, P, 2]
    """What the kernel reads: see :class:`Conv3x3Weight`."""
    few = weight.shape[1] <= FEW_INPUTS or weight.shape[0] <= FEW_OUTPUTS * groups
    if few and weight.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported():
        return paired_weight(weight, groups, shuffle)
    return transformed_weight(weight, groups, shuffle)


def conv3x3(
    image: Tensor,  # [B, C, H, W]
    weight: Tensor | Conv3x3Weight,  # [O, C / G, 3, 3]
    bias: Tensor | None = None,  # [O]
    slope: Tensor | None = None,  # [O]
    residual: Tensor | None = None,  # [B, O / s / s, H s, W s]
    out: Tensor | None = None,  # [B, O / s / s, H s, W s]
    context: int = 0,
) -> Tensor:  # [B, O / s / s, H s, W s]
    """A 3 x 3 convolution at a stride of 1 with zeros around the image, and what follows it, in one pass.

    By Winograd's minimal filtering F(4 x 4, 3 x 3): 36 products for every 16 outputs and input channel, where a direct
    convolution needs 144. Errors are about 1e-6 of the largest value at 64 channels per group, two to three times those of
    direct float32 sums, and about 1e-5 at 200 channels. The transforms, the products, the rectifier, the pixel shuffle and the
    sum happen tile by tile inside the caches. Images of bfloat16, whose numbers are too short for that, are widened to float32
    when they are read, and rounded once, when the result is written.

    >>> prepared = fastroute.conv3x3_weight(layer.weight)  # once
    >>> y = fastroute.conv3x3(x, prepared, layer.bias, slope=torch.zeros(64))  # relu(layer(x))

    Args:
        image: (B, C, H, W) float32 or bfloat16; all other tensors have its dtype, but
            `bias` and `slope` may be float32.
        weight: what :func:`conv3x3_weight` gives; or (O, C / G, 3, 3) in G groups, which is then transformed in every
            call.
        bias: (O,), added to the sums. Default: none.
        slope: (O,), the factor of negative numbers: zeros for ReLU, one number for a leaky ReLU, the weight of a
            PReLU. Default: no rectifier.
        residual: (B, O / s², H s, W s), added last, behind the pixel shuffle by s of `weight`. Default: none.
        out: write into this tensor, for example some channels of a larger one, whose channels lie side by side
            (channels_last). Of the shape of the result. Default: a new tensor.
        context: 1 if the first and last row of `image` are neighbours that are read and have no result, as in a band of a
            larger image. The result then has the height H - 2. Default: 0, zeros above and below.

    Returns:
        (B, O / s², H s, W s), channels_last; `out` when it is given.

    Raises:
        ValueError: shapes that do not match, tensors on several devices, or an `out` that shares memory with an input.
        TypeError: another dtype, or tensors of several dtypes.

    Differentiable: yes, without `out`: where a gradient is needed, PyTorch's own convolution runs.
    Deterministic: yes, bit for bit, for any number of threads. A number that is not finite may spread over its tile.
    Synchronises: no.
    CUDA-graph safe: yes; on a GPU PyTorch's own convolution runs.
    Memory layout: any strides, channels_last images are read fastest; writes channels_last.

    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4; points of evaluation
    after Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks", 2018.
    """
    op = "conv3x3"
    prepared = weight if isinstance(weight, Conv3x3Weight) else None
    kernel, shuffle = (weight.weight, weight.shuffle) if isinstance(weight, Conv3x3Weight) else (weight, 1)
    groups = _check(image, kernel, bias, slope, residual, out, shuffle, context)
    given = [x for x in (image, kernel, bias, slope, residual, out) if x is not None]
    written = {} if out is None else {"out": out}
    plain = (image, kernel, bias, slope, residual, groups, shuffle, context)
    if is_transformed(given):
        result: Tensor = in_plain_torch(op, conv3x3_plain, *plain, **written)
        return result
    if out is not None and image.device.type != "cpu":
        check.written(op, "out", out, given[:-1])
        with torch.no_grad():
            return out.copy_(conv3x3_plain(*plain))
    if image.device.type != "cpu" or (out is None and torch.is_grad_enabled() and any(x.requires_grad for x in given)):
        return conv3x3_plain(*plain)
    if out is not None and prepared is None:
        # The kernel sees a transformed copy of it.
        check.written(op, "out", out, [kernel])
    transformed = prepared.transformed if prepared is not None else kernel_weight(kernel.detach(), groups, shuffle)
    arguments = (image, transformed, bias, slope, residual, kernel.shape[0], shuffle, context)
    found: Tensor = call(op, _reference if out is None else _reference_out, image.device, *arguments, **written)
    return found if out is None else out


def _check(
    image: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [O, C / G, 3, 3]
    bias: Tensor | None,  # [O]
    slope: Tensor | None,  # [O]
    residual: Tensor | None,  # [B, O / s / s, H s, W s]
    out: Tensor | None,  # [B, O / s / s, H s, W s]
    shuffle: int,
    context: int,
) -> int:
    """Check the arguments; the number of groups."""
    op = "conv3x3"
    check.rank(op, "image", image, "(B, C, H, W)", 4)
    check.rank(op, "weight", weight, "(O, C / G, 3, 3)", 4)
    outputs, inputs = weight.shape[:2]
    if weight.shape[2:] != (TAPS, TAPS) or outputs < 1 or inputs < 1 or image.shape[1] % inputs or image.shape[1] < 1:
        raise ValueError(
            f"{op}: weight must be (O, C / G, 3, 3) for an image of C = {image.shape[1]} channels; got {tuple(weight.shape)}"
        )
    groups = image.shape[1] // inputs
    if outputs % (groups * shuffle**2):
        raise ValueError(
            f"{op}: the {outputs} output channels of weight must be a multiple of its {groups} groups"
            + (f" times {shuffle**2}, for the pixel shuffle" if shuffle > 1 else "")
        )
    shape = _result_shape(image, outputs, shuffle, context)
    vector = (outputs,)
    check.shapes(op, ("bias", bias, vector), ("slope", slope, vector), ("residual", residual, shape), ("out", out, shape))
    named = {"image": image, "weight": weight, "bias": bias, "slope": slope, "residual": residual, "out": out}
    for name, x in named.items():
        if x is not None:
            check.convolution_dtype(op, name, x.dtype, None if x is image else image.dtype)
            check.same_device(op, "image", image, name, x)
    check.channels_side_by_side(op, out)
    check.without_gradient(op, out)
    return groups


def _result_shape(image: Tensor, channels: int, shuffle: int, context: int) -> tuple[int, ...]:  # [B, C, H, W]
    """The shape of the result."""
    if context not in (0, 1) or image.shape[2] < 2 * context:
        raise ValueError(f"conv3x3: context must be 0, or 1 for an image of at least 2 rows; got {context}")
    rows = image.shape[2] - 2 * context
    return image.shape[0], channels // shuffle**2, rows * shuffle, image.shape[3] * shuffle


@in_own_dtype
def conv3x3_plain(
    image: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [O, C / G, 3, 3]
    bias: Tensor | None,  # [O]
    slope: Tensor | None,  # [O]
    residual: Tensor | None,  # [B, O / s / s, H s, W s]
    groups: int,
    shuffle: int = 1,
    context: int = 0,
) -> Tensor:  # [B, O / s / s, H s, W s]
    """The same by PyTorch's own layers."""
    # PyTorch's convolutions refuse an image without rows.
    rows = image.shape[2] - 2 * context
    empty = image.new_zeros(image.shape[0], weight.shape[0], rows, image.shape[3]) if 0 in (rows, image.shape[3]) else None
    bias = None if bias is None else bias.to(image.dtype)
    y = F.conv2d(image, weight, bias, padding=(1 - context, 1), groups=groups) if empty is None else empty
    if slope is not None:
        y = F.prelu(y, slope.to(y.dtype))
    y = F.pixel_shuffle(y, shuffle)
    return y if residual is None else y + residual


def _fake(
    image: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [36, G, C / G, P] or [9, G, pairs, P, 2]
    bias: Tensor | None,  # [O]
    slope: Tensor | None,  # [O]
    residual: Tensor | None,  # [B, O / s / s, H s, W s]
    channels: int,
    shuffle: int,
    context: int = 0,
) -> Tensor:  # [B, O / s / s, H s, W s]
    size = (image.shape[0], channels // shuffle**2, (image.shape[2] - 2 * context) * shuffle, image.shape[3] * shuffle)
    return torch.empty(size, dtype=image.dtype, device=image.device, memory_format=torch.channels_last)


def _reference(
    image: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [36, G, C / G, P] or [9, G, pairs, P, 2]
    bias: Tensor | None,  # [O]
    slope: Tensor | None,  # [O]
    residual: Tensor | None,  # [B, O / s / s, H s, W s]
    channels: int,
    shuffle: int,
    context: int = 0,
) -> Tensor:  # [B, O / s / s, H s, W s]
    op = "conv3x3"
    check.rank(op, "image", image, "(B, C, H, W)", 4)
    direct = image.dtype == torch.bfloat16 and weight.ndim == 5
    wanted = f"({TAPS**2}, G, pairs of C / G, P, 2)" if direct else f"({SIDE**2}, G, C / G, P)"
    check.rank(op, "weight", weight, wanted, 5 if direct else 4)
    check.at_least(op, 1, channels=channels, shuffle=shuffle)
    check.product(op, "a pixel", shuffle, shuffle)
    groups, parts = weight.shape[1], shuffle**2
    whole = groups >= 1 and channels % (groups * parts) == 0 and image.shape[1] >= groups and image.shape[1] % groups == 0
    inputs = image.shape[1] // max(groups, 1)
    first, *rest = (TAPS**2, -(-inputs // 2), 2) if direct else (SIDE**2, inputs)
    columns = parts * -(-channels // max(groups * parts, 1) // PAD) * PAD
    if not whole or tuple(weight.shape) != (first, groups, rest[0], columns, *rest[1:]):
        raise ValueError(f"{op}: weight must be {wanted} for this image, as conv3x3_weight gives it")
    check.product(op, "the result", image.shape[0], channels, image.shape[2], image.shape[3])
    shape = _result_shape(image, channels, shuffle, context)
    check.shapes(op, ("bias", bias, (channels,)), ("slope", slope, (channels,)), ("residual", residual, shape))
    transformed = torch.float32 if image.dtype == torch.bfloat16 and not direct else image.dtype
    check.convolution_dtype(op, "image", image.dtype, None)
    check.convolution_dtype(op, "weight", weight.dtype, transformed)
    for name, x in (("bias", bias), ("slope", slope), ("residual", residual)):
        if x is not None:
            check.convolution_dtype(op, name, x.dtype, image.dtype)
    return conv3x3_reference(image, weight, bias, slope, residual, channels, shuffle, context)


def _reference_out(
    image: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [36, G, C / G, P] or [9, G, pairs, P, 2]
    bias: Tensor | None,  # [O]
    slope: Tensor | None,  # [O]
    residual: Tensor | None,  # [B, O / s / s, H s, W s]
    channels: int,
    shuffle: int,
    context: int = 0,
    *,
    out: Tensor,  # [B, O / s / s, H s, W s]
) -> None:
    inputs = [x for x in (image, weight, bias, slope, residual) if x is not None]
    write_result("conv3x3", out, _reference(image, weight, bias, slope, residual, channels, shuffle, context), inputs)


register("conv3x3", _reference, _fake, *by_reference(conv3x3_reference))
register("conv3x3.out", _reference_out, lambda *args, out: None)
