"""`cell_mlp`: an MLP once per cell of an image, averaged over the windows that overlap there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastroute.ops import _checks as check
from fastroute.ops._library import call, register
from fastroute.reference.cell_mlp import _cell_mlp_backward_reference, cell_mlp_reference, chunk_on

SCHEMAS = [
    "cell_mlp(Tensor image, Tensor[] weights, Tensor[] biases, float slope, int cell, SymInt span, SymInt step) -> Tensor",
    "_cell_mlp_backward(Tensor grad, Tensor image, Tensor[] weights, Tensor[] biases, float slope, int cell, SymInt span, "
    "SymInt step) -> Tensor[]",
]


def plain_bytes(columns: int, pixels: int, hidden: int, dtype: torch.dtype, device: torch.device) -> int:
    """What the plain form holds at most beside its input and output, for rows of `columns` cells of `pixels` values.

    Args:
        columns: cells of a row.
        pixels: values of a cell.
        hidden: units of the widest layer.
        dtype, device: of the layers.
    """
    return dtype.itemsize * max(chunk_on(device), columns) * (2 * pixels + 3 * hidden)


def cell_mlp(
    image: Tensor,  # [B, C, H, W]
    layers: Sequence[tuple[Tensor, Tensor]],  # (weight [F_out, F_in], bias [F_out]) of each layer
    cell: int,
    span: int,
    step: int,
    slope: float = 0.1,
) -> Tensor:  # [B, H // cell, windows, F_out]
    """Every cell of `cell` x `cell` pixels through an MLP, and the mean over windows of `span` cells along each row.

    A convolution whose stride is its kernel's size, 1 x 1 convolutions and an average, as patch classifiers are made of, give
    the same for a cell whichever patch it is seen in. Here each cell is computed once, and its activations never leave the
    caches; patches that overlap share them. What belongs to a patch is the mean of the rows of cells that it covers:

    >>> rows = fastroute.cell_mlp(image, layers, cell=4, span=8, step=7)  # patches of 32 pixels at a stride of 28
    >>> patches = rows.unfold(1, 8, 7).mean(dim=-1)

    Args:
        image: (B, C, H, W), floating, or uint8 or uint16, whose pixels are divided by 255 or 65535. H and W are multiples of
            `cell`.
        layers: (weight, bias) of each layer, first layer first, all of one dtype: float32, float16, bfloat16 or float64. The
            first reads a cell's C · cell² numbers, channel by channel and row by row, as the flattened weight of a
            convolution does. A leaky ReLU follows every layer.
        cell: side of a cell in pixels.
        span: cells of a window; at most W / cell.
        step: cells from one window to the next. The last one is shifted inward, to end where the row does, as in
            :class:`TileGrid`.
        slope: of the leaky ReLU for negative numbers.

    Returns:
        (B, H / cell, windows, F_out), contiguous, of the layers' dtype, windows = ceil((W / cell - span) / step) + 1.

    Raises:
        ValueError: shapes that do not match, an image that does not consist of whole cells or is narrower than a window,
            tensors on several devices.
        TypeError: an unsupported dtype, or layers of several.

    Differentiable: with respect to `image`, when it is floating, and `layers`; the backward pass recomputes the forward one.
    Deterministic: yes, bit for bit, for any number of threads; a row's numbers do not depend on the rows above and below.
    Synchronises: no.
    CUDA-graph safe: yes.
    Memory layout: any strides, contiguous images are read fastest; writes a contiguous tensor.

    Source: the class module of ClassSR (Kong et al., CVPR 2021, section 3.2) without its overlaps computed twice.
    """
    op = "cell_mlp"
    check.rank(op, "image", image, "(B, C, H, W)", 4)
    check.dtype(op, "image", image.dtype, (*check.FLOATING, *check.INTEGER_IMAGE))
    check.at_least(op, 1, cell=cell, span=span, step=step)
    if not abs(slope) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{op}: slope must be a number of float32; got {slope}")
    height, width = image.shape[2:]
    if height % cell or width % cell:
        raise ValueError(f"{op}: image must be a multiple of cell ({cell}) in height and width; got {tuple(image.shape)}")
    if width // cell < span:
        raise ValueError(f"{op}: span must be at most the cells of a row, {width // cell}; got {span}")
    _check_layers(image, layers, cell)
    weights, biases = [w for w, _ in layers], [b for _, b in layers]
    # A step beyond the last window is one to it.
    step = min(step, max(width // cell - span, 1))
    return call(op, cell_mlp_reference, image.device, image, weights, biases, slope, cell, span, step)


def _check_layers(image: Tensor, layers: Sequence[tuple[Tensor, Tensor]], cell: int) -> None:  # [B, C, H, W]
    op = "cell_mlp"
    if len(layers) < 1:
        raise ValueError(f"{op}: layers must hold at least one (weight, bias); got none")
    fan_in, dtype = image.shape[1] * cell * cell, layers[0][0].dtype
    for n, (weight, bias) in enumerate(layers):
        name = f"the weight of layer {n}"
        check.rank(op, name, weight, "(F_out, F_in)", 2)
        check.rank(op, f"the bias of layer {n}", bias, "(F_out,)", 1)
        check.dtype(op, name, weight.dtype, check.FLOATING)
        if weight.dtype != dtype or bias.dtype != dtype:
            raise TypeError(f"{op}: layers must all be of one dtype, {dtype}; got {weight.dtype} and {bias.dtype} in layer {n}")
        check.same_device(op, "image", image, name, weight)
        check.same_device(op, name, weight, "its bias", bias)
        if weight.shape[0] < 1 or weight.shape[1] != fan_in or bias.shape[0] != weight.shape[0]:
            raise ValueError(
                f"{op}: {name} must have {fan_in} columns and as many rows as its bias, at least one; got "
                f"{tuple(weight.shape)} and a bias of {bias.shape[0]}"
            )
        fan_in = weight.shape[0]


def _fake(
    image: Tensor,  # [B, C, H, W]
    weights: list[Tensor],  # [F_out, F_in] each
    biases: list[Tensor],  # [F_out] each
    slope: float,
    cell: int,
    span: int,
    step: int,
) -> Tensor:
    cols = image.shape[3] // cell
    windows = (cols - span + step - 1) // step + 1
    return weights[0].new_empty((image.shape[0], image.shape[2] // cell, windows, weights[-1].shape[0]))


def _backward_fake(
    grad: Tensor, image: Tensor, weights: list[Tensor], biases: list[Tensor], slope: float, cell: int, span: int, step: int
) -> list[Tensor]:  # [B, cells, windows, F_out], [B, C, H, W], [F_out, F_in] each, [F_out] each
    return [torch.empty_like(x) for x in (image, *weights, *biases)]


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # [B, cells, windows, F_out]
    image, weights, biases, *ctx.rest = inputs
    ctx.number = len(weights)
    ctx.save_for_backward(image, *weights, *biases)


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple:  # [B, cells, windows, F_out]
    image, *layers = ctx.saved_tensors
    n = ctx.number
    grads = ops._cell_mlp_backward(grad, image, layers[:n], layers[n:], *ctx.rest)
    of_image = grads[0] if image.dtype.is_floating_point else None
    return of_image, grads[1 : 1 + n], grads[1 + n :], None, None, None, None


register("cell_mlp", cell_mlp_reference, _fake, _backward, _setup_context)
register("_cell_mlp_backward", _cell_mlp_backward_reference, _backward_fake, once=True)
