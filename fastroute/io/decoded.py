"""The result of a format's decoder, and limits on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastroute.io import exif as exif_blocks
from fastroute.io import xmp as packets
from fastroute.io.picture import Metadata, Origin

# The bytes per pixel that decoders need, including the decoded pixels.
DECODING = 10
UNDONE = "the header tells of {0} x {1} pixels, more than the file can hold: it is damaged"


@dataclass
class Decoded:
    """A picture as its file stores it.

    Attributes:
        pixels: [H, W, C] gray or RGB, with alpha if C is even, not premultiplied; uint8, uint16 or float32.
        kind: see :class:`fastroute.io.Picture`.
        metadata: without orientation.
        orientation: 1 … 8, as EXIF counts them.
        origin: the file.
    """

    pixels: np.ndarray
    kind: str
    metadata: Metadata
    orientation: int
    origin: Origin


@dataclass(frozen=True)
class Limits:
    """The limits for a file that is decoded as a whole.

    Attributes:
        pixels: largest number of pixels, or None for no limit.
        memory: largest number of bytes for decoding, or None for no limit.
    """

    pixels: int | None = None
    memory: int | None = None


def check_size(width: int, height: int, limit: Limits) -> None:
    """Refuse a picture without pixels, or with more than the limit, before anything is allocated."""
    if width < 1 or height < 1:
        raise ValueError(f"it has no pixels: {width} x {height}")
    if limit.pixels is not None and width * height > limit.pixels:
        raise ValueError(f"{width} x {height} pixels are more than the limit of {limit.pixels:,}; raise max_pixels to read it")
    if limit.memory is not None and width * height * DECODING > limit.memory:
        raise ValueError(
            f"its format is decoded whole, which takes about {width * height * DECODING / 1e6:.0f} MB of {width} x {height} "
            f"pixels, more than the memory limit of {limit.memory / 1e6:.0f} MB: raise that, or store the picture as TIFF"
        )


def take_exif(block: bytes | None, notes: list[str]) -> tuple[bytes | None, int]:
    """A block of EXIF for an upright picture, and its original orientation."""
    if not block:
        return None, 1
    try:
        return exif_blocks.upright(block), exif_blocks.orientation(block)
    except Exception:  # a damaged block may raise anything
        notes.append("a damaged block of EXIF was left out")
        return None, 1


def take_xmp(packet: str | bytes | None, notes: list[str]) -> bytes | None:
    """A packet of XMP for a single upright picture."""
    if not packet:
        return None
    found = packet.encode("utf-8", "replace") if isinstance(packet, str) else bytes(packet)
    mended, claims = packets.without_claims(found)
    notes += [f"XMP told of {what}, which a result does not hold: that was taken out" for what in claims]
    return packets.upright(mended) if mended else None
