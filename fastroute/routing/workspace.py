"""Branch outputs between the branches and the stitching."""

from __future__ import annotations

import torch
from torch import Tensor

from fastroute.grid import TileGrid
from fastroute.ops.stitch_patches import stitch_patches
from fastroute.routing.bands import Band, first_covering


class Workspace:
    """Branch outputs of a band, and of earlier ones as long as output rows to come are covered by their patches."""

    def __init__(self, grid: TileGrid, channels: int, shuffle: int, window: str | Tensor) -> None:
        self.grid, self.shuffle, self.window = grid, shuffle, window
        span = grid.patch * grid.scale // shuffle
        self.size = torch.Size((channels * shuffle**2, span, span))
        self.strides: tuple[int, ...] = ()  # of what is in `batches`, but for the first
        self.batches: list[Tensor] = []
        self.number = 0  # of patches in `batches`
        # Batches of earlier bands: last tile row of the band, and how many batches there were with it.
        self.marks: list[tuple[int, int]] = []
        self.places = torch.empty(0)  # [images, patches] of the current band's images; those not held are not read

    def put(self, results: list[Tensor]) -> None:  # [n, C·r·r, P / r, P / r] each
        """Keep the next batches of branch outputs."""
        if not self.batches:
            self.strides = results[0].stride()[1:]
        for result in results:
            if result.shape[1:] != self.size:
                patch = f"{self.grid.patch} x {self.grid.patch}"
                before = f" before its pixel shuffle of factor {self.shuffle}" if self.shuffle > 1 else ""
                raise ValueError(
                    f"upscale: a branch must map {patch} patches to {tuple(self.size)}{before}; got "
                    f"{tuple(result.shape[1:])}. Is scale={self.grid.scale} that of the branches?"
                )
            # A branch may answer in a memory format of its own.
            if result.stride()[1:] != self.strides:
                strides = (result[0].numel(), *self.strides)
                result = torch.empty_strided(result.shape, strides, dtype=result.dtype, device=result.device).copy_(result)
            self.batches.append(result)
            self.number += result.shape[0]

    def stitch(self, band: Band, inverse: Tensor, output: Tensor) -> None:  # [N], [images, C, rows, W]
        """Write into `output` the rows that are complete with `band`, and drop what no later row needs."""
        grid, cols = self.grid, self.grid.cols
        (image, end), (top, bottom) = band.images, band.rows
        if top == 0:
            self.places = torch.full((end - image, grid.num_patches), -1, dtype=torch.int64, device=inverse.device)
        first, held = band.first_patch(grid), band.num_patches(grid)
        # Places in class order are numbered over all bands, those in `batches` from the first batch that is still there.
        here = inverse[first : first + held] - first
        self.places[:, top * cols : bottom * cols] = here.view(end - image, -1) + self.number - held
        stitch_patches(
            self.batches,
            grid,
            self.window,
            inverse=self.places.flatten(),
            shuffle=self.shuffle,
            rows=band.output(grid),
            out=output,
        )
        self.marks.append((bottom, len(self.batches)))
        needed = first_covering(grid, bottom)
        while self.marks and self.marks[0][0] <= needed:
            self._drop(self.marks.pop(0)[1])

    def _drop(self, count: int) -> None:
        """Forget the first `count` batches."""
        dropped = sum(batch.shape[0] for batch in self.batches[:count])
        del self.batches[:count]
        self.number -= dropped
        self.places -= dropped
        self.marks = [(row, number - count) for row, number in self.marks]
