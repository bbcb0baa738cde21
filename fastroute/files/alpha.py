"""Bicubic enlargement of transparency, for any rows of the result at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# The parameter of the cubic, as in PyTorch's bicubic interpolation.
SHARPNESS = -0.75
# The number of rows of the result that are computed together.
BAND = 64


def enlarge_rows(
    read: Callable[[int, int], Tensor],
    size_in: tuple[int, int],
    size_out: tuple[int, int],
    rows: tuple[int, int],
    columns: tuple[int, int] | None = None,
) -> Tensor:  # -> [rows, columns]
    """Rows of the enlarged transparency. Their bits do not depend on how many of them are requested together.

    Args:
        read: returns rows of the input, (n, w), given the first one and the one after the last.
        size_in, size_out: height and width of the input and of the result.
        rows: the first row of the result, and the one after the last.
        columns: likewise; by default all.
    """
    wide = columns or (0, size_out[1])
    bands = [_band(read, size_in, size_out, (top, min(top + BAND, rows[1])), wide) for top in range(rows[0], rows[1], BAND)]
    return bands[0] if len(bands) == 1 else torch.cat(bands)


def _band(
    read: Callable[[int, int], Tensor],
    size_in: tuple[int, int],
    size_out: tuple[int, int],
    rows: tuple[int, int],
    columns: tuple[int, int],
) -> Tensor:
    at, down = _taps(size_in[0], size_out[0], *rows)
    first, last = int(at.min()), int(at.max()) + 1
    source = read(first, last)
    across_at, across = _taps(size_in[1], size_out[1], *columns)
    wide = _weighed(source.float(), across_at, across, 1)
    large = _weighed(wide, at - first, down, 0)
    if source.is_floating_point():
        return large.clamp_(0, 1)
    return large.clamp_(0, 255 if source.dtype == torch.uint8 else 65535).round_().to(source.dtype)


def _weighed(x: Tensor, at: Tensor, weights: Tensor, dim: int) -> Tensor:  # [..., n], [4, n], [4, n]
    """The weighted sum of four rows or columns, at the places `at` (4, n). The order of the sums does not depend on n."""
    shape = (-1, 1) if dim == 0 else (1, -1)
    total = x.index_select(dim, at[0]).mul_(weights[0].view(shape))
    for place, weight in zip(at[1:], weights[1:], strict=True):
        total += x.index_select(dim, place).mul_(weight.view(shape))
    return total


def _taps(size_in: int, size_out: int, first: int, last: int) -> tuple[Tensor, Tensor]:  # -> [4, n], [4, n]
    """The places in the input of the four neighbours of every place in the output, and their weights."""
    centre = (torch.arange(first, last, dtype=torch.float64) + 0.5) * (size_in / size_out) - 0.5
    begin = centre.floor()
    t = centre - begin
    a = SHARPNESS

    def near(d: Tensor) -> Tensor:  # [n]
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: Tensor) -> Tensor:  # [n]
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    weights = torch.stack([far(t + 1), near(t), near(1 - t), far(2 - t)]).float()
    places = begin.long() + torch.arange(-1, 3)[:, None]
    return places.clamp_(0, size_in - 1), weights
