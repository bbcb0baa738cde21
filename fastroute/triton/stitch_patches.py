"""stitch_patches: out[b, c, Y, X] = Σ_i wy[i, Y] · Σ_j wx[j, X] · patch(i, j)[c, Y - y_i, X - x_j], the sums over the tile
rows i and tile columns j that cover the pixel, columns first and products rounded on their own, as everywhere. Two kernels make
tables, among them where every patch lies; one copies what a single tile makes, and one blends the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastroute.grid import covered_size, tile_count
from fastroute.ops import _checks as check
from fastroute.ops.stitch_patches import check_places, check_regions
from fastroute.triton._common import (
    FLOATING,
    INTEGER_IMAGE,
    INTERPRETED,
    NAMES,
    WIDER,
    Variant,
    ceil_div,
    launch,
    product,
    to_type,
    to_work,
    work_type,
)
from fastroute.triton._geometry import origin
from fastroute.triton._stitch_kernels import SIZES, stitch_patches_blend_kernel, stitch_patches_copy_kernel
from fastroute.triton._stitch_tables import axis_tables, find_places, table_variants

# A launcher that reads several tensors by their addresses stays one node of a graph: a compiler would not know them in use.
OPAQUE = ("stitch_patches.batches_out",)
# Warps of a program, packs that one turn of it copies, and pieces that one blends.
WARPS, COPIED, BLENDED = 4, 256, 128
# Turns of a program, so that small images have enough programs and large ones do not ask for too many tables.
TURNS = 4
# Cells between rows of tiles from end to end: few large programs, for the interpreter, whose time goes by steps.
WIDE = True
# Of the gradient: warps of a program, and its elements, one for each thread.
BACKWARD_WARPS = 8
BLOCK = 32 * BACKWARD_WARPS


def _constants(dtype: torch.dtype, patch: int, stride: int, scale: int) -> dict[str, Any]:
    return {"PATCH": patch, "STRIDE": stride, "SCALE": scale, "WORK": work_type(dtype)}


def _shares(source: torch.dtype, target: torch.dtype, patch: int, stride: int, scale: int, shuffle: int) -> dict[str, int]:
    """How pixels are shared out: `PACK` pixels at a time, as many as 16 bytes hold of the narrower type, if tiles begin and end
    with whole packs, else 1. `UNIT` of them lie side by side in a patch and are read at once; `PIECE` are blended at once."""
    pack = math.gcd(16 // min(source.itemsize, target.itemsize), stride * scale, patch * scale)
    unit = min(pack, 16 // source.itemsize) if shuffle == 1 else shuffle
    if pack % unit or unit & (unit - 1):
        pack = unit = 1
    return {"PACK": pack, "UNIT": unit, "PIECE": min(unit, 4) if shuffle == 1 else max(unit, min(pack, 4))}


def _programs(pack: int, piece: int, patch: int, stride: int, scale: int) -> tuple[dict[str, int], dict[str, int]]:
    """Lanes of a program that copies and of one that blends, and how many share a tile or a cell, for about `TURNS` turns."""
    if INTERPRETED:
        return {"LANES": 512, "PARTS": 1}, {"LANES": 4096, "PARTS": 1, "WIDE": WIDE}
    alone, beside = max(2 * stride - patch, 0) * scale, min(patch - stride, stride) * scale
    copied, blended = alone * alone // pack, beside * max(alone, beside) // piece
    copy = {"LANES": COPIED, "PARTS": max(1, ceil_div(copied, COPIED * TURNS))}
    return copy, {"LANES": BLENDED, "PARTS": max(1, ceil_div(blended, BLENDED * TURNS)), "WIDE": False}


def _odd(batch: Tensor, step_x: int, channels: int, of_regions: bool, unit: int, shuffle: int) -> int:  # [M_i, C·r·r, h_i, w_i]
    """0 if runs of pixels that are read at once lie side by side and begin at multiples of their length."""
    if shuffle > 1:
        dense = abs(step_x - channels * shuffle**2)
        return dense if of_regions else dense + abs(batch.stride(1) - 1) + batch.stride(0) % unit + batch.stride(2) % unit
    steps = batch.shape[3:] if of_regions else batch.stride()[:3]
    return abs(step_x - 1) + sum(step % unit for step in steps)


def stitch_patches_out_triton(
    patches: Tensor,  # [M, C·r·r, P / r, P / r]
    inverse: Tensor | None,  # [N]
    window: Tensor,  # [P]
    height: int,
    width: int,
    patch: int,
    stride: int,
    scale: int,
    crop: bool,
    shuffle: int,
    row_begin: int,
    row_end: int,
    *,
    out: Tensor,  # [B, C, rows, W·s]
) -> None:
    """See :func:`fastroute.stitch_patches`."""
    if inverse is not None:
        inverse = inverse.contiguous()
        check_places(inverse, patches.shape[0], (height, width, patch, stride, scale, crop), row_begin, row_end)
    _stitch([patches], inverse, None, window, (height, width, patch, stride, scale, crop), shuffle, row_begin, out)


def _stitch(
    batches: list[Tensor],  # [M_i, C·r·r, h_i / r, w_i / r] each
    inverse: Tensor | None,  # [N]
    region: Tensor | None,  # [N]
    window: Tensor,  # [P]
    grid: tuple[int, int, int, int, int, bool],
    shuffle: int,
    row_begin: int,
    out: Tensor,  # [B, C, rows, W·s]
) -> None:
    """Patches, or regions that hold them."""
    height, width, patch, stride, scale, crop = grid
    rows, cols = tile_count(height, patch, stride, crop), tile_count(width, patch, stride, crop)
    batch, channels, out_height, out_width = out.shape
    first = batches[0]
    if batch > 0 and sum(held.shape[0] for held in batches) == 0:
        raise ValueError("stitch_patches: patches must hold at least one row where inverse is not empty")
    shares = _shares(first.dtype, out.dtype, patch, stride, scale, shuffle)
    pack, unit, piece = shares["PACK"], shares["UNIT"], shares.pop("PIECE")
    weights, ends = axis_tables(window, height, width, rows, cols, patch, stride, scale, crop, pack)
    places, step_x = find_places(batches, inverse, region, batch * rows * cols, grid, shuffle)
    # Kernels look at the address of the first tensor. The last tile is shifted inward, by any number of pixels.
    odd = sum(_odd(held, step_x, channels, region is not None, unit, shuffle) for held in batches)
    odd += sum(held.data_ptr() % 16 for held in batches[1:]) + max(width - patch, 0) * scale % max(unit, piece)
    sizes = (height, width, rows, cols, row_begin, out_height, out_width, step_x, *out.stride()[:3], odd)
    constants = {"CHANNELS": channels, **_constants(first.dtype, patch, stride, scale), "SHUFFLE": shuffle, **shares}
    copy, blend = _programs(pack, piece, patch, stride, scale)
    options = {**constants, **copy, "num_warps": WARPS}
    launch(stitch_patches_copy_kernel, batch * rows * cols * copy["PARTS"], first, places, ends, out, *sizes, **options)
    options = {**constants, "PIECE": piece, **blend, "num_warps": WARPS}
    programs = batch * _blended_cells(rows, cols, bool(blend["WIDE"])) * blend["PARTS"]
    launch(stitch_patches_blend_kernel, programs, first, places, ends, weights, out, *sizes, **options)


def _blended_cells(rows: int, cols: int, wide: bool) -> int:
    """Cells beside those that one tile makes alone, and between their rows."""
    return rows * (cols + 1) + (rows + 1) * (1 if wide else 2 * cols + 1)


def stitch_patches_batches_out_triton(
    batches: list[Tensor],  # [M_i, C·r·r, P / r, P / r] each, or regions
    inverse: Tensor | None,  # [N]
    region: Tensor | None,  # [N]
    window: Tensor,  # [P]
    height: int,
    width: int,
    patch: int,
    stride: int,
    scale: int,
    crop: bool,
    shuffle: int,
    row_begin: int,
    row_end: int,
    *,
    out: Tensor,  # [B, C, rows, W·s]
) -> None:
    """Patches or regions in several tensors, which are read where they lie."""
    grid = (height, width, patch, stride, scale, crop)
    inverse = None if inverse is None else inverse.contiguous()
    if region is None or inverse is None:
        check_places(inverse, sum(batch.shape[0] for batch in batches), grid, row_begin, row_end)
        region = None
    else:
        region = region.contiguous()
        check_regions(batches, inverse, region, grid, shuffle, row_begin, row_end)
    _stitch(batches, inverse, region, window, grid, shuffle, row_begin, out)


def stitch_patches_triton(
    patches: Tensor,  # [M, C·r·r, P / r, P / r]
    inverse: Tensor | None,  # [N]
    window: Tensor,  # [P]
    height: int,
    width: int,
    patch: int,
    stride: int,
    scale: int,
    crop: bool,
    shuffle: int,
    dtype: torch.dtype | None,
    row_begin: int,
    row_end: int,
) -> Tensor:  # [B, C, rows, W·s]
    """See :func:`fastroute.stitch_patches`."""
    tiles = tile_count(height, patch, stride, crop) * tile_count(width, patch, stride, crop)
    number = patches.shape[0] if inverse is None else inverse.shape[0]
    out_width = covered_size(width, patch, stride, crop) * scale
    size = (number // tiles, patches.shape[1] // shuffle**2, row_end - row_begin, out_width)
    out = torch.empty(size, dtype=dtype or patches.dtype, device=patches.device)
    geometry = (height, width, patch, stride, scale, crop, shuffle, row_begin, row_end)
    stitch_patches_out_triton(patches, inverse, window, *geometry, out=out)
    return out


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
    constants = _constants(grad.dtype, patch, stride, scale)
    weights, _ = axis_tables(window, height, width, rows, cols, patch, stride, scale, crop)
    span, channels = patch * scale, grad.shape[1]
    out = torch.empty((num_patches, channels, span, span), dtype=grad.dtype, device=grad.device)
    programs = ceil_div(num_patches, WIDER) * ceil_div(channels * span * span, BLOCK)
    sizes = (num_patches, height, width, rows, cols, *grad.shape[2:], *grad.stride(), channels)
    constants |= {"BLOCK": BLOCK, "WIDER": WIDER, "num_warps": BACKWARD_WARPS}
    launch(stitch_patches_backward_kernel, programs, grad, numbers, begin, weights, out, *sizes, **constants)
    return out


def unsupported_reasons(device: torch.device) -> list[str]:
    """Why these kernels cannot run on `device`."""
    return []


def variants() -> Iterator[Variant]:
    """The kernels as the launchers call them."""
    names = (*SIZES, "channels", "lines_count")
    strides = {f"grad_{axis}": "i32" for axis in "ncyx"}
    rest = {**dict.fromkeys(("places", "numbers", "begin"), "*i64"), "ends": "*i32", **dict.fromkeys(names, "i32"), **strides}

    def types(source: torch.dtype, target: torch.dtype) -> dict[str, str]:
        work = "*fp64" if source == torch.float64 else "*fp32"
        pointers = {name: f"*{NAMES[source]}" for name in ("patches", "grad")}
        return {**rest, **pointers, "out": f"*{NAMES[target]}", "weights": work}

    def forward(
        source: torch.dtype, target: torch.dtype, shuffle: int = 1, channels: int = 3, patch: int = 32, stride: int = 28
    ) -> Iterator[Variant]:
        shares = _shares(source, target, patch, stride, 4, shuffle)
        copy, blend = _programs(shares["PACK"], shares["PIECE"], patch, stride, 4)
        constants = {"CHANNELS": channels, **_constants(source, patch, stride, 4), "SHUFFLE": shuffle, **shares}
        options = {"num_warps": WARPS}
        yield Variant(stitch_patches_blend_kernel, types(source, target), {**constants, **blend}, options)
        del constants["PIECE"]
        yield Variant(stitch_patches_copy_kernel, types(source, target), {**constants, **copy}, options)

    for source in FLOATING:
        every = source == torch.float32
        for target in FLOATING + INTEGER_IMAGE if every else (source, torch.uint8):
            yield from forward(source, target)
        yield from forward(source, source, shuffle=4)
        yield from forward(source, torch.uint8, shuffle=4)
        constants = _constants(source, 32, 28, 4)
        backward, options = {**constants, "BLOCK": BLOCK, "WIDER": WIDER}, {"num_warps": BACKWARD_WARPS}
        yield Variant(stitch_patches_backward_kernel, types(source, source), backward, options)
        if every:
            without = {**backward, "numbers": None, "begin": None}
            yield Variant(stitch_patches_backward_kernel, types(source, source), without, options)
    yield from forward(torch.float16, torch.uint8, channels=64)
    yield from forward(torch.float16, torch.uint8, shuffle=3, patch=33, stride=30)
    yield from table_variants()
