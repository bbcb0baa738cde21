"""Branch outputs between the branches and the stitching."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from fastroute.grid import TileGrid
from fastroute.ops._upsampled import FINISHED, Upsamplers, features_of, stitch_upsampled
from fastroute.ops.stitch_patches import stitch_patches
from fastroute.routing.bands import Band, first_covering
from fastroute.windows import window_on


class Workspace:
    """Branch outputs of a band, and of earlier ones as long as output rows to come are covered by their patches.

    Args:
        grid: where the patches lie.
        channels: of the images.
        shuffle: factor of the pixel shuffle that the branches leave to the stitching.
        window: weighs overlapping patches.
        upsamplers: the last layers of every branch, where they are left to the stitching too; None for a branch whose
            patches are finished.
    """

    def __init__(self, grid: TileGrid, channels: int, shuffle: int, window: str | Tensor, upsamplers: Upsamplers = ()) -> None:
        self.grid, self.channels, self.shuffle, self.window = grid, channels, shuffle, window
        self.upsamplers = [u for u in upsamplers if u is not None]
        numbers = iter(range(len(upsamplers)))
        # Which of them each class goes through.
        self.kinds = [FINISHED if u is None else next(numbers) for u in upsamplers]
        self.strides: dict[int, tuple[int, ...]] = {}  # of what is in `batches`, but for the first; by kind
        self.batches: list[Tensor] = []
        self.classes: list[int] = []  # of `batches`
        self.number = 0  # of patches in `batches`
        # Batches of earlier bands: last tile row of the band, and how many batches there were with it.
        self.marks: list[tuple[int, int]] = []
        self.places = torch.empty(0)  # [images, patches] of the current band's images; those not held are not read

    def size(self, c: int) -> torch.Size:
        """Of a patch of class `c`, as it is held: (C, P, P), (C·r·r, P / r, P / r) or (F, p, p)."""
        span = self.grid.patch * self.grid.scale
        if not self.upsamplers:
            return torch.Size((self.channels * self.shuffle**2, span // self.shuffle, span // self.shuffle))
        if self.kinds[c] == FINISHED:
            return torch.Size((self.channels, span, span))
        upsampler = self.upsamplers[self.kinds[c]]
        return torch.Size((features_of(upsampler), span // upsampler.shuffle, span // upsampler.shuffle))

    @property
    def kinds_of_batches(self) -> list[int]:
        """Which of `upsamplers` each of `batches` goes through."""
        return [self.kinds[c] for c in self.classes]

    def put(self, results: list[Tensor], c: int) -> None:  # [n, *size(c)] each
        """Keep the next batches of outputs of the branch of class `c`."""
        size = self.size(c)
        kind = self.kinds[c] if self.upsamplers else 0
        if kind not in self.strides:
            self.strides[kind] = (size[1] * size[2], size[2], 1) if kind == FINISHED else results[0].stride()[1:]
        strides = self.strides[kind]
        for result in results:
            if result.shape[1:] != size:
                patch = f"{self.grid.patch} x {self.grid.patch}"
                before = f" before its pixel shuffle of factor {self.shuffle}" if self.shuffle > 1 else ""
                raise ValueError(
                    f"upscale: a branch must map {patch} patches to {tuple(size)}{before}; got "
                    f"{tuple(result.shape[1:])}. Is scale={self.grid.scale} that of the branches?"
                )
            # A branch may answer in a memory format of its own.
            if result.stride()[1:] != strides:
                dense = torch.empty_strided(result.shape, (size.numel(), *strides), dtype=result.dtype, device=result.device)
                result = dense.copy_(result)
            self.batches.append(result)
            self.classes.append(c)
            self.number += result.shape[0]

    def stitch(self, band: Band, inverse: Tensor, output: Tensor) -> dict[int, float]:  # [N], [images, C, rows, W]
        """Write into `output` the rows that are complete with `band`, and drop what no later row needs.

        Returns:
            Seconds that the last layers of each branch took.
        """
        grid, cols = self.grid, self.grid.cols
        (image, end), (top, bottom) = band.images, band.rows
        if top == 0:
            self.places = torch.full((end - image, grid.num_patches), -1, dtype=torch.int64, device=inverse.device)
        first, held = band.first_patch(grid), band.num_patches(grid)
        # Places in class order are numbered over all bands, those in `batches` from the first batch that is still there.
        here = inverse[first : first + held] - first
        self.places[:, top * cols : bottom * cols] = here.view(end - image, -1) + self.number - held
        layers = self._stitch(self.places.flatten(), band.output(grid), output)
        self.marks.append((bottom, len(self.batches)))
        needed = first_covering(grid, bottom)
        while self.marks and self.marks[0][0] <= needed:
            self._drop(self.marks.pop(0)[1])
        return layers

    def _stitch(self, places: Tensor, rows: tuple[int, int], output: Tensor) -> dict[int, float]:
        if not self.upsamplers:
            stitch_patches(self.batches, self.grid, self.window, inverse=places, shuffle=self.shuffle, rows=rows, out=output)
            return {}
        grid, held = self.grid, (self.batches, self.kinds_of_batches, self.upsamplers)
        window = window_on(self.window, grid.patch * grid.scale, grid.stride * grid.scale, output.device, torch.float32)
        begin = time.perf_counter()
        spent = stitch_upsampled(*held, grid, window, places, rows, output).tolist()
        taken = time.perf_counter() - begin
        times = {kind: taken * seconds / sum(spent) for kind, seconds in enumerate(spent[:-1]) if seconds}
        return {c: times[kind] for c, kind in enumerate(self.kinds) if kind in times}

    def _drop(self, count: int) -> None:
        """Forget the first `count` batches."""
        dropped = sum(batch.shape[0] for batch in self.batches[:count])
        del self.batches[:count], self.classes[:count]
        self.number -= dropped
        self.places -= dropped
        self.marks = [(row, number - count) for row, number in self.marks]
