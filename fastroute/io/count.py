"""Counting the pictures in a file."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from fastroute.io.recognise import HEAD, format_of_bytes

# Bits of a TIFF's NewSubfileType: a smaller copy of another page, and a mask of one. Neither is a picture of its own.
REDUCED, MASK = 1, 4


def count_pictures(path: str | Path) -> int:
    """The number of pages of a TIFF, without thumbnails and masks, or of frames of an animation; 1 for any other image.

    Nothing is decoded.

    Raises:
        OSError, ValueError: the file cannot be read or is damaged. :func:`fastroute.io.read_picture` says why.
    """
    with open(path, "rb") as file:
        name = format_of_bytes(file.read(HEAD))
        file.seek(0)
        if name == "TIFF":
            import tifffile

            with tifffile.TiffFile(file) as tiff:
                return max(1, sum(is_picture(page) for page in tiff.pages))
        if name == "PNG":
            return _png_frames(file)
        if name == "WEBP":
            return _webp_frames(file)
        if name in ("GIF", "AVIF"):
            from PIL import Image

            Image.preinit()
            Image.init()
            if name in Image.OPEN:
                return int(getattr(Image.OPEN[name][0](file, str(path)), "n_frames", 1))
    return 1


def is_picture(page: object) -> bool:
    """Whether a page of a TIFF is a picture of its own."""
    return not int(getattr(page, "subfiletype", 0) or 0) & (REDUCED | MASK)


def _png_frames(file: BinaryIO) -> int:
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        if name == b"acTL" and length == 8:
            return max(1, int(struct.unpack(">I", file.read(4))[0]))
        if name in (b"IDAT", b"IEND"):
            break
        file.seek(length + 4, 1)
    return 1


def _webp_frames(file: BinaryIO) -> int:
    file.seek(12)
    count = 0
    while len(head := file.read(8)) == 8:
        name, length = struct.unpack("<4sI", head)
        count += name == b"ANMF"
        file.seek(length + length % 2, 1)
    return max(1, count)
