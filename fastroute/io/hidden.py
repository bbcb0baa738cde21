"""Replaces the colours of invisible pixels, so that they do not bleed into visible ones.

Colours under full transparency are arbitrary, often black, and a network would blend them into the visible edge. They are
replaced by visible colours from nearby: the mean, weighted by alpha, over the smallest of several squares that contains
anything visible.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Half the side of the squares. Each is twice as large as the one before.
RADII = (1, 2, 4, 8, 16, 32)
REACH = RADII[-1]
# The side of the tiles that are processed one after the other.
TILE = 256


def fill_hidden(color: Tensor, alpha: Tensor | None) -> Tensor:  # [C, H, W], [H, W] -> [C, H, W]
    """Spread visible colours below full transparency. Returns the same tensor if nothing is hidden.

    A pixel without anything visible within 32 pixels becomes medium gray. Every pixel depends only on those within 32 pixels,
    in the same order of sums, so bands of a picture give the bits of the whole.

    Args:
        color: uint8, uint16 or float32.
        alpha: transparency of the same type, not premultiplied; None for an opaque picture.
    """
    if alpha is None or bool(alpha.numpy().all()):
        return color
    if alpha.is_floating_point():
        alpha = alpha.clamp(min=0)
    height, width = color.shape[1:]
    # The channels of a gray picture may share memory.
    single = color.shape[0] > 1 and color.stride(0) == 0
    planes = color[:1] if single else color
    result = planes.clone()
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            here = slice(top, min(top + TILE, height)), slice(left, min(left + TILE, width))
            if not bool(alpha[here].numpy().all()):
                y, x = max(top - REACH, 0), max(left - REACH, 0)
                around = slice(y, here[0].stop + REACH), slice(x, here[1].stop + REACH)
                inside = slice(top - y, here[0].stop - y), slice(left - x, here[1].stop - x)
                _fill(result[:, here[0], here[1]], alpha[here], planes[:, around[0], around[1]], alpha[around], inside)
    return result.expand(color.shape[0], -1, -1) if single else result


def _fill(
    result: Tensor,  # [C, h, w]
    alpha: Tensor,  # [h, w]
    color_around: Tensor,  # [C, h', w']
    alpha_around: Tensor,  # [h', w']
    inside: tuple[slice, slice],
) -> None:
    """Fill the hidden pixels of a tile, which lies inside of a larger one."""
    missing = alpha == 0
    peak = 1 if result.is_floating_point() else 255 if result.dtype == torch.uint8 else 65535
    filled = torch.full(result.shape, peak / 2, dtype=torch.float64)
    if bool(alpha_around.numpy().any()):
        # The sums are exact in any order: 255 * 255 * 65 * 65 fits into 32 bits, and sums of 16-bit values fit into doubles.
        kind = torch.int32 if result.dtype == torch.uint8 else torch.float64
        weight = alpha_around.to(kind)
        sums = torch.cat([weight[None], color_around.to(kind) * weight])
        for square in _squares(sums, inside):
            now = missing & (square[0] > 0)
            if bool(now.any()):
                filled[:, now] = square[1:, now].double() / square[0, now].double()
                missing = missing & ~now
            if not bool(missing.any()):
                break
    filled = filled if result.is_floating_point() else filled.round_()
    # Older versions of torch choose between no numbers of 16 bits.
    result.copy_(torch.where(alpha == 0, filled, result.double()))


def _squares(sums: Tensor, inside: tuple[slice, slice]) -> Iterator[Tensor]:  # [K, h', w'] -> [K, h, w] each
    """The sums over squares of 2 r + 1 pixels around every pixel inside, for all radii r."""
    # Zeros outside of the picture.
    size = [part.stop - part.start for part in inside]
    gaps = [(REACH - part.start, part.stop + REACH - whole) for part, whole in zip(inside, sums.shape[1:], strict=True)]
    padded = torch.nn.functional.pad(sums, (*gaps[1], *gaps[0]))
    down, length = padded, 1
    for radius in RADII:
        # Sums of 2 r rows, from those of half as many; then of the same columns.
        while length < 2 * radius:
            down = _paired(down, length, 1)
            length *= 2
        rows = _centred(down, padded, radius, 1, size[0])
        across, side = rows, 1
        while side < 2 * radius:
            across = _paired(across, side, 2)
            side *= 2
        yield _centred(across, rows, radius, 2, size[1])


def _paired(sums: Tensor, length: int, dim: int) -> Tensor:
    """Sums of twice as many rows or columns: those that begin here and those that begin `length` later."""
    count = sums.shape[dim] - length
    return sums.narrow(dim, 0, count) + sums.narrow(dim, length, count)


def _centred(sums: Tensor, single: Tensor, radius: int, dim: int, count: int) -> Tensor:
    """Sums of 2 r + 1 around each of `count` places: the 2 r that begin r before it, and the one r behind it."""
    return sums.narrow(dim, REACH - radius, count) + single.narrow(dim, REACH + radius, count)
