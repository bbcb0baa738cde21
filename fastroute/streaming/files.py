"""Files as readers and writers: TIFF by strips and tiles, zarr arrays by chunks, any other image file decoded whole."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastroute import io
from fastroute.io.files import part_prefix, permissions_of, target_of
from fastroute.streaming.protocols import ArrayReader, ArrayWriter, Reader, Writer

TIFF, ZARR = (".tif", ".tiff"), ".zarr"
# Side of the tiles and chunks that are written.
TILE = 256
# What TIFF files are read by strips and tiles: gray or RGB, upright, its channels side by side.
PHOTOMETRICS = {1, 2}
DTYPES = ("uint8", "uint16", "float32")


def require(name: str) -> Any:
    """A package of the extra `large`.

    Raises:
        ImportError: it is not installed; says how to install it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f'large files need {name}: run pip install ".[large]" in a copy of the source') from error


class TensorReader:
    """An image in memory as a :class:`fastroute.Reader`."""

    def __init__(self, image: Tensor) -> None:  # [C, H, W]
        self.image, self.dtype = image, image.dtype
        self.shape: tuple[int, int, int] = tuple(image.shape)  # type: ignore[assignment]

    def read(self, y0: int, y1: int, x0: int, x1: int) -> Tensor:  # [C, y1 - y0, x1 - x0]
        """See :class:`fastroute.Reader`."""
        return self.image[:, y0:y1, x0:x1]


class TiffReader:
    """The first page of a TIFF file, of which the strips or tiles under a rectangle are decoded.

    Args:
        page: of an open `tifffile.TiffFile`.
    """

    def __init__(self, page: Any) -> None:
        self.page = page
        height, width, channels = (*page.shape, 1)[:3]
        self.shape = (int(channels), int(height), int(width))
        self.dtype = torch.from_numpy(np.empty(0, dtype=page.dtype)).dtype
        # Rows and columns of a segment, and segments side by side.
        self.rows, self.columns = page.chunks[:2]
        self.across = -(-width // self.columns)

    def read(self, y0: int, y1: int, x0: int, x1: int) -> Tensor:  # [C, y1 - y0, x1 - x0]
        """See :class:`fastroute.Reader`."""
        pixels = np.empty((y1 - y0, x1 - x0, self.shape[0]), dtype=self.page.dtype)
        for row in range(y0 // self.rows, -(-y1 // self.rows)):
            for column in range(x0 // self.columns, -(-x1 // self.columns)):
                segment = self._segment(row * self.across + column)
                top, left = row * self.rows, column * self.columns
                here = slice(max(y0, top), min(y1, top + self.rows)), slice(max(x0, left), min(x1, left + self.columns))
                part = segment[here[0].start - top : here[0].stop - top, here[1].start - left : here[1].stop - left]
                pixels[here[0].start - y0 : here[0].stop - y0, here[1].start - x0 : here[1].stop - x0] = part
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def _segment(self, number: int) -> np.ndarray:  # [rows, columns, C]
        file = self.page.parent.filehandle
        file.seek(self.page.dataoffsets[number])
        data = file.read(self.page.databytecounts[number])
        # Empty ones are left out of sparse files.
        decoded = self.page.decode(data, number)[0] if data else None
        if decoded is None:
            return np.zeros((self.rows, self.columns, self.shape[0]), dtype=self.page.dtype)
        return decoded[0]

    @staticmethod
    def suits(page: Any) -> bool:
        """Whether it is read by strips and tiles."""
        orientation = page.tags.valueof("Orientation", 1)
        axes = page.axes in ("YX", "YXS") and page.planarconfig == 1
        return axes and orientation == 1 and page.photometric in PHOTOMETRICS and str(page.dtype) in DTYPES


class ChannelReader:
    """A reader of gray or transparent images for networks of three colours."""

    def __init__(self, reader: Reader) -> None:
        self.reader, self.dtype = reader, reader.dtype
        self.shape = (3, *reader.shape[1:])

    def read(self, y0: int, y1: int, x0: int, x1: int) -> Tensor:  # [3, y1 - y0, x1 - x0]
        """See :class:`fastroute.Reader`."""
        pixels = self.reader.read(y0, y1, x0, x1)
        return pixels[:3] if pixels.shape[0] >= 3 else pixels[:1].expand(3, -1, -1)


class TiffWriter:
    """A BigTIFF file of tiles, as they are, each written where it lies.

    Args:
        file: open for reading and writing.
        shape: (C, H, W).
        dtype: of the pixels.
    """

    row_step = TILE

    def __init__(self, file: BinaryIO, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.file, (self.channels, self.height, self.width) = file, shape
        self.dtype = torch.empty(0, dtype=dtype).numpy().dtype
        tifffile = require("tifffile")
        with tifffile.TiffWriter(file, bigtiff=True) as writer:
            writer.write(
                None,
                shape=(self.height, self.width, self.channels) if self.channels > 1 else (self.height, self.width),
                dtype=self.dtype,
                tile=(TILE, TILE),
                photometric="rgb" if self.channels == 3 else "minisblack",
                planarconfig="contig" if self.channels > 1 else None,
                metadata=None,
            )
        file.seek(0)
        with tifffile.TiffFile(file) as made:
            self.offsets = made.pages[0].dataoffsets

    def write(self, y: int, x: int, pixels: Tensor) -> None:  # [C, h, w]
        """See :class:`fastroute.Writer`: whole rows of tiles."""
        across = -(-self.width // TILE)
        for top in range(0, pixels.shape[1], TILE):
            for column in range(across):
                part = pixels[:, top : top + TILE, column * TILE : (column + 1) * TILE].permute(1, 2, 0).numpy()
                tile = np.zeros((TILE, TILE, self.channels), dtype=self.dtype)
                tile[: part.shape[0], : part.shape[1]] = part
                self.file.seek(self.offsets[(y + top) // TILE * across + column])
                self.file.write(tile.tobytes())


@contextmanager
def open_reader(path: str | Path, channels: int) -> Iterator[Reader]:
    """An image file or a zarr array (H, W, C) or (H, W) for networks of so many channels; alpha is left out.

    Raises:
        fastroute.io.ImageError: it is missing, unreadable or no image.
        ImportError: a zarr array, and zarr is not installed.
    """
    path = Path(path)
    if path.suffix.lower() == ZARR:
        if not path.is_dir():
            raise io.ImageError(f"cannot read {path}: {'not a folder' if path.exists() else 'No such file or directory'}")
        try:
            array = require("zarr").open_array(str(path), mode="r")
        except (OSError, ValueError) as error:
            raise io.ImageError(f"cannot read {path}: {error}") from error
        yield _fitting(ArrayReader(array), channels)
        return
    if path.suffix.lower() in TIFF and path.is_file():
        tifffile = require("tifffile")
        try:
            file = tifffile.TiffFile(path)
        except (OSError, ValueError) as error:
            raise io.ImageError(f"cannot read {path}: {error}") from error
        with file:
            if file.pages and TiffReader.suits(file.pages[0]):
                yield _fitting(TiffReader(file.pages[0]), channels)
                return
    yield _fitting(TensorReader(io.read_picture(path).color), channels)


def _fitting(reader: Reader, channels: int) -> Reader:
    return ChannelReader(reader) if channels == 3 and reader.shape[0] in (1, 2, 4) else reader


def check_target(path: str | Path) -> None:
    """Fail now rather than after the work.

    Raises:
        ValueError: its ending names no format that is written in tiles, or nothing can be written there.
        ImportError: the package that writes it is not installed.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (*TIFF, ZARR):
        raise ValueError(f"upscale_file: target must end in .tif, .tiff or .zarr, which are written in tiles; got {path}")
    require("zarr" if suffix == ZARR else "tifffile")
    if suffix != ZARR:
        io.check_writable(path)
        return
    if path.exists() and not path.is_dir():
        raise ValueError(f"upscale_file: cannot write {path}: it is a file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"upscale_file: cannot write {path}: the folder {path.parent} does not exist or may not be written")


@contextmanager
def open_writer(path: str | Path, shape: tuple[int, int, int], dtype: torch.dtype) -> Iterator[Writer]:
    """A tiled BigTIFF file or a zarr array (H, W, C), which takes its name when the block ends: whole, or not at all."""
    path = target_of(path)
    part = path.parent / f"{part_prefix(path)}{secrets.token_hex(6)}.part"
    try:
        if path.suffix.lower() != ZARR:
            with open(part, "xb+") as file:
                yield TiffWriter(file, shape, dtype)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.fileno(), permissions_of(path))
            os.replace(part, path)
            return
        channels, height, width = shape
        kind = torch.empty(0, dtype=dtype).numpy().dtype
        size, chunks = (height, width, channels), (min(2 * TILE, height), min(2 * TILE, width), channels)
        array = require("zarr").open_array(str(part), mode="w", shape=size, chunks=chunks, dtype=kind)
        yield ArrayWriter(array, row_step=chunks[0])
        _replace_folder(part, path)
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def _replace_folder(new: Path, path: Path) -> None:
    """Give `new` the name `path`; what was there is removed when that is done."""
    old = new.with_name(f"{new.name}.old")
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
