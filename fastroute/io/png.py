"""PNG: pixels through libpng, and the other chunks byte for byte."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import imagecodecs
import numpy as np

from fastroute.io.colour import COLOUR_CHUNKS
from fastroute.io.decoded import UNDONE, Decoded, Limits, check_size, take_exif, take_xmp
from fastroute.io.exif import HEADER
from fastroute.io.metadata import Carried, resolution
from fastroute.io.picture import Metadata, Origin

MAGIC = b"\x89PNG\r\n\x1a\n"
# The number of channels by the header's colour type.
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# Deflate compresses nothing by more than this factor.
DEFLATE_RATIO = 1032
# A fast level of compression: at the default level photographs become a tenth smaller, in twice the time.
LEVEL = 3
# The chunks that define the pixels.
CRITICAL = ("IHDR", "PLTE", "IDAT", "IEND", "tRNS")
TEXTS = ("tEXt", "zTXt", "iTXt")
# Chunks that would be wrong or meaningless for a result: significant bits, and frames of an animation.
SILENT = ("sBIT", "acTL", "fcTL", "fdAT", "iDOT")
# The passes of an interlaced picture: the begin and the steps of each.
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
XMP = "XML:com.adobe.xmp"
MOST_TEXT = 1 << 26
INCHES_PER_METRE = 39.37007874015748


def decode(data: bytes, limit: Limits) -> Decoded:
    """A PNG file."""
    width, height, bits, colour = struct.unpack(">IIBB", data[16:26])
    check_size(width, height, limit)
    if height * (width * bits * CHANNELS.get(colour, 1) // 8) > DEFLATE_RATIO * len(data):
        raise ValueError(UNDONE.format(width, height))
    parts: list[bytes | memoryview] = [MAGIC]
    name = ""
    others, frames = [], 1
    for name, content, raw, whole in _chunks(data):
        if name in CRITICAL:
            parts.append(raw)
        elif name == "acTL" and len(content) == 8:
            frames = max(1, struct.unpack(">I", content[:4])[0])
        elif name not in SILENT:
            others.append((name, bytes(content), whole))
    if name != "IEND":
        raise ValueError("it is cut short")
    interlaced = data[28:29] == b"\1"
    if interlaced:
        pixels = _woven(parts, width, height, bits * CHANNELS.get(colour, 1))
    else:
        pixels = imagecodecs.png_decode(b"".join(parts))
    notes: list[str] = []
    metadata, orientation = _metadata(others, notes)
    if frames > 1:
        notes.insert(0, f"of {frames} frames of the animation, the first was read")
    kind = {0: "gray", 3: "palette", 4: "gray"}.get(colour, "rgb")
    origin = Origin("PNG", True, frames, tuple(notes))
    return Decoded(pixels.reshape(*pixels.shape[:2], -1), kind, metadata, orientation, origin)


def _woven(parts: Sequence[bytes | memoryview], width: int, height: int, bits: int) -> np.ndarray:  # -> [H, W] or [H, W, C]
    """The pixels of a PNG with Adam7: each pass is a picture of its own, with the same header, palette and transparency.

    Args:
        parts: the magic bytes, and the chunks that define the pixels.
        width, height: size of the whole picture.
        bits: bits of a pixel.
    """
    by_name = [(bytes(part[4:8]), part) for part in parts[1:]]
    machine = zlib.decompressobj()
    packed = b"".join(bytes(part[8:-4]) for name, part in by_name if name == b"IDAT")
    sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in ADAM7]
    lengths = [h * (1 + (w * bits + 7) // 8) if w > 0 and h > 0 else 0 for w, h in sizes]
    rows = machine.decompress(packed, sum(lengths))
    if len(rows) < sum(lengths):
        raise ValueError("it is cut short")
    others = b"".join(part for name, part in by_name if name in (b"PLTE", b"tRNS"))
    head, at, whole = bytes(by_name[0][1][8:21]), 0, None
    for (x, y, dx, dy), (w, h), length in zip(ADAM7, sizes, lengths, strict=True):
        if not length:
            continue
        body = chunk("IHDR", struct.pack(">II", w, h) + head[8:12] + b"\0") + others
        body += chunk("IDAT", zlib.compress(rows[at : at + length], 0)) + chunk("IEND", b"")
        part = imagecodecs.png_decode(MAGIC + body)
        if whole is None:
            whole = np.empty((height, width, *part.shape[2:]), part.dtype)
        whole[y::dy, x::dx] = part
        at += length
    if whole is None:
        raise ValueError("it has no pixels")
    return whole


def _metadata(chunks: list[tuple[str, bytes, bool]], notes: list[str]) -> tuple[Metadata, int]:
    icc = block = packet = dpi = None
    kept: list[tuple[str, bytes]] = []
    text: dict[str, str] = {}
    left = {name: None for name, _, whole in chunks if not whole}
    for name, content, whole in chunks:
        if not whole:
            continue
        if name in TEXTS:
            try:
                key, value = _text(name, content)
            except (ValueError, zlib.error, IndexError):
                left[name] = None
                continue
            if key == XMP:
                packet = value
            elif key in ("Raw profile type exif", "Raw profile type APP1") and block is None:
                block = _raw_profile(value)
            else:
                text[key] = value
                kept.append((name, content))
        elif name == "iCCP":
            icc = _inflated(content[content.find(b"\0") + 2 :], notes)
        elif name == "eXIf":
            block = content
        elif (
            name in COLOUR_CHUNKS and len(content) == {"cICP": 4, "mDCV": 24, "cLLI": 8, "sRGB": 1, "cHRM": 32, "gAMA": 4}[name]
        ):
            kept.append((name, content))
        elif name == "pHYs" and len(content) == 9 and content[8] == 1:
            dpi = resolution([count / INCHES_PER_METRE for count in struct.unpack(">II", content[:8])])
        elif name != "pHYs" or content[:4] != content[4:8]:
            left[name] = None
    if left:
        notes.append(f"chunks of the PNG that were left out: {', '.join(left)}")
    exif, orientation = take_exif(None if block is None else HEADER + block.removeprefix(HEADER), notes)
    return Metadata(icc, exif, take_xmp(packet, notes), dpi, text, chunks=tuple(kept)), orientation


def _text(name: str, content: bytes) -> tuple[str, str]:
    key, _, rest = content.partition(b"\0")
    if name == "tEXt":
        return key.decode("latin-1"), rest.decode("latin-1")
    if name == "zTXt":
        return key.decode("latin-1"), _limited(rest[1:]).decode("latin-1")
    compressed = rest[0]
    _, _, value = rest[2:].split(b"\0", 2)
    return key.decode("latin-1"), (_limited(value) if compressed else value).decode("utf-8", "replace")


def _limited(data: bytes) -> bytes:
    machine = zlib.decompressobj()
    text = machine.decompress(data, MOST_TEXT)
    if machine.unconsumed_tail:
        raise ValueError("a text is too long")
    return text


def _inflated(data: bytes, notes: list[str]) -> bytes | None:
    try:
        return _limited(data) or None
    except (zlib.error, ValueError):
        notes.append("a damaged colour profile was left out")
        return None


def _raw_profile(text: str) -> bytes | None:
    """Decode what ImageMagick stores as hexadecimal digits after a name and a length."""
    try:
        return bytes.fromhex("".join(text.strip().split("\n")[2:]))
    except ValueError:
        return None


def encode(file: BinaryIO, pixels: np.ndarray, chunks: Sequence[tuple[str, bytes]] = ()) -> None:  # [H, W] or [H, W, C]
    """Write pixels of 8 or 16 bits, with chunks before them."""
    data = memoryview(imagecodecs.png_encode(pixels, level=LEVEL))
    after_header = len(MAGIC) + 25
    file.write(data[:after_header])
    for name, content in chunks:
        file.write(chunk(name, content))
    file.write(data[after_header:])


def chunk(name: str, content: bytes) -> bytes:
    """The bytes of a chunk."""
    body = name.encode() + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def chunks_of(metadata: Metadata, held: Carried) -> list[tuple[str, bytes]]:
    """The chunks that carry metadata.

    Args:
        metadata: metadata of the picture.
        held: the part of it that a PNG can hold.
    """
    present = dict(metadata.chunks)
    found = [(name, present[name]) for name in COLOUR_CHUNKS if name in present and not (held.icc and name == "sRGB")]
    if held.icc is not None:
        found.append(("iCCP", b"ICC Profile\0\0" + zlib.compress(held.icc)))
    if held.dpi is not None:
        counts = [min(round(value * INCHES_PER_METRE), 2**31 - 1) for value in held.dpi]
        found.append(("pHYs", struct.pack(">IIB", *counts, 1)))
    if held.exif is not None:
        found.append(("eXIf", held.exif.removeprefix(HEADER)))
    if held.xmp is not None:
        found.append(("iTXt", XMP.encode() + bytes(5) + held.xmp))
    stored = [(*_text(name, content), (name, content)) for name, content in metadata.chunks if name in TEXTS]
    same = {key for key, value, _ in stored if metadata.text.get(key) == value}
    found += [raw for key, _, raw in stored if key in same]
    found += [_text_chunk(key, value) for key, value in metadata.text.items() if key not in same]
    if held.comment and "Comment" not in metadata.text:
        found.append(_text_chunk("Comment", held.comment.decode("utf-8", "replace")))
    return found


def _text_chunk(key: str, value: str) -> tuple[str, bytes]:
    name = key.encode("latin-1", "replace")[:79] or b"Comment"
    if value.isascii() and "\0" not in value:
        return "tEXt", name + b"\0" + value.encode()
    return "iTXt", name + bytes(5) + value.encode("utf-8", "replace")


def _chunks(data: bytes) -> Iterator[tuple[str, memoryview, memoryview, bool]]:
    """The name, the content and all bytes of every chunk, and whether it is complete."""
    view, at = memoryview(data), len(MAGIC)
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        content = view[at + 8 : at + 8 + length]
        whole = end <= len(data) and (
            name in (b"IDAT", b"fdAT") or zlib.crc32(content, zlib.crc32(name)) == struct.unpack_from(">I", data, end - 4)[0]
        )
        yield name.decode("latin-1"), content, view[at:end], whole
        if name == b"IEND":
            break
        at = end
