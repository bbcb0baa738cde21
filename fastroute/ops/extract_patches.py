"""`extract_patches`: all patches of an image, converted, normalised and in class order, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastroute.grid import TileGrid, tile_count
from fastroute.ops import _checks as check
from fastroute.ops._library import call, register
from fastroute.reference.extract_patches import (
    _extract_patches_backward_reference,
    extract_patches_reference,
)

SCHEMAS = [
    "extract_patches(Tensor image, Tensor? order, Tensor? mean, Tensor? std, int patch, int stride, bool crop, "
    "ScalarType? dtype, bool channels_last, int rows, int cols) -> Tensor",
    "_extract_patches_backward(Tensor grad, Tensor? order, SymInt batch, SymInt height, SymInt width, int patch, "
    "int stride, bool crop) -> Tensor",
]


def extract_patches(
    image: Tensor,  # [B, C, H, W]
    grid: TileGrid,
    order: Tensor | None = None,  # [M]
    mean: Tensor | None = None,  # [C]
    std: Tensor | None = None,  # [C]
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:  # [M, C, p, p] or [M, C, *size]
    """Crop the patches of `grid`, convert and normalise them, in class order when `order` is given.

    A read outside the image repeats its edge, so an image smaller than a patch works.

    Args:
        image: (B, C, H, W), float32, float16, bfloat16, float64, uint8 or uint16; any strides.
        grid: where the patches lie; its height and width are those of `image`.
        order: int64 (M,), numbers of the patches wanted, in the order wanted: `ClassGroups.order`, a slice of it, or any
            selection. Patch numbers are image-major, then rows, then columns. Default: all of them in that order.
        mean, std: (C,), subtracted and divided by; in units of the converted image.
        dtype: floating type of the patches, default that of `image`. Integer images turn into [0, 1]: uint8 values are
            divided by 255, uint16 values by 65535. Arithmetic is float32.
        memory_format: torch.contiguous_format or torch.channels_last; default as `image`.
        size: height and width in LR pixels of what is cut out, from the first pixel of each patch of `order` on: the regions
            of one shape that :func:`fastroute.merge_regions` found. At least a patch, which is the default.

    Returns:
        (M, C, patch, patch), or (M, C, height, width) of `size`; M = B * grid.num_patches without `order`.

    Raises:
        ValueError: a wrong rank or size, tensors on several devices, or a patch number out of range.
        TypeError: an unsupported dtype, or an integer image with `mean` or `std` and no floating `dtype`.

    Differentiable: with respect to `image`, for floating images and patches, not for another `size`.
    Deterministic: yes, bit for bit, forward and backward.
    Synchronises: no.
    CUDA-graph safe: yes.
    Memory layout: reads any strides; writes contiguous or channels_last.

    Source: patch sampling of ClassSR (Kong et al., CVPR 2021, section 3.1).
    """
    op = "extract_patches"
    check.rank(op, "image", image, "(B, C, H, W)", 4)
    check.dtype(op, "image", image.dtype, check.FLOATING + check.INTEGER_IMAGE)
    if (image.shape[2], image.shape[3]) != (grid.height, grid.width):
        raise ValueError(
            f"{op}: image must be {grid.height} x {grid.width} as the grid says; got {image.shape[2]} x {image.shape[3]}"
        )
    if image.shape[1] < 1:
        raise ValueError(f"{op}: image must have at least one channel; got {tuple(image.shape)}")
    check.index(op, "order", order, None)
    rows, cols = (grid.patch, grid.patch) if size is None else size
    if min(rows, cols) < grid.patch:
        raise ValueError(f"{op}: size must be at least the patch, {grid.patch} x {grid.patch}; got {rows} x {cols}")
    if max(rows, cols) > grid.patch and image.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: regions have no gradient; leave size out, or detach image")
    target = image.dtype if dtype is None else dtype
    for name, statistic in (("mean", mean), ("std", std)):
        if statistic is None:
            continue
        check.rank(op, name, statistic, "(C,)", 1)
        check.dtype(op, name, statistic.dtype, check.FLOATING)
        if statistic.shape[0] != image.shape[1]:
            raise ValueError(f"{op}: {name} must have {image.shape[1]} entries, one per channel; got {statistic.shape[0]}")
        check.same_device(op, "image", image, name, statistic)
        if statistic.requires_grad:
            raise ValueError(f"{op}: {name} must not require a gradient; normalise the patches yourself")
    check.same_device(op, "image", image, "order", order)
    if not target.is_floating_point and (mean is not None or std is not None or target != image.dtype):
        raise TypeError(f"{op}: dtype must be floating to convert or normalise; got {target}")
    check.dtype(op, "dtype", target, check.FLOATING + check.INTEGER_IMAGE)
    return call(
        op,
        _checked_reference,
        image.device,
        image,
        order,
        mean,
        std,
        grid.patch,
        grid.stride,
        grid.crop,
        target,
        _is_channels_last(image, memory_format),
        rows,
        cols,
    )


def _is_channels_last(image: Tensor, memory_format: torch.memory_format | None) -> bool:  # [B, C, H, W]
    if memory_format is None:
        return not image.is_contiguous() and image.is_contiguous(memory_format=torch.channels_last)
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(f"extract_patches: memory_format must be contiguous_format or channels_last; got {memory_format}")
    return memory_format == torch.channels_last


def _fake(
    image: Tensor,  # [B, C, H, W]
    order: Tensor | None,  # [M]
    mean: Tensor | None,  # [C]
    std: Tensor | None,  # [C]
    patch: int,
    stride: int,
    crop: bool,
    dtype: torch.dtype | None,
    channels_last: bool,
    rows: int,
    cols: int,
) -> Tensor:
    b, c, height, width = image.shape
    check.geometry("extract_patches", height, width, patch, stride, crop)
    tiles = tile_count(height, patch, stride, crop) * tile_count(width, patch, stride, crop)
    m = b * tiles if order is None else order.shape[0]
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((m, c, rows, cols), dtype=dtype or image.dtype, device=image.device, memory_format=memory_format)


def _backward_fake(
    grad: Tensor, order: Tensor | None, batch: int, height: int, width: int, patch: int, stride: int, crop: bool
) -> Tensor:  # [M, C, p, p], [M]
    check.geometry("extract_patches", height, width, patch, stride, crop)
    return grad.new_empty((batch, grad.shape[1], height, width))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # [M, C, p, p]
    image, order, _, std, patch, stride, crop, _, _, rows, cols = inputs
    if max(rows, cols) > patch:
        raise ValueError("extract_patches: regions have no gradient")
    ctx.save_for_backward(order, std)
    ctx.size = (image.shape[0], image.shape[2], image.shape[3])
    ctx.grid = (patch, stride, crop)
    ctx.dtype = image.dtype


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple:  # [M, C, p, p]
    order, std = ctx.saved_tensors
    if std is not None:
        work = torch.float64 if grad.dtype == torch.float64 else torch.float32
        grad = grad.to(work) / std.to(work)[:, None, None]
    image_grad = ops._extract_patches_backward(grad, order, *ctx.size, *ctx.grid)
    return image_grad.to(ctx.dtype), *[None] * 10


def _backward_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # [B, C, H, W]
    ctx.save_for_backward(inputs[1])
    ctx.grid = inputs[5:]


def _double_backward(ops: Any, ctx: Any, grad: Tensor) -> tuple:  # [B, C, H, W]
    patches = ops.extract_patches(grad, *ctx.saved_tensors, None, None, *ctx.grid, grad.dtype, False, ctx.grid[0], ctx.grid[0])
    return patches, *[None] * 7


def _checked_reference(image: Tensor, order: Tensor | None, *rest: Any) -> Tensor:  # [B, C, H, W], [M]
    patch, stride, crop = rest[2:5]
    check.rank("extract_patches", "image", image, "(B, C, H, W)", 4)
    check.geometry("extract_patches", image.shape[2], image.shape[3], patch, stride, crop)
    if order is not None:
        b, _, height, width = image.shape
        tiles = tile_count(height, patch, stride, crop) * tile_count(width, patch, stride, crop)
        check.in_range("extract_patches", "order", order, b * tiles)
    return extract_patches_reference(image, order, *rest)


def _checked_backward_reference(grad: Tensor, order: Tensor | None, batch: int, *rest: Any) -> Tensor:  # [M, C, p, p], [M]
    op = "extract_patches"
    check.geometry(op, *rest)
    height, width, patch, stride, crop = rest
    check.rank(op, "grad", grad, "(M, C, p, p)", 4)
    tiles = batch * tile_count(height, patch, stride, crop) * tile_count(width, patch, stride, crop)
    if tuple(grad.shape[2:]) != (patch, patch) or grad.shape[0] != (tiles if order is None else order.shape[0]):
        raise ValueError(
            f"{op}: grad must have one row of {patch} x {patch} pixels per extracted patch; got {tuple(grad.shape)}"
        )
    if order is not None:
        check.in_range(op, "order", order, tiles)
    return _extract_patches_backward_reference(grad, order, batch, *rest)


register("extract_patches", _checked_reference, _fake, _backward, _setup_context)
register("_extract_patches_backward", _checked_backward_reference, _backward_fake, _double_backward, _backward_setup_context)
