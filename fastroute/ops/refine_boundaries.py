"""`refine_boundaries`: smooths the seams between cheap and expensive pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastroute._levels import MAXIMUM
from fastroute.ops import _checks as check
from fastroute.ops._library import call, register
from fastroute.reference.refine_boundaries import (
    _refine_boundaries_backward_reference,
    refine_boundaries_reference,
)

SCHEMAS = [
    "refine_boundaries(Tensor image, Tensor class_map, SymInt row_begin, SymInt row_end) -> Tensor",
    "refine_boundaries.out(Tensor image, Tensor class_map, SymInt row_begin, SymInt row_end, *, Tensor(a!) out) -> Tensor(a!)",
    "_refine_boundaries_backward(Tensor grad, Tensor class_map, SymInt row_begin, SymInt row_end) -> Tensor",
]


def refine_boundaries(
    image: Tensor,  # [B, C, H, W]
    class_map: Tensor,  # [B, H, W]
    rows: tuple[int, int] | None = None,
    out: Tensor | None = None,  # [B, C, rows, W]
) -> Tensor:  # [B, C, H, W]
    """Replace each pixel of class 0 that touches another class by the mean of the 3 x 3 pixels around it.

    The outermost rows and columns stay as they are. Only pixels of `image` are read, never refined ones, so an image may be
    refined band by band: give one row more on either side and the `rows` in between.

    Args:
        image: (B, C, H, W); float32, float16, bfloat16 or float64.
        class_map: uint8 or int64 (B, H, W).
        rows: write only these rows (first, one past the last).
        out: write into this tensor, for example a band of a larger image; its last dimension must be contiguous. Of the
            dtype of `image`, or uint8 or uint16: [0, 1] is then multiplied by 255 or 65535, clamped and rounded half to
            even.

    Returns:
        (B, C, H, W), or (B, C, rows, W); `out` when it is given.

    Raises:
        ValueError: shapes that do not match, tensors on several devices, or an `out` that shares memory with an input or
            between its own rows.
        TypeError: an unsupported dtype.

    Differentiable: with respect to `image`, without `out`.
    Deterministic: yes, bit for bit.
    Synchronises: no.
    CUDA-graph safe: yes.
    Memory layout: any strides, contiguous images are read fastest; writes contiguous rows.

    Source: PCSR (Jeong et al., ECCV 2024), section 3.5, pixel-wise refinement.
    """
    op = "refine_boundaries"
    check.rank(op, "image", image, "(B, C, H, W)", 4)
    check.dtype(op, "image", image.dtype, check.FLOATING)
    check.rank(op, "class_map", class_map, "(B, H, W)", 3)
    check.dtype(op, "class_map", class_map.dtype, (torch.uint8, torch.int64))
    check.same_device(op, "image", image, "class_map", class_map)
    expected = (image.shape[0], *image.shape[2:])
    if tuple(class_map.shape) != expected:
        raise ValueError(f"{op}: class_map must be {expected}, as image is; got {tuple(class_map.shape)}")
    begin, end = check.rows(op, rows, image.shape[2])
    if out is None:
        return call(op, _reference, image.device, image, class_map, begin, end)
    check.rank(op, "out", out, "(B, C, rows, W)", 4)
    check.same_device(op, "image", image, "out", out)
    check.dtype(op, "out", out.dtype, (image.dtype, *check.INTEGER_IMAGE))
    size = (image.shape[0], image.shape[1], end - begin, image.shape[3])
    if tuple(out.shape) != size or (out.stride(3) != 1 and size[3] > 1):
        raise ValueError(f"{op}: out must be {size} with contiguous rows; got {tuple(out.shape)} with strides {out.stride()}")
    return call(op, _reference_out, image.device, image.detach(), class_map, begin, end, out=out)


def _reference(image: Tensor, class_map: Tensor, row_begin: int, row_end: int) -> Tensor:  # [B, C, H, W], [B, H, W]
    check.rows("refine_boundaries", (row_begin, row_end), image.shape[2])
    return refine_boundaries_reference(image, class_map, (row_begin, row_end))


def _reference_out(
    image: Tensor,  # [B, C, H, W]
    class_map: Tensor,  # [B, H, W]
    row_begin: int,
    row_end: int,
    *,
    out: Tensor,  # [B, C, rows, W]
) -> Tensor:
    check.written("refine_boundaries", "out", out, (image, class_map))
    if out.dtype == image.dtype:
        return out.copy_(_reference(image, class_map, row_begin, row_end))
    work = torch.float64 if image.dtype == torch.float64 else torch.float32
    maximum = MAXIMUM[out.dtype]
    refined = _reference(image.to(work), class_map, row_begin, row_end)
    return out.copy_((refined.nan_to_num(0, 1, 0).clamp(0, 1) * maximum).round())


def _fake(image: Tensor, class_map: Tensor, row_begin: int, row_end: int) -> Tensor:  # [B, C, H, W], [B, H, W]
    return image.new_empty((image.shape[0], image.shape[1], row_end - row_begin, image.shape[3]))


def _backward_fake(grad: Tensor, class_map: Tensor, row_begin: int, row_end: int) -> Tensor:  # [B, C, rows, W], [B, H, W]
    return grad.new_empty((*grad.shape[:2], *class_map.shape[1:]))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # [B, C, rows, W]
    _, class_map, row_begin, row_end = inputs
    ctx.save_for_backward(class_map)
    ctx.rows = (row_begin, row_end)


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple:  # [B, C, rows, W]
    return ops._refine_boundaries_backward(grad, *ctx.saved_tensors, *ctx.rows), None, None, None


def _double_backward(ops: Any, ctx: Any, grad: Tensor) -> tuple:  # [B, C, H, W]
    return ops.refine_boundaries(grad, *ctx.saved_tensors, *ctx.rows), None, None, None


def _checked_backward_reference(
    grad: Tensor,  # [B, C, rows, W]
    class_map: Tensor,  # [B, H, W]
    row_begin: int,
    row_end: int,
) -> Tensor:
    op = "refine_boundaries"
    check.rank(op, "grad", grad, "(B, C, rows, W)", 4)
    check.rank(op, "class_map", class_map, "(B, H, W)", 3)
    check.rows(op, (row_begin, row_end), class_map.shape[1])
    batch, _, width = class_map.shape
    if (grad.shape[0], *grad.shape[2:]) != (batch, row_end - row_begin, width):
        raise ValueError(
            f"{op}: grad must be ({batch}, C, {row_end - row_begin}, {width}), as the output; got {tuple(grad.shape)}"
        )
    return _refine_boundaries_backward_reference(grad, class_map, row_begin, row_end)


register("refine_boundaries", _reference, _fake, _backward, _setup_context)
register("refine_boundaries.out", _reference_out, lambda *args, out: out)
register("_refine_boundaries_backward", _checked_backward_reference, _backward_fake, _double_backward, _setup_context)
