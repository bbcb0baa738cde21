"""Recognises images by their first bytes or, if these say nothing, by their ending."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

# The endings of files that can be read. Reading depends on the content; an ending only says what a file was meant to be.
READ_SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".webp", ".tif", ".tiff", ".btf", ".tf8", ".bmp", ".dib", ".gif",
    ".ppm", ".pgm", ".pbm", ".pnm", ".pam", ".pfm", ".avif", ".jp2", ".j2k", ".j2c", ".jpc", ".jpx", ".jpf", ".heic", ".heif",
    ".hif",
)  # fmt: skip
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
JPEG2000_MAGIC = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
AVIF_BRANDS = {b"avif", b"avis"}
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)
# The number of bytes that are read. The brands of a file of the AVIF family fit into them.
HEAD = 256


def format_of_bytes(head: bytes) -> str | None:
    """The format of a file that begins with `head`: "PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PNM", "AVIF", "HEIF",
    "JPEG2000", or None for any other file."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith(TIFF_MAGIC):
        return "TIFF"
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in BMP_HEADERS:
        return "BMP"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if head[:1] == b"P" and head[1:2] in tuple(b"1234567Ff"[i : i + 1] for i in range(9)) and head[2:3].isspace():
        return "PNM"
    if head.startswith(JPEG2000_MAGIC):
        return "JPEG2000"
    if head[4:8] == b"ftyp":
        end = min(int.from_bytes(head[:4], "big"), len(head))
        brands = {head[8:12]} | {head[i : i + 4] for i in range(16, end, 4)}
        return "AVIF" if brands & AVIF_BRANDS else "HEIF" if brands & HEIF_BRANDS else None
    return None


def format_of_file(path: str | Path) -> str | None:
    """The format of a file by its content, see :func:`format_of_bytes`.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return format_of_bytes(file.read(HEAD))


def is_image(path: str | Path) -> bool:
    """Whether a file is an image, or was meant to be one: its content or its ending says so.

    Files of HEIF count, whether or not the package that decodes them is installed: :func:`fastroute.io.read_picture` says
    which one is missing. Damaged and unreadable files with the ending of an image count as well.
    """
    path = Path(path)
    if path.suffix.lower() in READ_SUFFIXES:
        return True
    try:
        return path.is_file() and format_of_file(path) is not None
    except OSError:
        return False


def reads_heif() -> bool:
    """Whether the package that decodes HEIF is installed."""
    return find_spec("pillow_heif") is not None
