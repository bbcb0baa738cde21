"""Rows of images on their way to a device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastroute.runtime.protocols import Reader
from fastroute.runtime.transfer import to_device

Span = tuple[int, int]


class Source(Protocol):
    """Images that are read by rows, from the top to the bottom of one after the other; a step back starts anew.

    Attributes:
        shape: (B, C, H, W).
        dtype, device: of the rows that it gives.
        step: rows that are read at a time, about, where they are not in memory.
    """

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device
    step: int

    def get(self, images: Span, rows: Span) -> Tensor:  # [images, C, rows, W]
        """Those rows of those images, on `device`."""


class TensorSource:
    """Images in memory."""

    def __init__(self, images: Tensor, device: torch.device) -> None:  # [B, C, H, W]
        self.images, self.device, self.dtype, self.step = images, device, images.dtype, 1
        self.shape: tuple[int, int, int, int] = tuple(images.shape)  # type: ignore[assignment]

    def get(self, images: Span, rows: Span) -> Tensor:  # [images, C, rows, W]
        """See :class:`Source`."""
        return to_device(self.images[images[0] : images[1], :, rows[0] : rows[1]], self.device)


class ReaderSource:
    """The image of a reader; the rows asked for last are kept.

    Args:
        reader: what is read.
        device: where the rows are wanted.
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
    """Rows that are made from top to bottom, in chunks, when they are asked for.

    Args:
        chunks: each some tensors (..., n, w) side by side, whose rows follow those of the chunk before.
        whole: (..., H, W) to keep all rows in; without it, those that were released are let go.
        end: rows that are in `whole` already.
    """

    def __init__(self, chunks: Iterable[Sequence[Tensor]], whole: Tensor | None = None, end: int = 0) -> None:
        self.chunks: Iterator[Sequence[Tensor]] = iter(chunks)
        self.whole, self.end = whole, end
        self.held: list[tuple[int, Sequence[Tensor]]] = []

    def rows(self, begin: int, end: int) -> Tensor:  # [..., end - begin, w]
        """Rows `begin` to `end`, the last one excluded."""
        while self.end < end:
            chunk = next(self.chunks)
            count = chunk[0].shape[-2]
            if self.whole is None:
                self.held.append((self.end, chunk))
            else:
                left = 0
                for part in chunk:
                    self.whole[..., self.end : self.end + count, left : left + part.shape[-1]] = part
                    left += part.shape[-1]
            self.end += count
        if self.whole is not None:
            return self.whole[..., begin:end, :]
        pieces = [
            (top, [part[..., max(begin - top, 0) : end - top, :] for part in chunk]) for top, chunk in self.held if top < end
        ]
        lines = [(max(top, begin) - begin, parts) for top, parts in pieces if parts[0].shape[-2]]
        if len(lines) == 1 and len(lines[0][1]) == 1:
            return lines[0][1][0]
        # Straight into place: joined side by side first, they would be held once more.
        first = lines[0][1]
        size = (*first[0].shape[:-2], end - begin, sum(part.shape[-1] for part in first))
        # As they are: in channels_last a pixel's values lie side by side.
        layout = torch.channels_last if first[0].ndim == 4 and first[0].stride(1) == 1 else torch.contiguous_format
        joined = torch.empty(size, dtype=first[0].dtype, device=first[0].device, memory_format=layout)
        for top, parts in lines:
            left = 0
            for part in parts:
                joined[..., top : top + part.shape[-2], left : left + part.shape[-1]] = part
                left += part.shape[-1]
        return joined

    def release(self, before: int) -> None:
        """Rows before `before` are not asked for any more."""
        self.held = [(top, chunk) for top, chunk in self.held if top + chunk[0].shape[-2] > before]
