"""gather_groups: out[i] = x[order[i]]. One program copies a block of rows by a block of their elements."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastroute.ops import _checks as check
from fastroute.triton._common import WIDER, Variant, ceil_div, launch

# Elements of one size are copied as integers, whatever they mean.
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


@triton.jit(do_not_specialize=["rows", "limit"])
def gather_groups_kernel(
    x,  # [limit, width]
    index,  # [rows]
    out,  # [rows, width]
    rows,
    limit,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows whose index is out of range become 0: a GPU cannot raise without a wait, but nothing outside is read."""
    program = tl.program_id(0)
    pieces = (width + COLUMNS - 1) // COLUMNS
    row = (program // pieces).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program % pieces) * COLUMNS + tl.arange(0, COLUMNS)
    source = tl.load(index + row, mask=row < rows, other=0)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    known = (source >= 0) & (source < limit)
    value = tl.load(x + source[:, None] * width + column[None, :], mask=inside & known[:, None], other=0)
    tl.store(out + row[:, None] * width + column[None, :], value, mask=inside)


def block_of(width: int) -> tuple[int, int]:
    """Rows and elements of a block. Few thresholds: a compiled graph keeps one block for all sizes between them."""
    if width <= 8:
        return 128 * WIDER, 8
    return (8 * WIDER, 128) if width <= 256 else (WIDER, 1024)


def move_rows(x: Tensor, index: Tensor) -> Tensor:  # [N, ...], [N] -> [N, ...]
    """Row `index[i]` of `x` at place i; shared with `scatter_groups`."""
    rows, limit, width = index.shape[0], x.shape[0], math.prod(x.shape[1:])
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    size = x.element_size()
    word = WORDS[size]
    # Complex numbers of 16 bytes are two words.
    width *= size // min(size, 8)
    words, moved = (t.reshape(-1).view(word) for t in (x.contiguous(), out))
    block_rows, columns = block_of(width)
    programs = ceil_div(rows, block_rows) * ceil_div(width, columns)
    launch(
        gather_groups_kernel, programs, words, index.contiguous(), moved, rows, limit, width, ROWS=block_rows, COLUMNS=columns
    )
    return out


def gather_groups_triton(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # [N, ...], [N], [N] -> [N, ...]
    """See :func:`fastroute.gather_groups`."""
    check.in_range("gather_groups", "groups.order", order, x.shape[0])
    return move_rows(x, order)


def unsupported_reasons(device: torch.device) -> list[str]:
    """Why these kernels cannot run on `device`."""
    return []


def variants() -> Iterator[Variant]:
    """The kernels as the launchers call them."""
    for word in ("u8", "i16", "i32", "i64"):
        for rows, columns in {block_of(width) for width in (8, 256, 257)}:
            types = {"x": f"*{word}", "index": "*i64", "out": f"*{word}", "rows": "i32", "limit": "i32", "width": "i32"}
            yield Variant(gather_groups_kernel, types, {"ROWS": rows, "COLUMNS": columns})
