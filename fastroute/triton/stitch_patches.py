"""stitch_patches: out[b, c, Y, X] = Σ_i wy[i, Y] · Σ_j wx[j, X] · patch(i, j)[c, Y - y_i, X - x_j], the sums over the tile
rows i and tile columns j that cover the pixel, columns first and products rounded on their own, as everywhere. One program
writes a block of pixels in all channels, of which images have few, so that where a pixel comes from is found out once; the
weights of both axes are normalised by a kernel before. A patch in a region is read where a table says, which another kernel
makes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastroute.grid import covered_size, tile_count
from fastroute.ops.stitch_patches import check_places, check_regions
from fastroute.triton._common import (
    FLOATING,
    INTEGER_IMAGE,
    INTERPRETED,
    NAMES,
    Variant,
    ceil_div,
    launch,
    product,
    to_pixel,
    to_work,
)
from fastroute.triton._geometry import first_covering, last_covering, origin
from fastroute.triton._stitch_backward import _stitch_patches_backward_triton as _stitch_patches_backward_triton
from fastroute.triton._stitch_backward import backward_variants
from fastroute.triton._stitch_tables import WARPS, axis_weights, constants_of, region_table, table_variants, weights_pointer

# Channels that a program of the forward kernel writes together, at most.
MOST_CHANNELS = 4


@triton.jit
def weighted(at, weight, known, WORK: tl.constexpr):
    """What lies at `at`, where it is `known`, times `weight`."""
    return tl.where(known, product(to_work(tl.load(at, mask=known, other=0), WORK), weight), 0)


# A thread has one pixel, so that alignment helps nothing; `out` may be a slice of rows, which begins anywhere.
@triton.jit(
    do_not_specialize=[
        "places", "height", "width", "rows", "cols", "row_begin", "out_height", "out_width", "patch_n", "patch_c", "patch_y",
        "out_n", "out_c", "out_y",
    ],
    do_not_specialize_on_alignment=["patches", "out"],
)  # fmt: skip
def stitch_patches_kernel(
    patches,  # [M, C·r·r, P / r, P / r]
    inverse,  # [N] or None
    table,  # [N, 3], where patches in regions begin and the strides there, or None
    weights,  # [rows + cols, P]
    out,  # [B, C, out_height, out_width]
    places,
    height,
    width,
    rows,
    cols,
    row_begin,
    out_height,
    out_width,
    groups,
    patch_n,
    patch_c,
    patch_y,
    patch_x,
    out_n,
    out_c,
    out_y,
    PATCH: tl.constexpr,
    STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    SHUFFLE: tl.constexpr,
    GROUP: tl.constexpr,
    WORK: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """One program writes `GROUP` channels, up to four, of one of `groups` groups. With a fused pixel shuffle of factor r, pixel
    (k, l) of channel c is element (k / r, l / r) of channel c·r² + (k mod r)·r + l mod r. A place out of range adds nothing: a
    GPU cannot raise without a wait."""
    SPAN: tl.constexpr = PATCH * SCALE
    program = tl.program_id(0)
    blocks_y, blocks_x = (out_height + BLOCK_Y - 1) // BLOCK_Y, (out_width + BLOCK_X - 1) // BLOCK_X
    plane = program // blocks_x // blocks_y
    image, c = (plane // groups).to(tl.int64), plane % groups * GROUP
    # One axis: of blocks of two the compiler would not see along which neighbours lie.
    BLOCK: tl.constexpr = BLOCK_Y * BLOCK_X
    line = (program // blocks_x % blocks_y) * BLOCK_Y + tl.arange(0, 1 if BLOCK_Y == 1 else BLOCK) // BLOCK_X
    x = (program % blocks_x) * BLOCK_X + tl.arange(0, BLOCK) % BLOCK_X
    y = line + row_begin
    inside = (line < out_height) & (x < out_width)
    first_y = first_covering(y // SCALE, rows, PATCH, STRIDE)
    last_y = last_covering(y // SCALE, rows, height, PATCH, STRIDE)
    first_x = first_covering(x // SCALE, cols, PATCH, STRIDE)
    last_x = last_covering(x // SCALE, cols, width, PATCH, STRIDE)
    total0 = tl.full((BLOCK,), 0, WORK)
    total1, total2, total3 = total0, total0, total0
    # Ends of the loops are the same for a whole block: steps in which no tile covers a pixel would take as long.
    for i in range(tl.min(first_y), tl.max(last_y) + 1):
        row = inside & (i >= first_y) & (i <= last_y)
        k = y - origin(i, height, PATCH, STRIDE) * SCALE
        strip0 = tl.full((BLOCK,), 0, WORK)
        strip1, strip2, strip3 = strip0, strip0, strip0
        for other in range(tl.max(last_x - first_x) + 1):
            j = first_x + other
            reads = row & (j <= last_x)
            column = x - origin(j, width, PATCH, STRIDE) * SCALE
            place = (image * rows + i) * cols + j
            if inverse is not None:
                place = tl.load(inverse + place, mask=reads, other=0)
            if table is not None:
                begin = tl.load(table + 3 * place, mask=reads, other=-1)
                step_c = tl.load(table + 3 * place + 1, mask=reads, other=0)
                step_y = tl.load(table + 3 * place + 2, mask=reads, other=0)
                known = reads & (begin >= 0)
            else:
                begin, step_c, step_y = place * patch_n, patch_c, patch_y
                known = reads & (place >= 0) & (place < places)
            channel = (c * SHUFFLE + k % SHUFFLE) * SHUFFLE + column % SHUFFLE
            within = (k // SHUFFLE).to(tl.int64) * step_y + (column // SHUFFLE).to(tl.int64) * patch_x
            at = patches + begin + channel.to(tl.int64) * step_c + within
            weight = tl.load(weights + (rows + j) * SPAN + column, mask=(x < out_width) & (j <= last_x), other=0)
            next_channel = step_c.to(tl.int64) * (SHUFFLE * SHUFFLE)
            strip0 += weighted(at, weight, known, WORK)
            if GROUP > 1:
                strip1 += weighted(at + next_channel, weight, known, WORK)
            if GROUP > 2:
                strip2 += weighted(at + 2 * next_channel, weight, known, WORK)
            if GROUP > 3:
                strip3 += weighted(at + 3 * next_channel, weight, known, WORK)
        weight = tl.load(weights + i * SPAN + k, mask=(line < out_height) & (i >= first_y) & (i <= last_y), other=0)
        total0 += tl.where(row, product(strip0, weight), 0)
        if GROUP > 1:
            total1 += tl.where(row, product(strip1, weight), 0)
        if GROUP > 2:
            total2 += tl.where(row, product(strip2, weight), 0)
        if GROUP > 3:
            total3 += tl.where(row, product(strip3, weight), 0)
    target = out + image * out_n + c.to(tl.int64) * out_c + line.to(tl.int64) * out_y + x
    step = out_c.to(tl.int64)
    tl.store(target, to_pixel(total0, out.dtype.element_ty), mask=inside)
    if GROUP > 1:
        tl.store(target + step, to_pixel(total1, out.dtype.element_ty), mask=inside)
    if GROUP > 2:
        tl.store(target + 2 * step, to_pixel(total2, out.dtype.element_ty), mask=inside)
    if GROUP > 3:
        tl.store(target + 3 * step, to_pixel(total3, out.dtype.element_ty), mask=inside)


def _block() -> dict[str, int]:
    """A program's block: on a device a run of one row, a pixel for each thread, so that neighbours read neighbouring pixels.

    With more of them the compiler would let a thread have neighbours, for the sake of what it writes, and as masks allow
    no access of several at once, all that a warp reads or writes at a time would lie apart.
    """
    return {"BLOCK_Y": 64, "BLOCK_X": 128} if INTERPRETED else {"BLOCK_Y": 1, "BLOCK_X": 32 * WARPS}


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
    geometry = (height, width, patch, stride, scale, crop, shuffle)
    _stitch(patches, inverse, None, patches.shape[0], patches.stride(), window, geometry, row_begin, out)


def _stitch(
    patches: Tensor,  # [M, C, P, P]
    inverse: Tensor | None,  # [N]
    table: Tensor | None,  # [N, 3]
    places: int,
    steps: tuple[int, ...],
    window: Tensor,  # [P]
    geometry: tuple[int, int, int, int, int, bool, int],
    row_begin: int,
    out: Tensor,  # [B, C, rows, W·s]
) -> None:
    """Patches one by one, their strides being `steps`; or by `table`, of whose pixels the last of `steps` is the stride."""
    height, width, patch, stride, scale, crop, shuffle = geometry
    rows, cols = tile_count(height, patch, stride, crop), tile_count(width, patch, stride, crop)
    constants = constants_of(patches.dtype, patch, stride, scale)
    weights = axis_weights(window, height, width, rows, cols, patch, stride, scale, crop)
    batch, channels, out_height, out_width = out.shape
    block = _block()
    # Images have one to four channels.
    group = channels if 0 < channels <= MOST_CHANNELS else 1
    programs = batch * channels // group * ceil_div(out_height, block["BLOCK_Y"]) * ceil_div(out_width, block["BLOCK_X"])
    pointers = (patches, inverse, table, weights, out)
    sizes = (places, height, width, rows, cols, row_begin, out_height, out_width, channels // group)
    constants |= {"SHUFFLE": shuffle, "GROUP": group, **block}
    launch(stitch_patches_kernel, programs, *pointers, *sizes, *steps, *out.stride()[:3], **constants, num_warps=WARPS)


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
    """Patches or regions in several tensors: put together first, as a kernel reads one."""
    grid = (height, width, patch, stride, scale, crop)
    if region is None or inverse is None:
        stitch_patches_out_triton(torch.cat(batches), inverse, window, *grid, shuffle, row_begin, row_end, out=out)
        return
    inverse, region = inverse.contiguous(), region.contiguous()
    check_regions(batches, inverse, region, grid, shuffle, row_begin, row_end)
    planar = batches[0].is_contiguous()
    flat = [(batch if planar else batch.permute(0, 2, 3, 1)).reshape(-1) for batch in batches]
    elements = flat[0] if len(flat) == 1 else torch.cat(flat)
    table = region_table(batches, inverse, region, planar, grid, shuffle)
    steps = (0, 0, 0, 1 if planar else batches[0].shape[1])
    _stitch(elements, None, table, 0, steps, window, (*grid, shuffle), row_begin, out)


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


def unsupported_reasons(device: torch.device) -> list[str]:
    """Why these kernels cannot run on `device`."""
    return []


def variants() -> Iterator[Variant]:
    """The kernels as the launchers call them."""
    names = ("places", "height", "width", "rows", "cols", "row_begin", "out_height", "out_width", "groups")
    sizes = dict.fromkeys((*names, "out_n", "out_c", "out_y"), "i32")
    rest = {**dict.fromkeys(("inverse", "table"), "*i64"), **sizes, **{f"patch_{axis}": "i32" for axis in "ncyx"}}

    def forward(
        source: torch.dtype, target: torch.dtype, shuffle: int = 1, missing: tuple = ("table",), group: int = 3
    ) -> Variant:
        block = {"SHUFFLE": shuffle, "GROUP": group, **_block(), **dict.fromkeys(missing)}
        pointers = {"patches": f"*{NAMES[source]}", "out": f"*{NAMES[target]}", "weights": weights_pointer(source)}
        constants = {**constants_of(source, 32, 28, 4), **block}
        return Variant(stitch_patches_kernel, {**rest, **pointers}, constants, {"num_warps": WARPS})

    for source in FLOATING:
        every = source == torch.float32
        yield from (forward(source, target) for target in (FLOATING + INTEGER_IMAGE if every else (source, torch.uint8)))
        yield forward(source, source, shuffle=4)
        yield forward(source, torch.uint8, shuffle=4, missing=("inverse", "table"))
        yield forward(source, source, missing=("inverse",))
        yield from (forward(source, source, group=group) for group in (1, 2, 4) if every)
        yield forward(source, torch.uint8, shuffle=4, missing=("inverse",))
    yield from backward_variants()
    yield from table_variants()
