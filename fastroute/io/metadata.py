"""Metadata out of a picture that Pillow opened, and into the arguments with which Pillow writes one."""

from __future__ import annotations

import math
import struct
from types import MappingProxyType
from typing import Any

from PIL import Image, PngImagePlugin

from fastroute.io.picture import Metadata, Picture, upright_xmp

ORIENTATION, EXIF_IFD, GPS_IFD, INTEROP_IFD = 0x0112, 0x8769, 0x8825, 0xA005
PIXEL_WIDTH, PIXEL_HEIGHT = 0xA002, 0xA003
# Tags of a TIFF's own directory that describe the picture rather than how its pixels are stored.
DESCRIPTIVE = (270, 271, 272, 305, 306, 315, 316, 33432)
# A segment of a JPEG holds no more.
SEGMENT = 65533 - 29
# What Pillow may raise on a block of EXIF that is not whole.
DAMAGE = (ValueError, TypeError, KeyError, IndexError, OSError, SyntaxError, AttributeError, OverflowError, struct.error)


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 … 8; 1 where there is none."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except DAMAGE:
        return 1
    return value if value in range(1, 9) else 1


def metadata_of(image: Image.Image) -> Metadata:
    """What the file says; the picture must have been loaded, for some formats say it at their end."""
    info = image.info
    try:
        exif = exif_block(image.getexif(), image.format == "TIFF")
    except DAMAGE:
        exif = None
    text = getattr(image, "text", {}) if image.format == "PNG" else {}
    return Metadata(
        icc=info.get("icc_profile") or None,
        exif=exif,
        xmp=xmp_packet(info.get("xmp") or info.get("XML:com.adobe.xmp")),
        dpi=resolution(info.get("dpi")),
        text=MappingProxyType({str(k): str(v) for k, v in text.items() if k != "XML:com.adobe.xmp"}),
    )


def exif_block(found: Image.Exif, tiff: bool) -> bytes | None:
    """The block without orientation and thumbnail; of a TIFF, only what describes the picture. None if nothing is left."""
    kept = Image.Exif()
    for tag, value in found.items():
        if tag not in (ORIENTATION, EXIF_IFD, GPS_IFD) and (not tiff or tag in DESCRIPTIVE):
            kept[tag] = value
    for tag in (EXIF_IFD, GPS_IFD):
        directory = dict(found.get_ifd(tag))
        if INTEROP_IFD in directory:
            directory[INTEROP_IFD] = dict(found.get_ifd(INTEROP_IFD))
        if directory:
            kept[tag] = directory
    return kept.tobytes() if len(kept) else None


def resized_exif(picture: Picture) -> Image.Exif | None:
    """The picture's EXIF with its present size."""
    if picture.metadata.exif is None:
        return None
    exif = Image.Exif()
    exif.load(picture.metadata.exif)
    directory = exif.get_ifd(EXIF_IFD)
    for tag, value in ((PIXEL_WIDTH, picture.width), (PIXEL_HEIGHT, picture.height)):
        if tag in directory:
            directory[tag] = value
    return exif


def xmp_packet(found: str | bytes | None) -> bytes | None:
    """A packet of XMP that tells of an upright picture."""
    packet = found.encode() if isinstance(found, str) else found
    return upright_xmp(packet) if packet else None


def resolution(found: Any) -> tuple[float, float] | None:
    """Pixels per inch, if they make sense."""
    try:
        dpi = (float(found[0]), float(found[1]))
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        return None
    # Where there is no unit, Pillow says 1.
    return dpi if all(math.isfinite(value) and value > 1 for value in dpi) else None


def save_options(picture: Picture, file_format: str, gray: bool) -> dict[str, Any]:
    """Arguments of Pillow's `save` that carry the metadata, as far as the format holds it."""
    metadata = picture.metadata
    options: dict[str, Any] = {}
    if file_format != "BMP":
        icc, exif = picture.profile(gray), resized_exif(picture)
        if icc is not None:
            options["icc_profile"] = icc
        block = b"" if exif is None else exif.tobytes()
        if block and (file_format != "JPEG" or len(block) < SEGMENT):
            options["exif"] = block
        if metadata.xmp is not None and file_format in ("WEBP", "JPEG") and len(metadata.xmp) < SEGMENT:
            options["xmp"] = metadata.xmp
    if metadata.dpi is not None and file_format != "WEBP":
        options["dpi"] = metadata.dpi
    if file_format == "PNG":
        chunks = PngImagePlugin.PngInfo()
        for key, value in metadata.text.items():
            chunks.add_itxt(key, value) if not value.isascii() else chunks.add_text(key, value)
        if metadata.xmp is not None:
            chunks.add_itxt("XML:com.adobe.xmp", metadata.xmp.decode("utf-8", "replace"))
        options["pnginfo"] = chunks
    return options
