"""TIFF: writes a picture as a whole, or the frame of a large one whose tiles are filled in later, with all metadata."""

from __future__ import annotations

import struct
from typing import Any, BinaryIO

import numpy as np
import tifffile

from fastroute.io import exif as exif_blocks
from fastroute.io.metadata import Carried

XMP, IPTC = 700, 33723
BYTE, ASCII, LONG, UNDEFINED, LONG8 = 1, 2, 4, 7, 16
# Tags of EXIF's first directory that a TIFF sets itself: storage of pixels, resolution, pointers, XMP, profile.
OWN = {*range(254, 269), *range(273, 285), 290, 291, 292, 293, 296, 301, *range(317, 348), 512, 513, 514, 515, *range(519, 522),
       529, 530, 531, 532, XMP, IPTC, 34377, 34675, *exif_blocks.POINTERS}  # fmt: skip


def encode(file: BinaryIO, pixels: np.ndarray, gray: bool, alpha: bool, held: Carried) -> None:  # [H, W] or [H, W, C]
    """Write pixels of any depth, compressed without loss."""
    where = file.tell()
    tags, directories = _tags(held)
    tifffile.imwrite(
        file, pixels, compression="adobe_deflate", predictor=True, planarconfig=None if pixels.ndim == 2 else "contig",
        **_arguments(gray, alpha, held), extratags=tags,
    )  # fmt: skip
    _append_directories(file, where, directories)


def frame(
    file: BinaryIO,
    shape: tuple[int, int, int],  # H, W, C
    dtype: np.dtype,
    tile: int,
    gray: bool,
    alpha: bool,
    held: Carried,
) -> tuple[int, ...]:
    """Write a BigTIFF of empty uncompressed tiles. Returns the begin of each."""
    tags, directories = _tags(held)
    with tifffile.TiffWriter(file, bigtiff=True, byteorder="<") as writer:
        writer.write(
            None, shape=shape if shape[2] > 1 else shape[:2], dtype=dtype, tile=(tile, tile),
            planarconfig="contig" if shape[2] > 1 else None, **_arguments(gray, alpha, held), extratags=tags,
        )  # fmt: skip
    _append_directories(file, 0, directories)
    file.seek(0)
    with tifffile.TiffFile(file) as made:
        return tuple(made.pages[0].dataoffsets)


def _arguments(gray: bool, alpha: bool, held: Carried) -> dict[str, Any]:
    return {
        "photometric": "minisblack" if gray else "rgb",
        "extrasamples": ["unassalpha"] if alpha else None,
        "metadata": None,
        "software": False,
        "iccprofile": held.icc,
        "resolution": held.dpi,
        "resolutionunit": "INCH" if held.dpi else None,
    }


def _tags(held: Carried) -> tuple[list[tuple[int, int, int, Any, bool]], dict[int, exif_blocks.Directory]]:
    """Metadata as tags of the file's directory, and the directories below it."""
    tags: list[tuple[int, int, int, Any, bool]] = []
    directories: dict[int, exif_blocks.Directory] = {}
    if held.exif is not None:
        found, order = exif_blocks.parse(held.exif)
        for entry in found.entries:
            if entry.tag not in OWN:
                value = entry.value if order == "<" else exif_blocks.swapped(entry.kind, entry.value)
                tags.append((entry.tag, entry.kind, len(value) // exif_blocks.SIZES[entry.kind], value, True))
        directories = {tag: _little(child, order) for tag, child in found.children.items()}
        # tifffile leaves these tags out. The numbers just below are free and keep the order of tags right.
        tags += [(tag - 1, LONG, 1, 0, True) for tag in directories]
    for tag, kind, block in ((XMP, BYTE, held.xmp), (IPTC, UNDEFINED, held.iptc)):
        if block is not None:
            tags.append((tag, kind, len(block), block, True))
    return tags, directories


def _little(directory: exif_blocks.Directory, order: str) -> exif_blocks.Directory:
    """A directory with little-endian values."""
    if order == "<":
        return directory
    entries = [entry._replace(value=exif_blocks.swapped(entry.kind, entry.value)) for entry in directory.entries]
    return exif_blocks.Directory(entries, {tag: _little(child, order) for tag, child in directory.children.items()})


def _append_directories(file: BinaryIO, begin: int, directories: dict[int, exif_blocks.Directory]) -> None:
    """Write the directories of EXIF and GPS at the end, and replace the placeholder tags by pointers to them."""
    if not directories:
        return
    file.flush()
    file.seek(begin)
    with tifffile.TiffFile(file) as tiff:
        entries, big = {tag: tiff.pages[0].tags[tag - 1] for tag in directories}, tiff.is_bigtiff
    for tag, content in directories.items():
        at = file.seek(0, 2)
        at += at % 2
        file.seek(at)
        file.write(exif_blocks.write_directory(content, at - begin, "<", "<", big))
        # No pointer of a classic TIFF reaches beyond 4 GB. The tag then keeps a number that no reader knows.
        if big or at - begin < 1 << 32:
            file.seek(entries[tag].offset)
            file.write(struct.pack("<HH", tag, LONG8 if big else LONG))
            file.seek(entries[tag].valueoffset)
            file.write(struct.pack("<Q" if big else "<I", at - begin))
    file.seek(0, 2)
