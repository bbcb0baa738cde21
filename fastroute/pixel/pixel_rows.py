"""The rows of the features and of the image that a band of output pixels needs."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fastroute.models.pcsr import relative_coordinates
from fastroute.ops.pixel_mlp import Layers
from fastroute.rewrite.row_stages import MAX_COLUMNS, MIN_ROWS, make_stage, rows_in_bands, unsupported_reasons
from fastroute.runtime.devices import on_device
from fastroute.runtime.memory_plan import ACTIVATIONS, REARRANGED, LiveBytes, WorkingSet

# The most pixels of a band, of the output and of the encoder's input. They bound the memory, but give threads enough work. A
# GPU takes an 8K image in one band, if memory allows.
OUTPUT_BAND = {"cpu": 1 << 20, "cuda": 1 << 25}
ENCODER_BAND = {"cpu": 1 << 15, "cuda": 1 << 21}
# Pixels of the image that an output band corresponds to. In a GPU's large bands, the features count too.
INPUT_BAND = {"cpu": sys.maxsize, "cuda": 1 << 21}
# By how many a GPU divides these numbers where less memory is allowed, the last one in any case.
BAND_PARTS = (1, 2, 4)
# Under a budget, an image of at most this many output pixels is classified as a whole. On a GPU it then waits for nothing. A
# larger one is first classified on rows spread over it, with a quarter as many pixels. For 2-means, the second number is the
# limit.
BUDGET_SAMPLE = {"cpu": 1 << 22, "cuda": 1 << 26}
ADAPTIVE_SAMPLE = 1 << 25
# Pixels of rows spread over an image that are classified together: their features are gathered first.
SAMPLE_BAND = {"cpu": 1 << 16, "cuda": 1 << 23}
# The least number of sampled pixels of an image whose turn under a shared budget is still to come.
WAITING_SAMPLE = 1 << 16
# Bytes per sampled pixel: for the logit of a class and a search in it, and for a score, which is held twice.
BUDGET_BYTES, ADAPTIVE_BYTES = 18, 20
# Rows and columns of the band on which the memory of an encoder is counted.
PROBE = 16
# The largest number of sizes of images whose coordinates are kept.
PLACES = 16

# Tensors that come and go with each band lie in the C library's heap, which takes up to this many times as much. Once large
# blocks have been freed, all but the largest allocations share the heap, and the gaps between them fit nothing larger.
HEAP = {"cpu": 2, "cuda": 1}

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Window:
    """Rows of the features, and the rows of the output that they correspond to.

    Attributes:
        features: first row and one past the last.
        output: the same for the output, at the ratio of the whole image.
    """

    features: tuple[int, int]
    output: tuple[int, int]

    @property
    def height(self) -> int:
        """Output rows."""
        return self.output[1] - self.output[0]

    def within(self, begin: int, end: int) -> tuple[int, int]:
        """Output rows, counted from the first one of this window."""
        return begin - self.output[0], end - self.output[0]


@dataclass(frozen=True)
class PixelGrid:
    """The rows of an image and of its output.

    Attributes:
        lr, size: height and width of the image and of the output.
        device: the device that processes them, which decides how large a band is.
        parts: by how many the size of a band is divided to save memory.
    """

    lr: tuple[int, int]
    size: tuple[int, int]
    device: torch.device = HOST
    parts: int = 1

    def window(self, begin: int, end: int) -> Window:
        """The features that output rows `begin` to `end` read, and one row more on either side.

        Feature rows and output rows of a window have the ratio of the whole image, and begin at multiples of it. So a pixel has
        the same position within its feature as in the whole image, to the last bit.
        """
        h, height = self.lr[0], self.size[0]
        parts = math.gcd(h, height)
        low, high = h // parts, height // parts  # feature rows and output rows of the smallest window
        first = max(begin * h // height - 1, 0) // low
        last = -(-min(-(-end * h // height) + 1, h) // low)
        return Window((first * low, last * low), (first * high, last * high))

    def bands(self) -> list[tuple[int, int]]:
        """The rows (first, one past the last) of bands of nearly equal height."""
        height, width = self.size
        count = -(-height * width * self.parts // on_device(OUTPUT_BAND, self.device))
        count = max(count, -(-self.lr[0] * self.lr[1] * self.parts // on_device(INPUT_BAND, self.device)))
        edges = [height * i // count for i in range(count + 1)]
        return [(a, b) for a, b in pairwise(edges) if b > a]

    def sample(self, pixels: int) -> int:
        """The distance of rows that hold at most `pixels` pixels together."""
        step, high = -(-self.size[0] * self.size[1] // pixels), self.size[0] // math.gcd(self.lr[0], self.size[0])
        # Otherwise all of them would have the same position within their features.
        while step > 1 and math.gcd(step, high) > 1:
            step += 1
        return step

    @property
    def overlapping(self) -> bool:
        """Whether the windows of bands are so large that all features must be held."""
        return any(2 * (w.features[1] - w.features[0]) >= self.lr[0] for w in self.widest)

    @property
    def widest(self) -> list[Window]:
        """The windows of all bands, with one row more on either side."""
        return [self.window(max(a - 1, 0), min(b + 1, self.size[0])) for a, b in self.bands()]


class PixelMemory:
    """The memory that the pixel path needs.

    Args:
        encoder: the prepared encoder.
        mlps: layers of the upsamplers and of the classifier.
        channels: number of channels of the images.
        depth: number of channels of the features.
        classes: number of classes.
        dtype: type of the features.
    """

    def __init__(
        self, encoder: nn.Module, mlps: Sequence[Layers], channels: int, depth: int, classes: int, dtype: torch.dtype
    ) -> None:
        self.channels, self.depth, self.classes, self.itemsize, self.dtype = channels, depth, classes, dtype.itemsize, dtype
        self.in_bands = not unsupported_reasons(encoder)
        self.reach = make_stage(encoder).reach if self.in_bands else 0
        self.units = max((weight.shape[0] for mlp in mlps for weight, _ in mlp), default=1)
        device = next(encoder.parameters()).device
        x = torch.zeros(1, self.channels, 2 * PROBE, PROBE, dtype=dtype, device=device)
        with torch.no_grad():
            encoder(x)  # a first run may prepare weights
        with torch.no_grad(), LiveBytes() as live:
            if self.in_bands:
                for _ in rows_in_bands(encoder, lambda rows, cols: x[:, :, rows, cols], 2 * PROBE, PROBE, 0, PROBE):
                    live.mark()
            else:
                encoder(x)
        self._places: dict[tuple[object, ...], Tensor] = {}
        # The bytes that layers keep, per column, and those alive while a band passes, per pixel of the band.
        self.kept = live.marked // PROBE
        self.passing = REARRANGED * live.most // (PROBE * (PROBE if self.in_bands else 2 * PROBE))

    def place(self, grid: PixelGrid) -> Tensor:  # [H + W]
        """The coordinates of :func:`fastroute.models.pcsr.relative_coordinates`, kept for the next images of the same size."""
        key = (grid.lr, grid.size, grid.device)
        if key not in self._places:
            # An ordinary tensor, whatever the context is.
            with torch.inference_mode(False):
                like = torch.empty(1, dtype=self.dtype, device=grid.device).expand(1, 1, *grid.lr)
                found = relative_coordinates(like, grid.size)
            if len(self._places) >= PLACES:
                self._places.clear()
            self._places[key] = found
            return found
        return self._places[key]

    def encoder_band(self, grid: PixelGrid) -> tuple[int, int]:
        """About how many pixels pass the encoder together, and the largest number of their columns."""
        most = on_device(ENCODER_BAND, grid.device)
        if grid.device.type == "cpu":
            return most, MAX_COLUMNS
        # On a GPU, narrow strips would mean many small kernels. Fewer pixels pass if a wide network keeps much for each.
        pixels = max(min(most, on_device(ACTIVATIONS, grid.device) // self.passing), MIN_ROWS * MAX_COLUMNS)
        return pixels, pixels // MIN_ROWS

    def features(self, grid: PixelGrid, keep: bool) -> int:
        """The bytes of the features that are held."""
        return grid.lr[1] * self.depth * self.itemsize * (grid.lr[0] if keep else self.rows_held(grid))

    def gathered(self, grid: PixelGrid) -> int:
        """The bytes of the features of sampled rows that are classified together."""
        rows = min(on_device(SAMPLE_BAND, grid.device) // grid.size[1] + 1, grid.size[0])
        # Rows that are gathered one by one are joined; a GPU holds their first layer too.
        each = 2 * self.depth * self.itemsize + (0 if grid.device.type == "cpu" else 4 * self.units)
        return rows * grid.lr[1] * each

    def rows_held(self, grid: PixelGrid) -> int:
        """The number of feature rows held if not all are: those of a band that is upsampled, and of one that is classified."""
        windows = [w.features for w in grid.widest]
        most = max(b[1] - a[0] for a, b in zip(windows, [*windows[1:], windows[-1]], strict=True))
        return min(most + self._newest(grid), grid.lr[0])

    def _newest(self, grid: PixelGrid) -> int:
        """The number of feature rows that the encoder makes at a time."""
        if not self.in_bands:
            return 0
        (height, width), (pixels, columns) = grid.lr, self.encoder_band(grid)
        strip = width // -(-width // columns)
        # The last step also makes the rows that waited for rows below them.
        return min(max(MIN_ROWS, pixels // strip) + self.reach, height)

    def working_set(
        self, grid: PixelGrid, keep: bool, sampled: int, itemsize: int, streamed: bool, step: int = 1
    ) -> WorkingSet:
        """The working set.

        Args:
            grid: the rows of the image and of the output.
            keep: whether all features are kept.
            sampled: bytes of the sample on which the decision is solved.
            itemsize: bytes of a value of the image.
            streamed: whether rows are read and written in bands of their own.
            step: number of rows that are written together.
        """
        (h, w), (height, width) = grid.lr, grid.size
        tallest = max(b - a for a, b in grid.bands()) + 2
        lr_rows = max(window.features[1] - window.features[0] for window in grid.widest)
        passing, products = self.encoder_band(grid)[0], 0
        if grid.device.type != "cpu":
            passing = min(passing, h * w)
            # A GPU computes the outputs of an MLP's first layer for all features of a band, in float32.
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
        # If all features of an image that is read once are kept, so are its rows.
        fixed += (h if keep else 0) * row + 3 * lr_rows * row + 3 * step * out_row
        return WorkingSet(fixed, 3 * out_row + 2 * row * h // height, tallest, height)


def budget_sample(grid: PixelGrid) -> int:
    """The number of pixels on which a budget is solved."""
    whole = on_device(BUDGET_SAMPLE, grid.device)
    return whole if grid.size[0] * grid.size[1] <= whole else whole // 4


def waiting_sample(images: int) -> int:
    """The number of pixels that are sampled before its turn in each of several images."""
    return max(WAITING_SAMPLE, BUDGET_SAMPLE["cpu"] // max(images, 1))


def sampled_rows(grid: PixelGrid, pixels: int) -> list[range]:
    """The rows on which an image is sampled, in parts that are classified together.

    They are all rows, band by band, if the output has at most `pixels` pixels, else rows at equal distances.
    """
    step = grid.sample(pixels)
    if step <= 1:
        return [range(*band) for band in grid.bands()]
    rows = range(step // 2, grid.size[0], step)
    together = max(on_device(SAMPLE_BAND, grid.device) // grid.size[1], 1)
    return [rows[first : first + together] for first in range(0, len(rows), together)]
