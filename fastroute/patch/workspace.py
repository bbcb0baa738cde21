"""The outputs of branches, held until they are stitched."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from fastroute.grid import TileGrid
from fastroute.ops._upsampled import FINISHED, Upsampler, Upsamplers, features_of, stitch_upsampled
from fastroute.ops.stitch_patches import stitch_patches
from fastroute.patch.bands import Band, first_covering
from fastroute.rewrite.optimize import interpolated
from fastroute.windows import window_on

Shape = tuple[int, int]  # height and width in LR pixels


class Workspace:
    """The branch outputs of a band, and of earlier bands as long as their patches cover output rows to come.

    There is one output per patch, or per region of several patches, see :func:`fastroute.merge_regions`.

    Args:
        grid: where the patches lie.
        channels: number of channels of the images.
        shuffle: factor of the pixel shuffle that the branches leave to the stitching.
        window: weights of overlapping patches.
        upsamplers: the last layers of every branch, if they are left to the stitching too; None for a branch that finishes its
            patches.
    """

    def __init__(
        self,
        grid: TileGrid,
        channels: int,
        shuffle: int,
        window: str | Tensor,  # [P]
        upsamplers: Upsamplers = (),
    ) -> None:
        self.grid, self.channels, self.shuffle, self.window = grid, channels, shuffle, window
        self.last = list(upsamplers)  # of every class
        # The upsamplers in use, the class of each, and the upsampler of each class and shape: an interpolation has a matrix for
        # every size, other layers are the same for all.
        self.upsamplers: list[Upsampler] = []
        self.class_of: list[int] = []
        self.kind_of: dict[tuple[int, Shape | None], int] = {}
        for c, upsampler in enumerate(upsamplers):
            if upsampler is not None:
                self._kind(c, (grid.patch, grid.patch))
        self.channels_last: dict[int, bool] = {}  # of what is in `batches`, by class; of all where nothing is left to stitching
        self.batches: list[Tensor] = []
        self.kinds: list[int] = []  # which of `upsamplers` each of `batches` goes through
        self.number = 0  # of patches or regions in `batches`
        # For earlier bands, the last tile row of the band and the number of batches up to its end.
        self.marks: list[tuple[int, int]] = []
        self.places = torch.empty(0)  # [images, patches] of the current band's images; those not held are not read

    def size(self, c: int, shape: Shape | None = None) -> torch.Size:
        """The size in which a region of class `c`, by default a patch, is held: (C, H, W), (C·r·r, H / r, W / r), (F, h, w)."""
        height, width = (n * self.grid.scale for n in shape or (self.grid.patch, self.grid.patch))
        upsampler = self.last[c] if self.last else None
        factor = upsampler.shuffle if upsampler else 1 if self.last else self.shuffle
        channels = features_of(upsampler) if upsampler else self.channels * factor**2
        return torch.Size((channels, height // factor, width // factor))

    def put(self, results: list[Tensor], c: int, shape: Shape | None = None) -> None:  # [n, *size] each
        """Keep the next batches of outputs of class `c`, for regions of `shape` LR pixels, by default patches."""
        size, kind = self.size(c, shape), self._kind(c, shape or (self.grid.patch, self.grid.patch))
        alike = c if self.last else 0
        if alike not in self.channels_last:
            first = results[0]
            last = not first.is_contiguous() and first.is_contiguous(memory_format=torch.channels_last)
            self.channels_last[alike] = last and (kind != FINISHED or not self.last)
        layout = torch.channels_last if self.channels_last[alike] else torch.contiguous_format
        for result in results:
            if result.shape[1:] != size:
                patch = "{} x {}".format(*(shape or (self.grid.patch, self.grid.patch)))
                before = f" before its pixel shuffle of factor {self.shuffle}" if self.shuffle > 1 else ""
                raise ValueError(
                    f"upscale: a branch must map {patch} patches to {tuple(size)}{before}; got "
                    f"{tuple(result.shape[1:])}. Is scale={self.grid.scale} that of the branches?"
                )
            # A branch may use a memory format of its own.
            self.batches.append(result.contiguous(memory_format=layout))
            self.kinds.append(kind)
            self.number += result.shape[0]

    def _kind(self, c: int, shape: Shape) -> int:
        """The number of the upsampler for regions of class `c` and `shape`, which is added if it is new."""
        upsampler = self.last[c] if self.last else None
        if upsampler is None:
            return FINISHED
        key = (c, shape if upsampler.weight.ndim == 2 else None)
        if key not in self.kind_of:
            self.kind_of[key] = len(self.upsamplers)
            patch = shape == (self.grid.patch, self.grid.patch)
            self.upsamplers.append(upsampler if patch or key[1] is None else interpolated(upsampler, shape))
            self.class_of.append(c)
        return self.kind_of[key]

    def stitch(
        self,
        band: Band,
        inverse: Tensor,  # [N]
        output: Tensor,  # [images, C, rows, W]
        region: Tensor | None = None,  # [N]
        regions: int | None = None,
    ) -> dict[int, float]:
        """Write into `output` the rows that are complete with `band`, and drop what no later row needs.

        Args:
            band: the band whose outputs were `put` last.
            inverse: the place of every patch after sorting.
            output: the rows to write.
            region: the first patch of the region of every patch, whose place is then that of the region.
            regions: number of regions of the band. Default: its number of patches.

        Returns:
            The seconds that the last layers of each branch took.
        """
        grid, cols = self.grid, self.grid.cols
        (image, end), (top, bottom) = band.images, band.rows
        if top == 0:
            self.places = torch.full((end - image, grid.num_patches), -1, dtype=torch.int64, device=inverse.device)
        first, held = band.first_patch(grid), band.num_patches(grid)
        own = slice(image * grid.num_patches, end * grid.num_patches)
        # Places in class order are numbered over all bands, and those in `batches` from the first batch that is still held.
        here = (inverse[first : first + held] if region is None else inverse[region[first : first + held]]) - first
        before = self.number - (held if regions is None else regions)
        self.places[:, top * cols : bottom * cols] = here.view(end - image, -1) + before
        begin = None if region is None else region[own] - own.start
        layers = self._stitch(self.places.flatten(), begin, band.output(grid), output)
        self.marks.append((bottom, len(self.batches)))
        needed = first_covering(grid, bottom)
        while self.marks and self.marks[0][0] <= needed:
            self._drop(self.marks.pop(0)[1])
        return layers

    def _stitch(
        self,
        places: Tensor,  # [N]
        region: Tensor | None,  # [N]
        rows: tuple[int, int],
        output: Tensor,  # [images, C, rows, W]
    ) -> dict[int, float]:
        if not self.upsamplers:
            held = (self.batches, self.grid, self.window)
            stitch_patches(*held, inverse=places, shuffle=self.shuffle, rows=rows, out=output, region=region)
            return {}
        grid = self.grid
        window = window_on(self.window, grid.patch * grid.scale, grid.stride * grid.scale, output.device, torch.float32)
        begin = time.perf_counter()
        parts = (self.batches, self.kinds, self.upsamplers)
        spent = stitch_upsampled(*parts, grid, window, places, rows, output, region).tolist()
        taken = time.perf_counter() - begin
        times: dict[int, float] = {}
        for c, seconds in zip(self.class_of, spent, strict=False):
            if seconds:
                times[c] = times.get(c, 0.0) + taken * seconds / sum(spent)
        return times

    def _drop(self, count: int) -> None:
        """Forget the first `count` batches."""
        dropped = sum(batch.shape[0] for batch in self.batches[:count])
        del self.batches[:count], self.kinds[:count]
        self.number -= dropped
        self.places -= dropped
        self.marks = [(row, number - count) for row, number in self.marks]
