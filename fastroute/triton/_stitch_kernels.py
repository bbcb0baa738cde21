"""The kernels of `stitch_patches` that write an image, in cells. The rows and columns that a tile makes alone, at a weight
of 1, cut the image into rectangles: those of one tile are copied, the others blended. Lanes go through the packs of
neighbouring pixels of a cell row by row, and a program writes all channels of its packs."""

from __future__ import annotations

import triton
import triton.language as tl

from fastroute.triton._common import pixel_of, product, to_pixel, to_work
from fastroute.triton._geometry import first_covering, last_covering, origin

# What no kernel is compiled for: sizes differ from image to image, and whether packs begin where vectors do is found at run
# time.
SIZES = (
    "height",
    "width",
    "rows",
    "cols",
    "row_begin",
    "out_height",
    "out_width",
    "patch_x",
    "out_n",
    "out_c",
    "out_y",
    "odd",
)
ANYWHERE = ("patches", "out")


@triton.jit
def in_vectors(patches, out, out_n, out_c, out_y, odd, UNIT: tl.constexpr, PACK: tl.constexpr):
    """Whether packs of patches and of `out` begin where vectors do; 0 in `odd` says so of all sizes of the patches."""
    if PACK == 1:
        return False
    else:
        whole: tl.constexpr = min(UNIT * patches.dtype.element_ty.primitive_bitwidth // 8, 16)
        packs: tl.constexpr = PACK * out.dtype.element_ty.primitive_bitwidth // 8
        begins = patches.to(tl.int64, bitcast=True) % whole + out.to(tl.int64, bitcast=True) % packs
        return begins + out_n % PACK + out_c % PACK + out_y % PACK + odd == 0


# Numbers are rounded to multiples of what they are multiples of, where packs are whole vectors: so that the compiler knows.


@triton.jit
def rounded(number, unit: tl.constexpr, FAST: tl.constexpr):
    """`number`, which is a multiple of `unit` if `FAST`."""
    return number // unit * unit if FAST else number


@triton.jit
def pixels_at(
    patches,
    begin,
    step_c,
    step_y,
    step_x,
    c,  # [LANES, 1] or one
    k,  # [LANES, 1]
    column,  # [LANES, 1]
    CHANNELS: tl.constexpr,
    SHUFFLE: tl.constexpr,
    UNIT: tl.constexpr,
    N: tl.constexpr,
    FAST: tl.constexpr,
):
    """Addresses of N pixels of channel c of a patch, from (k, column) on. With a fused pixel shuffle of factor r, pixel
    (k, l) of channel c is element (k / r, l / r) of channel c·r² + (k mod r)·r + l mod r."""
    along = tl.arange(0, N)[None, :]
    base = patches + rounded(begin, UNIT, FAST)
    if FAST:
        size: tl.constexpr = patches.dtype.element_ty.primitive_bitwidth // 8
        base = tl.multiple_of(base, min(UNIT * size, 16))
    step_y = rounded(step_y, UNIT, FAST)
    row = (k // SHUFFLE).to(tl.int64) * step_y
    if SHUFFLE == 1:
        row += c * step_c
        if FAST:
            return base + (row + column) + along
        else:
            return base + (row + column.to(tl.int64) * step_x) + along
    elif FAST:
        # The values of an LR pixel lie side by side.
        across: tl.constexpr = CHANNELS * SHUFFLE * SHUFFLE
        pixel = row + (column // SHUFFLE).to(tl.int64) * across + (c * SHUFFLE + k % SHUFFLE) * SHUFFLE
        return base + pixel + (along // SHUFFLE * across + along % SHUFFLE)
    else:
        value = (c * SHUFFLE + k % SHUFFLE) * SHUFFLE + column % SHUFFLE
        return base + (row + (column // SHUFFLE).to(tl.int64) * step_x + value * step_c) + along


@triton.jit
def first_packs(first, across, LANES: tl.constexpr):
    """Rows, of `across` packs each, and packs in them of the lanes that begin at pack `first`."""
    at = first + tl.arange(0, LANES)[:, None]
    line = at // across
    return line, at - line * across


@triton.jit
def next_packs(line, pack, across, step):
    """The rows and packs `step` packs on, without a division in each lane."""
    lines = step // across
    pack += step - lines * across
    wraps = pack >= across
    return line + lines + wraps.to(tl.int32), tl.where(wraps, pack - across, pack)


@triton.jit
def copy_cell(
    patches,
    begin,
    step_c,
    step_y,
    step_x,
    first_k,
    first_l,
    across,
    total,
    out,
    out_c,
    out_y,
    part,
    CHANNELS: tl.constexpr,
    SHUFFLE: tl.constexpr,
    UNIT: tl.constexpr,
    N: tl.constexpr,
    WORK: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    FAST: tl.constexpr,
):
    """Pixels of a patch from (first_k, first_l) on, `total` packs in rows of `across`, to `out`."""
    along = tl.arange(0, N)[None, :]
    first_l = rounded(first_l, UNIT, FAST)
    out_c, out_y = rounded(out_c, N, FAST), rounded(out_y, N, FAST)
    if SHUFFLE == 1:
        step_c = rounded(step_c, UNIT, FAST)
    elif FAST:
        step_c = 1
    line, pack = first_packs(part * LANES, across, LANES)
    for _ in range(part * LANES, total, PARTS * LANES):
        inside = line < total // across
        # Lanes too many read the first row again: a mask would clear registers.
        k, column = first_k + tl.where(inside, line, 0), pack * N
        source = pixels_at(patches, begin, step_c, step_y, step_x, 0, k, first_l + column, CHANNELS, SHUFFLE, UNIT, N, FAST)
        target = out + (line.to(tl.int64) * out_y + column) + along
        if CHANNELS <= 4:
            for c in tl.static_range(CHANNELS):
                pixel = tl.load(source + c * SHUFFLE * SHUFFLE * step_c)
                tl.store(target + c * out_c, pixel_of(pixel, WORK, out.dtype.element_ty), mask=inside)
        else:
            for c in range(CHANNELS):
                pixel = tl.load(source + c * (SHUFFLE * SHUFFLE * step_c))
                tl.store(target + c * out_c, pixel_of(pixel, WORK, out.dtype.element_ty), mask=inside)
        line, pack = next_packs(line, pack, across, PARTS * LANES)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ANYWHERE)
def stitch_patches_copy_kernel(
    patches,  # [M, C·r·r, P / r, P / r]
    places,  # [N, 3]
    ends,  # [rows + cols, 2]
    out,  # [B, C, out_height, out_width]
    height,
    width,
    rows,
    cols,
    row_begin,
    out_height,
    out_width,
    patch_x,
    out_n,
    out_c,
    out_y,
    odd,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    SHUFFLE: tl.constexpr,
    WORK: tl.constexpr,
    UNIT: tl.constexpr,
    PACK: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """What a tile makes alone; `PARTS` programs share a tile."""
    tile = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    j, i = tile % cols, tile // cols % rows
    y0 = tl.maximum(tl.load(ends + 2 * i), row_begin)
    y1 = tl.minimum(tl.load(ends + 2 * i + 1), row_begin + out_height)
    x0, x1 = tl.load(ends + 2 * (rows + j)), tl.load(ends + 2 * (rows + j) + 1)
    lines = tl.maximum(y1 - y0, 0)
    if lines * (x1 - x0) > 0:
        begin = tl.load(places + 3 * tile)
        step_c, step_y = tl.load(places + 3 * tile + 1), tl.load(places + 3 * tile + 2)
        k = y0 - origin(i, height, PATCH, STRIDE) * SCALE
        first_l = x0 - origin(j, width, PATCH, STRIDE) * SCALE
        image = (tile // cols // rows).to(tl.int64) * out_n
        row = (y0 - row_begin).to(tl.int64) * out_y
        if in_vectors(patches, out, out_n, out_c, out_y, odd, UNIT, PACK):
            first = out + (rounded(image, PACK, True) + rounded(row, PACK, True) + rounded(x0, PACK, True))
            size: tl.constexpr = out.dtype.element_ty.primitive_bitwidth // 8
            first = tl.multiple_of(first, min(PACK * size, 16))
            across = (x1 - x0) // PACK
            copy_cell(
                patches, begin, step_c, step_y, patch_x, k, first_l, across, lines * across, first, out_c, out_y, part,
                CHANNELS, SHUFFLE, UNIT, PACK, WORK, LANES, PARTS, True,
            )  # fmt: skip
        else:
            across = x1 - x0
            copy_cell(
                patches, begin, step_c, step_y, patch_x, k, first_l, across, lines * across, out + image + row + x0, out_c,
                out_y, part, CHANNELS, SHUFFLE, UNIT, 1, WORK, LANES, PARTS, False,
            )  # fmt: skip


@triton.jit
def blend_cell(
    patches,
    places,
    weights,
    first_tile,
    height,
    width,
    rows,
    cols,
    step_x,
    y0,
    y1,
    x0,
    x1,
    out,
    out_c,
    out_y,
    part,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    SHUFFLE: tl.constexpr,
    UNIT: tl.constexpr,
    N: tl.constexpr,
    WORK: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    FAST: tl.constexpr,
):
    """Pixels of rows [y0, y1) and columns [x0, x1), to `out`, which begins with the first; tiles of the image begin at place
    `first_tile`."""
    SPAN: tl.constexpr = PATCH * SCALE
    along = tl.arange(0, N)[None, :]
    out_c, out_y = rounded(out_c, N, FAST), rounded(out_y, N, FAST)
    first_i = first_covering(y0 // SCALE, rows, PATCH, STRIDE)
    last_i = last_covering((y1 - 1) // SCALE, rows, height, PATCH, STRIDE)
    first_j = first_covering(x0 // SCALE, cols, PATCH, STRIDE)
    last_j = last_covering((x1 - 1) // SCALE, cols, width, PATCH, STRIDE)
    across, lines = (x1 - x0) // N, y1 - y0
    # Rows of one channel after those of another.
    line, pack = first_packs(part * LANES, across, LANES)
    for _ in range(part * LANES, CHANNELS * lines * across, PARTS * LANES):
        inside = line < CHANNELS * lines
        c = tl.where(inside, line // lines, 0)
        y, column = tl.where(inside, line - c * lines, 0), pack * N
        total = tl.full((LANES, N), 0, WORK)
        for i in range(first_i, last_i + 1):
            k = y0 + y - origin(i, height, PATCH, STRIDE) * SCALE
            row = (k >= 0) & (k < SPAN)
            strip = tl.full((LANES, N), 0, WORK)
            for j in range(first_j, last_j + 1):
                tile = first_tile + i * cols + j
                begin = tl.load(places + 3 * tile)
                step_c, step_y = tl.load(places + 3 * tile + 1), tl.load(places + 3 * tile + 2)
                if SHUFFLE == 1:
                    step_c = rounded(step_c, UNIT, FAST)
                elif FAST:
                    step_c = 1
                at = rounded(x0 - origin(j, width, PATCH, STRIDE) * SCALE, N, FAST) + column
                reads = row & (at >= 0) & (at < SPAN)
                source = pixels_at(patches, begin, step_c, step_y, step_x, c, k, at, CHANNELS, SHUFFLE, UNIT, N, FAST)
                pixel = tl.load(source, mask=reads, other=0)
                weight = tl.load(weights + ((rows + j) * SPAN + at) + along, mask=reads, other=0)
                strip += tl.where(reads, product(to_work(pixel, WORK), weight), 0)
            weight = tl.load(weights + (i * SPAN + k), mask=row, other=0)
            total += tl.where(row, product(strip, weight), 0)
        target = out + (c.to(tl.int64) * out_c + y.to(tl.int64) * out_y + column) + along
        tl.store(target, to_pixel(total, out.dtype.element_ty), mask=inside)
        line, pack = next_packs(line, pack, across, PARTS * LANES)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ANYWHERE)
def stitch_patches_blend_kernel(
    patches,  # [M, C·r·r, P / r, P / r]
    places,  # [N, 3]
    ends,  # [rows + cols, 2]
    weights,  # [rows + cols, P]
    out,  # [B, C, out_height, out_width]
    height,
    width,
    rows,
    cols,
    row_begin,
    out_height,
    out_width,
    patch_x,
    out_n,
    out_c,
    out_y,
    odd,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    SHUFFLE: tl.constexpr,
    WORK: tl.constexpr,
    UNIT: tl.constexpr,
    PACK: tl.constexpr,
    PIECE: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """What lies beside and between: segment s of an axis, from entry s - 1 of `ends` to entry s, is that of one tile if s is
    odd. `PARTS` programs share a cell. `WIDE` cells between rows of tiles are one from end to end."""
    part = tl.program_id(0) % PARTS
    cell = tl.program_id(0) // PARTS
    beside = rows * (cols + 1)
    across = 1 if WIDE else 2 * cols + 1
    cells = beside + (rows + 1) * across
    image = (cell // cells).to(tl.int64)
    cell = cell % cells
    if cell < beside:
        down, right = cell // (cols + 1) * 2 + 1, cell % (cols + 1) * 2
    else:
        down, right = (cell - beside) // across * 2, (cell - beside) % across
    y0 = tl.maximum(tl.load(ends + down - 1, mask=down > 0, other=0), row_begin)
    y1 = tl.load(ends + down, mask=down < 2 * rows, other=row_begin + out_height)
    y1 = tl.minimum(y1, row_begin + out_height)
    x0 = tl.load(ends + 2 * rows + right - 1, mask=right > 0, other=0)
    x1 = tl.load(ends + 2 * rows + right, mask=right < 2 * cols, other=out_width)
    if WIDE:
        x0, x1 = tl.where(down % 2 == 1, x0, 0), tl.where(down % 2 == 1, x1, out_width)
    if (y1 > y0) & (x1 > x0):
        first = out + (image * out_n + (y0 - row_begin).to(tl.int64) * out_y + x0)
        first_tile = image * rows * cols
        fast = in_vectors(patches, out, out_n, out_c, out_y, odd, UNIT, PACK)
        if fast & ((x1 - x0) % PIECE == 0):
            size: tl.constexpr = out.dtype.element_ty.primitive_bitwidth // 8
            blend_cell(
                patches, places, weights, first_tile, height, width, rows, cols, patch_x, y0, y1, x0, x1,
                tl.multiple_of(first, PIECE * size), out_c, out_y, part, CHANNELS, PATCH, STRIDE, SCALE, SHUFFLE, UNIT, PIECE,
                WORK, LANES, PARTS, True,
            )  # fmt: skip
        else:
            blend_cell(
                patches, places, weights, first_tile, height, width, rows, cols, patch_x, y0, y1, x0, x1,
                first, out_c, out_y, part, CHANNELS, PATCH, STRIDE, SCALE, SHUFFLE, UNIT, 1, WORK, LANES, PARTS, False,
            )  # fmt: skip
