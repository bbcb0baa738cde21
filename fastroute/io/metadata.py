"""The metadata of a picture that a file format can hold, in the form in which they are written."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from typing import Any

from fastroute.io import exif as exif_blocks
from fastroute.io import xmp as packets
from fastroute.io.colour import COLOUR_CHUNKS, is_plain_srgb, profile_of_chunks
from fastroute.io.picture import Metadata, suiting

# The largest segment of a JPEG.
SEGMENT = 65533 - 29
IPTC = 0x0404
# The metadata that each format can hold.
HELD = {
    "PNG": {"icc", "exif", "xmp", "dpi", "text", "comment", "chunks"},
    "JPEG": {"icc", "exif", "xmp", "dpi", "comment", "iptc"},
    "WEBP": {"icc", "exif", "xmp"},
    "TIFF": {"icc", "exif", "xmp", "dpi", "iptc"},
    "BMP": {"dpi"},
    "ZARR": set[str](),
}
# The largest resolution, in pixels per inch.
MOST_DPI = {"PNG": (2**31 - 1) / 39.4, "JPEG": 65535.0, "TIFF": 2.0**31, "BMP": (2**31 - 1) / 39.4}


@dataclass
class Carried:
    """Metadata in the form of a format, and sentences about what the format cannot hold."""

    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    comment: bytes | None = None
    iptc: bytes | None = None
    lost: list[str] = field(default_factory=list)


def carried(metadata: Metadata, name: str, gray: bool, size: tuple[int, int] | None = None) -> Carried:
    """The part of the metadata that a file of the format `name` can hold.

    Args:
        metadata: metadata of the picture.
        name: name of a format in `HELD`.
        gray: whether the pixels are stored as gray.
        size: height and width, for metadata that contain them.
    """
    held, found = HELD[name], Carried()
    found.icc = _profile(metadata, name, gray, found.lost)
    for what, label in (("exif", "EXIF"), ("xmp", "XMP"), ("comment", "comment"), ("iptc", "IPTC")):
        value = getattr(metadata, what)
        if not value:
            continue
        if what not in held:
            found.lost.append(f"{name} holds no {label}")
        elif name == "JPEG" and len(value) > SEGMENT:
            found.lost.append(f"JPEG holds no {label} of {len(value):,} bytes")
        else:
            setattr(found, what, value)
    if metadata.dpi is not None:
        if "dpi" not in held or max(metadata.dpi) > MOST_DPI[name]:
            found.lost.append(f"{name} holds no resolution{f' of {max(metadata.dpi):g}' if 'dpi' in held else ''}")
        else:
            found.dpi = metadata.dpi
    if metadata.text and "text" not in held:
        found.lost.append(f"{name} holds no texts ({', '.join(metadata.text)})")
    if size is not None:
        found.exif = found.exif and exif_blocks.sized(found.exif, size[1], size[0])
        found.xmp = found.xmp and packets.sized(found.xmp, size[1], size[0])
    return found


def _profile(metadata: Metadata, name: str, gray: bool, lost: list[str]) -> bytes | None:
    chunks = {key: content for key, content in metadata.chunks if key in COLOUR_CHUNKS}
    icc = metadata.icc
    if icc is not None:
        suits = suiting(icc, gray)
        if "icc" not in HELD[name]:
            lost.append(f"{name} holds no colour profile")
            return None
        if suits is None:
            lost.append("the colour profile is none of the result's kind of colours and was left out")
            return None
        if "cICP" in chunks and name != "PNG":
            lost.append(f"{name} holds no cICP")
        return suits
    if not chunks or name == "PNG" or is_plain_srgb(chunks):
        return None
    made = profile_of_chunks(chunks) if "icc" in HELD[name] else None
    lost.append(
        f"{name} holds no {', '.join(chunks)}: "
        + (
            "its colours are described by a profile instead"
            if made
            else "its colours will be shown as sRGB, which they are not"
        )
    )
    return made


def resolution(found: Any) -> tuple[float, float] | None:
    """The pixels per inch, if they make sense."""
    try:
        dpi = (float(found[0]), float(found[1]))
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        return None
    # Without a unit, Pillow reports 1.
    return dpi if all(math.isfinite(value) and value > 1 for value in dpi) else None


def save_options(held: Carried, name: str) -> dict[str, Any]:
    """The arguments of Pillow's `save` for JPEG, WebP and BMP."""
    options: dict[str, Any] = {}
    for key, value in (("icc_profile", held.icc), ("exif", held.exif), ("xmp", held.xmp), ("dpi", held.dpi)):
        if value is not None:
            options[key] = value
    if held.comment is not None:
        options["comment"] = held.comment
    if held.iptc is not None and name == "JPEG":
        block = b"8BIM" + struct.pack(">HHI", IPTC, 0, len(held.iptc)) + held.iptc + bytes(len(held.iptc) % 2)
        content = b"Photoshop 3.0\0" + block
        options["extra"] = b"\xff\xed" + struct.pack(">H", len(content) + 2) + content
    return options
