"""Some rows of an image as an image of their own, and some rows of a result on their way to the whole of it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastroute.runtime.protocols import Reader, Writer


class RowsReader:
    """Rows `first` to `end` of an image, excluding `end`, as a :class:`fastroute.Reader`."""

    def __init__(self, reader: Reader, first: int, end: int) -> None:
        self.reader, self.first, self.dtype = reader, first, reader.dtype
        channels, _, width = reader.shape
        self.shape = (channels, end - first, width)

    def read(self, y0: int, y1: int, x0: int, x1: int) -> Tensor:  # [C, y1 - y0, x1 - x0]
        """See :class:`fastroute.Reader`."""
        return self.reader.read(self.first + y0, self.first + y1, x0, x1)


class RowsWriter:
    """Passes rows of a result on to the writer of the whole result, in its steps; rows outside of `rows` are dropped.

    Args:
        writer: writer of the whole result.
        shift: the row of the whole result at which the rows that are written here begin.
        rows: first row of the whole result to pass on and one past the last: multiples of the writer's `row_step`, or the end
            of the result.

    Attributes:
        held: bytes of the largest incomplete step that waits for more rows; 0 if none does.
    """

    def __init__(self, writer: Writer, shift: int, rows: tuple[int, int]) -> None:
        self.writer, self.shift, self.rows = writer, shift, rows
        self.step, self.held = int(getattr(writer, "row_step", 1)), 0
        self.begin, self.filled, self.waiting = 0, 0, torch.empty(0)

    def write(self, y: int, x: int, pixels: Tensor) -> None:  # [C, h, w]
        """See :class:`fastroute.Writer`."""
        top = y + self.shift
        first, end = max(top, self.rows[0]), min(top + pixels.shape[1], self.rows[1])
        while first < end:
            last = min((first // self.step + 1) * self.step, self.rows[1])  # where the step ends that `first` lies in
            part = pixels[:, first - top : min(end, last) - top]
            if not self.filled and part.shape[1] == last - first:
                # Whole steps are passed on from where they lie.
                whole = max(end // self.step * self.step, last) if end < self.rows[1] else end
                self.writer.write(first, x, pixels[:, first - top : whole - top])
                first = whole
                continue
            if not self.filled:
                self.begin, self.waiting = first, pixels.new_empty(pixels.shape[0], last - first, pixels.shape[2])
            self.waiting[:, self.filled : self.filled + part.shape[1]] = part
            self.filled += part.shape[1]
            first += part.shape[1]
            if first == last:
                self.writer.write(self.begin, x, self.waiting)
                self.filled, self.waiting = 0, torch.empty(0)
