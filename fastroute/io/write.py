"""Writes tensors and pictures to files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastroute._arguments import whole
from fastroute.buffers import is_exhausted
from fastroute.io.files import ImageError, ImageMemoryError, check_writable, write_atomically
from fastroute.io.metadata import carried, save_options
from fastroute.io.picture import BITS, Picture


class Format(NamedTuple):
    """The limits of a file format: bits per channel, the longest side, and whether it has an alpha channel."""

    bits: tuple[int, ...]
    side: int
    alpha: bool
    options: dict[str, Any]


FORMATS = {
    "PNG": Format((8, 16), 2**31 - 1, True, {}),
    "JPEG": Format((8,), 65500, False, {"quality": 95, "subsampling": 0}),
    # The hidden colours below full transparency are kept, as in the other formats.
    "WEBP": Format((8,), 16383, True, {"quality": 95, "exact": True}),
    "TIFF": Format((8, 16, 32), 2**31 - 1, True, {}),
    "BMP": Format((8,), 2**31 - 1, False, {}),
}
# The effort of lossless WebP. It is as fast as Pillow's default, whatever the quality of the lossy form.
LOSSLESS_EFFORT = 80
# What libwebp's encoder says where it gets no memory.
NO_MEMORY = ("encoding error 1", "encoding error 2")
ALPHA_FORMATS = "PNG, WebP or TIFF"


def format_of(path: str | Path) -> str:
    """The format that the ending of `path` names, see :func:`check_writable`."""
    return Image.registered_extensions()[Path(path).suffix.lower()]


def check_holds(path: str | Path, height: int, width: int, alpha: Tensor | None = None) -> None:  # alpha [h, w]
    """Check that the format of `path` can hold a picture of this size, with this alpha unless it is opaque.

    Raises:
        ImageError: the format has no alpha, or a side has too many pixels.
    """
    name = format_of(path)
    known = FORMATS[name]
    if max(height, width) > known.side:
        raise ImageError(f"cannot write {path}: {name} holds at most {known.side:,} pixels a side; it has {width} x {height}")
    if alpha is not None and not known.alpha and not _is_opaque(alpha):
        raise ImageError(
            f"cannot write {path}: {name} holds no transparency; choose {ALPHA_FORMATS}, or drop the alpha channel"
        )


def not_kept(path: str | Path, picture: Picture) -> list[str]:
    """What :func:`write_picture` would leave out or change in the format of the file's ending, in whole sentences.

    The result is empty if everything is kept. What was lost in reading is in ``picture.origin.notes``.
    """
    name = format_of(path)
    deepest = max(FORMATS[name].bits)
    lost = [f"{name} holds {deepest} bits a channel: the {picture} was rounded"] if picture.bits > deepest else []
    return lost + carried(picture.metadata, name, _as_gray(picture, name)).lost


def check_quality(op: str, quality: int | None) -> None:
    """`quality` is None or a whole number from 1 to 100.

    Raises:
        TypeError: the quality is not a whole number.
        ValueError: the quality is out of range.
    """
    if quality is not None and not 1 <= whole(op, "quality", quality, sys.maxsize, -sys.maxsize) <= 100:
        raise ValueError(f"{op}: quality must lie in 1 … 100; got {quality}")


def write_picture(path: str | Path, picture: Picture, *, quality: int | None = None) -> None:
    """Write a picture in the format of the file's ending, completely or not at all.

    A gray picture is written as gray if the format has it. TIFF keeps the depth, PNG up to 16 bits; other formats get 8 bits,
    clamped and rounded. Profile, EXIF, XMP, resolution and texts are kept as far as the format can hold them; :func:`not_kept`
    lists what is not.

    Args:
        path: path of the file, whose ending names the format.
        picture: the picture.
        quality: quality of JPEG and WebP, 1 to 100; 95 by default. Lossless formats have none.

    Raises:
        ImageError: see :func:`check_writable` and :func:`check_holds`; or the encoder failed.
        ValueError: the quality is out of range.
    """
    check_quality("write_picture", quality)
    check_writable(path)
    check_holds(path, picture.height, picture.width, picture.alpha)
    name = format_of(path)
    try:
        picture = picture.as_bits(min(picture.bits, max(FORMATS[name].bits)))
        pixels = interleaved(picture, FORMATS[name].alpha)
        write_atomically(path, lambda file: _encode(file, picture, pixels, name, quality))
    except Exception as error:  # libraries may raise anything
        if is_exhausted(error) or str(error) in NO_MEMORY:
            remedy = "`upscale_file` writes .png, .tif and .zarr in bands, within memory_limit"
            raise ImageMemoryError(f"cannot write {path}: out of memory; {remedy}") from error
        raise ImageError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def write_image(path: str | Path, image: Tensor) -> None:  # [C, H, W]
    """Write an image (C, H, W) of uint8, uint16 or float in [0, 1]: C is 1 for gray, 3 for RGB, 2 and 4 with alpha.

    The format is that of the file's ending; see :func:`write_picture` for what it keeps. The file is complete or not written.

    Raises:
        ImageError: see :func:`check_writable` and :func:`check_holds`; or the encoder failed.
        ValueError: the number of dimensions or channels, or the dtype, is not supported.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 2, 3, 4):
        raise ValueError(f"write_image: image must be (C, H, W) with 1 to 4 channels; got {tuple(image.shape)}")
    if image.is_floating_point():
        image = image.float()
    if image.dtype not in BITS:
        raise ValueError(f"write_image: image must be uint8, uint16 or floating; got {image.dtype}")
    write_picture(path, Picture.of_channels(image.cpu()))


def _encode(file: BinaryIO, picture: Picture, pixels: np.ndarray, name: str, quality: int | None) -> None:
    gray = _as_gray(picture, name)
    held = carried(picture.metadata, name, gray, (picture.height, picture.width))
    if name == "TIFF":
        from fastroute.io import tiff_write

        tiff_write.encode(file, pixels, gray, picture.alpha is not None, held)
    elif name == "PNG":
        from fastroute.io import png

        png.encode(file, pixels, png.chunks_of(picture.metadata, held))
    else:
        encoder = dict(FORMATS[name].options)
        if quality is not None and "quality" in encoder:
            encoder["quality"] = quality
        elif name == "WEBP" and picture.origin.format == "WEBP" and picture.origin.lossless:
            encoder |= {"lossless": True, "quality": LOSSLESS_EFFORT}
        Image.fromarray(pixels).save(file, format=name, **encoder, **save_options(held, name))


def _as_gray(picture: Picture, name: str) -> bool:
    """Whether the pixels are stored as gray: Pillow writes gray WebP as RGB, whose profile must then be one of RGB."""
    return picture.kind == "gray" and name != "WEBP"


def interleaved(picture: Picture, with_alpha: bool) -> np.ndarray:  # -> [H, W] or [H, W, C]
    """The channels side by side, with gray as a single channel."""
    planes = [*picture.color[: 1 if picture.kind == "gray" else 3]]
    if with_alpha and picture.alpha is not None:
        planes.append(picture.alpha)
    arrays = [plane.numpy() for plane in planes]
    return np.ascontiguousarray(arrays[0]) if len(arrays) == 1 else np.stack(arrays, axis=-1)


def _is_opaque(alpha: Tensor) -> bool:
    peak = {torch.uint8: 255, torch.uint16: 65535}.get(alpha.dtype, 1)
    return bool((alpha.numpy() == peak).all())
