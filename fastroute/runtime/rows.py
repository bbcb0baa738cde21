"""Rows of images on their way to a device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastroute import buffers
from fastroute.runtime.protocols import Reader
from fastroute.runtime.transfer import to_device

Span = tuple[int, int]


class Source(Protocol):
    """Images that are read by rows, one image after the other, each from top to bottom. A step back starts again.

    Attributes:
        shape: (B, C, H, W).
        dtype, device: dtype and device of the rows that are returned.
        step: approximate number of rows that are read at a time if they are not in memory.
    """

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device
    step: int

    def get(self, images: Span, rows: Span) -> Tensor:  # [images, C, rows, W]
        """The requested rows of the requested images, on `device`."""


class TensorSource:
    """Images in memory."""

    def __init__(self, images: Tensor, device: torch.device) -> None:  # [B, C, H, W]
        self.images, self.device, self.dtype, self.step = images, device, images.dtype, 1
        self.shape: tuple[int, int, int, int] = tuple(images.shape)  # type: ignore[assignment]

    def get(self, images: Span, rows: Span) -> Tensor:  # [images, C, rows, W]
        """See :class:`Source`."""
        return to_device(self.images[images[0] : images[1], :, rows[0] : rows[1]], self.device)


class ReaderSource:
    """The image of a reader. The rows requested last are kept.

    Args:
        reader: source of the image.
        device: device to which the rows are copied.
    """

    def __init__(self, reader: Reader, device: torch.device) -> None:
        self.reader, self.device, self.dtype, self.step = reader, device, reader.dtype, 1
        channels, height, width = reader.shape
        self.shape: tuple[int, int, int, int] = (1, channels, height, width)
        self.begin, self.held = 0, torch.empty(0)

    def get(self, images: Span, rows: Span) -> Tensor:  # [1, C, rows, W]
        """See :class:`Source`."""
        top, bottom = rows
        end = self.begin + (self.held.shape[2] if self.held.ndim == 4 else 0)
        pieces = []
        if self.begin <= top < end:
            pieces.append(self.held[:, :, top - self.begin :])
        else:
            end = top
        if bottom > end:
            pieces.append(self._read(end, min(max(bottom, end + self.step), self.shape[2])))
        self.begin, self.held = top, pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
        return self.held[:, :, : bottom - top]

    def _read(self, top: int, bottom: int) -> Tensor:
        _, channels, _, width = self.shape
        pixels = self.reader.read(top, bottom, 0, width)
        if not isinstance(pixels, Tensor) or pixels.dtype != self.dtype or pixels.shape != (channels, bottom - top, width):
            what = f"{tuple(pixels.shape)} {pixels.dtype}" if isinstance(pixels, Tensor) else type(pixels).__name__
            wanted = f"{(channels, bottom - top, width)} {self.dtype}"
            raise ValueError(f"reader: read({top}, {bottom}, 0, {width}) must give a tensor {wanted}; got {what}")
        return to_device(pixels[None], self.device)


class RowStream:
    """Rows that are made in chunks from top to bottom when they are requested.

    Rows that are not released lie side by side in one buffer and move up when it is full. Separate tensors that outlive the
    ones made between them would leave gaps in the heap that nothing else fits into.

    Args:
        chunks: yields one or several tensors (..., n, w) side by side, whose rows follow those of the chunk before.
        whole: (..., H, W), a tensor in which all rows are kept. Without it, released rows are freed.
        end: number of rows that are in `whole` already.
        room: approximate number of rows held at a time without `whole`. A buffer that is too small is replaced.
    """

    def __init__(
        self,
        chunks: Iterable[Sequence[Tensor]],
        whole: Tensor | None = None,  # [..., H, W]
        end: int = 0,
        room: int = 0,
    ) -> None:
        self.chunks: Iterator[Sequence[Tensor]] = iter(chunks)
        self.buffer, self.end, self.room = whole, end, room
        self.owned = True  # what is not was given, and is not written to
        self.begin = self.needed = 0  # row of the first one in the buffer, and of the first one that may be asked for

    def rows(self, begin: int, end: int) -> Tensor:  # [..., end - begin, w]
        """Rows `begin` to `end`, excluding `end`. They may move when more rows are requested."""
        while self.end < end:
            self._add(next(self.chunks))
        assert self.buffer is not None
        return self.buffer[..., begin - self.begin : end - self.begin, :]

    def release(self, before: int) -> None:
        """Release the rows before `before`, which will not be requested any more."""
        self.needed = max(self.needed, before)

    def _add(self, chunk: Sequence[Tensor]) -> None:  # [..., n, w] each
        first, count = chunk[0], chunk[0].shape[-2]
        if self.buffer is None and len(chunk) == 1:
            self.buffer, self.owned, self.begin, self.end = first, False, self.end, self.end + count
            return
        at = self.end - self.begin
        if self.buffer is None or not self.owned or at + count > self.buffer.shape[-2]:
            at = self._make_room(first, sum(part.shape[-1] for part in chunk), count)
        left = 0
        assert self.buffer is not None
        for part in chunk:
            self.buffer[..., at : at + count, left : left + part.shape[-1]] = part
            left += part.shape[-1]
        self.end += count

    def _make_room(self, like: Tensor, width: int, count: int) -> int:  # [..., n, w]
        """Make room for `count` more rows behind those that are still needed, and return their place."""
        kept = max(self.end - max(self.needed, self.begin), 0)
        old, first = self.buffer, self.end - kept - self.begin
        if old is None or not self.owned or kept + count > old.shape[-2]:
            self.buffer = _rows_like(like, max(kept + count, self.room), width)
            if old is not None:
                self.buffer[..., :kept, :] = old[..., first : first + kept, :]
            self.owned = True
        else:
            # By as many rows at a time as lie between, which do not overlap.
            for top in range(0, kept, first):
                rows = min(first, kept - top)
                old[..., top : top + rows, :] = old[..., first + top : first + top + rows, :]
        self.begin = self.end - kept
        return kept


def _rows_like(x: Tensor, rows: int, width: int) -> Tensor:  # [..., n, w] -> [..., rows, width]
    """Memory for rows in the memory format of `x`: in channels_last, the values of a pixel lie side by side."""
    if x.ndim == 4 and x.stride(1) == 1:
        b, c = x.shape[:2]
        return buffers.empty((b, rows, width, c), x.dtype, x.device).permute(0, 3, 1, 2)
    return buffers.empty((*x.shape[:-2], rows, width), x.dtype, x.device)
