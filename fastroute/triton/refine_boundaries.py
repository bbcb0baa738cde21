"""refine_boundaries: pixels of class 0 beside a more expensive one become the mean of their 3 x 3 pixels; others are copied."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastroute.triton._common import (
    FLOATING,
    INTEGER_IMAGE,
    NAMES,
    WIDER,
    Variant,
    ceil_div,
    launch,
    quotient,
    to_pixel,
    to_work,
)

BLOCK = 512 * WIDER
SIZES = ["pixels", "channels", "height", "width", "rows", "row_begin"]
STRIDES = ["image_b", "image_c", "image_y", "image_x", "map_b", "map_y", "map_x", "out_b", "out_c", "out_y"]


# Any of the three may be a slice of rows, of any alignment; places in a row are not known to the compiler anyway.
@triton.jit(
    do_not_specialize=[*SIZES, "image_b", "image_c", "image_y", "map_b", "map_y", "out_b", "out_c", "out_y"],
    do_not_specialize_on_alignment=["image", "class_map", "out"],
)
def refine_boundaries_kernel(
    image,  # [B, C, H, W]
    class_map,  # [B, H, W]
    out,  # [B, C, rows, W]
    pixels,
    channels,
    height,
    width,
    rows,
    row_begin,
    image_b,
    image_c,
    image_y,
    image_x,
    map_b,
    map_y,
    map_x,
    out_b,
    out_c,
    out_y,
    BLOCK: tl.constexpr,
    WORK: tl.constexpr,
):
    """out = (sum of the 3 x 3 pixels, row by row) / 9 on the boundary, else the pixel.

    Work mapping: one program per BLOCK pixels, counted through the written rows of all images; all channels of them.
    """
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    line, x = pixel // width, pixel % width
    b, row = line // rows, line % rows
    y = row + row_begin
    inner = inside & (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)

    known = class_map + b * map_b + y * map_y + x * map_x
    light = inner & (tl.load(known, mask=inner, other=1) == 0)
    expensive = tl.full((BLOCK,), 0, tl.int32)
    for dy in tl.static_range(-1, 2):
        for dx in tl.static_range(-1, 2):
            if dy != 0 or dx != 0:
                expensive |= (tl.load(known + dy * map_y + dx * map_x, mask=light, other=0) != 0).to(tl.int32)
    refined = light & (expensive != 0)

    at = image + b * image_b + y * image_y + x * image_x
    to = out + b * out_b + row * out_y + x
    c = 0
    while c < channels:
        here = tl.load(at, mask=inside, other=0.0)
        total = tl.full((BLOCK,), 0.0, WORK)
        for dy in tl.static_range(-1, 2):
            for dx in tl.static_range(-1, 2):
                total += to_work(tl.load(at + dy * image_y + dx * image_x, mask=refined, other=0.0), WORK)
        mean = quotient(total, tl.full((BLOCK,), 9.0, WORK))
        result = to_pixel(tl.where(refined, mean, to_work(here, WORK)), out.dtype.element_ty)
        tl.store(to, result, mask=inside)
        at += image_c
        to += out_c
        c += 1


def refine_boundaries_triton(
    image: Tensor,  # [B, C, H, W]
    class_map: Tensor,  # [B, H, W]
    row_begin: int,
    row_end: int,
) -> Tensor:
    """See :func:`fastroute.refine_boundaries`."""
    out = image.new_empty((image.shape[0], image.shape[1], row_end - row_begin, image.shape[3]))
    return refine_boundaries_out_triton(image, class_map, row_begin, row_end, out=out)


def refine_boundaries_out_triton(
    image: Tensor,  # [B, C, H, W]
    class_map: Tensor,  # [B, H, W]
    row_begin: int,
    row_end: int,
    *,
    out: Tensor,  # [B, C, rows, W]
) -> Tensor:
    """See :func:`fastroute.refine_boundaries`, its `out`."""
    batch, channels, height, width = image.shape
    rows = row_end - row_begin
    pixels = batch * rows * width
    sizes = (pixels, channels, height, width, rows, row_begin)
    launch(
        refine_boundaries_kernel, ceil_div(pixels, BLOCK), image, class_map, out, *sizes, *image.stride(),
        *class_map.stride(), *out.stride()[:3], BLOCK=BLOCK, WORK=work_of(image.dtype),
    )  # fmt: skip
    return out


def work_of(dtype: torch.dtype) -> tl.dtype:
    """The type of the sums."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def unsupported_reasons(device: torch.device) -> list[str]:
    """Why these kernels cannot run on `device`."""
    return []


def variants() -> Iterator[Variant]:
    """The kernel as the launchers call it."""
    numbers = dict.fromkeys((*SIZES, *STRIDES), "i32")
    for dtype in FLOATING:
        for target in (dtype, *INTEGER_IMAGE) if dtype == torch.float32 else (dtype, torch.uint8):
            for known in ("u8", "i64") if target == dtype else ("u8",):
                types = {"image": f"*{NAMES[dtype]}", "class_map": f"*{known}", "out": f"*{NAMES[target]}"}
                yield Variant(refine_boundaries_kernel, types | numbers, {"BLOCK": BLOCK, "WORK": work_of(dtype)})
