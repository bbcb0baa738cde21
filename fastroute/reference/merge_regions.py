"""Reference of `merge_regions`: the cheapest halvings of every block, from single patches up to whole blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastroute.grid import tile_count, tile_origins

# What a rectangle does: runs as one region, or is cut between its rows or its columns.
WHOLE, ROWS, COLS = 0, 1, 2


def merge_regions_reference(
    class_ids: Tensor,  # [N]
    costs: Tensor,  # [K, S]
    height: int,
    width: int,
    patch: int,
    stride: int,
    crop: bool,
    merge: int,
    promote: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fastroute.merge_regions`; returns class_ids [N], region [N] and group [N], all int64."""
    rows, cols = tile_count(height, patch, stride, crop), tile_count(width, patch, stride, crop)
    levels, device = merge.bit_length(), class_ids.device
    codes_y = [side_codes(height, patch, stride, crop, level).to(device) for level in range(levels)]
    codes_x = [side_codes(width, patch, stride, crop, level).to(device) for level in range(levels)]
    ids = class_ids.long().view(-1, rows, cols)
    # Of every rectangle of 2^y x 2^x tiles, [B, ceil(rows / 2^y), ceil(cols / 2^x)]: its highest and lowest class, the least
    # cost of its patches, and what it does for it.
    highest, lowest = {(0, 0): ids}, {(0, 0): ids}
    least: dict[tuple[int, int], Tensor] = {}
    choice: dict[tuple[int, int], Tensor] = {}
    for y in range(levels):
        for x in range(levels):
            if y or x:
                smaller, axis = ((y - 1, x), 1) if y else ((y, x - 1), 2)
                highest[y, x] = torch.maximum(*halves(highest[smaller], axis, -1))
                lowest[y, x] = torch.minimum(*halves(lowest[smaller], axis, len(costs)))
            code = codes_y[y][:, None] * 2 * levels + codes_x[x]
            cost = costs[highest[y, x], code]
            if not promote:
                cost = torch.where(highest[y, x] == lowest[y, x], cost, torch.inf)
            act = torch.full_like(highest[y, x], WHOLE)
            for cut, smaller, axis in ((ROWS, (y - 1, x), 1), (COLS, (y, x - 1), 2)):
                if min(smaller) < 0:
                    continue
                first, second = halves(least[smaller], axis, 0.0)
                cheaper = first + second < cost
                cost, act = torch.where(cheaper, first + second, cost), torch.where(cheaper, cut, act)
            least[y, x], choice[y, x] = cost, act
    # Every patch goes down from its block to the rectangle that runs whole.
    row = torch.arange(rows, device=device)[:, None].expand_as(ids)
    col = torch.arange(cols, device=device).expand_as(ids)
    image = torch.arange(len(ids), device=device)[:, None, None]
    level_y, level_x = torch.full_like(ids, levels - 1), torch.full_like(ids, levels - 1)
    for y in reversed(range(levels)):
        for x in reversed(range(levels)):
            # Cuts of rows lead to a smaller y, cuts of columns to a smaller x: both come later.
            act = choice[y, x][image, row >> y, col >> x]
            here = (level_y == y) & (level_x == x)
            level_y = torch.where(here & (act == ROWS), y - 1, level_y)
            level_x = torch.where(here & (act == COLS), x - 1, level_x)
    executed, code = torch.empty_like(ids), torch.empty_like(ids)
    for y in range(levels):
        for x in range(levels):
            here = (level_y == y) & (level_x == x)
            executed = torch.where(here, highest[y, x][image, row >> y, col >> x], executed)
            code = torch.where(here, codes_y[y][row >> y] * 2 * levels + codes_x[x][col >> x], code)
    first_row, first_col = row >> level_y << level_y, col >> level_x << level_x
    region = (image * rows + first_row) * cols + first_col
    shapes = 4 * levels**2
    first = (first_row == row) & (first_col == col)
    group = torch.where(first, executed * shapes + code, len(costs) * shapes)
    return executed.reshape(-1), region.reshape(-1), group.reshape(-1)


def side_codes(size: int, patch: int, stride: int, crop: bool, level: int) -> Tensor:
    """Side codes of the stretches of 2^level tiles along one axis, see :func:`fastroute.grid.region_sides`."""
    origins = tile_origins(size, patch, stride, crop)
    codes = []
    for first in range(0, len(origins), 2**level):
        tiles = origins[first : first + 2**level]
        fitting = (len(tiles) - 1).bit_length()
        whole = patch + (2**fitting - 1) * stride
        codes.append(2 * fitting + (tiles[-1] + patch - tiles[0] != whole))
    return torch.tensor(codes)


def halves(x: Tensor, axis: int, missing: float) -> tuple[Tensor, Tensor]:  # [...]
    """First and second halves of the pairs along `axis`; `missing` where the last has none."""
    if x.shape[axis] % 2:
        last = list(x.shape)
        last[axis] = 1
        x = torch.cat([x, x.new_full(last, missing)], axis)
    index = torch.arange(0, x.shape[axis], 2, device=x.device)
    return x.index_select(axis, index), x.index_select(axis, index + 1)
