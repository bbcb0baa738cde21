"""Writers of files in bands: TIFF by tiles, PNG by rows, zarr by chunks. Other formats are collected first."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastroute import io
from fastroute.files.alpha import enlarge_rows
from fastroute.files.readers import ZARR, OpenPicture, dtype_of, require
from fastroute.io.files import new_folder, remove_parts, why_not_writable, written_atomically
from fastroute.io.metadata import Carried, carried
from fastroute.io.picture import Metadata, Picture, converted, describe
from fastroute.io.write import FORMATS, check_holds, format_of, write_picture
from fastroute.runtime.protocols import ArrayWriter, Writer

# The side of the tiles and chunks that are written.
TILE = 256
# The folder of an array contains one of these files.
ARRAY_FILES = ("zarr.json", ".zarray", ".zgroup")
# The rows of a PNG that are filtered together, and the bytes of a chunk.
PNG_ROWS, PNG_CHUNK = 32, 1 << 20
# The most bytes that encoding a collected result takes, per pixel and byte of a sample, including the result.
ENCODING = {"JPEG": 5, "WEBP": 12, "BMP": 5}


class TiffWriter:
    """A BigTIFF file of uncompressed tiles, each written at its place.

    Args:
        file: a file that is open for reading and writing.
        shape: (C, H, W). The last of 2 or 4 channels is transparency.
        dtype: type of the pixels.
        held: metadata.
    """

    row_step = TILE

    def __init__(self, file: BinaryIO, shape: tuple[int, int, int], dtype: torch.dtype, held: Carried) -> None:
        from fastroute.io import tiff_write

        self.file, (self.channels, self.height, self.width) = file, shape
        self.dtype = dtype_of(dtype)
        stored = (self.height, self.width, self.channels)
        gray, alpha = self.channels < 3, self.channels in (2, 4)
        self.offsets = tiff_write.frame(file, stored, self.dtype, TILE, gray, alpha, held)

    def write(self, y: int, x: int, pixels: Tensor) -> None:  # [C, h, w]
        """Write whole rows of tiles, see :class:`fastroute.Writer`."""
        across = -(-self.width // TILE)
        for top in range(0, pixels.shape[1], TILE):
            for column in range(across):
                part = pixels[:, top : top + TILE, column * TILE : (column + 1) * TILE].permute(1, 2, 0).numpy()
                tile = np.zeros((TILE, TILE, self.channels), dtype=self.dtype)
                tile[: part.shape[0], : part.shape[1]] = part
                self.file.seek(self.offsets[(y + top) // TILE * across + column])
                self.file.write(tile.tobytes())


class PngWriter:
    """A PNG file that is filtered and compressed row by row.

    Args:
        file: a file that is open for writing.
        shape: (C, H, W). The last of 2 or 4 channels is transparency.
        dtype: type of the pixels. Floating point is written as 16 bits.
        chunks: metadata.
    """

    row_step = PNG_ROWS

    def __init__(
        self, file: BinaryIO, shape: tuple[int, int, int], dtype: torch.dtype, chunks: list[tuple[str, bytes]]
    ) -> None:
        from fastroute.io import png

        self.file, self.chunk = file, png.chunk
        channels, height, self.width = shape
        size = min(dtype_of(dtype).itemsize, 2)
        colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
        header = self.width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8 * size, colour, 0, 0, 0])
        file.write(png.MAGIC + png.chunk("IHDR", header))
        for name, content in chunks:
            file.write(png.chunk(name, content))
        self.left, self.pixel = height, channels * size
        self.above = np.zeros(self.width * self.pixel, np.uint8)
        self.machine, self.waiting = zlib.compressobj(png.LEVEL), b""

    def write(self, y: int, x: int, pixels: Tensor) -> None:  # [C, h, w]
        """See :class:`fastroute.Writer`."""
        for top in range(0, pixels.shape[1], PNG_ROWS):
            band = pixels[:, top : top + PNG_ROWS]
            band = converted(band, 16) if band.is_floating_point() else band
            part = np.ascontiguousarray(band.permute(1, 2, 0).numpy())
            rows = part.astype(part.dtype.newbyteorder(">")).view(np.uint8).reshape(part.shape[0], -1)
            self.waiting += self.machine.compress(filtered(rows, self.above, self.pixel).tobytes())
            self.above = rows[-1].copy()
            self.left -= rows.shape[0]
            if len(self.waiting) >= PNG_CHUNK:
                self._flush()
        if self.left == 0:
            self.waiting += self.machine.flush()
            self._flush()
            self.file.write(self.chunk("IEND", b""))

    def _flush(self) -> None:
        self.file.write(self.chunk("IDAT", self.waiting))
        self.waiting = b""


def filtered(rows: np.ndarray, above: np.ndarray, pixel: int) -> np.ndarray:  # [n, bytes], [bytes] -> [n, 1 + bytes]
    """Filter rows of a PNG by the filter with the smallest sum of differences, as libpng does, and add its number."""
    up = np.concatenate([above[None], rows[:-1]])
    left, corner = np.zeros_like(rows), np.zeros_like(rows)
    left[:, pixel:], corner[:, pixel:] = rows[:, :-pixel], up[:, :-pixel]
    best, least = rows, _differences(rows)
    number = np.zeros(len(rows), np.uint8)
    for kind, predict in enumerate((lambda: left, lambda: up, lambda: _mean(left, up), lambda: _paeth(left, up, corner)), 1):
        rest = rows - predict()
        total = _differences(rest)
        better = total < least
        best = np.where(better[:, None], rest, best)
        number[better], least = kind, np.minimum(total, least)
    return np.concatenate([number[:, None], best], axis=1)


def _differences(rest: np.ndarray) -> np.ndarray:
    return np.abs(rest.view(np.int8).astype(np.int16)).sum(axis=1, dtype=np.int64)


def _mean(left: np.ndarray, up: np.ndarray) -> np.ndarray:
    return ((left.astype(np.uint16) + up) >> 1).astype(np.uint8)


def _paeth(left: np.ndarray, up: np.ndarray, corner: np.ndarray) -> np.ndarray:
    a, b, c = (part.astype(np.int16) for part in (left, up, corner))
    to_left, to_up, to_corner = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
    return np.where((to_left <= to_up) & (to_left <= to_corner), left, np.where(to_up <= to_corner, up, corner))


class ResultWriter:
    """Writes the three colours of a network's output as a picture, gray as gray, and adds the transparency.

    Args:
        writer: writer of the file.
        opened: source of the transparency.
        gray: whether the mean of the three colours is written.
        size: height and width of the result.
    """

    def __init__(self, writer: Writer, opened: OpenPicture, gray: bool, size: tuple[int, int]) -> None:
        self.writer, self.opened, self.gray, self.size = writer, opened, gray, size
        self.row_step = int(getattr(writer, "row_step", 1))

    def write(self, y: int, x: int, pixels: Tensor) -> None:  # [C, h, w]
        """See :class:`fastroute.Writer`."""
        from fastroute.files.pictures import mean_of_channels

        if not self.gray and not self.opened.alpha:
            self.writer.write(y, x, pixels)
            return
        for top in range(0, pixels.shape[1], self.row_step):
            part = pixels[:, top : top + self.row_step]
            planes = [mean_of_channels(part) if self.gray else part]
            if self.opened.alpha:
                size = (self.opened.height, self.opened.width)
                rows, columns = (y + top, y + top + part.shape[1]), (x, x + part.shape[2])
                planes.append(enlarge_rows(self._alpha, size, self.size, rows, columns)[None])
            self.writer.write(y + top, x, torch.cat(planes) if len(planes) > 1 else planes[0])

    def _alpha(self, y0: int, y1: int) -> Tensor:  # [y1 - y0, w]
        return self.opened.read(y0, y1, 0, self.opened.width)[-1]


class Collected:
    """A result whose format encodes it as a whole."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.pixels = torch.empty(shape, dtype=dtype)

    def write(self, y: int, x: int, pixels: Tensor) -> None:  # [C, h, w]
        """See :class:`fastroute.Writer`."""
        self.pixels[:, y : y + pixels.shape[1], x : x + pixels.shape[2]] = pixels


def memory_of(path: str | Path, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[int, int]:
    """The bytes that writing (C, H, W) takes beside the bands: all the time, and at the end."""
    path = Path(path)
    channels, height, width = shape
    row = channels * width * dtype.itemsize
    name = "" if path.suffix.lower() == ZARR else format_of(path)
    if name in ENCODING:
        return row * height, row * height * ENCODING[name] // dtype.itemsize
    return (row * PNG_ROWS * 12 if name == "PNG" else row * TILE * 2), 0


def check_target(path: str | Path) -> None:
    """Check before the work that `path` can be written.

    Raises:
        ValueError: the ending names no format that can be written, or nothing can be written at this path.
        ImportError: the package that writes this format is not installed.
    """
    path = Path(path)
    if path.suffix.lower() != ZARR:
        io.check_writable(path)
        return
    require("zarr")
    if path.exists() and not path.is_dir():
        raise io.ImageError(f"cannot write {path}: it is a file")
    if path.is_dir() and any(path.iterdir()) and not any((path / name).exists() for name in ARRAY_FILES):
        raise io.ImageError(f"cannot write {path}: it is a folder that holds something else than an array")
    reason = "" if path.is_dir() else why_not_writable(path)
    if reason:
        raise io.ImageError(f"cannot write {path}: {reason}")


@contextmanager
def open_writer(
    path: str | Path, shape: tuple[int, int, int], opened: OpenPicture, quality: int | None = None
) -> Iterator[Writer]:
    """A file for the result (C, H, W), which gets its name when the block ends: it is complete or does not appear.

    Args:
        path: .zarr for an array (H, W, C), or any ending of a file that can be written.
        shape: shape of the pixels. The last of 2 or 4 channels is transparency.
        opened: the original picture, with its type and metadata.
        quality: see :func:`fastroute.io.write_picture`.

    Raises:
        fastroute.io.ImageError: the file cannot be written, for example because the disk is full.
    """
    path = Path(path)
    channels, height, width = shape
    dtype, metadata = opened.dtype, opened.metadata
    remove_parts([path])
    try:
        if path.suffix.lower() == ZARR:
            with new_folder(path) as folder:
                size, chunks = (height, width, channels), (min(2 * TILE, height), min(2 * TILE, width), channels)
                array = require("zarr").open_array(str(folder), mode="w", shape=size, chunks=chunks, dtype=dtype_of(dtype))
                yield ArrayWriter(array, row_step=chunks[0])
            return
        name = format_of(path)
        held = carried(metadata, name, channels < 3, (height, width))
        if name in ENCODING:
            collected = Collected(shape, dtype)
            yield collected
            alpha = collected.pixels[-1] if channels in (2, 4) else None
            color = collected.pixels[:1].expand(3, -1, -1) if channels < 3 else collected.pixels[:3]
            write_picture(path, Picture(color, alpha, opened.kind, metadata, opened.origin), quality=quality)
            return
        with written_atomically(path) as file:
            yield _writer(name, file, shape, dtype, metadata, held)
    except OSError as error:
        raise io.ImageError(f"cannot write {path}: {error.strerror or error}") from error


def _writer(
    name: str, file: BinaryIO, shape: tuple[int, int, int], dtype: torch.dtype, metadata: Metadata, held: Carried
) -> Writer:
    if name == "TIFF":
        return TiffWriter(file, shape, dtype, held)
    from fastroute.io import png

    return PngWriter(file, shape, dtype, png.chunks_of(metadata, held))


def check_result(path: Path, size: tuple[int, int], opened: OpenPicture) -> None:
    """Check before the work that the format can hold the result.

    Raises:
        fastroute.io.ImageError: the picture has transparency and the format does not, or the sides are too long.
    """
    if path.suffix.lower() == ZARR:
        return
    check_holds(path, *size)
    if opened.alpha and not FORMATS[format_of(path)].alpha:
        step = 256
        for top in range(0, opened.height, step):
            check_holds(path, *size, opened.read(top, min(top + step, opened.height), 0, opened.width)[-1])


def left_of(limit: int, held: int, path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> int:
    """The bytes of a limit that are left for the work.

    Args:
        limit: limit for everything.
        held: bytes that the input takes.
        path, shape, dtype: path, shape and type of the result.

    Raises:
        fastroute.io.ImageError: the result is encoded as a whole and does not fit.
    """
    always, at_end = memory_of(path, shape, dtype)
    most = max(always + held, at_end)
    if at_end and most > limit:
        raise io.ImageError(
            f"cannot write {path}: its format is encoded whole, which takes about {most / 1e6:.0f} MB here, "
            f"more than the memory limit of {limit / 1e6:.0f} MB; choose .png, .tif or .zarr, which are written in bands"
        )
    return type(limit)(max(limit - held - always, 1))


def lost(path: Path, opened: OpenPicture) -> list[str]:
    """What the format of the result does not keep, see :func:`fastroute.io.not_kept`."""
    name = "ZARR" if path.suffix.lower() == ZARR else format_of(path)
    bits, kept = 8 * opened.dtype.itemsize, max(FORMATS[name].bits) if name in FORMATS else 32
    told = [f"{name} holds {kept} bits a channel: the {describe(bits, opened.kind, opened.alpha)} was rounded"]
    return (told if bits > kept else []) + carried(opened.metadata, name, opened.kind == "gray" and name != "WEBP").lost
