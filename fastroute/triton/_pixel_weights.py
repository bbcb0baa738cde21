"""What is made of the weights of a class before its pixels are computed: packed layers and the hoisted first one."""

from __future__ import annotations

import triton
import triton.language as tl

from fastroute.triton._common import INTERPRETED, WIDER, to_work
from fastroute.triton._pixel_layers import multiply_add, round_operand, value_place, weight_place

# Features of which one program makes the hoisted product.
HOIST_ROWS = 64
# Numbers that the packing program moves at once.
PACK_BLOCK = 1024 * WIDER
# Programs that share a layer.
PACK_PARTS = 2 if INTERPRETED else 16


@triton.jit
def convert(value, dtype: tl.constexpr):
    """A loaded element in the type of the products: its own, or one that holds it."""
    return value if value.dtype == dtype else to_work(value, dtype)


@triton.constexpr_function
def layer_place(layer, widths, fan_in):
    """Where the weights of a layer begin among all weights; those of no layer end where the biases begin."""
    return sum(a * b for a, b in zip((fan_in, *widths), widths[:layer], strict=False))


@triton.constexpr_function
def bias_place(layer, widths, fan_in):
    """Where the bias of a layer begins behind all weights."""
    return sum(a * b for a, b in zip((fan_in, *widths), widths, strict=False)) + sum(widths[:layer])


@triton.jit
def pixel_pack_kernel(
    flat_ptr,  # all weights [F_out, F_in], first layer first, then all biases [F_out]
    packed_ptr,  # [padded out, padded in] of each further layer, one after the other
    values_ptr,  # [padded] slopes along y and x of the first layer, then the biases of each further one, float32
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The layers as `pixel_mlp_kernel` reads them, padded with zeros, in its types.

    Work mapping: PARTS programs write a layer, in turn BLOCK numbers each.
    """
    begin = tl.program_id(0) % PARTS * BLOCK
    for i in tl.static_range(len(WIDTHS)):
        if tl.program_id(0) // PARTS == i:
            if i == 0:
                for first in range(begin, PADDED[0], PARTS * BLOCK):
                    n = first + tl.arange(0, BLOCK)
                    for axis in tl.static_range(2):
                        slope = tl.load(flat_ptr + n * (D + 4) + D + axis, mask=n < WIDTHS[0], other=0.0)
                        tl.store(values_ptr + axis * PADDED[0] + n, to_work(slope, tl.float32), mask=n < PADDED[0])
            else:
                for first in range(begin, PADDED[i] * PADDED[i - 1], PARTS * BLOCK):
                    at = first + tl.arange(0, BLOCK)
                    n, k = at // PADDED[i - 1], at % PADDED[i - 1]
                    inside = (n < WIDTHS[i]) & (k < WIDTHS[i - 1])
                    weight = tl.load(flat_ptr + layer_place(i, WIDTHS, D + 4) + n * WIDTHS[i - 1] + k, mask=inside, other=0.0)
                    weight = round_operand(convert(weight, packed_ptr.dtype.element_ty), PRECISION)
                    tl.store(packed_ptr + weight_place(i, PADDED) + at, weight, mask=n < PADDED[i])
                for first in range(begin, PADDED[i], PARTS * BLOCK):
                    n = first + tl.arange(0, BLOCK)
                    bias = tl.load(flat_ptr + bias_place(i, WIDTHS, D + 4) + n, mask=n < WIDTHS[i], other=0.0)
                    tl.store(values_ptr + value_place(i, PADDED) + n, to_work(bias, tl.float32), mask=n < PADDED[i])


@triton.jit(do_not_specialize=["pixels", "lr_begin", "lr_rows", "h", "w", "height", "width"])
def pixel_hoist_kernel(
    features_ptr,  # [B, D, h, w]
    weight_ptr,  # [F, D + 4]
    bias_ptr,  # [F]
    hoisted_ptr,  # [B lr_rows w, STRIDE], float32
    pixels,
    lr_begin,
    lr_rows,
    h,
    w,
    height,
    width,
    stride_b,
    stride_d,
    stride_y,
    stride_x,
    D: tl.constexpr,
    OUT: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """hoisted = W[:, :D] · feature + (W[:, D + 2] · cell_y + W[:, D + 3] · cell_x + b), zero in the padding.

    Work mapping: one program per ROWS features and N units.
    """
    program = tl.program_id(0).to(tl.int64)
    across: tl.constexpr = (STRIDE + N - 1) // N
    pixel = program // across * ROWS + tl.arange(0, ROWS)
    inside = pixel < pixels
    row, x = pixel // w, pixel % w
    image, y = row // lr_rows, row % lr_rows + lr_begin
    feature = features_ptr + image * stride_b + y * stride_y + x * stride_x
    n = (program % across) * N + tl.arange(0, N)
    sums = tl.full((ROWS, N), 0, tl.float32)
    for first in range(0, D, K):
        d = first + tl.arange(0, K)
        at = feature[:, None] + d[None, :].to(tl.int64) * stride_d
        block = convert(tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0), TYPE)
        at = weight_ptr + n[:, None] * (D + 4) + d[None, :]
        weight = convert(tl.load(at, mask=(n < OUT)[:, None] & (d < D)[None, :], other=0.0), TYPE)
        sums = multiply_add(round_operand(block, PRECISION), round_operand(weight, PRECISION), sums, PRECISION)
    constant = to_work(tl.load(bias_ptr + n, mask=n < OUT, other=0.0), tl.float32)
    for axis in tl.static_range(2):
        small, large = (h, height) if axis == 0 else (w, width)
        cell = tl.full((1,), 2.0, tl.float64) * small / tl.full((1,), 1.0, tl.float64) / large
        column = tl.load(weight_ptr + n * (D + 4) + D + 2 + axis, mask=n < OUT, other=0.0)
        constant += to_work(column, tl.float32) * cell.to(tl.float32)
    sums = tl.where((n < OUT)[None, :], sums + constant[None, :], 0.0)
    tl.store(hoisted_ptr + pixel[:, None] * STRIDE + n[None, :], sums, mask=inside[:, None] & (n < STRIDE)[None, :])
