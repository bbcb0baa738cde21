"""The two ends of an upscale, for both routers: where rows come from and where they go.

An image in memory on the router's device is read and written in place. Any other passes in bands: a thread writes a band while
the next one is computed, and a GPU copies beside its kernels. The rows that are computed together are the same in either case,
and so are the results, bit for bit.
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
    """See the module.

    Attributes:
        source: where the rows come from.
        make_sink: where bands of so many output rows go.
        in_place: input and output are worked on where they lie.
        step: output rows that are written together.
    """

    source: Source
    make_sink: Callable[[int], Sink]
    in_place: bool
    step: int = 1

    @contextmanager
    def opened(self, rows_in: int, rows_out: int) -> Iterator[Sink]:
        """The sink, for bands of so many rows of input and output; all is written when the block ends."""
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
    """Images and results on the host, of which bands go to `device` and come back."""

    def store(span: Span, top: int, band: Tensor) -> None:
        output[span[0] : span[1], :, top : top + band.shape[2]] = band

    shape: tuple[int, int, int, int] = tuple(output.shape)  # type: ignore[assignment]
    return Endpoints(TensorSource(images, device), lambda rows: BandSink(store, shape, output.dtype, device, rows), False)


def streamed(reader: Reader, writer: Writer, size: tuple[int, int], device: torch.device) -> Endpoints:
    """From a reader to a writer of `size`."""
    source = ReaderSource(reader, device)
    shape = (1, source.shape[1], *size)
    step = int(getattr(writer, "row_step", 1))

    def store(span: Span, top: int, band: Tensor) -> None:
        writer.write(top, 0, band[0])

    return Endpoints(source, lambda rows: BandSink(store, shape, source.dtype, device, rows, step), False, step)


def output_like(op: str, images: Tensor, size: tuple[int, ...]) -> Tensor:
    """Uninitialised memory for a result: an ordinary tensor, which may be changed in place, where `images` are.

    Raises:
        MemoryError, torch.OutOfMemoryError: there is not so much.
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
    """Where an image for a router on `device` may lie: there or on the host."""
    on_host = isinstance(image, Tensor) and image.device.type == "cpu"
    return torch.device("cpu") if on_host else device
