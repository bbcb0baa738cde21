"""Image files of every kind, and files that are none."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageCms, PngImagePlugin

from fastroute.io import png

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
DPI = (300.0, 300.0)


def ramp(height: int = 9, width: int = 13, channels: int = 3, peak: int = 255) -> np.ndarray:
    """[H, W, C] uint8 or uint16: smooth, different in every channel, and not symmetric."""
    y, x, c = np.mgrid[0:height, 0:width, 0:channels]
    values = (x + 1.7 * y * (c + 1) + 11 * c) / (width + 1.7 * height * channels + 11 * channels)
    return np.rint(values * peak).astype(np.uint8 if peak == 255 else np.uint16)


def exif(orientation: int = 1) -> bytes:
    """A block with tags of the picture, of the exposure and of the place."""
    block = Image.Exif()
    block[0x0112], block[0x010F], block[0x8298] = orientation, "Maker", "(c) Somebody"
    block[0x8769] = {0xA002: 13, 0xA003: 9, 0x829A: (1, 250)}
    block[0x8825] = {1: "N", 2: (47.0, 22.0, 3.5)}
    return block.tobytes()


def write_kinds(folder: Path) -> dict[str, Path]:
    """One small file of every kind that is read, by its name."""
    rgb, gray, deep = Image.fromarray(ramp()), Image.fromarray(ramp()[:, :, 0]), ramp(peak=65535)
    alpha = Image.fromarray(np.linspace(0, 255, 9 * 13).reshape(9, 13).astype(np.uint8))
    rgba, gray_alpha = rgb.copy(), gray.copy()
    rgba.putalpha(alpha)
    gray_alpha.putalpha(alpha)
    deep_alpha = np.dstack([deep, deep[:, :, :1][::-1]])
    text = PngImagePlugin.PngInfo()
    text.add_text("Title", "A ramp")
    text.add_itxt("XML:com.adobe.xmp", XMP.decode())
    pillow = {
        "gray.png": (gray, {}),
        "gray.jpg": (gray, {"quality": 95}),
        "gray-alpha.png": (gray_alpha, {}),
        "bilevel.png": (gray.convert("1"), {}),
        "rgb.png": (rgb, {"icc_profile": SRGB, "dpi": DPI, "exif": exif(6), "pnginfo": text}),
        "rgb.jpg": (rgb, {"icc_profile": SRGB, "dpi": DPI, "exif": exif(6), "xmp": XMP, "quality": 95}),
        "rgb.webp": (rgb, {"icc_profile": SRGB, "exif": exif(6), "xmp": XMP, "lossless": True}),
        "rgb.tif": (rgb, {"icc_profile": SRGB, "dpi": DPI}),
        "rgb.bmp": (rgb, {}),
        "rgba.png": (rgba, {}),
        "rgba.webp": (rgba, {"lossless": True, "exact": True}),
        "rgba.tif": (rgba, {}),
        "key.png": (rgb, {"transparency": rgb.getpixel((2, 3))}),
        "palette.png": (rgb.quantize(16), {}),
        "palette-alpha.png": (rgb.quantize(16), {"transparency": bytes([0, 128])}),
        "cmyk.jpg": (rgb.convert("CMYK"), {"quality": 95}),
        "cmyk.tif": (rgb.convert("CMYK"), {}),
        "gray16.png": (Image.fromarray(deep[:, :, 0]), {}),
        **{f"turned{n}.jpg": (rgb, {"exif": exif(n), "quality": 95}) for n in range(2, 9)},
    }
    for name, (image, options) in pillow.items():
        image.save(folder / name, **options)
    for name, pixels in {"rgb16.png": deep, "rgba16.png": deep_alpha, "gray-alpha16.png": deep_alpha[:, :, 2:]}.items():
        with open(folder / name, "wb") as file:
            png.encode(file, np.ascontiguousarray(pixels))
    real = (deep / 65535).astype(np.float32)
    tiffs = {
        "gray16.tif": (deep[:, :, 0], {"photometric": "minisblack"}),
        "rgb16.tif": (deep, {"photometric": "rgb", "iccprofile": SRGB}),
        "rgba16.tif": (deep_alpha, {"photometric": "rgb", "extrasamples": ["unassalpha"], "compression": "lzw"}),
        "planar16.tif": (deep.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate"}),
        "float.tif": (real, {"photometric": "rgb"}),
        "float-gray.tif": (real[:, :, 0], {"photometric": "minisblack", "compression": "adobe_deflate", "predictor": True}),
    }
    for name, (pixels, options) in tiffs.items():
        tifffile.imwrite(folder / name, pixels, metadata=None, **options)
    return {name: folder / name for name in [*pillow, "rgb16.png", "rgba16.png", "gray-alpha16.png", *tiffs]}


def write_bad(folder: Path) -> dict[str, str]:
    """Files that cannot be read, and a word of the reason."""
    encoded = io.BytesIO()
    Image.fromarray(ramp(200, 200)).save(encoded, format="PNG")
    (folder / "bad-cut.png").write_bytes(encoded.getvalue()[: len(encoded.getvalue()) // 2])
    deep = io.BytesIO()
    tifffile.imwrite(deep, ramp(50, 50, peak=65535), photometric="rgb", metadata=None)
    (folder / "bad-cut.tif").write_bytes(deep.getvalue()[:5000])
    (folder / "bad-empty.jpg").write_bytes(b"")
    os.symlink(folder / "nowhere", folder / "bad-link.png")
    (folder / "bad-text.png").write_text("no image")
    (folder / "bad-header.png").write_bytes(absurd_png(13000, 13000))
    return {
        "bad-cut.png": "", "bad-cut.tif": "cut short", "bad-empty.jpg": "it is empty", "bad-text.png": "not an image",
        "bad-header.png": "more than the file can hold",
    }  # fmt: skip


def absurd_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a large picture."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return png.MAGIC + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
