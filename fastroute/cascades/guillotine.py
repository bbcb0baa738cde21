"""The cheapest guillotine cut of a grid of cells: into rectangles, each of which has a value, so that their sum is least.

A rectangle stays whole or is cut in two along a row or a column, and so are its parts. All cuts of all rectangles are compared
by a dynamic programme, from the smallest rectangle to the largest.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from fastroute.cascades.cells import Rectangle

# float64 [N, R, C, R, C]: of grid n the rectangle of h rows and w columns from (top, left) on, at [n, h - 1, w - 1, top, left].
Values = NDArray[np.float64]


def cheapest(whole: Values) -> Values:
    """The least sum over all cuts of every rectangle, from the values of rectangles that stay whole.

    Grids are small, so that what a call of numpy takes counts most: all cuts of a height, or of a width, are one. Their first
    parts are s = 1, 2, ... high; the others, h - s high and s further down, lie by a stride of their own.
    """
    best = whole.copy()
    number, rows, cols, _, _ = best.shape
    of_grid, of_height, of_width, of_top, of_left = best.strides
    for h in range(1, rows + 1):
        tops = rows - h + 1
        own = best[:, h - 1, :, :tops]
        if h > 1:
            shape, steps = (number, h - 1, cols, tops, cols), (of_grid, of_top - of_height, of_width, of_top, of_left)
            below = as_strided(best[:, h - 2, :, 1:], shape, steps)
            np.minimum(own, (best[:, : h - 1, :, :tops] + below).min(axis=1), out=own)
        for w in range(2, cols + 1):
            lefts = cols - w + 1
            wide = own[:, w - 1, :, :lefts]
            across = (of_grid, of_left - of_width, of_top, of_left)
            behind = as_strided(own[:, w - 2, :, 1:], (number, w - 1, tops, lefts), across)
            np.minimum(wide, (own[:, : w - 1, :, :lefts] + behind).min(axis=1), out=wide)
    return best


def parts(whole: Values, best: Values, n: int) -> Iterator[Rectangle]:
    """The rectangles of the cheapest cut of grid `n`; of cuts that cost the same the fewest, between rows before columns."""
    _, rows, cols, _, _ = whole.shape
    open_parts = [Rectangle(0, 0, rows, cols)]
    while open_parts:
        part = open_parts.pop()
        top, left, h, w = part.top, part.left, part.bottom - part.top, part.right - part.left
        if whole[n, h - 1, w - 1, top, left] <= best[n, h - 1, w - 1, top, left]:
            yield part
            continue
        ahead = np.arange(1, h), np.arange(1, w)
        above = best[n, ahead[0] - 1, w - 1, top, left] + best[n, h - ahead[0] - 1, w - 1, top + ahead[0], left]
        before = best[n, h - 1, ahead[1] - 1, top, left] + best[n, h - 1, w - ahead[1] - 1, top, left + ahead[1]]
        found = int(np.concatenate([above, before]).argmin())
        if found < h - 1:
            middle = top + found + 1
            open_parts += [part._replace(top=middle), part._replace(bottom=middle)]
        else:
            middle = left + found - (h - 1) + 1
            open_parts += [part._replace(left=middle), part._replace(right=middle)]
