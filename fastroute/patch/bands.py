"""Bands of tile rows that are routed together, and the rows of the image that they need."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from fastroute.grid import TileGrid
from fastroute.runtime.rows import Source


@dataclass(frozen=True)
class Band:
    """Consecutive tile rows of some images, routed together.

    Attributes:
        images: first image and one past the last. There are several only if the band holds them as a whole.
        rows: first tile row and one past the last.
    """

    images: tuple[int, int]
    rows: tuple[int, int]

    def first_patch(self, grid: TileGrid) -> int:
        """The number of the first patch."""
        return self.images[0] * grid.num_patches + self.rows[0] * grid.cols

    def num_patches(self, grid: TileGrid) -> int:
        """How many patches the band has."""
        return (self.images[1] - self.images[0]) * (self.rows[1] - self.rows[0]) * grid.cols

    def pixels(self, grid: TileGrid) -> tuple[int, int]:
        """The rows of the image that the patches cover."""
        origins = grid.row_origins
        return origins[self.rows[0]], min(origins[self.rows[1] - 1] + grid.patch, grid.height)

    def output(self, grid: TileGrid) -> tuple[int, int]:
        """The output rows that this band completes."""
        top, bottom = self.rows
        end = grid.row_origins[bottom] * grid.scale if bottom < grid.rows else grid.output_size[0]
        return (grid.row_origins[top] * grid.scale if top else 0), end

    def read(self, source: Source, grid: TileGrid) -> tuple[Tensor, TileGrid]:
        """The pixels of the band and the grid of its patches, whose patch n is patch `first_patch` + n of the whole."""
        top, bottom = self.pixels(grid)
        return source.get(self.images, (top, bottom)), replace(grid, height=bottom - top)


def plan_bands(batch: int, grid: TileGrid, patches: int, merge: int = 1) -> list[Band]:
    """Bands of whole images if several fit in about `patches` patches, else bands of tile rows of one image.

    Every band but the last of an image has a multiple of `merge` tile rows, so that no region lies in two.
    """
    if grid.num_patches <= patches:
        per_band = max(1, patches // grid.num_patches)
        return [Band((i, min(i + per_band, batch)), (0, grid.rows)) for i in range(0, batch, per_band)]
    count = -(-grid.num_patches // patches)
    # The bands have equal heights, so that none is left with a single row.
    edges = sorted({min(round(grid.rows * i / count / merge) * merge, grid.rows) for i in range(count)} | {grid.rows})
    return [Band((b, b + 1), rows) for b in range(batch) for rows in pairwise(edges)]


def band_around(numbers: Tensor, grid: TileGrid) -> Band:  # [n], rising, on the CPU
    """The smallest band that holds the patches `numbers`."""
    (first, top), (last, bottom) = (divmod(int(n), grid.num_patches) for n in (numbers[0], numbers[-1]))
    if first != last:
        return Band((first, last + 1), (0, grid.rows))
    return Band((first, first + 1), (top // grid.cols, bottom // grid.cols + 1))


def first_covering(grid: TileGrid, row: int) -> int:
    """The first tile row that covers the first pixel of tile row `row`. After the last row, no tile row is needed any more."""
    if row >= grid.rows:
        return row
    at = grid.row_origins[row]
    return next(i for i, y in enumerate(grid.row_origins) if y + grid.patch > at)


def band_of_patches(bands: list[Band], grid: TileGrid, device: torch.device) -> Tensor:  # [N]
    """The band of every patch, computed on `device` without a copy from the host."""
    numbers = torch.empty(sum(band.num_patches(grid) for band in bands), dtype=torch.int64, device=device)
    for number, band in enumerate(bands):
        first = band.first_patch(grid)
        numbers[first : first + band.num_patches(grid)].fill_(number)
    return numbers
