"""JPEG: through Pillow's libjpeg; 12-bit, 16-bit and lossless files through imagecodecs."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from PIL import JpegImagePlugin

from fastroute.io.colour import from_cmyk
from fastroute.io.decoded import UNDONE, Decoded, Limits, check_size, take_exif, take_xmp
from fastroute.io.metadata import IPTC, resolution
from fastroute.io.picture import Metadata, Origin
from fastroute.io.samples import Meaning

# Types of frames: sequential and progressive, which Pillow decodes at 8 bits; lossless; arithmetically coded.
PLAIN, LOSSLESS, ARITHMETIC = (0xC0, 0xC1, 0xC2), (0xC3,), (0xC9, 0xCA)
FRAMES = (*PLAIN, *LOSSLESS, 0xC5, 0xC6, 0xC7, *ARITHMETIC, 0xCB, 0xCD, 0xCE, 0xCF)
# A block of 64 pixels takes at least 2 bits of Huffman codes, or a share of a run of empty blocks.
PIXELS_PER_BYTE = 2048


def decode(data: bytes, limit: Limits) -> Decoded:
    """A JPEG file."""
    frame, precision, height, width, at = _frame(data)
    check_size(width, height, limit)
    if frame not in ARITHMETIC and width * height > PIXELS_PER_BYTE * len(data):
        raise ValueError(UNDONE.format(width, height))
    plain = precision == 8 and frame not in LOSSLESS
    if not plain and data.rstrip(b"\0")[-2:] != b"\xff\xd9":
        raise ValueError("it is cut short")
    head = bytearray() if plain else bytearray(data)
    if not plain:
        # Only for the markers, which Pillow reads only in files of 8 bits.
        head[at], head[at + 3] = 0xC0, 8
    notes: list[str] = []
    with JpegImagePlugin.JpegImageFile(io.BytesIO(data if plain else head)) as image:
        metadata, orientation = _metadata(image, notes)
        if plain:
            image.load()
            pixels, kind = np.array(image), {"L": "gray", "CMYK": "cmyk"}.get(image.mode, "rgb")
            if kind == "cmyk":
                pixels = from_cmyk(pixels, metadata.icc)
            pixels = pixels.reshape(*pixels.shape[:2], -1)
        else:
            pixels, kind = _deep(data, precision, metadata.icc)
    if kind == "cmyk":
        metadata = Metadata(**{**vars(metadata), "icc": None})
        notes.append("CMYK was converted to sRGB")
    return Decoded(pixels, kind, metadata, orientation, Origin("JPEG", frame in LOSSLESS, 1, tuple(notes)))


def _deep(data: bytes, precision: int, icc: bytes | None) -> tuple[np.ndarray, str]:
    import imagecodecs

    samples = imagecodecs.jpeg_decode(data)
    samples = samples.reshape(*samples.shape[:2], -1)
    kind = {1: "gray", 3: "rgb", 4: "cmyk"}.get(samples.shape[2])
    if kind is None:
        raise ValueError(f"a JPEG of {samples.shape[2]} components is not supported")
    return Meaning(kind, precision, icc=icc).pixels(samples), kind


def _metadata(image: JpegImagePlugin.JpegImageFile, notes: list[str]) -> tuple[Metadata, int]:
    info = image.info
    exif, orientation = take_exif(info.get("exif"), notes)
    comments = [content for name, content in image.applist if name == "COM"]
    iptc = next((block for block in _iptc(image)), None)
    for name, content in image.applist:
        if name == "APP2" and content.startswith(b"MPF\0"):
            notes.append("further pictures in the file, such as a preview or a gain map, were left out")
        elif name == "APP1" and content.startswith(b"http://ns.adobe.com/xmp/extension/"):
            notes.append("a second packet of XMP was left out")
        elif name == "APP11" and content.startswith(b"JP"):
            notes.append("a record of provenance, which signs the pixels of the original, was left out")
    metadata = Metadata(
        icc=info.get("icc_profile") or None,
        exif=exif,
        xmp=take_xmp(info.get("xmp"), notes),
        dpi=resolution(info.get("dpi")),
        comment=comments[-1] if comments else None,
        iptc=iptc,
    )
    if len(comments) > 1:
        notes.append(f"of {len(comments)} comments, the last was kept")
    return metadata, orientation


def _iptc(image: JpegImagePlugin.JpegImageFile) -> Iterator[bytes]:
    """The blocks of IPTC in Photoshop's resources."""
    for name, content in image.applist:
        if name != "APP13" or not content.startswith(b"Photoshop 3.0\0"):
            continue
        at = 14
        while content[at : at + 4] == b"8BIM" and at + 12 <= len(content):
            number = int.from_bytes(content[at + 4 : at + 6], "big")
            at += 6 + (content[at + 6] + 2) // 2 * 2
            length = int.from_bytes(content[at : at + 4], "big")
            if number == IPTC and length:
                yield content[at + 4 : at + 4 + length]
            at += 4 + length + length % 2


def _frame(data: bytes) -> tuple[int, int, int, int, int]:
    """The marker of the frame, its precision, height and width, and the place of the marker."""
    at = 2
    while at + 9 < len(data):
        if data[at] != 0xFF:
            at += 1
            continue
        marker = data[at + 1]
        if marker in FRAMES:
            height, width = (int.from_bytes(data[at + i : at + i + 2], "big") for i in (5, 7))
            return marker, data[at + 4], height, width, at + 1
        if marker == 0xFF or marker == 0 or 0xD0 <= marker <= 0xD8:
            at += 1 if marker == 0xFF else 2
        elif marker in (0xD9, 0xDA):
            break
        else:
            at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
    raise ValueError("it is damaged: it has no frame")
