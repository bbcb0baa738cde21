"""A picture: pixels in the form that networks take, and the metadata of its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

BITS = {torch.uint8: 8, torch.uint16: 16, torch.float32: 32}
# The bytes of a profile that name its colour space.
ICC_SPACE = slice(16, 20)
NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Metadata:
    """The metadata of a file.

    Attributes:
        icc: colour profile of the pixels.
        exif: a block of EXIF as in JPEG files, without an orientation, because the pixels are upright.
        xmp: a packet of XMP, with its orientation set to upright.
        dpi: pixels per inch, horizontally and vertically.
        text: titles, comments and similar texts of a PNG, by keyword.
        comment: comment of a JPEG or GIF.
        iptc: a block of IPTC (IIM) as in JPEG and TIFF files.
        chunks: chunks of a PNG, name and content, byte for byte: those about colours (gAMA, cHRM, cICP, …), and the texts as
            they were stored.
    """

    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    text: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    comment: bytes | None = None
    iptc: bytes | None = None
    chunks: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True)
class Origin:
    """The file that a picture comes from.

    Attributes:
        format: "PNG", "JPEG", … as :func:`fastroute.io.format_of_bytes` names it; empty for a picture that was made in memory.
        lossless: whether its pixels were stored without loss.
        pictures: number of pages of a TIFF or frames of an animation. The first one is read.
        notes: whole sentences about what was left out or changed while reading.
    """

    format: str = ""
    lossless: bool = True
    pictures: int = 1
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """Pixels and metadata.

    Attributes:
        color: (3, H, W), uint8, uint16 or float32 in about [0, 1], RGB; a gray picture has three equal channels.
        alpha: (H, W) of the same type, or None for a picture without transparency; not premultiplied.
        kind: "gray", "rgb", "palette" or "cmyk": how the file stored its colours. A gray picture is written as gray, all
            others as RGB.
        metadata: profile, EXIF, XMP, resolution, texts.
        origin: the file it comes from.
    """

    color: Tensor  # [3, H, W]
    alpha: Tensor | None = None  # [H, W]
    kind: str = "rgb"
    metadata: Metadata = Metadata()
    origin: Origin = Origin()

    @classmethod
    def of_channels(cls, channels: Tensor) -> Picture:  # [C, H, W]
        """A picture of 1 channel for gray or 3 for RGB, and one more with alpha."""
        alpha = channels[-1] if channels.shape[0] % 2 == 0 else None
        if channels.shape[0] <= 2:
            return cls(channels[:1].expand(3, -1, -1), alpha, "gray")
        return cls(channels[:3], alpha)

    @property
    def bits(self) -> int:
        """The bits per channel: 8, 16, or 32 for floating point."""
        return BITS[self.color.dtype]

    @property
    def height(self) -> int:
        """In pixels."""
        return self.color.shape[1]

    @property
    def width(self) -> int:
        """In pixels."""
        return self.color.shape[2]

    def __str__(self) -> str:
        return describe(self.bits, self.kind, self.alpha is not None)

    def as_bits(self, bits: int) -> Picture:
        """The same picture with 8 or 16 bits per channel, or float32 for 32, clamped and rounded."""
        if bits == self.bits:
            return self
        alpha = None if self.alpha is None else converted(self.alpha, bits)
        # A gray picture's channels may be one in memory.
        color = converted(self.color[:1], bits).expand(3, -1, -1) if self.kind == "gray" else converted(self.color, bits)
        return replace(self, color=color, alpha=alpha)

    def profile(self, gray: bool) -> bytes | None:
        """The colour profile if it suits pixels stored as gray, or as RGB."""
        return suiting(self.metadata.icc, gray)


def describe(bits: int, kind: str, alpha: bool) -> str:
    """A description such as "16-bit gray with alpha"."""
    depth = "float" if bits == 32 else f"{bits}-bit"
    name = {"gray": "gray", "rgb": "RGB", "palette": "palette", "cmyk": "CMYK"}[kind]
    return f"{depth} {name}{' with alpha' if alpha else ''}"


def suiting(icc: bytes | None, gray: bool) -> bytes | None:
    """A colour profile, if it suits pixels stored as gray, or as RGB."""
    if icc is None or icc[ICC_SPACE] not in ((b"GRAY", b"RGB ") if gray else (b"RGB ",)):
        return None
    return icc


def converted(x: Tensor, bits: int) -> Tensor:
    """Convert pixels to 8 bits, 16 bits, or floating point for 32, clamped and rounded."""
    peaks = {8: 255, 16: 65535, 32: 1}
    source = {torch.uint8: 255, torch.uint16: 65535, torch.float32: 1}[x.dtype]
    scaled = x.float() * (peaks[bits] / source)
    if bits == 32:
        return scaled
    return scaled.clamp_(0, peaks[bits]).round_().to(torch.uint8 if bits == 8 else torch.uint16)
