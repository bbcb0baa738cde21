"""What the pixel kernels read beside the network: tables of the two axes and the pixels sorted by class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastroute.triton._common import WIDER, ceil_div, launch

AXIS_BLOCK = 256 * WIDER
# Pixels that one program sorts, and its warps.
GROUP_BLOCK, GROUP_WARPS = 2048 * WIDER, 8
# A listed pixel is row << shift | column: of 32 bits where both fit into 16, else of 64.
NARROW, WIDE = 16, 32
# Of the kernels that sort. A class map may be a slice of rows, of any alignment.
UNSPECIALISED = ["classes", "pixels", "rows", "width", "row_begin", "map_b", "map_y", "map_x"]


@triton.jit(
    do_not_specialize=[
        "h", "w", "height", "width", "row_begin", "lr_begin", "rows", "lr_rows", "batch", "channels", "residual_b",
        "residual_y", "residual_x",
    ]
)  # fmt: skip
def pixel_axis_kernel(
    given_ptr,  # [H + W] float32, or None: exact coordinates
    feature_ptr,  # [B rows + W] int64
    relative_ptr,  # [B rows + W] float32
    target_ptr,  # [B rows + W] int64
    source_ptr,  # [2, B rows + W] int64
    blend_ptr,  # [B rows + W] float32
    h,
    w,
    height,
    width,
    row_begin,
    lr_begin,
    rows,
    lr_rows,
    batch,
    channels,
    residual_b,
    residual_y,
    residual_x,
    BLOCK: tl.constexpr,
):
    """All that depends on the row of a pixel alone, for the rows of every image, then all that depends on its column alone.

    feature   the row's first hoisted feature; what the column adds to it
    relative  ((2y + 1) · h - (2i + 1) · H) / H for feature i, the numerator an exact integer; or what is given, which also
              decides between feature i and the two beside it
    target    offset of the row in the output; what the column adds to it
    source    offsets of the two residual pixels, blend the weight of the second one

    Work mapping: one program per BLOCK entries.
    """
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row_entries = batch.to(tl.int64) * rows
    entries = row_entries + width
    mask = entry < entries
    is_row = entry < row_entries
    image, y = entry // rows, entry % rows
    at = tl.where(is_row, row_begin + y, entry - row_entries)
    size = tl.where(is_row, h, w).to(tl.int64)
    out = tl.where(is_row, height, width).to(tl.int64)

    doubled = (2 * at + 1) * size
    nearest = doubled // (2 * out)
    # Half way between two features the even one is read.
    nearest -= ((doubled % (2 * out) == 0) & (nearest % 2 == 1)).to(tl.int64)
    relative = (doubled - (2 * nearest + 1) * out).to(tl.float64) / out.to(tl.float64)
    if given_ptr is not None:
        given = tl.load(given_ptr + tl.where(is_row, at, height + at), mask=mask, other=0.0).to(tl.float64)
        nearest += (relative - given > 1.0).to(tl.int64) - (relative - given < -1.0).to(tl.int64)
        nearest = tl.minimum(tl.maximum(nearest, 0), size - 1)
        relative = given
    feature = tl.where(is_row, (image * lr_rows + nearest - lr_begin) * w, nearest)
    target = tl.where(is_row, (image * channels * rows + y) * width, at)
    tl.store(feature_ptr + entry, feature, mask=mask)
    tl.store(relative_ptr + entry, relative.to(tl.float32), mask=mask)
    tl.store(target_ptr + entry, target, mask=mask)

    place = tl.minimum(tl.maximum(doubled - out, 0), 2 * out * (size - 1))
    first = place // (2 * out)
    second = tl.minimum(first + 1, size - 1)
    blend = (place % (2 * out)).to(tl.float64) / (2 * out).to(tl.float64)
    base = tl.where(is_row, image * residual_b, 0)
    stride = tl.where(is_row, residual_y, residual_x).to(tl.int64)
    tl.store(source_ptr + entry, base + first * stride, mask=mask)
    tl.store(source_ptr + entries + entry, base + second * stride, mask=mask)
    tl.store(blend_ptr + entry, blend.to(tl.float32), mask=mask)


@triton.jit
def read_classes(class_map_ptr, pixel, classes, pixels, rows, width, row_begin, map_b, map_y, map_x):
    """Class of each pixel, counted through the rows of all images, as int32; `classes` where it is out of range, -1 behind
    the last pixel. Also its row of all rows and its column."""
    row, x = pixel // width, pixel % width
    image, y = row // rows, row % rows + row_begin
    at = image * map_b + y * map_y + x * map_x
    known = tl.load(class_map_ptr + at, mask=pixel < pixels, other=0).to(tl.int64)
    known = tl.where((known >= 0) & (known < classes), known, classes)
    return tl.where(pixel < pixels, known, -1).to(tl.int32), row, x


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=["class_map_ptr"])
def pixel_count_kernel(
    class_map_ptr,  # [B, H, W]
    counts_ptr,  # [K + 1, blocks] int64
    classes,
    pixels,
    rows,
    width,
    row_begin,
    map_b,
    map_y,
    map_x,
    BLOCK: tl.constexpr,
):
    """counts[k, block] = pixels of class k in a block of BLOCK pixels; class K holds those out of range.

    Work mapping: one program per block.
    """
    block = tl.program_id(0)
    pixel = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    known, _, _ = read_classes(class_map_ptr, pixel, classes, pixels, rows, width, row_begin, map_b, map_y, map_x)
    to = counts_ptr + block
    k = 0
    while k <= classes:
        tl.store(to, tl.sum((known == k).to(tl.int32), axis=0))
        to += tl.num_programs(0)
        k += 1


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=["class_map_ptr"])
def pixel_list_kernel(
    class_map_ptr,  # [B, H, W]
    ends_ptr,  # [K + 1, blocks] int64
    list_ptr,  # [B rows W] int32 or int64
    classes,
    pixels,
    rows,
    width,
    row_begin,
    map_b,
    map_y,
    map_x,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """list[ends[k, block] - count + rank] = row << SHIFT | column of the pixels of class k, in their order.

    Work mapping: one program per block of BLOCK pixels; `ends` are the running sums of the counts.
    """
    block = tl.program_id(0)
    pixel = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    known, row, x = read_classes(class_map_ptr, pixel, classes, pixels, rows, width, row_begin, map_b, map_y, map_x)
    entry = ((row << SHIFT) | x).to(list_ptr.dtype.element_ty)
    end = ends_ptr + block
    k = 0
    while k <= classes:
        here = known == k
        rank = tl.cumsum(here.to(tl.int32), axis=0) - tl.sum(here.to(tl.int32), axis=0)
        tl.store(list_ptr + tl.load(end) + rank - 1, entry, mask=here)
        end += tl.num_programs(0)
        k += 1


@dataclass(frozen=True)
class AxisTables:
    """What :func:`pixel_axis_kernel` writes."""

    feature: Tensor  # [B rows + W] int64
    relative: Tensor  # [B rows + W]
    target: Tensor  # [B rows + W] int64
    source: Tensor  # [2, B rows + W] int64
    blend: Tensor  # [B rows + W]


@dataclass(frozen=True)
class PixelList:
    """Pixels in the order of their classes, and where each block of each class ends."""

    pixels: Tensor  # [B rows W]
    ends: Tensor  # [(K + 1) blocks] int64
    blocks: int
    shift: int


def nearest(at: int, size: int, out: int) -> int:
    """The feature that output pixel `at` reads, as in the kernel."""
    doubled = (2 * at + 1) * size
    index = doubled // (2 * out)
    return index - 1 if doubled % (2 * out) == 0 and index % 2 == 1 else index


def axis_tables(
    shape: tuple[int, int, int, int],  # B, C, H, W
    small: tuple[int, int],
    rows: tuple[int, int],
    lr_rows: tuple[int, int],
    residual: Tensor | None,  # [B, C, h, w]
    relative: Tensor | None,  # [H + W]
    device: torch.device,
) -> AxisTables:
    """The tables for output rows `rows` and hoisted feature rows `lr_rows`, first and one past the last."""
    batch, channels, height, width = shape
    count = rows[1] - rows[0]
    entries = batch * count + width
    given = None if relative is None else relative.contiguous()
    # Each table begins at a multiple of 16 bytes whatever its length: Triton compiles once more for another alignment.
    padded = ceil_div(entries, 4) * 4
    index = torch.empty((4 * padded,), dtype=torch.int64, device=device)
    value = torch.empty((2 * padded,), dtype=torch.float32, device=device)
    tables = AxisTables(
        feature=index[:entries],
        relative=value[:entries],
        target=index[padded : padded + entries],
        source=index[2 * padded : 2 * padded + 2 * entries].view(2, entries),
        blend=value[padded : padded + entries],
    )
    strides = (0, 0, 0) if residual is None else (residual.stride(0), residual.stride(2), residual.stride(3))
    sizes = (*small, height, width, rows[0], lr_rows[0], count, lr_rows[1] - lr_rows[0], batch, channels)
    launch(
        pixel_axis_kernel, ceil_div(entries, AXIS_BLOCK), given, tables.feature, tables.relative, tables.target, tables.source,
        tables.blend, *sizes, *strides, BLOCK=AXIS_BLOCK,
    )  # fmt: skip
    return tables


def list_pixels(
    class_map: Tensor,  # [B, H, W]
    classes: int,
    rows: tuple[int, int],
) -> PixelList:
    """A stable counting sort of the pixels of `rows` by class, without asking the device for anything."""
    batch, _, width = class_map.shape
    count = rows[1] - rows[0]
    pixels = batch * count * width
    blocks = ceil_div(pixels, GROUP_BLOCK)
    shift = NARROW if max(batch * count, width) < 1 << NARROW - 1 else WIDE
    counts = torch.empty(((classes + 1) * blocks,), dtype=torch.int64, device=class_map.device)
    order = torch.empty((pixels,), dtype=torch.int32 if shift == NARROW else torch.int64, device=class_map.device)
    args = (classes, pixels, count, width, rows[0], *class_map.stride())
    launch(pixel_count_kernel, blocks, class_map, counts, *args, BLOCK=GROUP_BLOCK, num_warps=GROUP_WARPS)
    ends = counts.cumsum(0)
    launch(pixel_list_kernel, blocks, class_map, ends, order, *args, BLOCK=GROUP_BLOCK, SHIFT=shift, num_warps=GROUP_WARPS)
    return PixelList(order, ends, blocks, shift)
