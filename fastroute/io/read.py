"""Reads files as pictures and tensors, as a whole or by rectangles, through the same decoders."""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastroute._arguments import real
from fastroute.buffers import is_exhausted
from fastroute.io.decoded import Decoded, Limits
from fastroute.io.files import ImageError, ImageMemoryError
from fastroute.io.picture import Picture
from fastroute.io.recognise import HEAD, format_of_bytes

AUTO = "auto"
# EXIF's orientations from 5 on exchange rows and columns. These orientations reverse the upright rows and columns.
ROWS_TURNED, COLUMNS_TURNED = (3, 4, 7, 8), (2, 3, 6, 7)


class _Pixels(Protocol):
    """The pixels as a file stores them, read by rectangles."""

    height: int
    width: int

    def read(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray: ...


class OpenPicture:
    """A picture in an open file, upright, read by rectangles.

    Attributes:
        height, width: in pixels.
        channels: 1 for gray, 3 for RGB, and one more for alpha.
        dtype: type of the pixels: uint8, uint16 or float32.
        kind, metadata, origin: see :class:`fastroute.io.Picture`.
        held: bytes of decoded pixels that stay in memory while the picture is open.
    """

    def __init__(self, path: str | Path, pixels: _Pixels, facts: Decoded, held: int) -> None:
        self.path, self.pixels, self.held = path, pixels, held
        self.kind, self.orientation, self.origin = facts.kind, facts.orientation, facts.origin
        self.channels, self.dtype = facts.pixels.shape[2], torch.from_numpy(facts.pixels[:0, :0]).dtype
        turned = self.orientation >= 5
        self.dropped = False
        self.height, self.width = (pixels.width, pixels.height) if turned else (pixels.height, pixels.width)
        dpi = facts.metadata.dpi
        self.metadata = replace(facts.metadata, dpi=dpi[::-1]) if turned and dpi is not None else facts.metadata

    def without_alpha(self) -> OpenPicture:
        """The same picture without its transparency."""
        if not self.alpha:
            return self
        other = copy(self)
        other.dropped, other.channels = True, self.channels - 1
        return other

    @property
    def alpha(self) -> bool:
        """Whether the last channel is transparency."""
        return self.channels in (2, 4)

    def read(self, y0: int, y1: int, x0: int, x1: int) -> Tensor:  # [C, y1 - y0, x1 - x0]
        """The pixels of rows y0 to y1 and columns x0 to x1, excluding y1 and x1.

        Raises:
            ImageError: the pixels are damaged, or are floating point beyond [0, 2].
        """
        with explained(self.path):
            if self.orientation in ROWS_TURNED:
                y0, y1 = self.height - y1, self.height - y0
            if self.orientation in COLUMNS_TURNED:
                x0, x1 = self.width - x1, self.width - x0
            if self.orientation >= 5:
                y0, y1, x0, x1 = x0, x1, y0, y1
            pixels = _upright(self.pixels.read(y0, y1, x0, x1), self.orientation)
            pixels = pixels[:, :, :-1] if self.dropped else pixels
            return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, 2, 0)))

    def picture(self) -> Picture:
        """The whole picture.

        Raises:
            ImageError: see :meth:`read`.
        """
        check = getattr(self.pixels, "check_whole", None)
        if check is not None:
            with explained(self.path):
                check()
        plain = Picture.of_channels(self.read(0, self.height, 0, self.width))
        return replace(plain, kind=self.kind, metadata=self.metadata, origin=self.origin)


class _InMemory:
    def __init__(self, pixels: np.ndarray) -> None:  # [H, W, C]
        self.pixels, (self.height, self.width) = pixels, pixels.shape[:2]

    def read(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        return self.pixels[y0:y1, x0:x1]


@contextmanager
def open_picture(
    path: str | Path,
    *,
    max_pixels: int | str | None = AUTO,
    white: float = 1.0,
    memory: int | None = None,
    data: bytes | None = None,
) -> Iterator[OpenPicture]:
    """Open the picture of a file; see :func:`read_picture` for the other arguments and the errors.

    Strips and tiles of a TIFF are decoded when they are read. Any other file is decoded as a whole, and refused if that would
    take more bytes than `memory`.
    """
    if not 0 < real("read_picture", "white", white) < math.inf:
        raise ValueError(f"read_picture: white must be positive and finite; got {white}")
    limit = Limits(pixel_limit() if isinstance(max_pixels, str) else max_pixels, memory)
    with explained(path):
        if data is None:
            _check_file(path)
        with open(path, "rb") if data is None else BytesIO(data) as file:
            name = format_of_bytes(file.read(HEAD))
            file.seek(0)
            if name != "TIFF":
                facts = _decode(file.read(), name, limit, white)
    if name != "TIFF":
        yield OpenPicture(path, _InMemory(facts.pixels), facts, facts.pixels.nbytes)
        return
    import tifffile

    from fastroute.io import tiff_read

    with explained(path):
        tiff = tifffile.TiffFile(path if data is None else BytesIO(data))
    with tiff:
        with explained(path):
            source = tiff_read.TiffSource(tiff, limit, white)
            empty = np.empty((0, 0, source.meaning.channels), source.meaning.dtype)
            facts = Decoded(empty, source.meaning.kind, source.metadata, source.orientation, source.origin)
            opened: _Pixels = source
            held = source.held
        yield OpenPicture(path, opened, facts, held)


def read_picture(
    path: str | Path, *, max_pixels: int | str | None = AUTO, white: float = 1.0, data: bytes | None = None
) -> Picture:
    """Read an image file: PNG, JPEG, WebP, TIFF, BMP, GIF, Netpbm, AVIF, HEIF or JPEG 2000, recognised by its content.

    The picture is turned upright according to its EXIF orientation. Gray, RGB and palette pictures keep their alpha channel and
    depth: up to 8 bits become uint8 and 9 to 16 bits uint16, both at full range, and floating point becomes float32. CMYK
    becomes sRGB by its embedded profile, or without one by the plain formula. If a file holds several pictures, the first is
    read; ``origin.pictures`` is their number, and ``origin.notes`` says what was left out.

    Args:
        path: the file.
        max_pixels: a larger picture is refused before anything is allocated; None for no limit. By default, "auto", twice
            ``PIL.Image.MAX_IMAGE_PIXELS``.
        white: the value that floating-point samples have where they are white, say 255.
        data: the content of the file, if it is in memory. Messages still name `path`.

    Raises:
        TypeError, ValueError: `white` is no positive number.
        ImageError: the file is missing, unreadable, no image, damaged, cut short or too large; or of a kind that is not known:
            signed samples, or floating point beyond [0, 2] once divided by `white`, or not a number.
    """
    with open_picture(path, max_pixels=max_pixels, white=white, data=data) as opened:
        return opened.picture()


def read_image(path: str | Path, *, max_pixels: int | str | None = AUTO, white: float = 1.0) -> Tensor:
    """Read an image file as a uint8 RGB tensor (3, H, W), upright according to its EXIF orientation, without transparency.

    Depths beyond 8 bits are scaled. :func:`read_picture` keeps depth, transparency and metadata, and has the same arguments.

    Raises:
        ImageError: see :func:`read_picture`.
    """
    return read_picture(path, max_pixels=max_pixels, white=white).as_bits(8).color.contiguous()


def pixel_limit() -> int | None:
    """The number of pixels beyond which a file is refused, which is Pillow's limit."""
    return None if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS


def _check_file(path: str | Path) -> None:
    if not stat.S_ISREG(Path(path).stat().st_mode) and not Path(path).is_dir():
        raise ImageError(f"cannot read {path}: not a regular file")


def _decode(data: bytes, name: str | None, limit: Limits, white: float) -> Decoded:
    """Decode any file but a TIFF. Decoders are loaded when they are needed, because some take as long as a small picture."""
    if name == "PNG":
        from fastroute.io import png

        return png.decode(data, limit)
    if name == "JPEG":
        from fastroute.io import jpeg

        return jpeg.decode(data, limit)
    if name == "PNM":
        from fastroute.io import pnm

        return pnm.decode(data, limit, white)
    if name in ("WEBP", "GIF", "BMP"):
        from fastroute.io import plain

        return plain.decode(data, name, limit)
    from fastroute.io import boxes

    if name is None:
        raise ValueError("not an image of a known format" if data else "it is empty")
    decoders = {"AVIF": boxes.decode_avif, "HEIF": boxes.decode_heif, "JPEG2000": boxes.decode_jpeg2000}
    return decoders[name](data, limit)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:  # [H, W, C]
    """Turn pixels upright according to their EXIF orientation."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if orientation in ROWS_TURNED else 1, :: -1 if orientation in COLUMNS_TURNED else 1]


@contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Turn any error of a decoder into an ImageError that names the file."""
    try:
        yield
    except ImageError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_exhausted(error):
            raise ImageError(f"cannot read {path}: {_damaged(error)}") from error
        remedy = "cut it, or store it as TIFF, whose strips or tiles `upscale_file` reads one by one"
        raise ImageMemoryError(f"cannot read {path}: out of memory; {remedy}") from error
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # libraries may raise anything on damaged files
        raise ImageError(f"cannot read {path}: {_damaged(error)}") from error


def _damaged(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) and str(error) else f"it is damaged ({error or type(error).__name__})"
