"""PNG beyond what Pillow does: 16 bits per channel, and a header that is checked before anything is allocated."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

MAGIC = b"\x89PNG\r\n\x1a\n"
# Channels by the header's colour type.
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# Deflate shrinks nothing by more than this.
DEFLATE_RATIO = 1032
# Of libpng: as fast as the pixels deserve; photographs become a tenth smaller at the default level, in twice the time.
LEVEL = 3
# Chunks that tell the pixels; all others are metadata.
CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS")


def bit_depth(path: str | Path) -> int | None:
    """Bits per channel of a PNG; None for another file.

    Raises:
        ValueError: the header does not fit the file: it claims more pixels than the file's bytes can hold.
    """
    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(29)
    if not head.startswith(MAGIC) or len(head) < 29:
        return None
    width, height, bits, color = struct.unpack(">IIBB", head[16:26])
    least = height * (width * bits * CHANNELS.get(color, 1) // 8)
    if least > DEFLATE_RATIO * path.stat().st_size:
        raise ValueError(f"it is damaged: its header tells of {width} x {height} pixels, more than the file can hold")
    return int(bits)


def decode(path: str | Path) -> np.ndarray:  # -> [H, W] or [H, W, C] uint16
    """The pixels of a 16-bit PNG; a colour that is to be transparent becomes an alpha channel."""
    import imagecodecs

    pixels: np.ndarray = imagecodecs.png_decode(Path(path).read_bytes())
    return pixels


def encode(file: BinaryIO, pixels: np.ndarray, **metadata: Any) -> None:  # [H, W] or [H, W, C] uint16
    """Write 16-bit pixels, with metadata in the form in which Pillow takes it."""
    import imagecodecs

    # Pillow writes a small picture with the same metadata, whose chunks are taken over.
    small = io.BytesIO()
    Image.new("L" if pixels.ndim == 2 else "RGB", (1, 1)).save(small, format="PNG", **metadata)
    ancillary = b"".join(raw for name, raw in _chunks(small.getvalue()) if name not in CRITICAL)
    data = imagecodecs.png_encode(pixels, level=LEVEL)
    after_header = len(MAGIC) + 25
    file.write(data[:after_header])
    file.write(ancillary)
    file.write(memoryview(data)[after_header:])


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and bytes of every chunk."""
    at = len(MAGIC)
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        yield data[at + 4 : at + 8], data[at : at + 12 + length]
        at += 12 + length
