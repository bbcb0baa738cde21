"""Tile-grid arithmetic in kernels: the twin of fastroute/grid.py and csrc/common/geometry.h. Arguments are 32-bit."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def origin(tile, size, PATCH: tl.constexpr, STRIDE: tl.constexpr):
    """First pixel of a tile along one axis: the last is shifted inward to end where the image ends."""
    return tl.minimum(tile * STRIDE, tl.maximum(size - PATCH, 0))


@triton.jit
def first_covering(at, tiles, PATCH: tl.constexpr, STRIDE: tl.constexpr):
    """The first of the tiles that cover pixel `at`; they are consecutive."""
    return tl.minimum(tl.where(at < PATCH, 0, (at - PATCH) // STRIDE + 1), tiles - 1)


@triton.jit
def last_covering(at, tiles, size, PATCH: tl.constexpr, STRIDE: tl.constexpr):
    """The last of them."""
    last = tl.minimum(at // STRIDE, tiles - 1)
    return tl.where(at >= origin(tiles - 1, size, PATCH, STRIDE), tiles - 1, last)


def max_cover(patch: int, stride: int) -> int:
    """Tiles over one pixel along an axis, at most: the last may be shifted onto others."""
    return (patch + stride - 1) // stride + 1
