"""A rectangle of an image as an image of its own, and a rectangle of a result on its way to the whole of it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastroute.runtime.protocols import Reader, Writer
from fastroute.runtime.rows import Span


class RectangleReader:
    """Rows and columns of an image, as a :class:`fastroute.Reader`.

    Args:
        reader: reader of the whole image.
        rows, columns: the first of them and one past the last.
    """

    def __init__(self, reader: Reader, rows: Span, columns: Span) -> None:
        self.reader, self.top, self.left, self.dtype = reader, rows[0], columns[0], reader.dtype
        self.shape = (reader.shape[0], rows[1] - rows[0], columns[1] - columns[0])

    def read(self, y0: int, y1: int, x0: int, x1: int) -> Tensor:  # [C, y1 - y0, x1 - x0]
        """See :class:`fastroute.Reader`."""
        return self.reader.read(self.top + y0, self.top + y1, self.left + x0, self.left + x1)


class RectangleWriter:
    """Passes rows of a result on to the writer of the whole result, in its steps; what lies outside of a rectangle is dropped.

    Args:
        writer: writer of the whole result.
        shift: the row and the column of the whole result at which the rows that are written here begin.
        rows: first row of the whole result to pass on and one past the last: multiples of the writer's `row_step`, or the end
            of the result.
        columns: first column of the whole result to pass on and one past the last.

    Attributes:
        held: bytes of the largest incomplete step that waits for more rows; 0 if none does.
    """

    def __init__(self, writer: Writer, shift: tuple[int, int], rows: Span, columns: Span) -> None:
        self.writer, self.shift, self.rows, self.columns = writer, shift, rows, columns
        self.step, self.held = int(getattr(writer, "row_step", 1)), 0
        self.begin, self.filled, self.waiting = 0, 0, torch.empty(0)

    def write(self, y: int, x: int, pixels: Tensor) -> None:  # [C, h, w]
        """See :class:`fastroute.Writer`."""
        top, left = y + self.shift[0], x + self.shift[1]
        begin = max(left, self.columns[0])
        pixels = pixels[:, :, begin - left : self.columns[1] - left]
        first, end = max(top, self.rows[0]), min(top + pixels.shape[1], self.rows[1])
        while first < end:
            last = min((first // self.step + 1) * self.step, self.rows[1])  # where the step ends that `first` lies in
            part = pixels[:, first - top : min(end, last) - top]
            if not self.filled and part.shape[1] == last - first:
                # Whole steps are passed on from where they lie.
                whole = max(end // self.step * self.step, last) if end < self.rows[1] else end
                self.writer.write(first, begin, pixels[:, first - top : whole - top])
                first = whole
                continue
            if not self.filled:
                self.begin, self.waiting = first, pixels.new_empty(pixels.shape[0], last - first, pixels.shape[2])
            self.waiting[:, self.filled : self.filled + part.shape[1]] = part
            self.filled += part.shape[1]
            first += part.shape[1]
            if first == last:
                self.writer.write(self.begin, begin, self.waiting)
                self.filled, self.waiting = 0, torch.empty(0)
