"""WebP, GIF and BMP: formats of 8 bits, through Pillow."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from fastroute.io.decoded import Decoded, Limits, check_size, take_exif, take_xmp
from fastroute.io.metadata import resolution
from fastroute.io.picture import Metadata, Origin

GRAY_MODES = ("1", "L", "LA", "La")
CORE_HEADER, FIFTH_HEADER, EMBEDDED = 12, 124, b"DEBM"


def decode(data: bytes, name: str, limit: Limits) -> Decoded:
    """A WebP, GIF or BMP file."""
    if name == "BMP":
        _check_bmp(data, limit)
    if name == "GIF" and b";" not in data[-64:]:
        # Its end is a semicolon; some programs add a few bytes.
        raise ValueError("it is cut short")
    if name == "WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data) + 1:
        raise ValueError("it is cut short")
    with open_plugin(data, name) as image:
        check_size(image.width, image.height, limit)
        frames, notes = int(getattr(image, "n_frames", 1)), []
        image.load()
        if frames > 1:
            notes.append(f"of {frames} frames of the animation, the first was read")
        exif, orientation = take_exif(image.info.get("exif"), notes)
        comment = image.info.get("comment")
        metadata = Metadata(
            icc=image.info.get("icc_profile") or (_bmp_profile(data) if name == "BMP" else None),
            exif=exif,
            xmp=take_xmp(image.info.get("xmp"), notes),
            dpi=resolution(image.info.get("dpi")),
            comment=comment.encode() if isinstance(comment, str) else comment or None,
        )
        kind = "gray" if image.mode in GRAY_MODES else "palette" if image.mode in ("P", "PA") else "rgb"
        lossless = name != "WEBP" or is_lossless_webp(data)
        return Decoded(eight_bits(image), kind, metadata, orientation, Origin(name, lossless, frames, tuple(notes)))


def open_plugin(data: bytes, name: str) -> Image.Image:
    """Open the bytes by Pillow's plugin, without a limit on pixels and without guessing another format."""
    Image.init()
    if name not in Image.OPEN:
        raise ValueError(f"this build of Pillow reads no {name}")
    return Image.OPEN[name][0](io.BytesIO(data), "")


def eight_bits(image: Image.Image) -> np.ndarray:  # -> [H, W, C]
    """The pixels, gray or RGB, with alpha if the file has it."""
    clear = image.has_transparency_data
    if image.mode in GRAY_MODES:
        straight = image.convert("LA") if image.mode == "La" else image
        # Only the conversion to RGBA handles a gray value that means transparency.
        return np.array(straight.convert("RGBA"))[:, :, [0, 3]] if clear else np.array(straight.convert("L"))[:, :, None]
    wanted = "RGBA" if clear else "RGB"
    return np.array(image if image.mode == wanted else image.convert(wanted))


def is_lossless_webp(data: bytes) -> bool:
    """Whether all pictures of a WebP file are stored without loss."""
    at, kinds = 12, set()
    while at + 8 <= len(data):
        name, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if name == b"ANMF":
            # The pictures of a frame are chunks after 16 bytes of its own.
            at += 24
            continue
        kinds.add(name)
        at += 8 + length + length % 2
    return b"VP8L" in kinds and b"VP8 " not in kinds


def _check_bmp(data: bytes, limit: Limits) -> None:
    """Check the size in the header before Pillow allocates it."""
    header = int.from_bytes(data[14:18], "little")
    form = ((18, 20), (20, 22), (24, 26)) if header == CORE_HEADER else ((18, 22), (22, 26), (28, 30))
    width, height, bits = (int.from_bytes(data[begin:end], "little", signed=header != CORE_HEADER) for begin, end in form)
    check_size(width, abs(height), limit)
    compressed = header != CORE_HEADER and int.from_bytes(data[30:34], "little") in (1, 2)
    if not compressed and abs(height) * ((width * bits + 31) // 32 * 4) > len(data):
        raise ValueError("it is cut short")


def _bmp_profile(data: bytes) -> bytes | None:
    """The colour profile that a header of version 5 points to."""
    if int.from_bytes(data[14:18], "little") != FIFTH_HEADER or data[70:74] != EMBEDDED:
        return None
    begin, length = (int.from_bytes(data[i : i + 4], "little") for i in (126, 130))
    return data[14 + begin : 14 + begin + length] if 0 < length <= len(data) - begin - 14 else None
