"""The adjoint of stitch_patches: a pixel of a patch reads the gradient of its output pixel, times the weights of both axes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastroute.grid import tile_count
from fastroute.ops import _checks as check
from fastroute.triton._common import FLOATING, NAMES, WIDER, Variant, ceil_div, launch, product, to_type, to_work
from fastroute.triton._geometry import origin
from fastroute.triton._stitch_tables import WARPS, axis_weights, constants_of, weights_pointer

# Elements of the gradient that a program writes: one for each thread.
BLOCK = 32 * WARPS


@triton.jit(
    do_not_specialize=[
        "lines_count", "height", "width", "rows", "cols", "out_height", "out_width", "grad_n", "grad_c", "grad_y"
    ],
    do_not_specialize_on_alignment=["grad"],
)  # fmt: skip
def stitch_patches_backward_kernel(
    grad,  # [B, C, out_height, out_width]
    numbers,  # [N] patches by the row that holds them, or None
    begin,  # [M + 1] where the patches of a row begin in `numbers`, or None
    weights,  # [rows + cols, P]
    out,  # [M, C, P, P]
    lines_count,
    height,
    width,
    rows,
    cols,
    out_height,
    out_width,
    grad_n,
    grad_c,
    grad_y,
    grad_x,
    channels,
    PATCH: tl.constexpr,
    STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    WORK: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDER: tl.constexpr,
):
    """The adjoint: patch pixel (k, l) reads the gradient of its output pixel times wy[k] and then wx[l]; a row that several
    patches read sums them in their order, one that none reads is 0. One program writes a run of one row."""
    SPAN: tl.constexpr = PATCH * SCALE
    size = channels * SPAN * SPAN
    pieces = (size + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    m = (program // pieces).to(tl.int64) * WIDER + tl.arange(0, 1 if WIDER == 1 else WIDER * BLOCK) // BLOCK
    place = (program % pieces) * BLOCK + tl.arange(0, WIDER * BLOCK) % BLOCK
    inside = (m < lines_count) & (place < size)
    c, k, column = place // (SPAN * SPAN), place // SPAN % SPAN, place % SPAN
    total = tl.full((WIDER * BLOCK,), 0, WORK)
    start = m
    count = tl.full(m.shape, 1, tl.int64)
    if begin is not None:
        start = tl.load(begin + m, mask=m < lines_count, other=0)
        count = tl.load(begin + m + 1, mask=m < lines_count, other=0) - start
    for repeat in range(tl.max(count)):
        number = start + repeat
        held = (m < lines_count) & (repeat < count)
        if numbers is not None:
            number = tl.load(numbers + number, mask=held, other=0)
        tiles = rows * cols
        tile = (number % tiles).to(tl.int32)
        y = origin(tile // cols, height, PATCH, STRIDE) * SCALE + k
        x = origin(tile % cols, width, PATCH, STRIDE) * SCALE + column
        reads = inside & held & (y < out_height) & (x < out_width)
        at = number // tiles * grad_n + c.to(tl.int64) * grad_c + y.to(tl.int64) * grad_y + x.to(tl.int64) * grad_x
        value = to_work(tl.load(grad + at, mask=reads, other=0), WORK)
        wy = tl.load(weights + tile // cols * SPAN + k, mask=reads, other=0)
        wx = tl.load(weights + (rows + tile % cols) * SPAN + column, mask=reads, other=0)
        total += tl.where(reads, product(product(value, wy), wx), 0)
    tl.store(out + m * size + place, to_type(total, out.dtype.element_ty), mask=inside)


def _stitch_patches_backward_triton(
    grad: Tensor,  # [B, C, H·s, W·s]
    inverse: Tensor | None,  # [N]
    window: Tensor,  # [P]
    height: int,
    width: int,
    patch: int,
    stride: int,
    scale: int,
    crop: bool,
    num_patches: int,
) -> Tensor:  # [M, C, P, P]
    """The adjoint of :func:`fastroute.stitch_patches`."""
    rows, cols = tile_count(height, patch, stride, crop), tile_count(width, patch, stride, crop)
    numbers = begin = None
    if inverse is not None:
        check.in_range("stitch_patches", "inverse", inverse, num_patches)
        lines, numbers = torch.sort(inverse, stable=True)
        begin = torch.searchsorted(lines, torch.arange(num_patches + 1, device=inverse.device))
    constants = constants_of(grad.dtype, patch, stride, scale)
    weights = axis_weights(window, height, width, rows, cols, patch, stride, scale, crop)
    span, channels = patch * scale, grad.shape[1]
    out = torch.empty((num_patches, channels, span, span), dtype=grad.dtype, device=grad.device)
    programs = ceil_div(num_patches, WIDER) * ceil_div(channels * span * span, BLOCK)
    sizes = (num_patches, height, width, rows, cols, *grad.shape[2:], *grad.stride(), channels)
    constants |= {"BLOCK": BLOCK, "WIDER": WIDER, "num_warps": WARPS}
    launch(stitch_patches_backward_kernel, programs, grad, numbers, begin, weights, out, *sizes, **constants)
    return out


def backward_variants() -> Iterator[Variant]:
    """The kernel as the launcher calls it."""
    names = ("height", "width", "rows", "cols", "out_height", "out_width", "channels", "lines_count")
    rest = dict.fromkeys((*names, *(f"grad_{axis}" for axis in "ncyx")), "i32")
    for dtype in FLOATING:
        pointers = {"numbers": "*i64", "begin": "*i64", "weights": weights_pointer(dtype)}
        types = {**rest, **pointers, **dict.fromkeys(("grad", "out"), f"*{NAMES[dtype]}")}
        constants = {**constants_of(dtype, 32, 28, 4), "BLOCK": BLOCK, "WIDER": WIDER}
        yield Variant(stitch_patches_backward_kernel, types, constants, {"num_warps": WARPS})
        if dtype == torch.float32:
            without = {**constants, "numbers": None, "begin": None}
            yield Variant(stitch_patches_backward_kernel, types, without, {"num_warps": WARPS})
