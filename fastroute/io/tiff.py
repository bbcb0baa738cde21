"""TIFF beyond what Pillow does: 16 bits and floating point, and metadata beside them; through tifffile."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tifffile
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from fastroute.io.metadata import (
    DAMAGE,
    DESCRIPTIVE,
    EXIF_IFD,
    GPS_IFD,
    exif_block,
    resized_exif,
    resolution,
    xmp_packet,
)  # fmt: skip
from fastroute.io.picture import Metadata, Picture

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
XMP, ORIENTATION, RESOLUTION_UNIT = 700, 274, 296
INCH, CENTIMETRE = 2, 3
BYTE, ASCII, LONG = 1, 2, 4
PREMULTIPLIED = 1
DEEP = ("uint16", "float16", "float32", "float64")


def is_deep(path: str | Path) -> bool:
    """Whether the file is a TIFF whose channels are deeper than 8 bits.

    Raises:
        ValueError: it is a damaged TIFF.
    """
    with open(path, "rb") as file:
        if file.read(4) not in MAGIC:
            return False
    with tifffile.TiffFile(path) as file:
        return file.pages[0].dtype is not None and file.pages[0].dtype.itemsize > 1


def decode(path: str | Path, limit: int | None) -> tuple[np.ndarray, int, Metadata]:
    """The first picture of a deep TIFF.

    Args:
        path: the file.
        limit: pixels beyond which it is refused, before anything is allocated.

    Returns:
        [H, W, C] uint16 or float32, C = 1 to 4, gray or RGB, with alpha if even; its orientation; and its metadata.

    Raises:
        ValueError: too large, damaged, or of a kind that is not known.
    """
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        height, width, channels = page.imagelength, page.imagewidth, page.samplesperpixel
        if limit is not None and height * width > limit:
            raise ValueError(f"{width} x {height} pixels are more than the limit of {limit:,}")
        kind = page.photometric.name
        colours = {"MINISBLACK": 1, "MINISWHITE": 1, "RGB": 3}.get(kind)
        extra = tuple(int(sample) for sample in page.extrasamples)
        if colours is None or page.dtype.name not in DEEP or channels not in (colours, colours + 1) or page.imagedepth > 1:
            raise ValueError(
                f"a TIFF of {channels} channels of {page.dtype}, {kind}, is not supported; gray or RGB are, of uint16 or floats"
            )
        if max(page.dataoffsets[i] + n for i, n in enumerate(page.databytecounts)) > Path(path).stat().st_size:
            raise ValueError("it is cut short")
        pixels = page.asarray()
        if channels == 1:
            pixels = pixels.reshape(height, width, 1)
        elif page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
            pixels = np.moveaxis(pixels.reshape(channels, height, width), 0, 2)
        if page.dtype.kind == "f":
            pixels = pixels.astype(np.float32)
        peak = 65535 if page.dtype.kind == "u" else 1
        if kind == "MINISWHITE":
            pixels = np.concatenate([peak - pixels[:, :, :1], pixels[:, :, 1:]], axis=2)
        if channels > colours and extra[:1] == (PREMULTIPLIED,):
            pixels = _unmultiplied(pixels, peak)
        orientation = page.tags[ORIENTATION].value if ORIENTATION in page.tags else 1
        return pixels, int(orientation), _metadata(path, page)


def _unmultiplied(pixels: np.ndarray, peak: int) -> np.ndarray:
    alpha = pixels[:, :, -1:].astype(np.float32)
    colour = np.divide(pixels[:, :, :-1] * np.float32(peak), alpha, out=np.zeros(pixels[:, :, :-1].shape, np.float32),
                       where=alpha > 0)  # fmt: skip
    if pixels.dtype == np.uint16:
        colour = np.rint(np.clip(colour, 0, peak)).astype(np.uint16)
    return np.concatenate([colour, pixels[:, :, -1:]], axis=2)


def _metadata(path: str | Path, page: Any) -> Metadata:
    exif = None
    try:
        with open(path, "rb") as file:
            found = Image.Exif()
            found.load_from_fp(file)
            exif = exif_block(found, tiff=True)
    except DAMAGE:
        pass
    xmp = page.tags[XMP].value if XMP in page.tags else None
    # Without a unit, the numbers are an aspect ratio.
    unit = page.tags[RESOLUTION_UNIT].value if RESOLUTION_UNIT in page.tags else None
    dpi = resolution(page.get_resolution("INCH")) if unit in (INCH, CENTIMETRE) else None
    return Metadata(icc=page.iccprofile, exif=exif, xmp=xmp_packet(xmp), dpi=dpi)


def encode(file: BinaryIO, picture: Picture, pixels: np.ndarray) -> None:  # [H, W] or [H, W, C]
    """Write any depth, compressed without loss, with all metadata."""
    gray, alpha = picture.kind == "gray", picture.alpha is not None
    metadata, exif = picture.metadata, resized_exif(picture)
    tags: list[tuple[int, int, int, Any, bool]] = []
    directories = {}
    if exif is not None:
        for tag in DESCRIPTIVE:
            if isinstance(exif.get(tag), str) and exif[tag]:
                value = exif[tag].encode() + b"\0"
                tags.append((tag, ASCII, len(value), value, True))
        directories = {tag: found for tag in (EXIF_IFD, GPS_IFD) if (found := exif.get_ifd(tag))}
        tags += [(tag - 1, LONG, 1, 0, True) for tag in directories]
    if metadata.xmp is not None:
        tags.append((XMP, BYTE, len(metadata.xmp), metadata.xmp, True))
    where = file.tell()
    tifffile.imwrite(
        file,
        pixels,
        byteorder="<",
        photometric="minisblack" if gray else "rgb",
        extrasamples=["unassalpha"] if alpha else None,
        planarconfig=None if pixels.ndim == 2 else "contig",
        compression="adobe_deflate",
        predictor=True,
        metadata=None,
        software=False,
        iccprofile=picture.profile(gray),
        resolution=metadata.dpi,
        resolutionunit="INCH" if metadata.dpi else None,
        extratags=tags,
    )
    _append_directories(file, where, directories)


def _append_directories(file: BinaryIO, begin: int, directories: dict[int, Any]) -> None:
    """Write the directories of EXIF and GPS at the end, and make the tags below their own point to them.

    tifffile leaves their own tags out; the numbers just below are free, so that the order of tags stays right.
    """
    if not directories:
        return
    file.flush()
    file.seek(begin)
    with tifffile.TiffFile(file) as tiff:
        entries = {tag: tiff.pages[0].tags[tag - 1] for tag in directories}
    for tag, content in directories.items():
        at = file.seek(0, 2)
        at += at % 2
        directory = ImageFileDirectory_v2(b"II*\0\0\0\0\0", group=tag)
        for key, value in content.items():
            directory[key] = value
        file.seek(at)
        file.write(directory.tobytes(at - begin))
        # Beyond 4 GB no pointer of this type leads: there the tag keeps a number that no reader knows.
        if at - begin < 1 << 32:
            file.seek(entries[tag].offset)
            file.write(struct.pack("<H", tag))
            file.seek(entries[tag].valueoffset)
            file.write(struct.pack("<I", at - begin))
    file.seek(0, 2)
