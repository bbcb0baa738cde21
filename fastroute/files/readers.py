"""Readers of files and arrays for networks: image files through the decoders of :mod:`fastroute.io`, zarr by chunks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastroute import io
from fastroute._extras import remedy
from fastroute.io.decoded import Decoded
from fastroute.io.hidden import REACH, fill_hidden
from fastroute.io.picture import Metadata, Origin
from fastroute.io.read import AUTO, OpenPicture, explained, open_picture
from fastroute.io.samples import check_range

ZARR = ".zarr"


def require(name: str) -> Any:
    """Import a package of the extra `large`.

    Raises:
        ImportError: it is not installed. The message says how to install it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"large files need {name}: {remedy('large')}") from error


class TensorReader:
    """An image in memory as a :class:`fastroute.Reader`."""

    def __init__(self, image: Tensor) -> None:  # [C, H, W]
        self.image, self.dtype = image, image.dtype
        self.shape: tuple[int, int, int] = tuple(image.shape)  # type: ignore[assignment]

    def read(self, y0: int, y1: int, x0: int, x1: int) -> Tensor:  # [C, y1 - y0, x1 - x0]
        """See :class:`fastroute.Reader`."""
        return self.image[:, y0:y1, x0:x1]


class PictureReader:
    """The colours of a picture in an open file, as :func:`fastroute.files.pictures.upscale_picture` passes them to a network.

    Args:
        opened: the picture.
        channels: number of channels of the network.
    """

    def __init__(self, opened: OpenPicture, channels: int) -> None:
        self.opened, self.dtype = opened, opened.dtype
        self.colours = opened.channels - opened.alpha
        self.shape = (3 if channels == 3 else self.colours, opened.height, opened.width)

    def read(self, y0: int, y1: int, x0: int, x1: int) -> Tensor:  # [C, y1 - y0, x1 - x0]
        """See :class:`fastroute.Reader`."""
        if not self.opened.alpha:
            color = self.opened.read(y0, y1, x0, x1)
        else:
            # Hidden colours are replaced by visible ones nearby.
            top, left = max(y0 - REACH, 0), max(x0 - REACH, 0)
            bottom, right = min(y1 + REACH, self.opened.height), min(x1 + REACH, self.opened.width)
            around = self.opened.read(top, bottom, left, right)
            color = fill_hidden(around[:-1], around[-1])[:, y0 - top : y1 - top, x0 - left : x1 - left]
        return color.expand(self.shape[0], -1, -1) if self.colours == 1 else color


class ZarrPixels:
    """A zarr array (H, W, C) or (H, W) of uint8, uint16 or floating point, by rectangles."""

    def __init__(self, array: Any, white: float) -> None:
        shape = tuple(array.shape)
        if len(shape) not in (2, 3) or 0 in shape or (len(shape) == 3 and shape[2] > 4):
            raise ValueError(f"an array must be (H, W) or (H, W, C) with 1 to 4 channels; its shape is {shape}")
        kind = np.dtype(array.dtype)
        if kind not in (np.uint8, np.uint16) and kind.kind != "f":
            raise ValueError(f"an array must be of uint8, uint16 or floating point; it is of {kind}")
        self.array, self.white, (self.height, self.width) = array, white, shape[:2]
        self.channels = shape[2] if len(shape) == 3 else 1
        self.dtype = kind if kind.kind == "u" else np.dtype(np.float32)

    def read(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:  # [y1 - y0, x1 - x0, C]
        """Its pixels."""
        pixels = np.asarray(self.array[y0:y1, x0:x1]).astype(self.dtype, copy=False)
        pixels = pixels.reshape(y1 - y0, x1 - x0, self.channels)
        if self.dtype.kind == "u":
            return pixels
        return check_range(pixels if self.white == 1 else pixels / np.float32(self.white))


@contextmanager
def open_source(path: str | Path, *, max_pixels: int | str | None = AUTO, white: float = 1.0,
                memory: int | None = None) -> Iterator[OpenPicture]:  # fmt: skip
    """An image file or a zarr array, read by rectangles.

    Args:
        path: path of the file, or of a folder that ends in .zarr.
        max_pixels, white: see :func:`fastroute.io.read_picture`. By default, the pixels of a TIFF are not limited.
        memory: limit in bytes. A file that must be decoded as a whole and would take more is refused.

    Raises:
        fastroute.io.ImageError: the file is missing, unreadable or not an image.
        ImportError: `path` is a zarr array, and zarr is not installed.
    """
    path = Path(path)
    if path.suffix.lower() != ZARR:
        with explained(path):
            if max_pixels == AUTO and path.is_file() and io.format_of_file(path) == "TIFF":
                # Strips and tiles are never all in memory.
                max_pixels = None
        with open_picture(path, max_pixels=max_pixels, white=white, memory=memory) as opened:
            yield opened
        return
    if not path.is_dir():
        raise io.ImageError(f"cannot read {path}: {'not a folder' if path.exists() else 'No such file or directory'}")
    zarr = require("zarr")
    with explained(path):
        pixels = ZarrPixels(zarr.open_array(str(path), mode="r"), white)
        empty = np.empty((0, 0, pixels.channels), pixels.dtype)
        kind = "gray" if pixels.channels < 3 else "rgb"
        opened = OpenPicture(path, pixels, Decoded(empty, kind, Metadata(), 1, Origin("ZARR")), 0)
    yield opened


@contextmanager
def open_reader(path: str | Path, channels: int) -> Iterator[PictureReader]:
    """An image file or a zarr array for networks of `channels` channels, without transparency; see :func:`open_source`."""
    with open_source(path) as opened:
        yield PictureReader(opened, channels)


@contextmanager
def open_twice(path: str | Path, **options: Any) -> Iterator[tuple[OpenPicture, OpenPicture]]:
    """Open a picture for two threads, one for colours and one for transparency. A picture decoded as a whole is shared."""
    with ExitStack() as stack:
        first = stack.enter_context(open_source(path, **options))
        again = first.alpha and first.origin.format in ("TIFF", "ZARR")
        yield first, stack.enter_context(open_source(path, **options)) if again else first


def dtype_of(dtype: torch.dtype) -> np.dtype:
    """NumPy's name for a type of pixels."""
    kind: np.dtype = torch.empty(0, dtype=dtype).numpy().dtype
    return kind
