"""What `stitch_patches` and its adjoint know before they start: the weights of both axes, normalised over the tiles of a pixel,
and where patches lie that are read from regions. Tables in the memory of the device, made without a wait."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastroute.grid import covered_size, tile_count
from fastroute.triton._common import WIDER, Variant, ceil_div, launch, quotient, work_type
from fastroute.triton._geometry import first_covering, last_covering, max_cover, origin

# Entries of one program.
BLOCK = 128 * WIDER
# Warps of a program of `stitch_patches` and of its adjoint.
WARPS = 8


def constants_of(dtype: torch.dtype, patch: int, stride: int, scale: int) -> dict:
    """What is fixed when the kernels of `stitch_patches` and its adjoint are compiled."""
    return {"PATCH": patch, "STRIDE": stride, "SCALE": scale, "WORK": work_type(dtype)}


def weights_pointer(dtype: torch.dtype) -> str:
    """The type of the weights for patches of `dtype`, as Triton writes it."""
    return "*fp64" if dtype == torch.float64 else "*fp32"


@triton.jit(do_not_specialize=["height", "width", "rows", "cols", "length_y", "length_x", "cover"])
def stitch_patches_weights_kernel(
    window,  # [P]
    weights,  # [rows + cols, P]
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
    BLOCK: tl.constexpr,
):
    """Weights of every tile row and column, which sum to 1 over the tiles of a pixel; 0 outside the image."""
    SPAN: tl.constexpr = PATCH * SCALE
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    line, k = place // SPAN, place % SPAN
    is_row = line < rows
    tile = tl.where(is_row, line, line - rows)
    size, tiles = tl.where(is_row, height, width), tl.where(is_row, rows, cols)
    at = origin(tile, size, PATCH, STRIDE) * SCALE + k
    first = first_covering(at // SCALE, tiles, PATCH, STRIDE)
    last = last_covering(at // SCALE, tiles, size, PATCH, STRIDE)
    length = tl.where(is_row, length_y, length_x)
    inside = (line < rows + cols) & (at < length)
    weight = tl.load(window + k, mask=inside, other=1)
    total = tl.full((BLOCK,), 0, window.dtype.element_ty)
    for step in range(cover):
        i = first + step
        covers = inside & (i <= last)
        total += tl.load(window + at - origin(i, size, PATCH, STRIDE) * SCALE, mask=covers, other=0)
    # Where every window is 0, near an end of the axis, the tile at that end has the pixel alone.
    empty = inside & (total == 0)
    weight = tl.where(empty, (tile == tl.where(2 * at < length, 0, tiles - 1)).to(total.dtype), weight)
    total = tl.where(inside & (total != 0), total, 1)
    tl.store(weights + place, tl.where(inside, quotient(weight, total), 0), mask=line < rows + cols)


def axis_weights(
    window: Tensor, height: int, width: int, rows: int, cols: int, patch: int, stride: int, scale: int, crop: bool
) -> Tensor:  # [rows + cols, P]
    """Normalised weights of both axes."""
    span = patch * scale
    weights = torch.empty((rows + cols, span), dtype=window.dtype, device=window.device)
    sizes = [covered_size(size, patch, stride, crop) * scale for size in (height, width)]
    arguments = (window.contiguous(), weights, height, width, rows, cols, *sizes, max_cover(patch, stride))
    block = {"PATCH": patch, "STRIDE": stride, "SCALE": scale, "BLOCK": BLOCK}
    launch(stitch_patches_weights_kernel, ceil_div((rows + cols) * span, BLOCK), *arguments, **block)
    return weights


@triton.jit(
    do_not_specialize=["number", "first", "last", "base", "held_y", "held_x", "channels", "height", "width", "rows", "cols"]
)
def stitch_patches_regions_kernel(
    inverse,  # [N]
    region,  # [N]
    table,  # [N, 3]
    number,
    first,
    last,
    base,
    held_y,
    held_x,
    channels,
    height,
    width,
    rows,
    cols,
    PATCH: tl.constexpr,
    STRIDE: tl.constexpr,
    FACTOR: tl.constexpr,
    PLANAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For patches whose region is one of the rows [first, last), regions of held_y x held_x pixels that follow each other in
    memory from element `base` on: the element at which each begins, and strides of channels and rows. A patch that its region
    does not hold is moved into it, so that nothing outside is read."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(inverse + n, mask=n < number, other=-1)
    held = (n < number) & (place >= first) & (place < last)
    corner = tl.load(region + n, mask=held, other=0)
    tiles = rows * cols
    tile = (n % tiles).to(tl.int32)
    corner = (tl.minimum(tl.maximum(corner, 0), number - 1) % tiles).to(tl.int32)
    y = (origin(tile // cols, height, PATCH, STRIDE) - origin(corner // cols, height, PATCH, STRIDE)) * FACTOR
    x = (origin(tile % cols, width, PATCH, STRIDE) - origin(corner % cols, width, PATCH, STRIDE)) * FACTOR
    y = tl.minimum(tl.maximum(y, 0), held_y - PATCH * FACTOR).to(tl.int64)
    x = tl.minimum(tl.maximum(x, 0), held_x - PATCH * FACTOR).to(tl.int64)
    pixels = tl.full((BLOCK,), 0, tl.int64) + held_y.to(tl.int64) * held_x
    if PLANAR:
        step_c, step_y, step_x = pixels, held_x, 1
    else:
        step_c, step_y, step_x = 1, held_x * channels, channels
    at = base + (place - first) * pixels * channels + y * step_y + x * step_x
    tl.store(table + 3 * n, at, mask=held)
    tl.store(table + 3 * n + 1, step_c, mask=held)
    tl.store(table + 3 * n + 2, step_y, mask=held)


def region_table(
    batches: list[Tensor],  # [M_i, C·r·r, h_i / r, w_i / r] each
    inverse: Tensor,  # [N]
    region: Tensor,  # [N]
    planar: bool,
    grid: tuple[int, int, int, int, int, bool],
    shuffle: int,
) -> Tensor:  # [N, 3]
    """Where each patch begins in `batches` laid side by side, and strides of channels and rows; -1 where it lies nowhere."""
    height, width, patch, stride, scale, crop = grid
    rows, cols = tile_count(height, patch, stride, crop), tile_count(width, patch, stride, crop)
    number, channels = inverse.shape[0], batches[0].shape[1]
    table = torch.full((number, 3), -1, dtype=torch.int64, device=inverse.device)
    factor = {"PATCH": patch, "STRIDE": stride, "FACTOR": scale // shuffle, "PLANAR": planar, "BLOCK": BLOCK}
    first = begin = 0
    # Neighbours of one size are one tensor.
    for (held_y, held_x), alike in groupby(batches, lambda batch: batch.shape[2:]):
        last = first + sum(batch.shape[0] for batch in alike)
        sizes = (number, first, last, begin, held_y, held_x, channels, height, width, rows, cols)
        launch(stitch_patches_regions_kernel, ceil_div(number, BLOCK), inverse, region, table, *sizes, **factor)
        first, begin = last, begin + (last - first) * channels * held_y * held_x
    return table


def table_variants() -> Iterator[Variant]:
    """The kernels as they are called here; elements of regions are counted, of which there may be more than 2^31."""
    sizes = ("number", "first", "last", "held_y", "held_x", "channels", "height", "width", "rows", "cols")
    names = dict.fromkeys((*sizes, "length_y", "length_x", "cover"), "i32")
    types = {**dict.fromkeys(("inverse", "region", "table"), "*i64"), **names}
    constants = {"PATCH": 32, "STRIDE": 28, "BLOCK": BLOCK}
    for work in ("*fp32", "*fp64"):
        yield Variant(stitch_patches_weights_kernel, {**types, "window": work, "weights": work}, {**constants, "SCALE": 4})
    for planar in (False, True):
        for base in ("i32", "i64"):
            more = {**constants, "FACTOR": 4, "PLANAR": planar}
            yield Variant(stitch_patches_regions_kernel, {**types, "base": base}, more)
