"""What `stitch_patches` and its adjoint know before they start: the weights of both axes, normalised over the tiles of a
pixel; which pixels a tile makes alone; and where in memory every patch lies. Tables in the memory of the device, made without a
wait."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastroute.grid import covered_size, tile_count
from fastroute.triton._common import INTERPRETED, NAMES, WIDER, Variant, ceil_div, launch, next_power, quotient
from fastroute.triton._geometry import first_covering, last_covering, max_cover, origin

# Entries of one program.
BLOCK = 128 * WIDER


@triton.jit(do_not_specialize=["height", "width", "rows", "cols", "length_y", "length_x", "cover"])
def stitch_patches_weights_kernel(
    window,  # [P]
    weights,  # [rows + cols, P]
    ends,  # [rows + cols, 2]
    height,
    width,
    rows,
    cols,
    length_y,
    length_x,
    cover,
    PATCH: tl.constexpr,
    STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDER: tl.constexpr,
):
    """Weights of every tile row and column, which sum to 1 over the tiles of a pixel; 0 outside the image. And the rows, or
    whole packs of columns, that the tile makes alone at a weight of 1: where one of them has another weight, none."""
    SPAN: tl.constexpr = PATCH * SCALE
    line = tl.program_id(0) * WIDER + tl.arange(0, WIDER)[:, None]
    is_row = line < rows
    tile = tl.where(is_row, line, line - rows)
    size, tiles = tl.where(is_row, height, width), tl.where(is_row, rows, cols)
    length, pack = tl.where(is_row, length_y, length_x), tl.where(is_row, 1, PACK)
    own = origin(tile, size, PATCH, STRIDE) * SCALE
    before = tl.where(tile > 0, (origin(tile - 1, size, PATCH, STRIDE) + PATCH) * SCALE, 0)
    after = tl.where(tile < tiles - 1, origin(tile + 1, size, PATCH, STRIDE) * SCALE, length)
    begin, end = (before + pack - 1) // pack * pack, after // pack * pack
    others = tl.full((WIDER, 1), 0, tl.int32)
    for first in range(0, SPAN, BLOCK):
        k = first + tl.arange(0, BLOCK)[None, :]
        at = own + k
        first_tile = first_covering(at // SCALE, tiles, PATCH, STRIDE)
        last_tile = last_covering(at // SCALE, tiles, size, PATCH, STRIDE)
        inside = (line < rows + cols) & (k < SPAN) & (at < length)
        weight = tl.load(window + k, mask=inside, other=1)
        total = tl.full((WIDER, BLOCK), 0, window.dtype.element_ty)
        for step in range(cover):
            i = first_tile + step
            total += tl.load(window + at - origin(i, size, PATCH, STRIDE) * SCALE, mask=inside & (i <= last_tile), other=0)
        # Where every window is 0, near an end of the axis, the tile at that end has the pixel alone.
        empty = inside & (total == 0)
        weight = tl.where(empty, (tile == tl.where(2 * at < length, 0, tiles - 1)).to(total.dtype), weight)
        total = tl.where(inside & (total != 0), total, 1)
        weight = tl.where(inside, quotient(weight, total), 0)
        tl.store(weights + line * SPAN + k, weight, mask=(line < rows + cols) & (k < SPAN))
        other = inside & (at >= begin) & (at < end) & ~(weight == 1)
        others = tl.maximum(others, tl.max(other.to(tl.int32), 1)[:, None])
    # Where nothing is alone, a tile cuts the axis where it begins.
    none = (others > 0) | (end <= begin)
    cut = tl.minimum((own + pack - 1) // pack * pack, length)
    tl.store(ends + 2 * line, tl.where(none, cut, begin), mask=line < rows + cols)
    tl.store(ends + 2 * line + 1, tl.where(none, cut, end), mask=line < rows + cols)


def axis_tables(
    window: Tensor,  # [P]
    height: int,
    width: int,
    rows: int,
    cols: int,
    patch: int,
    stride: int,
    scale: int,
    crop: bool,
    pack: int = 1,
) -> tuple[Tensor, Tensor]:  # [rows + cols, P], [rows + cols, 2]
    """Normalised weights of both axes, and where the pixels begin and end that a tile makes alone, in packs of columns."""
    span = patch * scale
    weights = torch.empty((rows + cols, span), dtype=window.dtype, device=window.device)
    ends = torch.empty((rows + cols, 2), dtype=torch.int32, device=window.device)
    sizes = [covered_size(size, patch, stride, crop) * scale for size in (height, width)]
    arguments = (window.contiguous(), weights, ends, height, width, rows, cols, *sizes, max_cover(patch, stride))
    programs, constants = ceil_div(rows + cols, WIDER), _axis_constants(patch, stride, scale, pack)
    launch(stitch_patches_weights_kernel, programs, *arguments, **constants)
    return weights, ends


def _axis_constants(patch: int, stride: int, scale: int, pack: int) -> dict[str, int]:
    block = min(next_power(patch * scale), 1024 if INTERPRETED else 256)
    return {"PATCH": patch, "STRIDE": stride, "SCALE": scale, "PACK": pack, "BLOCK": block, "WIDER": WIDER}


# Tensors that one launch is told of.
TOLD = 8
_TENSORS = [f"batch_{number}" for number in range(TOLD)]
_BEGINS = [f"begin_{number}" for number in range(TOLD)]
_STEPS = ["step_n", "step_c", "step_y", "step_x"]
_SIZES = ["number", "end", "total", *_STEPS, "held_y", "held_x", "height", "width", "rows", "cols"]


@triton.jit
def held_by(row, at, first, patches, batch, begin):
    """Where `batch` lies, in elements behind `patches`, and its first row, for rows from `begin` on; for others as before."""
    size: tl.constexpr = patches.dtype.element_ty.primitive_bitwidth // 8
    distance = (batch.to(tl.int64, bitcast=True) - patches.to(tl.int64, bitcast=True)) // size
    return tl.where(row >= begin, distance, at), tl.where(row >= begin, begin, first)


@triton.jit(do_not_specialize=[*_BEGINS, *_SIZES], do_not_specialize_on_alignment=["patches", *_TENSORS])
def stitch_patches_places_kernel(
    patches,  # [M, C·r·r, h / r, w / r], the first tensor of all
    batch_0,  # [M_i, C·r·r, h / r, w / r], alike but for their number of rows, as are the next
    batch_1,  # [M_i, C·r·r, h / r, w / r]
    batch_2,  # [M_i, C·r·r, h / r, w / r]
    batch_3,  # [M_i, C·r·r, h / r, w / r]
    batch_4,  # [M_i, C·r·r, h / r, w / r]
    batch_5,  # [M_i, C·r·r, h / r, w / r]
    batch_6,  # [M_i, C·r·r, h / r, w / r]
    batch_7,  # [M_i, C·r·r, h / r, w / r]
    inverse,  # [N] or None
    region,  # [N] or None
    places,  # [N, 3]
    begin_0,
    begin_1,
    begin_2,
    begin_3,
    begin_4,
    begin_5,
    begin_6,
    begin_7,
    number,
    end,
    total,
    step_n,
    step_c,
    step_y,
    step_x,
    held_y,
    held_x,
    height,
    width,
    rows,
    cols,
    PATCH: tl.constexpr,
    STRIDE: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For patches in rows that these tensors hold, up to row `end`: where each begins, in elements behind `patches`, and
    strides of channels and rows. A row out of range becomes the nearest, and a patch that its region does not hold is
    moved into it: a GPU cannot raise without a wait, but nothing outside is read."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = n
    if inverse is not None:
        row = tl.load(inverse + n, mask=n < number, other=0)
    row = tl.minimum(tl.maximum(row, 0), total - 1)
    held = (n < number) & (row >= begin_0) & (row < end)
    at, first = tl.full((BLOCK,), 0, tl.int64), tl.full((BLOCK,), 0, tl.int64)
    at, first = held_by(row, at, first, patches, batch_0, begin_0)
    at, first = held_by(row, at, first, patches, batch_1, begin_1)
    at, first = held_by(row, at, first, patches, batch_2, begin_2)
    at, first = held_by(row, at, first, patches, batch_3, begin_3)
    at, first = held_by(row, at, first, patches, batch_4, begin_4)
    at, first = held_by(row, at, first, patches, batch_5, begin_5)
    at, first = held_by(row, at, first, patches, batch_6, begin_6)
    at, first = held_by(row, at, first, patches, batch_7, begin_7)
    at += (row - first) * step_n
    if region is not None:
        corner = tl.load(region + n, mask=held, other=0)
        tiles = rows * cols
        tile = (n % tiles).to(tl.int32)
        corner = (tl.minimum(tl.maximum(corner, 0), number - 1) % tiles).to(tl.int32)
        y = (origin(tile // cols, height, PATCH, STRIDE) - origin(corner // cols, height, PATCH, STRIDE)) * FACTOR
        x = (origin(tile % cols, width, PATCH, STRIDE) - origin(corner % cols, width, PATCH, STRIDE)) * FACTOR
        y = tl.minimum(tl.maximum(y, 0), held_y - PATCH * FACTOR).to(tl.int64)
        x = tl.minimum(tl.maximum(x, 0), held_x - PATCH * FACTOR).to(tl.int64)
        at += y * step_y + x * step_x
    tl.store(places + 3 * n, at, mask=held)
    tl.store(places + 3 * n + 1, tl.full((BLOCK,), 0, tl.int64) + step_c, mask=held)
    tl.store(places + 3 * n + 2, tl.full((BLOCK,), 0, tl.int64) + step_y, mask=held)


def find_places(
    batches: list[Tensor],  # [M_i, C·r·r, h_i / r, w_i / r] each
    inverse: Tensor | None,  # [N]
    region: Tensor | None,  # [N]
    number: int,
    grid: tuple[int, int, int, int, int, bool],
    shuffle: int,
) -> tuple[Tensor, int]:  # [N, 3]
    """Where each of `number` patches begins, in elements of the first of `batches`, with strides of channels and rows; and the
    stride of a pixel."""
    height, width, patch, stride, scale, crop = grid
    rows, cols = tile_count(height, patch, stride, crop), tile_count(width, patch, stride, crop)
    patches, total = batches[0], sum(batch.shape[0] for batch in batches)
    places = torch.empty((number, 3), dtype=torch.int64, device=patches.device)
    factor = {"PATCH": patch, "STRIDE": stride, "FACTOR": scale // shuffle, "BLOCK": BLOCK}
    # Of dense regions, whatever an axis of one pixel says.
    step_x = patches.stride(3) if region is None else 1 if patches.is_contiguous() else patches.shape[1]
    end = 0
    for told in _alike(batches):
        _, channels, held_y, held_x = told[0].shape
        steps = told[0].stride()[:3]
        if region is not None:
            steps = (channels * held_y * held_x, held_y * held_x if step_x == 1 else 1, held_x * step_x)
        begins = []
        for batch in told:
            begins.append(end)
            end += batch.shape[0]
        spare = TOLD - len(told)
        pointers = (patches, *told, *told[-1:] * spare, inverse, region, places, *begins, *[end] * spare)
        sizes = (number, end, total, *steps, step_x, held_y, held_x, height, width, rows, cols)
        launch(stitch_patches_places_kernel, ceil_div(number, BLOCK), *pointers, *sizes, **factor)
    return places, step_x


def _alike(batches: list[Tensor]) -> Iterator[list[Tensor]]:  # [M_i, C·r·r, h_i / r, w_i / r] each
    """Neighbours of one shape and one step from row to row, as many as one launch is told of."""
    for _, group in groupby(batches, lambda batch: (*batch.shape[1:], batch.stride(0))):
        alike = list(group)
        for first in range(0, len(alike), TOLD):
            yield alike[first : first + TOLD]


def table_variants() -> Iterator[Variant]:
    """The kernels as they are called here; a region may have more than 2^31 elements."""
    sizes = dict.fromkeys((*_BEGINS, *_SIZES, "length_y", "length_x", "cover"), "i32")
    types = {**dict.fromkeys(("inverse", "region", "places"), "*i64"), "ends": "*i32", **sizes}
    for work in ("*fp32", "*fp64"):
        constants = _axis_constants(32, 28, 4, 16)
        yield Variant(stitch_patches_weights_kernel, {**types, "window": work, "weights": work}, constants)
    for dtype in (torch.float32, torch.float16, torch.float64):
        more = {**types, **dict.fromkeys(("patches", *_TENSORS), f"*{NAMES[dtype]}")}
        for missing in ((), ("region",), ("inverse", "region")):
            for steps in ("i32", "i64"):
                sizes_of = {"PATCH": 32, "STRIDE": 28, "FACTOR": 4, "BLOCK": BLOCK}
                given: dict[str, Any] = {**sizes_of, **dict.fromkeys(missing)}
                yield Variant(stitch_patches_places_kernel, {**more, "step_n": steps}, given)
