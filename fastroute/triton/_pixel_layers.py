"""The layers of one tile of pixels: in pieces that stay in registers, or one piece after the other through memory."""

from __future__ import annotations

import triton
import triton.language as tl

from fastroute.triton._common import INTERPRETED, to_type, to_work


@triton.constexpr_function
def piece_count(padded, piece):
    """Pieces of a layer of `padded` units."""
    return -(-padded // piece)


@triton.constexpr_function
def piece_size(number, padded, piece):
    """Units of a piece: all are whole but the last."""
    return min(piece, padded - number * piece)


@triton.constexpr_function
def weight_place(layer, padded):
    """Where the packed weights of a layer begin; layer 0 has none."""
    return sum(a * b for a, b in zip(padded[:layer], padded[1:layer], strict=False))  # noqa: RUF007


@triton.constexpr_function
def value_place(layer, padded):
    """Where the packed biases of a layer begin, behind the slopes along y and x of the first one."""
    return 2 * padded[0] + sum(padded[1:layer])


@triton.jit
def load_block(packed_ptr, first_n, first_k, STRIDE: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """[N, K] of packed weights: N units from first_n and K inputs from first_k."""
    n = first_n + tl.arange(0, N)[:, None]
    k = first_k + tl.arange(0, K)[None, :]
    return tl.load(packed_ptr + n * STRIDE + k)


@triton.jit
def load_layer(packed_ptr, PADDED_OUT: tl.constexpr, PADDED_IN: tl.constexpr, PIECE_OUT: tl.constexpr, PIECE: tl.constexpr):
    """All blocks of a layer, block [n][k] from the inputs of piece k to the units of piece n."""
    blocks = ()
    for n in tl.static_range(piece_count(PADDED_OUT, PIECE_OUT)):
        row = ()
        for k in tl.static_range(piece_count(PADDED_IN, PIECE)):
            block = load_block(
                packed_ptr, n * PIECE_OUT, k * PIECE, PADDED_IN,
                piece_size(n, PADDED_OUT, PIECE_OUT), piece_size(k, PADDED_IN, PIECE),
            )  # fmt: skip
            row = row + (block,)  # type: ignore[assignment]  # noqa: RUF005
        blocks = blocks + (row,)  # type: ignore[assignment]  # noqa: RUF005
    return blocks


@triton.jit
def multiply_add(x, weight, sums, PRECISION: tl.constexpr):  # [M, K], [N, K], [M, N]
    """sums + x · weightᵀ, summed in float32."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        # The interpreter has no products of this type; those of float32 are the same.
        return tl.dot(to_work(x, tl.float32), tl.trans(to_work(weight, tl.float32)), sums)
    else:
        return tl.dot(x, tl.trans(weight), sums, input_precision=PRECISION)


@triton.jit
def round_operand(x, PRECISION: tl.constexpr):
    """A number of a product. As TF32 it is rounded to nearest, ties away from zero: the product would cut its last bits off."""
    if PRECISION != "tf32":
        return x
    else:
        bits = (x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def activate(x, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """ReLU, then the type of the products; NaN stays NaN.

    One instruction per pair of half floats. It says that it has effects, although it has none: else the compiler computes
    the first layer once more for each layout in which a product reads it, which takes more registers than there are.
    """
    if INTERPRETED:
        return round_operand(to_type(tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL), TYPE), PRECISION)
    elif TYPE == tl.float16:  # noqa: SIM300
        return tl.inline_asm_elementwise("cvt.rn.relu.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], tl.float16, False, 2)
    elif TYPE == tl.bfloat16:  # noqa: SIM300
        return tl.inline_asm_elementwise("cvt.rn.relu.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], tl.bfloat16, False, 2)
    else:
        x = tl.inline_asm_elementwise("max.NaN.f32 $0, $1, 0f00000000;", "=f,f", [x], tl.float32, False, 1)
        return round_operand(x, PRECISION)


@triton.jit
def first_piece(hoisted_ptr, slope_ptr, feature, rel_y, rel_x, at, PADDED: tl.constexpr, SIZE: tl.constexpr):
    """SIZE units from `at` of the first layer's sums: what the feature gives, what the row and the column add."""
    n = at + tl.arange(0, SIZE)
    piece = tl.load(hoisted_ptr + (feature * PADDED)[:, None] + n[None, :])
    piece += tl.load(slope_ptr + n)[None, :] * rel_y[:, None]
    return piece + tl.load(slope_ptr + PADDED + n)[None, :] * rel_x[:, None]


@triton.jit
def first_layer(hoisted_ptr, slope_ptr, feature, rel_y, rel_x, PADDED: tl.constexpr, PIECE: tl.constexpr):
    """All pieces of the first layer's sums."""
    sums = ()
    for j in tl.static_range(piece_count(PADDED, PIECE)):
        piece = first_piece(
            hoisted_ptr, slope_ptr, feature, rel_y, rel_x, j * PIECE, PADDED, piece_size(j, PADDED, PIECE)
        )  # fmt: skip
        sums = sums + (piece,)  # type: ignore[assignment]  # noqa: RUF005
    return sums


@triton.jit
def wide_piece(
    source,  # [BLOCK, 1] pointers to rows of activations
    weight_ptr,
    bias_ptr,
    at,
    PADDED_IN: tl.constexpr,
    SIZE: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """SIZE units from `at` of the next layer's sums."""
    sums = tl.full((BLOCK, SIZE), 0, tl.float32) + tl.load(bias_ptr + at + tl.arange(0, SIZE))[None, :]
    for k in range(0, PADDED_IN, STEP):
        x = tl.load(source + k + tl.arange(0, STEP)[None, :])
        block = load_block(weight_ptr, at, k, PADDED_IN, SIZE, STEP)
        sums = multiply_add(x, block, sums, PRECISION)
    return sums


@triton.jit
def next_layer(
    sums,
    blocks,
    packed_ptr,
    bias_ptr,
    PADDED_OUT: tl.constexpr,
    PADDED_IN: tl.constexpr,
    PIECE_OUT: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W relu(sums) + b in pieces; `blocks` are those of W, or empty: they are then read from memory one by one."""
    inputs = ()
    for k in tl.static_range(piece_count(PADDED_IN, PIECE)):
        inputs = inputs + (activate(sums[k], TYPE, PRECISION),)  # type: ignore[assignment]  # noqa: RUF005
    results = ()
    for j in tl.static_range(piece_count(PADDED_OUT, PIECE_OUT)):
        bias = tl.load(bias_ptr + j * PIECE_OUT + tl.arange(0, piece_size(j, PADDED_OUT, PIECE_OUT)))
        piece = tl.full((BLOCK, piece_size(j, PADDED_OUT, PIECE_OUT)), 0, tl.float32) + bias[None, :]
        for k in tl.static_range(piece_count(PADDED_IN, PIECE)):
            if len(blocks) > 0:
                block = blocks[j][k]
            else:
                block = load_block(
                    packed_ptr, j * PIECE_OUT, k * PIECE, PADDED_IN,
                    piece_size(j, PADDED_OUT, PIECE_OUT), piece_size(k, PADDED_IN, PIECE),
                )  # fmt: skip
            piece = multiply_add(inputs[k], block, piece, PRECISION)
        results = results + (piece,)  # type: ignore[assignment]  # noqa: RUF005
    return results


@triton.jit
def narrow(x, BLOCK: tl.constexpr):  # [BLOCK, 16] -> [BLOCK, 4]
    """The first 4 columns."""
    x, _ = tl.split(tl.permute(tl.reshape(x, (BLOCK, 2, 8)), (0, 2, 1)))
    x, _ = tl.split(tl.permute(tl.reshape(x, (BLOCK, 2, 4)), (0, 2, 1)))
    return x


@triton.jit
def bilinear(residual_ptr, source_ptr, blend_ptr, row, column, entries, c, inside):
    """The four pixels of the channels at offsets `c` around each place, blended along y, then along x."""
    blend_y, blend_x = tl.load(blend_ptr + row)[:, None], tl.load(blend_ptr + column)[:, None]
    top, bottom = tl.load(source_ptr + row), tl.load(source_ptr + entries + row)
    left, right = tl.load(source_ptr + column), tl.load(source_ptr + entries + column)
    a = to_work(tl.load(residual_ptr + (top + left)[:, None] + c[None, :], mask=inside[None, :], other=0.0), tl.float32)
    b = to_work(tl.load(residual_ptr + (bottom + left)[:, None] + c[None, :], mask=inside[None, :], other=0.0), tl.float32)
    a = a * (1 - blend_y) + b * blend_y
    b = to_work(tl.load(residual_ptr + (top + right)[:, None] + c[None, :], mask=inside[None, :], other=0.0), tl.float32)
    d = to_work(tl.load(residual_ptr + (bottom + right)[:, None] + c[None, :], mask=inside[None, :], other=0.0), tl.float32)
    return a * (1 - blend_x) + (b * (1 - blend_y) + d * blend_y) * blend_x


@triton.jit
def write_piece(
    result,
    out_ptr,
    target_ptr,
    residual_ptr,
    source_ptr,
    blend_ptr,
    row,
    column,
    inside,
    entries,
    residual_c,
    plane,
    first_c,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The last layer's sums of SIZE channels from `first_c` plus the residual, rounded once."""
    if CHANNELS <= 4 and SIZE == 16:
        result = narrow(result, BLOCK)
        c = tl.arange(0, 4)
    else:
        c = first_c + tl.arange(0, SIZE)
    known = c < CHANNELS
    c = c.to(tl.int64)
    if residual_ptr is not None:
        result += bilinear(residual_ptr, source_ptr, blend_ptr, row, column, entries, c * residual_c, known)
    to = out_ptr + (tl.load(target_ptr + row) + tl.load(target_ptr + column))[:, None] + (c * plane)[None, :]
    tl.store(to, to_type(result, out_ptr.dtype.element_ty), mask=inside[:, None] & known[None, :])


@triton.jit
def tile_count(ends_ptr, first, last, row_entries, width, BLOCK: tl.constexpr):
    """Where the pixels of the class begin and end, and their tiles; without a list, tiles of all rows."""
    if ends_ptr is not None:
        begin = tl.load(ends_ptr + first - 1, mask=first > 0, other=0)
        end = tl.load(ends_ptr + last - 1)
        tiles = (end - begin + BLOCK - 1) // BLOCK
    else:
        begin = tl.full((), 0, tl.int64)
        end = begin
        tiles = row_entries * ((width + BLOCK - 1) // BLOCK)
    return begin, end, tiles


@triton.jit
def tile_pixels(list_ptr, tile, begin, end, width, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    """Row and column of the pixels of a tile, and which of them to write: places behind the last one repeat it."""
    if list_ptr is not None:
        place = begin + tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < end
        entry = tl.load(list_ptr + tl.minimum(place, end - 1))
        row = entry >> SHIFT
        x = entry & ((1 << SHIFT) - 1)
    else:
        across = (width + BLOCK - 1) // BLOCK
        x = (tile % across) * BLOCK + tl.arange(0, BLOCK)
        inside = x < width
        x = tl.minimum(x, width - 1)
        row = tile // across + tl.full((BLOCK,), 0, tl.int32)
    return row, x, inside
