"""extract_patches: out[m, c, k, l] = (image[b, c, y0 + k, x0 + l] / maximum - mean[c]) / std[c] for the patch order[m] of
image b at (y0, x0). One program writes a run of one patch, in the order of the output's memory; sizes of a patch are
constants, so that the division of a place into c, k and l costs little. Those of a region are not: there are many."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastroute.grid import tile_count
from fastroute.ops import _checks as check
from fastroute.triton._common import (
    FLOATING,
    INTEGER_IMAGE,
    INTERPRETED,
    NAMES,
    WIDER,
    Variant,
    ceil_div,
    launch,
    next_power,
    quotient,
    to_type,
    to_work,
    work_type,
)
from fastroute.triton._geometry import first_covering, last_covering, origin

# Bytes of one program's output: 16 for each of 128 threads, twice.
BLOCK_BYTES = 4096
# Warps of a program of the gradient: with more, float32 spills on Ampere.
BACKWARD_WARPS = 4


# Pixels are read one by one, since the edge may repeat: what aligns rows of an image would only make more kernels.
@triton.jit(
    do_not_specialize=[
        "patches", "numbers", "height", "width", "rows", "cols", "down", "across", "image_n", "image_c", "image_y"
    ],
    do_not_specialize_on_alignment=["image"],
)  # fmt: skip
def extract_patches_kernel(
    image,  # [B, C, H, W]
    order,  # [M] or None
    mean,  # [C] or None
    std,  # [C] or None
    out,  # [M, C, down, across], contiguous or channels_last
    patches,
    numbers,
    height,
    width,
    rows,
    cols,
    down,
    across,
    image_n,
    image_c,
    image_y,
    image_x,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    STRIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    MAXIMUM: tl.constexpr,
    WORK: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDER: tl.constexpr,
):
    """Patches, where `down` and `across` are None, or regions of that size. A patch number that is out of range gives zeros: a
    GPU cannot raise without a wait, but nothing outside is read."""
    if down is None:
        ROWS: tl.constexpr = PATCH
        COLS: tl.constexpr = PATCH
        SIZE: tl.constexpr = CHANNELS * PATCH * PATCH
        PIECES: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    else:
        ROWS, COLS = down, across
        SIZE = CHANNELS * down * across
        PIECES = (SIZE + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    m = (program // PIECES).to(tl.int64) * WIDER + tl.arange(0, WIDER)[:, None]
    place = (program % PIECES) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (m < patches) & (place < SIZE)
    if CHANNELS_LAST:
        c, k, column = place % CHANNELS, place // (CHANNELS * COLS), place // CHANNELS % COLS
    else:
        c, k, column = place // (ROWS * COLS), place // COLS % ROWS, place % COLS
    number = m
    if order is not None:
        number = tl.load(order + m, mask=m < patches, other=0)
    known = inside & (number >= 0) & (number < numbers)
    tiles = rows * cols
    tile = (number % tiles).to(tl.int32)
    y = tl.minimum(origin(tile // cols, height, PATCH, STRIDE) + k, height - 1)
    x = tl.minimum(origin(tile % cols, width, PATCH, STRIDE) + column, width - 1)
    source = number // tiles * image_n + c.to(tl.int64) * image_c + y.to(tl.int64) * image_y + x.to(tl.int64) * image_x
    pixel = tl.load(image + source, mask=known, other=0)
    target = out.dtype.element_ty
    if MAXIMUM == 0 and mean is None and std is None and image.dtype.element_ty == target:
        value = pixel
    else:
        number = to_work(pixel, WORK)
        if MAXIMUM != 0:
            number = quotient(number, tl.full((), MAXIMUM, WORK))
        if mean is not None:
            number = number - to_work(tl.load(mean + c, mask=place < SIZE, other=0.0), WORK)
        if std is not None:
            number = quotient(number, to_work(tl.load(std + c, mask=place < SIZE, other=1.0), WORK))
        value = to_type(number, target)
    tl.store(out + m * SIZE + place, value, mask=inside)


def extract_patches_triton(
    image: Tensor,  # [B, C, H, W]
    order: Tensor | None,  # [M]
    mean: Tensor | None,  # [C]
    std: Tensor | None,  # [C]
    patch: int,
    stride: int,
    crop: bool,
    dtype: torch.dtype | None,
    channels_last: bool,
    rows: int,
    cols: int,
) -> Tensor:  # [M, C, rows, cols]
    """See :func:`fastroute.extract_patches`."""
    batch, channels, height, width = image.shape
    tile_rows, tile_cols = tile_count(height, patch, stride, crop), tile_count(width, patch, stride, crop)
    numbers = batch * tile_rows * tile_cols
    if order is not None:
        check.in_range("extract_patches", "order", order, numbers)
        order = order.contiguous()
    patches = numbers if order is None else order.shape[0]
    target = dtype or image.dtype
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((patches, channels, rows, cols), dtype=target, device=image.device, memory_format=memory_format)
    constants = _constants(image.dtype, target, channels, patch, stride, channels_last, mean is None and std is None)
    mean, std = (None if t is None else t.contiguous() for t in (mean, std))
    programs = ceil_div(patches, WIDER) * ceil_div(channels * rows * cols, constants["BLOCK"])
    extent = (None, None) if rows == cols == patch else (rows, cols)
    sizes = (patches, numbers, height, width, tile_rows, tile_cols, *extent)
    launch(extract_patches_kernel, programs, image, order, mean, std, out, *sizes, *image.stride(), **constants)
    return out


def _constants(
    source: torch.dtype, target: torch.dtype, channels: int, patch: int, stride: int, channels_last: bool, plain: bool
) -> dict:
    maximum = {torch.uint8: 255.0, torch.uint16: 65535.0}.get(source, 0.0)
    return {
        "CHANNELS": channels,
        "PATCH": patch,
        "STRIDE": stride,
        "CHANNELS_LAST": channels_last,
        # 0: nothing to divide by, pixels are copied or are floats already.
        "MAXIMUM": 0.0 if plain and source == target else maximum,
        "WORK": work_type(source, target),
        "BLOCK": min(BLOCK_BYTES // target.itemsize, next_power(channels * patch * patch)),
        "WIDER": WIDER,
    }


@triton.jit(
    do_not_specialize=[
        "batch", "height", "width", "rows", "cols", "repeat_y", "repeat_x", "grad_n", "grad_c", "grad_y"
    ],
    do_not_specialize_on_alignment=["grad"],
)  # fmt: skip
def extract_patches_backward_kernel(
    grad,  # [M, C, p, p]
    lines,  # [M] rows of grad by patch number, or None
    begin,  # [N + 1] where the rows of a patch begin in `lines`, or None
    out,  # [B, C, H, W]
    batch,
    height,
    width,
    rows,
    cols,
    repeat_y,
    repeat_x,
    grad_n,
    grad_c,
    grad_y,
    grad_x,
    channels,
    PATCH: tl.constexpr,
    STRIDE: tl.constexpr,
    WORK: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """The adjoint: image pixel (y, x) sums the gradients of all patch pixels that read it, tile rows before tile columns
    before repeated patches, each in its order. One program writes a block of one channel. `repeat_y` patch rows at most
    read one image row: more than one only where patches reach out of the image, and then its last row.

    On a device a block is a run of one row, a pixel for each thread, so that neighbours read neighbouring pixels. It has one
    axis: of blocks of two the compiler would not see along which neighbours lie."""
    BLOCK: tl.constexpr = BLOCK_Y * BLOCK_X
    program = tl.program_id(0)
    blocks_y, blocks_x = (height + BLOCK_Y - 1) // BLOCK_Y, (width + BLOCK_X - 1) // BLOCK_X
    plane = (program // blocks_x // blocks_y).to(tl.int64)
    image, c = program // blocks_x // blocks_y // channels, program // blocks_x // blocks_y % channels
    image, c = image.to(tl.int64), c.to(tl.int64)
    y = (program // blocks_x % blocks_y) * BLOCK_Y + tl.arange(0, 1 if BLOCK_Y == 1 else BLOCK) // BLOCK_X
    x = (program % blocks_x) * BLOCK_X + tl.arange(0, BLOCK) % BLOCK_X
    first_y, last_y = first_covering(y, rows, PATCH, STRIDE), last_covering(y, rows, height, PATCH, STRIDE)
    first_x, last_x = first_covering(x, cols, PATCH, STRIDE), last_covering(x, cols, width, PATCH, STRIDE)
    inside = (y < height) & (x < width)
    total = tl.full((BLOCK,), 0, WORK)
    # Ends of the loops are the same for a whole block: steps in which no tile covers a pixel would take as long.
    lowest = tl.min(first_y)
    for step in range((tl.max(last_y) + 1 - lowest) * repeat_y):
        i = lowest + step // repeat_y
        k = y - origin(i, height, PATCH, STRIDE) + step % repeat_y
        row = inside & (i >= first_y) & (i <= last_y) & (k < PATCH) & ((step % repeat_y == 0) | (y == height - 1))
        for other in range((tl.max(last_x - first_x) + 1) * repeat_x):
            j = first_x + other // repeat_x
            column = x - origin(j, width, PATCH, STRIDE) + other % repeat_x
            reads = row & (j <= last_x) & (column < PATCH) & ((other % repeat_x == 0) | (x == width - 1))
            tile = (image * rows + i) * cols + j
            at = c * grad_c + k.to(tl.int64) * grad_y + column.to(tl.int64) * grad_x
            if lines is None:
                value = tl.load(grad + tile * grad_n + at, mask=reads, other=0)
                total += tl.where(reads, to_work(value, WORK), 0)
            else:
                start = tl.load(begin + tile, mask=reads, other=0)
                count = tl.load(begin + tile + 1, mask=reads, other=0) - start
                for repeat in range(tl.max(count)):
                    more = reads & (repeat < count)
                    m = tl.load(lines + start + repeat, mask=more, other=0)
                    value = tl.load(grad + m * grad_n + at, mask=more, other=0)
                    total += tl.where(more, to_work(value, WORK), 0)
    target = (plane * height + y) * width + x
    tl.store(out + target, to_type(total, out.dtype.element_ty), mask=inside)


def _extract_patches_backward_triton(
    grad: Tensor,  # [M, C, p, p]
    order: Tensor | None,  # [M]
    batch: int,
    height: int,
    width: int,
    patch: int,
    stride: int,
    crop: bool,
) -> Tensor:  # [B, C, H, W]
    """The adjoint of :func:`fastroute.extract_patches`."""
    channels = grad.shape[1]
    rows, cols = tile_count(height, patch, stride, crop), tile_count(width, patch, stride, crop)
    lines = begin = None
    if order is not None:
        check.in_range("extract_patches", "order", order, batch * rows * cols)
        numbers, lines = torch.sort(order, stable=True)
        bounds = torch.arange(batch * rows * cols + 1, device=order.device)
        begin = torch.searchsorted(numbers, bounds)
    out = torch.empty((batch, channels, height, width), dtype=grad.dtype, device=grad.device)
    constants = _backward_constants(grad.dtype, patch, stride)
    programs = batch * channels * ceil_div(height, constants["BLOCK_Y"]) * ceil_div(width, constants["BLOCK_X"])
    sizes = (batch, height, width, rows, cols, torch.sym_max(patch - height, 0) + 1, torch.sym_max(patch - width, 0) + 1)
    pointers, strides = (grad, lines, begin, out), (*grad.stride(), channels)
    launch(extract_patches_backward_kernel, programs, *pointers, *sizes, *strides, **constants, num_warps=BACKWARD_WARPS)
    return out


def _backward_constants(dtype: torch.dtype, patch: int, stride: int) -> dict:
    block = (64, 128) if INTERPRETED else (1, 32 * BACKWARD_WARPS)
    return {"PATCH": patch, "STRIDE": stride, "WORK": work_type(dtype), "BLOCK_Y": block[0], "BLOCK_X": block[1]}


def unsupported_reasons(device: torch.device) -> list[str]:
    """Why these kernels cannot run on `device`."""
    return []


def variants() -> Iterator[Variant]:
    """The kernels as the launchers call them: all types to half and double, all layouts and statistics of one pair."""
    names = ("patches", "numbers", "height", "width", "rows", "cols", "down", "across", "channels")
    sizes = dict.fromkeys(names, "i32")
    strides = {f"{name}_{axis}": "i32" for name in ("image", "grad") for axis in "ncyx"}
    rest = {"order": "*i64", "mean": "*fp32", "std": "*fp32", **sizes, **strides}

    patches = ("down", "across")

    def forward(
        source: torch.dtype,
        target: torch.dtype,
        last: bool = False,
        missing: tuple = (),
        patch: int = 32,
        extent: tuple = patches,
    ) -> Variant:
        plain = "mean" in missing and "std" in missing
        constants = _constants(source, target, 3, patch, patch - 4, last, plain) | dict.fromkeys((*missing, *extent))
        return Variant(extract_patches_kernel, {"image": f"*{NAMES[source]}", "out": f"*{NAMES[target]}", **rest}, constants)

    for source in FLOATING + INTEGER_IMAGE:
        yield forward(source, source, missing=("mean", "std"))
        yield from (forward(source, target) for target in (torch.float16, torch.float64))
    yield from (forward(torch.float32, target) for target in (torch.float32, torch.bfloat16))
    for last in (False, True):
        for missing in ((), ("order",), ("mean",), ("std",), ("order", "mean", "std")):
            yield forward(torch.uint8, torch.float16, last, missing, patch=30)
        for source in FLOATING:
            yield forward(source, source, last, missing=("mean", "std"), extent=())
        yield forward(torch.uint8, torch.float16, last, extent=())
    extra = {
        "batch": "i32",
        "repeat_y": "i32",
        "repeat_x": "i32",
        "lines": "*i64",
        "begin": "*i64",
        **sizes,
        **strides,
    }
    for dtype in FLOATING:
        for left_out in ((), ("lines", "begin")):
            constants = _backward_constants(dtype, 32, 28) | dict.fromkeys(left_out)
            types = {"grad": f"*{NAMES[dtype]}", "out": f"*{NAMES[dtype]}", **extra}
            yield Variant(extract_patches_backward_kernel, types, constants, {"num_warps": BACKWARD_WARPS})
