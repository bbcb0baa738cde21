"""Files made of boxes: AVIF, HEIF and JPEG 2000, at their full depth."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from fastroute.io.decoded import Decoded, Limits, check_size, take_exif, take_xmp
from fastroute.io.exif import HEADER
from fastroute.io.picture import Metadata, Origin
from fastroute.io.plain import open_plugin
from fastroute.io.samples import Meaning

SRGB_CICP, UNSPECIFIED = (1, 13), 2


def boxes(data: bytes, begin: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """The type, and the begin and end of the content, of every box between two places."""
    end = len(data) if end is None else min(end, len(data))
    while begin + 8 <= end:
        length, name = struct.unpack_from(">I4s", data, begin)
        head = 8
        if length == 1 and begin + 16 <= end:
            length, head = struct.unpack_from(">Q", data, begin + 8)[0], 16
        stop = end if length == 0 else begin + length
        if length and length < head:
            return
        yield name, begin + head, min(stop, end)
        begin = stop


def find(data: bytes, path: tuple[bytes, ...], begin: int = 0, end: int | None = None) -> tuple[int, int] | None:
    """The begin and end of the content of the first box at a path of types."""
    for name, first, last in boxes(data, begin, end):
        if name == path[0]:
            # A full box: four bytes of version and flags come first.
            return (first, last) if len(path) == 1 else find(data, path[1:], first + 4 * (name == b"meta"), last)
    return None


def decode_avif(data: bytes, limit: Limits) -> Decoded:
    """An AVIF file."""
    import imagecodecs

    notes: list[str] = []
    with open_plugin(data, "AVIF") as image:
        check_size(image.width, image.height, limit)
        frames = int(getattr(image, "n_frames", 1))
        exif, orientation = take_exif(image.info.get("exif"), notes)
        packet, icc = take_xmp(image.info.get("xmp"), notes), image.info.get("icc_profile") or None
        properties = _properties(data)
        config = properties.get(b"av1C") or data[(at := data.find(b"av1C") + 4) : at + 4]
        bits = 12 if config[2] & 0x20 else 10 if config[2] & 0x40 else 8
        # imagecodecs decodes all frames or none: when decoding a single frame, it writes beyond its memory.
        if frames > 1 and bits == 8:
            image.load()
            samples = np.array(image)
        else:
            check_size(image.width, image.height * frames, limit)
            samples = imagecodecs.avif_decode(data)
            samples = samples[0] if frames > 1 else samples
    if frames > 1:
        notes.insert(0, f"of {frames} frames of the animation, the first was read")
    samples = samples.reshape(*samples.shape[:2], -1)
    bits = 8 if samples.dtype == np.uint8 else bits if bits > 8 else 16
    kind = "gray" if samples.shape[2] < 3 or config[2] & 0x10 else "rgb"
    if kind == "gray" and samples.shape[2] >= 3:
        samples = samples[:, :, [0, 3] if samples.shape[2] == 4 else [0]]
    alpha = samples.shape[2] - 1 if samples.shape[2] in (2, 4) else None
    pixels = Meaning(kind, bits, alpha=alpha).pixels(samples)
    metadata = Metadata(icc, exif, packet, chunks=() if icc else _cicp(properties.get(b"colr", b"")))
    return Decoded(pixels, kind, metadata, orientation, Origin("AVIF", False, frames, tuple(notes)))


def _properties(data: bytes) -> dict[bytes, bytes]:
    """The properties of the primary picture, by type."""
    meta = find(data, (b"meta",))
    if meta is None:
        return {}
    inside = {name: (begin, end) for name, begin, end in boxes(data, meta[0] + 4, meta[1])}
    parts = {name: (begin, end) for name, begin, end in boxes(data, *inside.get(b"iprp", (0, 0)))}
    if b"pitm" not in inside or b"ipco" not in parts or b"ipma" not in parts:
        return {}
    at = inside[b"pitm"][0]
    wide = data[at] != 0
    primary = int.from_bytes(data[at + 4 : at + (8 if wide else 6)], "big")
    found = [(name, data[begin:end]) for name, begin, end in boxes(data, *parts[b"ipco"])]
    at, end = parts[b"ipma"]
    wide, long = data[at] != 0, data[at + 3] & 1
    count = int.from_bytes(data[at + 4 : at + 8], "big")
    at += 8
    for _ in range(min(count, 4096)):
        size = 4 if wide else 2
        item, number = int.from_bytes(data[at : at + size], "big"), data[at + size]
        at += size + 1
        places = [int.from_bytes(data[at + i * (1 + long) : at + (i + 1) * (1 + long)], "big") for i in range(number)]
        at += number * (1 + long)
        if item == primary:
            numbers = [place & (0x7FFF if long else 0x7F) for place in places]
            return {found[n - 1][0]: found[n - 1][1] for n in numbers if 0 < n <= len(found)}
        if at >= end:
            break
    return {}


def _cicp(colour: bytes) -> tuple[tuple[str, bytes], ...]:
    """The content of a colour box as a chunk of PNG, for RGB pixels of full range."""
    if colour[:4] != b"nclx" or len(colour) < 11:
        return ()
    primaries, transfer = struct.unpack(">HH", colour[4:8])
    if (primaries, transfer) == SRGB_CICP or UNSPECIFIED in (primaries, transfer) or max(primaries, transfer) > 255:
        return ()
    return (("cICP", bytes([primaries, transfer, 0, 1])),)


def decode_heif(data: bytes, limit: Limits) -> Decoded:
    """A HEIF file, such as HEIC. Its decoder turns it upright."""
    try:
        import pillow_heif
    except ImportError as error:
        raise ValueError("HEIF needs the package pillow-heif: pip install pillow-heif") from error
    file = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False)
    image = file[file.primary_index]
    info: dict[str, Any] = dict(image.info)
    check_size(*image.size, limit)
    notes: list[str] = []
    if len(file) > 1:
        notes.append(f"of {len(file)} pictures in the file, the first was read")
    if info.get("depth_images") or info.get("aux"):
        notes.append("further pictures in the file, such as a depth or gain map, were left out")
    samples = np.asarray(image)
    bits = int(info.get("bit_depth", 8)) if samples.dtype == np.uint16 else 8
    # Samples of more than 8 bits are stored in the upper bits of 16.
    samples = samples.reshape(*samples.shape[:2], -1) >> (16 - bits if samples.dtype == np.uint16 else 0)
    kind = "gray" if samples.shape[2] < 3 else "rgb"
    alpha = samples.shape[2] - 1 if samples.shape[2] in (2, 4) else None
    premultiplied = image.mode.startswith("RGBa")
    pixels = Meaning(kind, bits, alpha=alpha, premultiplied=premultiplied).pixels(samples)
    exif, _ = take_exif(info.get("exif"), notes)
    icc = info.get("icc_profile") or None
    chunks = () if icc else _cicp(_properties(data).get(b"colr", b""))
    metadata = Metadata(icc, exif, take_xmp(info.get("xmp"), notes), chunks=chunks)
    return Decoded(pixels, kind, metadata, 1, Origin("HEIF", False, len(file), tuple(notes)))


# JPEG 2000: boxes that hold metadata, by their identifiers.
EXIF_UUID, XMP_UUID = b"JpgTiffExif->JP2", bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
IPTC_UUID = bytes.fromhex("33c7a4d2b81d4723a0baf1a3e097ad38")
SRGB, GRAY, SYCC, CMYK = 16, 17, 18, 12
SIZ, COD, COM, SOT, END = 0xFF51, 0xFF52, 0xFF64, 0xFF90, b"\xff\xd9"


def decode_jpeg2000(data: bytes, limit: Limits) -> Decoded:
    """A JPEG 2000 file, or a bare codestream."""
    import imagecodecs

    stream = (0, len(data)) if data.startswith(b"\xff\x4f") else find(data, (b"jp2c",))
    if stream is None:
        raise ValueError("it is damaged: it has no codestream")
    width, height, parts, reversible, comment = _codestream(data[stream[0] : stream[1]])
    check_size(width, height, limit)
    if data[stream[0] : stream[1]].rstrip(b"\0")[-2:] != END:
        raise ValueError("it is cut short")
    if any(signed for _, signed, _ in parts):
        raise ValueError("signed samples are not supported; unsigned ones are")
    notes: list[str] = []
    metadata, header = _jp2_metadata(data, comment, notes)
    space = header.get("space", 0)
    if any(step != parts[0][2] for _, _, step in parts):
        if max(bits for bits, _, _ in parts) > 8:
            raise ValueError("components of different sizes are supported up to 8 bits only")
        with open_plugin(data, "JPEG2000") as image:
            image.load()
            samples, bits, space = np.array(image), 8, SRGB
    else:
        samples = imagecodecs.jpeg2k_decode(data)
        bits = header["palette"] if "palette" in header else max(bits for bits, _, _ in parts)
    samples = samples.reshape(*samples.shape[:2], -1)
    count = samples.shape[2]
    colours = {GRAY: 1, SRGB: 3, SYCC: 3, CMYK: 4}.get(space, 1 if count < 3 else 3)
    if count < colours:
        raise ValueError(f"it is damaged: {count} components are too few for its colours")
    alpha = header.get("alpha", (None, False))
    if "alpha" not in header and count == colours + 1:
        alpha = (colours, False)
        notes.append("the last component, which the file does not name, was taken for transparency")
    if count > colours + (alpha[0] is not None):
        notes.append(f"of {count} components, those that are neither colour nor transparency were left out")
    if alpha[0] is not None and not colours <= alpha[0] < count:
        raise ValueError("colours behind transparency are not supported")
    kind = {1: "gray", 3: "rgb", 4: "cmyk"}[colours]
    meaning = Meaning(kind, bits, alpha=alpha[0], premultiplied=alpha[1], icc=metadata.icc)
    if kind == "cmyk":
        metadata = Metadata(**{**vars(metadata), "icc": None})
    return Decoded(
        meaning.pixels(samples), kind, metadata, header.get("turn", 1), Origin("JPEG2000", reversible, 1, tuple(notes))
    )


def _codestream(data: bytes) -> tuple[int, int, list[tuple[int, bool, tuple[int, int]]], bool, bytes | None]:
    """The width, the height, (bits, signed, step) of every component, whether coding is reversible, and a comment."""
    if data[2:4] != b"\xff\x51" or len(data) < 42:
        raise ValueError("it is damaged: its codestream has no header")
    right, bottom, left, top = struct.unpack_from(">IIII", data, 8)
    (count,) = struct.unpack_from(">H", data, 40)
    rows = [data[42 + 3 * i : 45 + 3 * i] for i in range(count)]
    parts = [((row[0] & 0x7F) + 1, bool(row[0] & 0x80), (row[1], row[2])) for row in rows]
    at, reversible, comment = 2, False, None
    while at + 4 <= len(data):
        marker, length = struct.unpack_from(">HH", data, at)
        if marker == SOT or marker < 0xFF00 or length < 2:
            break
        if marker == COD and length >= 12:
            reversible = data[at + 13] == 1
        elif marker == COM and not data[at + 6 :].startswith(b"Created by"):
            comment = data[at + 6 : at + 2 + length] or None
        at += 2 + length
    return right - left, bottom - top, parts, reversible, comment


def _jp2_metadata(data: bytes, comment: bytes | None, notes: list[str]) -> tuple[Metadata, dict[str, Any]]:
    found: dict[str, Any] = {}
    icc = exif = packet = dpi = iptc = None
    if data.startswith(b"\xff\x4f"):
        return Metadata(comment=comment), found
    for name, begin, end in boxes(data):
        content = data[begin:end]
        if name == b"uuid" and content.startswith(EXIF_UUID):
            exif, found["turn"] = take_exif(HEADER + content[16:].removeprefix(HEADER), notes)
        elif name == b"uuid" and content.startswith(XMP_UUID):
            packet = take_xmp(content[16:], notes)
        elif name == b"uuid" and content.startswith(IPTC_UUID):
            iptc = content[16:] or None
        elif name == b"jp2h":
            for inner, first, last in boxes(data, begin, end):
                part = data[first:last]
                if inner == b"colr" and "space" not in found and icc is None:
                    if part[0] == 1:
                        found["space"] = int.from_bytes(part[3:7], "big")
                    elif part[0] in (2, 3):
                        icc = part[3:] or None
                        found["space"] = {b"GRAY": GRAY, b"CMYK": CMYK}.get(part[19:23], SRGB)
                elif inner == b"pclr":
                    found["palette"] = max((size & 0x7F) + 1 for size in part[3 : 3 + part[2]])
                elif inner == b"cdef":
                    kinds = [struct.unpack_from(">HHH", part, 2 + 6 * i) for i in range(struct.unpack_from(">H", part)[0])]
                    found["alpha"] = next(((c, kind == 2) for c, kind, _ in kinds if kind in (1, 2)), (None, False))
                elif inner == b"res ":
                    dpi = _jp2_resolution(data, first, last)
    return Metadata(icc, exif, packet, dpi, comment=comment, iptc=iptc), found


def _jp2_resolution(data: bytes, begin: int, end: int) -> tuple[float, float] | None:
    from fastroute.io.metadata import resolution

    for name in (b"resc", b"resd"):
        if (place := find(data, (name,), begin, end)) and place[1] - place[0] >= 10:
            *parts, down, across = struct.unpack_from(">HHHHbb", data, place[0])
            rows, columns = parts[0] / max(parts[1], 1), parts[2] / max(parts[3], 1)
            return resolution((columns * 10.0**across * 0.0254, rows * 10.0**down * 0.0254))
    return None
