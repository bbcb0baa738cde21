"""merge_regions: least(r) = min(cost of r as one region, sum of least(halves of r)) for every rectangle r of every block of
merge x merge tiles, from single tiles upwards; then every tile goes down from its block to the rectangle that runs whole.

A lane stands for a tile, a program for as many blocks as it has lanes for. Rectangles of one size, 2^y x 2^x tiles, are found
at a time and kept in memory, where the lanes of the next size read them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastroute.grid import tile_count
from fastroute.ops import _checks as check
from fastroute.ops.merge_regions import check_costs
from fastroute.reference.merge_regions import COLS, ROWS, WHOLE
from fastroute.triton._common import NAMES, WIDER, Variant, ceil_div, launch
from fastroute.triton._geometry import origin

# Tiles of one program, a thread each: those of one block of the largest size.
LANES = 64 * WIDER
WARPS = 64 // 32
ACT_WHOLE, ACT_ROWS, ACT_COLS = tl.constexpr(WHOLE), tl.constexpr(ROWS), tl.constexpr(COLS)


@triton.jit
def side_code(first, level, tiles, size, PATCH: tl.constexpr, STRIDE: tl.constexpr):
    """Code of the side of the stretch of 2^level tiles that begins with tile `first`: see fastroute.grid.region_sides."""
    held = tl.minimum(1 << level, tiles - first)
    fitting = (held > 1).to(tl.int32) + (held > 2).to(tl.int32) + (held > 4).to(tl.int32)
    whole = PATCH + ((1 << fitting) - 1) * STRIDE
    spanned = origin(first + held - 1, size, PATCH, STRIDE) + PATCH - origin(first, size, PATCH, STRIDE)
    return 2 * fitting + (spanned != whole).to(tl.int32)


@triton.jit
def stretch(level, index, MERGE: tl.constexpr):
    """Number of the stretch `index` of 2^level tiles among those of all levels of a block, the smallest first."""
    return 2 * MERGE - 2 * (MERGE >> level) + index


@triton.jit(do_not_specialize=["step", "classes", "height", "width", "rows", "cols", "down", "across", "blocks"])
def merge_regions_kernel(
    class_ids,  # [N]
    costs,  # [K, S]
    least,  # [blocks, rectangles]
    highest,  # [blocks, rectangles]
    lowest,  # [blocks, rectangles]
    acts,  # [blocks, rectangles]
    executed,  # [N]
    region,  # [N]
    group,  # [N]
    step,
    classes,
    height,
    width,
    rows,
    cols,
    down,
    across,
    blocks,
    PATCH: tl.constexpr,
    STRIDE: tl.constexpr,
    MERGE: tl.constexpr,
    LEVELS: tl.constexpr,
    PROMOTE: tl.constexpr,
    LANES: tl.constexpr,
):
    """A class out of range counts as the nearest class: a GPU cannot raise without a wait, but nothing outside is read."""
    TILES: tl.constexpr = MERGE * MERGE
    SIDE: tl.constexpr = 2 * MERGE - 1
    SHAPES: tl.constexpr = 4 * LEVELS * LEVELS
    lane = tl.arange(0, LANES)
    block = tl.program_id(0).to(tl.int64) * (LANES // TILES) + lane // TILES
    cell = lane % TILES
    image = block // across // down
    top = (block // across % down).to(tl.int32) * MERGE
    left = (block % across).to(tl.int32) * MERGE
    begin = block * (SIDE * SIDE)
    row, col = top + cell // MERGE, left + cell % MERGE
    inside = (block < blocks) & (row < rows) & (col < cols)
    n = (image * rows + row) * cols + col
    own = tl.load(class_ids + n * step, mask=inside, other=0).to(tl.int64)
    own = tl.minimum(tl.maximum(own, 0), classes - 1).to(tl.int32)
    for size in range(LEVELS * LEVELS):
        y, x = size // LEVELS, size % LEVELS
        i, j = cell >> (LEVELS - 1 - x), cell & ((MERGE >> x) - 1)
        mine = (block < blocks) & (i < (MERGE >> y))
        first_row, first_col = top + (i << y), left + (j << x)
        held = mine & (first_row < rows) & (first_col < cols)
        # Halves of the rows, and of the columns.
        upper = begin + stretch(tl.maximum(y - 1, 0), 2 * i, MERGE) * SIDE + stretch(x, j, MERGE)
        fore = begin + stretch(y, i, MERGE) * SIDE + stretch(tl.maximum(x - 1, 0), 2 * j, MERGE)
        one = tl.where(y > 0, upper, fore)
        two = one + tl.where(y > 0, SIDE, 1)
        joined = held & (size > 0)
        most = tl.maximum(tl.load(highest + one, mask=joined, other=0), tl.load(highest + two, mask=joined, other=0))
        fewest = tl.minimum(tl.load(lowest + one, mask=joined, other=0), tl.load(lowest + two, mask=joined, other=0))
        most, fewest = tl.where(size > 0, most, own), tl.where(size > 0, fewest, own)
        code = side_code(first_row, y, rows, height, PATCH, STRIDE) * (2 * LEVELS)
        code += side_code(first_col, x, cols, width, PATCH, STRIDE)
        cost = tl.load(costs + most.to(tl.int64) * SHAPES + code, mask=held, other=0)
        if not PROMOTE:
            cost = tl.where(most == fewest, cost, float("inf"))
        act = tl.full((LANES,), ACT_WHOLE, tl.int32)
        by_rows, by_cols = held & (y > 0), held & (x > 0)
        parts = tl.load(least + upper, mask=by_rows, other=0) + tl.load(least + upper + SIDE, mask=by_rows, other=0)
        cheaper = by_rows & (parts < cost)
        cost, act = tl.where(cheaper, parts, cost), tl.where(cheaper, ACT_ROWS, act)
        parts = tl.load(least + fore, mask=by_cols, other=0) + tl.load(least + fore + 1, mask=by_cols, other=0)
        cheaper = by_cols & (parts < cost)
        cost, act = tl.where(cheaper, parts, cost), tl.where(cheaper, ACT_COLS, act)
        here = begin + stretch(y, i, MERGE) * SIDE + stretch(x, j, MERGE)
        tl.store(least + here, tl.where(held, cost, 0), mask=mine)
        tl.store(highest + here, tl.where(held, most, -1), mask=mine)
        tl.store(lowest + here, tl.where(held, fewest, classes), mask=mine)
        tl.store(acts + here, act, mask=mine)
        # The next step reads what other threads of this program have written.
        tl.debug_barrier()
    y = tl.full((LANES,), LEVELS - 1, tl.int32)
    x = tl.full((LANES,), LEVELS - 1, tl.int32)
    for _ in range(2 * LEVELS - 2):
        here = begin + stretch(y, cell // MERGE >> y, MERGE) * SIDE + stretch(x, cell % MERGE >> x, MERGE)
        act = tl.load(acts + here, mask=inside, other=0)
        y -= (act == ACT_ROWS).to(tl.int32)
        x -= (act == ACT_COLS).to(tl.int32)
    here = begin + stretch(y, cell // MERGE >> y, MERGE) * SIDE + stretch(x, cell % MERGE >> x, MERGE)
    most = tl.load(highest + here, mask=inside, other=0).to(tl.int64)
    first_row, first_col = row >> y << y, col >> x << x
    first = (image * rows + first_row) * cols + first_col
    code = side_code(first_row, y, rows, height, PATCH, STRIDE) * (2 * LEVELS)
    code += side_code(first_col, x, cols, width, PATCH, STRIDE)
    tl.store(executed + n, most, mask=inside)
    tl.store(region + n, first, mask=inside)
    # The others come after all shapes of all classes.
    none = tl.full((LANES,), 0, tl.int64) + classes * SHAPES
    tl.store(group + n, tl.where(first == n, most * SHAPES + code, none), mask=inside)


def merge_regions_triton(
    class_ids: Tensor,  # [N]
    costs: Tensor,  # [K, S]
    height: int,
    width: int,
    patch: int,
    stride: int,
    crop: bool,
    merge: int,
    promote: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # [N] each
    """See :func:`fastroute.merge_regions`."""
    classes, device = costs.shape[0], class_ids.device
    check.in_range("merge_regions", "class_ids", class_ids, classes)
    check_costs(costs)
    rows, cols = tile_count(height, patch, stride, crop), tile_count(width, patch, stride, crop)
    down, across = ceil_div(rows, merge), ceil_div(cols, merge)
    blocks, rectangles = class_ids.shape[0] // (rows * cols) * down * across, (2 * merge - 1) ** 2
    least = torch.empty((blocks, rectangles), dtype=torch.float32, device=device)
    highest, lowest, acts = (torch.empty((blocks, rectangles), dtype=torch.int32, device=device) for _ in range(3))
    executed, region, group = (torch.empty(class_ids.shape, dtype=torch.int64, device=device) for _ in range(3))
    found = (least, highest, lowest, acts, executed, region, group)
    sizes = (class_ids.stride(0), classes, height, width, rows, cols, down, across, blocks)
    programs = ceil_div(blocks * merge**2, LANES)
    constants = _constants(patch, stride, merge, promote)
    launch(merge_regions_kernel, programs, class_ids, costs.contiguous(), *found, *sizes, **constants, num_warps=WARPS)
    return executed, region, group


def _constants(patch: int, stride: int, merge: int, promote: bool) -> dict:
    sizes = {"PATCH": patch, "STRIDE": stride, "MERGE": merge, "LEVELS": merge.bit_length()}
    return {**sizes, "PROMOTE": promote, "LANES": LANES}


def unsupported_reasons(device: torch.device) -> list[str]:
    """Why these kernels cannot run on `device`."""
    return []


def variants() -> Iterator[Variant]:
    """The kernel as the launcher calls it: all types of ids, all sizes of blocks."""
    sizes = dict.fromkeys(("step", "classes", "height", "width", "rows", "cols", "down", "across", "blocks"), "i32")
    scratch = {"least": "*fp32", **dict.fromkeys(("highest", "lowest", "acts"), "*i32")}
    rest = {"costs": "*fp32", **scratch, **dict.fromkeys(("executed", "region", "group"), "*i64"), **sizes}

    def variant(dtype: torch.dtype, merge: int, promote: bool) -> Variant:
        types = {"class_ids": f"*{NAMES[dtype]}", **rest}
        return Variant(merge_regions_kernel, types, _constants(32, 28, merge, promote), {"num_warps": WARPS})

    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        yield variant(dtype, 4, True)
    for merge in (1, 2, 4, 8):
        yield variant(torch.int64, merge, False)
