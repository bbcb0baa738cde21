"""Which rows of the features and of the image a band of output pixels needs."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from fastroute.ops.pixel_mlp import Layers
from fastroute.rewrite.row_stages import MAX_COLUMNS, MIN_ROWS, make_stage, rows_in_bands, unsupported_reasons
from fastroute.runtime.devices import on_device
from fastroute.runtime.memory_plan import ACTIVATIONS, REARRANGED, LiveBytes, WorkingSet

# Pixels of a band, of the output and of the encoder's input: bounds of the memory, large enough to give threads work.
OUTPUT_BAND = {"cpu": 1 << 20, "cuda": 1 << 23}
ENCODER_BAND = {"cpu": 1 << 14, "cuda": 1 << 21}
# Pixels of the image that an output band stands for: of a GPU's large bands the features count too.
INPUT_BAND = {"cpu": sys.maxsize, "cuda": 1 << 20}
# An image of at most this many output pixels is classified whole under a budget, a larger one first on rows spread over it, of
# a quarter as many: single rows take several times as long per pixel. 2-means do so beyond the second number.
BUDGET_SAMPLE = 1 << 22
ADAPTIVE_SAMPLE = 1 << 25
# Pixels of an image whose turn under a shared budget is yet to come, at least.
WAITING_SAMPLE = 1 << 16
# Bytes per sampled pixel: the logits of a class, and a search in them; a score, twice.
BUDGET_BYTES, ADAPTIVE_BYTES = 14, 20
# Rows of a band, and columns, on which the memory of an encoder is counted.
PROBE = 16

# What comes and goes with each band lies in the C library's heap, which takes up to so many times as much: once large blocks
# have been freed, all but the largest share it, and what lies between two of them is a gap for anything larger.
HEAP = {"cpu": 2, "cuda": 1}

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Window:
    """Rows of the features, and the rows of the output that they stand for.

    Attributes:
        features: first row and one past the last.
        output: the same of the output, at the ratio of the whole.
    """

    features: tuple[int, int]
    output: tuple[int, int]

    @property
    def height(self) -> int:
        """Output rows."""
        return self.output[1] - self.output[0]

    def within(self, begin: int, end: int) -> tuple[int, int]:
        """Output rows counted from its first."""
        return begin - self.output[0], end - self.output[0]


@dataclass(frozen=True)
class PixelGrid:
    """The rows of an image and of what it is upscaled to.

    Attributes:
        lr, size: height and width of the image and of the output.
        device: where they are worked on, which says how large a band is.
    """

    lr: tuple[int, int]
    size: tuple[int, int]
    device: torch.device = HOST

    def window(self, begin: int, end: int) -> Window:
        """The features that output rows `begin` to `end` read, and a row more on either side.

        Their number is in the ratio of the whole to the output rows that they stand for, and begins at a multiple of it.
        So pixels of the window lie within their features, to the last bit, where those of the whole do.
        """
        h, height = self.lr[0], self.size[0]
        parts = math.gcd(h, height)
        low, high = h // parts, height // parts  # features and output rows of the smallest window
        first = max(begin * h // height - 1, 0) // low
        last = -(-min(-(-end * h // height) + 1, h) // low)
        return Window((first * low, last * low), (first * high, last * high))

    def bands(self) -> list[tuple[int, int]]:
        """Rows (first, one past the last) of bands of nearly equal height."""
        height, width = self.size
        count = -(-height * width // on_device(OUTPUT_BAND, self.device))
        count = max(count, -(-self.lr[0] * self.lr[1] // on_device(INPUT_BAND, self.device)))
        edges = [height * i // count for i in range(count + 1)]
        return [(a, b) for a, b in pairwise(edges) if b > a]

    def sample(self, pixels: int) -> int:
        """The distance of rows that hold at most `pixels` pixels together."""
        step, high = -(-self.size[0] * self.size[1] // pixels), self.size[0] // math.gcd(self.lr[0], self.size[0])
        # Else all of them would lie at the same place within their features.
        while step > 1 and math.gcd(step, high) > 1:
            step += 1
        return step

    @property
    def overlapping(self) -> bool:
        """Whether the windows of bands are no small part of the image: only all features serve them."""
        return any(2 * (w.features[1] - w.features[0]) >= self.lr[0] for w in self.widest)

    @property
    def widest(self) -> list[Window]:
        """The windows of all bands with a row more on either side."""
        return [self.window(max(a - 1, 0), min(b + 1, self.size[0])) for a, b in self.bands()]


class PixelMemory:
    """The memory of the pixel path.

    Args:
        encoder: as it runs.
        mlps: layers of the upsamplers and of the classifier.
        channels: of the images.
        depth: of the features.
        classes: number of classes.
        dtype: of features.
    """

    def __init__(
        self, encoder: nn.Module, mlps: Sequence[Layers], channels: int, depth: int, classes: int, dtype: torch.dtype
    ) -> None:
        self.channels, self.depth, self.classes, self.itemsize = channels, depth, classes, dtype.itemsize
        self.in_bands = not unsupported_reasons(encoder)
        self.reach = make_stage(encoder).reach if self.in_bands else 0
        self.units = max((weight.shape[0] for mlp in mlps for weight, _ in mlp), default=1)
        device = next(encoder.parameters()).device
        x = torch.zeros(1, self.channels, 2 * PROBE, PROBE, dtype=dtype, device=device)
        with torch.no_grad(), LiveBytes() as live:
            if self.in_bands:
                for _ in rows_in_bands(encoder, lambda rows, cols: x[:, :, rows, cols], 2 * PROBE, PROBE, 0, PROBE):
                    live.mark()
            else:
                encoder(x)
        # Rows that layers keep, per column; what lives while a band passes, per pixel of it.
        self.kept = live.marked // PROBE
        self.passing = REARRANGED * live.most // (PROBE * (PROBE if self.in_bands else 2 * PROBE))

    def encoder_band(self, grid: PixelGrid) -> tuple[int, int]:
        """Pixels that pass the encoder together, about, and columns of them at most."""
        most = on_device(ENCODER_BAND, grid.device)
        if grid.device.type == "cpu":
            return most, MAX_COLUMNS
        # Narrow strips would be many small kernels there; fewer pixels pass where a wide network keeps much of each.
        pixels = max(min(most, on_device(ACTIVATIONS, grid.device) // self.passing), MIN_ROWS * MAX_COLUMNS)
        return pixels, pixels // MIN_ROWS

    def features(self, grid: PixelGrid, keep: bool) -> int:
        """Bytes of the features that are held."""
        return grid.lr[1] * self.depth * self.itemsize * (grid.lr[0] if keep else self.rows_held(grid))

    def rows_held(self, grid: PixelGrid) -> int:
        """Rows of the features that are held where not all are: of a band that is upsampled, and of one that is classified."""
        windows = [w.features for w in grid.widest]
        most = max(b[1] - a[0] for a, b in zip(windows, [*windows[1:], windows[-1]], strict=True))
        return min(most + self._newest(grid), grid.lr[0])

    def _newest(self, grid: PixelGrid) -> int:
        """Rows of the features that the encoder makes at a time."""
        if not self.in_bands:
            return 0
        (height, width), (pixels, columns) = grid.lr, self.encoder_band(grid)
        strip = width // -(-width // columns)
        # With the last ones come those that waited for rows below.
        return min(max(MIN_ROWS, pixels // strip) + self.reach, height)

    def working_set(
        self, grid: PixelGrid, keep: bool, sampled: int, itemsize: int, streamed: bool, step: int = 1
    ) -> WorkingSet:
        """The working set.

        Args:
            grid: the rows.
            keep: all features are kept.
            sampled: bytes for what the decision is solved on.
            itemsize: of a value of the image.
            streamed: rows are read and written in bands of their own.
            step: rows that are written together.
        """
        (h, w), (height, width) = grid.lr, grid.size
        tallest = max(b - a for a, b in grid.bands()) + 2
        lr_rows = max(window.features[1] - window.features[0] for window in grid.widest)
        passing, products = self.encoder_band(grid)[0], 0
        if grid.device.type != "cpu":
            passing = min(passing, h * w)
            # A GPU makes those of an MLP's first layer for all features of a band, in float32.
            products = lr_rows * w * self.units * 4
        values = max(self.classes + 1, 2 * self.channels) * self.itemsize + 3
        moving = passing * self.passing + w * self.kept if self.in_bands else 0
        moving += (0 if keep else self._newest(grid)) * w * self.depth * self.itemsize + tallest * width * values
        moving += 2 * lr_rows * w * self.channels * self.itemsize + max(window.height for window in grid.widest) * width
        fixed = self.features(grid, keep) + on_device(HEAP, grid.device) * moving + products + sampled
        fixed += 0 if self.in_bands else h * w * self.passing
        if not streamed:
            return WorkingSet(fixed)
        out_row, row = self.channels * itemsize * width, self.channels * itemsize * w
        # Of an image that is read once all rows are kept where its features are.
        fixed += (h if keep else 0) * row + 3 * lr_rows * row + 3 * step * out_row
        return WorkingSet(fixed, 3 * out_row + 2 * row * h // height, tallest, height)


def budget_sample(grid: PixelGrid) -> int:
    """Pixels on which a budget is solved."""
    return BUDGET_SAMPLE if grid.size[0] * grid.size[1] <= BUDGET_SAMPLE else BUDGET_SAMPLE // 4


def waiting_sample(images: int) -> int:
    """Pixels that are looked at before its turn in each of so many images."""
    return max(WAITING_SAMPLE, BUDGET_SAMPLE // max(images, 1))


def sampled_rows(grid: PixelGrid, pixels: int) -> Iterator[tuple[int, int]]:
    """Bands of all rows where the output has at most `pixels` pixels, else single rows at equal distances."""
    step = grid.sample(pixels)
    if step <= 1:
        yield from grid.bands()
    else:
        yield from ((y, y + 1) for y in range(step // 2, grid.size[0], step))
