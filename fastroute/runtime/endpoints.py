"""The two ends of an upscale, for both routers: where rows come from and where they go.

An image in memory on the router's device is read and written in place. Any other image passes through in bands: a thread writes
one band while the next is computed, and a GPU copies while its kernels run. The same rows are computed together in either case,
so the results are the same, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastroute import buffers
from fastroute.runtime.protocols import Reader, Writer
from fastroute.runtime.rows import ReaderSource, Source, Span, TensorSource
from fastroute.runtime.sinks import BandSink, Sink, TensorSink


@dataclass(frozen=True)
class Endpoints:
    """The source and the destination of one call.

    Attributes:
        source: where the rows come from.
        make_sink: makes the destination for bands of a given number of output rows.
        in_place: whether input and output are read and written where they lie.
        step: number of output rows that are written together.
        held: bytes that the writer holds on its own.
    """

    source: Source
    make_sink: Callable[[int], Sink]
    in_place: bool
    step: int = 1
    held: int = 0

    @contextmanager
    def opened(self, rows_in: int, rows_out: int) -> Iterator[Sink]:
        """The sink, for bands of a given number of input and output rows. Everything is written when the block ends."""
        self.source.step = rows_in
        sink = self.make_sink(rows_out)
        try:
            yield sink
            sink.close()
        except BaseException:
            sink.abort()
            raise


def in_memory(images: Tensor, output: Tensor, device: torch.device) -> Endpoints:  # [B, C, h, w], [B, C, H, W]
    """Images and results in memory, on `device` or on the host."""
    if images.device == device:
        return Endpoints(TensorSource(images, device), lambda rows: TensorSink(output), True)
    return in_bands(images, output, device)


def in_bands(images: Tensor, output: Tensor, device: torch.device) -> Endpoints:  # [B, C, h, w], [B, C, H, W]
    """Images and results on the host; their bands are copied to `device` and back."""

    def store(span: Span, top: int, band: Tensor) -> None:  # [images, C, rows, W]
        output[span[0] : span[1], :, top : top + band.shape[2]] = band

    shape: tuple[int, int, int, int] = tuple(output.shape)  # type: ignore[assignment]
    return Endpoints(TensorSource(images, device), lambda rows: BandSink(store, shape, output.dtype, device, rows), False)


def streamed(reader: Reader, writer: Writer, size: tuple[int, int], device: torch.device) -> Endpoints:
    """From a reader to a writer of `size`."""
    source = ReaderSource(reader, device)
    shape = (1, source.shape[1], *size)
    step, held = int(getattr(writer, "row_step", 1)), int(getattr(writer, "held", 0))

    def store(span: Span, top: int, band: Tensor) -> None:  # [images, C, rows, W]
        writer.write(top, 0, band[0])

    return Endpoints(source, lambda rows: BandSink(store, shape, source.dtype, device, rows, step), False, step, held)


def output_like(op: str, images: Tensor, size: tuple[int, ...]) -> Tensor:  # [B, C, H, W]
    """Uninitialised memory for a result on the device of `images`: an ordinary tensor, which may be changed in place.

    Raises:
        MemoryError, torch.OutOfMemoryError: there is not enough memory.
    """
    try:
        with torch.inference_mode(False):
            return buffers.empty(size, images.dtype, images.device)
    except (MemoryError, RuntimeError) as error:
        if not buffers.is_exhausted(error):
            raise
        kind: type[Exception] = MemoryError
        advice = "`stream` and `upscale_file` write it in bands, within memory_limit"
        if images.device.type != "cpu":
            kind, advice = torch.OutOfMemoryError, "give the image on the CPU, and the result is there too"
        needed = math.prod(size) * images.dtype.itemsize
        raise kind(f"{op}: out of memory: the result takes {needed / 1e6:.0f} MB; {advice}") from error


def home(image: object, device: torch.device) -> torch.device:
    """The devices on which an image for a router on `device` may lie: that device or the host."""
    on_host = isinstance(image, Tensor) and image.device.type == "cpu"
    return torch.device("cpu") if on_host else device
