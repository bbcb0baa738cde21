"""The persistent kernels of `pixel_mlp`, one launch per class."""

from __future__ import annotations

import triton
import triton.language as tl

from fastroute.triton._pixel_layers import (
    activate,
    first_layer,
    first_piece,
    load_layer,
    next_layer,
    tile_count,
    tile_pixels,
    value_place,
    weight_place,
    wide_piece,
    write_piece,
)

# Channels that are written at once: the residual's addresses take many registers.
OUT_PIECE = tl.constexpr(16)
# Nothing gains from these numbers. Nor from the alignment of the residual, a slice of rows perhaps, read pixel by pixel.
UNSPECIALISED = ["first", "last", "row_entries", "entries", "width", "residual_c", "plane"]


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=["residual_ptr"])
def pixel_mlp_kernel(
    hoisted_ptr,  # [B lr_rows w, padded] float32
    packed_ptr,  # weights, as pixel_pack_kernel writes them
    values_ptr,  # slopes and biases, likewise
    feature_ptr,  # [B rows + W], as all tables of pixel_axis_kernel
    relative_ptr,
    target_ptr,
    source_ptr,  # [2, B rows + W]
    blend_ptr,
    list_ptr,  # [B rows W], or None: all pixels
    ends_ptr,  # [(K + 1) blocks]
    residual_ptr,  # [B, C, h, w], or None
    out_ptr,  # [B, C, rows, W]
    first,
    last,
    row_entries,
    entries,
    width,
    residual_c,
    plane,
    PADDED: tl.constexpr,
    OUT_PADDED: tl.constexpr,
    PIECE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
    RESIDENT: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = residual + W_n relu(... relu(hoisted + W_1[:, D] · rel_y + W_1[:, D + 1] · rel_x) ...) + b_n for one class.

    Work mapping: a persistent program takes every n-th tile of BLOCK pixels of its class, whose number it reads from
    ends[first - 1] and ends[last - 1]. All activations of a tile stay on the chip. The PADDED[layer] units of a
    layer are cut into pieces of PIECE and the rest, a power of two too; so 74 units cost 64 + 16 and not 128.
    """
    DEPTH: tl.constexpr = len(PADDED)
    layers = ()
    for i in tl.static_range(1, DEPTH):
        blocks = ()
        if RESIDENT:
            blocks = load_layer(
                packed_ptr + weight_place(i, PADDED), PADDED[i], PADDED[i - 1], OUT_PIECE if i == DEPTH - 1 else PIECE, PIECE
            )
        layers = layers + (blocks,)  # type: ignore[assignment]  # noqa: RUF005

    begin, end, tiles = tile_count(ends_ptr, first, last, row_entries, width, BLOCK)
    tile = tl.program_id(0)
    while tile < tiles:
        row, x, inside = tile_pixels(list_ptr, tile, begin, end, width, BLOCK, SHIFT)
        column = x + row_entries
        sums = ()
        if DEPTH > 0:
            feature = tl.load(feature_ptr + row) + tl.load(feature_ptr + column)
            rel_y, rel_x = tl.load(relative_ptr + row), tl.load(relative_ptr + column)
            sums = first_layer(hoisted_ptr, values_ptr, feature, rel_y, rel_x, PADDED[0], OUT_PIECE if DEPTH == 1 else PIECE)
            for i in tl.static_range(1, DEPTH):
                weight_ptr, bias_ptr = packed_ptr + weight_place(i, PADDED), values_ptr + value_place(i, PADDED)
                sums = next_layer(
                    sums, layers[i - 1], weight_ptr, bias_ptr, PADDED[i], PADDED[i - 1],
                    OUT_PIECE if i == DEPTH - 1 else PIECE, PIECE, BLOCK, TYPE, PRECISION,
                )  # fmt: skip
        else:
            for _ in tl.static_range(OUT_PADDED // OUT_PIECE):
                sums = sums + (tl.full((BLOCK, OUT_PIECE), 0, tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
        for j in tl.static_range(OUT_PADDED // OUT_PIECE):
            write_piece(
                sums[j], out_ptr, target_ptr, residual_ptr, source_ptr, blend_ptr, row, column, inside, entries, residual_c,
                plane, j * OUT_PIECE, CHANNELS, OUT_PIECE, BLOCK,
            )  # fmt: skip
        tile += tl.num_programs(0)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=["residual_ptr"])
def pixel_mlp_wide_kernel(
    hoisted_ptr,  # [B lr_rows w, padded] float32
    packed_ptr,  # weights, as pixel_pack_kernel writes them
    values_ptr,  # slopes and biases, likewise
    feature_ptr,  # [B rows + W], as all tables of pixel_axis_kernel
    relative_ptr,
    target_ptr,
    source_ptr,  # [2, B rows + W]
    blend_ptr,
    list_ptr,  # [B rows W], or None: all pixels
    ends_ptr,  # [(K + 1) blocks]
    residual_ptr,  # [B, C, h, w], or None
    out_ptr,  # [B, C, rows, W]
    scratch_ptr,  # [programs, 2, BLOCK, WIDEST]
    first,
    last,
    row_entries,
    entries,
    width,
    residual_c,
    plane,
    PADDED: tl.constexpr,
    OUT_PADDED: tl.constexpr,
    PIECE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEST: tl.constexpr,
    STEP: tl.constexpr,
):
    """What `pixel_mlp_kernel` computes, for layers whose activations are too many for registers.

    Work mapping: as there, but the activations of a tile lie in memory that the program keeps for itself, small enough for
    the caches: a layer reads one half of it, STEP units at a time, and writes the other, PIECE units at a time.
    """
    DEPTH: tl.constexpr = len(PADDED)
    scratch_ptr += tl.program_id(0).to(tl.int64) * (2 * BLOCK * WIDEST) + (tl.arange(0, BLOCK) * WIDEST)[:, None]
    begin, end, tiles = tile_count(ends_ptr, first, last, row_entries, width, BLOCK)
    tile = tl.program_id(0)
    while tile < tiles:
        row, x, inside = tile_pixels(list_ptr, tile, begin, end, width, BLOCK, SHIFT)
        column = x + row_entries
        feature = tl.load(feature_ptr + row) + tl.load(feature_ptr + column)
        rel_y, rel_x = tl.load(relative_ptr + row), tl.load(relative_ptr + column)
        for at in range(0, PADDED[0], PIECE):
            piece = first_piece(hoisted_ptr, values_ptr, feature, rel_y, rel_x, at, PADDED[0], PIECE)
            tl.store(scratch_ptr + at + tl.arange(0, PIECE)[None, :], activate(piece, TYPE, PRECISION))
        for i in tl.static_range(1, DEPTH - 1):
            tl.debug_barrier()
            weight_ptr, bias_ptr = packed_ptr + weight_place(i, PADDED), values_ptr + value_place(i, PADDED)
            source, to = scratch_ptr + (i - 1) % 2 * BLOCK * WIDEST, scratch_ptr + i % 2 * BLOCK * WIDEST
            for at in range(0, PADDED[i], PIECE):
                piece = wide_piece(source, weight_ptr, bias_ptr, at, PADDED[i - 1], PIECE, STEP, BLOCK, PRECISION)
                tl.store(to + at + tl.arange(0, PIECE)[None, :], activate(piece, TYPE, PRECISION))
        tl.debug_barrier()
        weight_ptr, bias_ptr = packed_ptr + weight_place(DEPTH - 1, PADDED), values_ptr + value_place(DEPTH - 1, PADDED)
        source = scratch_ptr + (DEPTH - 2) % 2 * BLOCK * WIDEST
        for j in tl.static_range(OUT_PADDED // OUT_PIECE):
            result = wide_piece(
                source, weight_ptr, bias_ptr, j * OUT_PIECE, PADDED[DEPTH - 2], OUT_PIECE, STEP, BLOCK,
                PRECISION,
            )  # fmt: skip
            write_piece(
                result, out_ptr, target_ptr, residual_ptr, source_ptr, blend_ptr, row, column, inside, entries, residual_c,
                plane, j * OUT_PIECE, CHANNELS, OUT_PIECE, BLOCK,
            )  # fmt: skip
        # The next tile overwrites what this one has still to read.
        tl.debug_barrier()
        tile += tl.num_programs(0)
