"""Rows of results on their way from the device to their destination."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from fastroute.runtime.rows import Span
from fastroute.runtime.transfer import to_host

Store = Callable[[Span, int, Tensor], None]


class Sink(Protocol):
    """Images that are written by rows, one image after the other, each from top to bottom."""

    def band(self, images: Span, rows: Span) -> Tensor:  # [images, C, rows, W]
        """The memory for the given rows of the given images. They must follow those of the previous call."""

    def done(self) -> None:
        """Report that the memory which `band` returned has been filled."""

    def close(self) -> None:
        """Report that everything has been written, and wait until it has been stored."""

    def abort(self) -> None:
        """Release the sink after its last band, whether or not everything was written."""


class TensorSink:
    """An image in memory on the device of the networks, written in place."""

    def __init__(self, output: Tensor) -> None:  # [B, C, H, W]
        self.output = output

    def band(self, images: Span, rows: Span) -> Tensor:  # [images, C, rows, W]
        """See :class:`Sink`."""
        return self.output[images[0] : images[1], :, rows[0] : rows[1]]

    def done(self) -> None:
        """See :class:`Sink`."""

    def close(self) -> None:
        """See :class:`Sink`."""

    def abort(self) -> None:
        """See :class:`Sink`."""


class BandSink:
    """Bands of rows that are computed in a buffer, while a thread stores the previous band.

    Args:
        store: is called with the images, the first row and the rows, on the CPU.
        shape: (B, C, H, W) of the whole result.
        dtype, device: type of the rows, and the device on which they are computed.
        target: approximate number of rows of a band.
        step: bands begin and end at multiples of this, except for the end of the last one.
    """

    def __init__(
        self,
        store: Store,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        target: int = 1,
        step: int = 1,
    ) -> None:
        self.store, self.shape, self.dtype, self.device = store, shape, dtype, device
        self.target, self.step = target, step
        self.images, self.begin, self.end = (0, 0), 0, 0  # what the buffer holds
        self.buffer = torch.empty(0)
        self.thread = ThreadPoolExecutor(1, "fastroute-write")
        # It begins now: where memory has run out, the C library ends a process in which a thread begins.
        self.thread.submit(torch.empty, 0).result()
        self.pending: Future[None] | None = None

    def band(self, images: Span, rows: Span) -> Tensor:  # [images, C, rows, W]
        """See :class:`Sink`."""
        if images != self.images or rows[0] != self.end:
            self.images, self.begin, self.end, self.buffer = images, rows[0], rows[0], torch.empty(0)
        count = rows[1] - self.begin
        if self.buffer.ndim != 4 or self.buffer.shape[2] < count:
            self._make_room(self.buffer[:, :, : self.end - self.begin] if self.buffer.ndim == 4 else None, count)
        at = self.end - self.begin
        self.end = rows[1]
        return self.buffer[:, :, at:count]

    def done(self) -> None:
        """See :class:`Sink`."""
        last = self.end == self.shape[2]
        count = self.end - self.begin
        whole = count if last else self.end // self.step * self.step - self.begin
        if whole <= 0 or (count < self.target and not last):
            return
        sent, rest = self.buffer[:, :, :whole], self.buffer[:, :, whole:count]
        self._send(self.images, self.begin, sent)
        self.begin += whole
        self.buffer = torch.empty(0)
        if rest.shape[2]:
            self._make_room(rest, rest.shape[2])

    def close(self) -> None:
        """See :class:`Sink`."""
        try:
            if self.pending is not None:
                self.pending.result()
        finally:
            self.abort()

    def abort(self) -> None:
        """See :class:`Sink`."""
        self.thread.shutdown(wait=True, cancel_futures=True)
        self.pending, self.buffer = None, torch.empty(0)

    def _make_room(self, kept: Tensor | None, rows: int) -> None:  # [images, C, n, W]
        """A buffer of at least `rows` rows that begins with `kept`."""
        # A band, and what is computed beyond its last whole step.
        rows = max(rows, min(self.target + self.step - 1, self.shape[2] - self.begin))
        size = (self.images[1] - self.images[0], self.shape[1], rows, self.shape[3])
        with torch.inference_mode(False):
            buffer = torch.empty(size, dtype=self.dtype, device=self.device)
        if kept is not None:
            buffer[:, :, : kept.shape[2]] = kept
        self.buffer = buffer

    def _send(self, images: Span, top: int, band: Tensor) -> None:  # [images, C, rows, W]
        host, ready = to_host(band)
        # At most one band waits: memory stays bounded, and an error comes up here.
        if self.pending is not None:
            self.pending.result()

        def store() -> None:
            ready()
            self.store(images, top, host)

        self.pending = self.thread.submit(store)
