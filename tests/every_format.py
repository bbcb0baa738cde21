"""Small files of every format, depth and layout that is read, with the pixels that they mean."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from importlib.util import find_spec

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from fastroute.io import png

HEIGHT, WIDTH = 18, 26
LOSSLESS_TIFF = ["none", "lzw", "adobe_deflate", "packbits", "lzma", "zstd", "png", "jpegxl", "jpeg2000", "webp", "lerc"]


@dataclass
class Case:
    """A file, and what it means.

    Attributes:
        data: its bytes.
        truth: [H, W, C] at the full range of uint8 or uint16, or float32; None where it is stored with loss.
        kind: see :class:`fastroute.io.Picture`.
        bits: 8, 16 or 32.
        alpha: whether it has transparency.
        suffix: of its name.
    """

    data: bytes
    truth: np.ndarray | None
    kind: str
    bits: int
    alpha: bool
    suffix: str


def samples(channels: int, bits: int, seed: int = 0) -> np.ndarray:  # [H, W, C]
    """Of so many bits, with both ends of the range; the last of 2 or 4 channels is mostly opaque."""
    rng = np.random.default_rng(seed)
    peak = (1 << bits) - 1
    y, x, c = np.mgrid[0:HEIGHT, 0:WIDTH, 0:channels]
    ramp = ((x + 2 * y + 5 * c) / (WIDTH + 2 * HEIGHT + 5 * channels) * peak + rng.random(x.shape) * min(peak, 3)).astype(int)
    ramp = np.clip(ramp, 0, peak)
    ramp[0, 0], ramp[-1, -1] = 0, peak
    if channels in (2, 4):
        ramp[:, :, -1] = np.where(x[:, :, 0] < 6, np.minimum(x[:, :, 0], peak), peak)
    return ramp.astype(np.uint8 if bits <= 8 else np.uint16)


def full(values: np.ndarray, bits: int) -> np.ndarray:
    """Samples of so many bits at the full range of 8 or 16."""
    kind = np.uint8 if bits <= 8 else np.uint16
    return np.rint(values.astype(np.float64) * (np.iinfo(kind).max / ((1 << bits) - 1))).astype(kind)


def of(channels: int) -> tuple[str, bool]:
    return "gray" if channels < 3 else "rgb", channels in (2, 4)


def make_all() -> dict[str, Case]:
    """By a name that tells format and layout."""
    return {**make_png(), **make_tiff(), **make_netpbm(), **make_jpeg(), **make_others(), **make_boxed()}


def make_png() -> dict[str, Case]:
    found = {}
    for colour, channels in ((0, 1), (2, 3), (4, 2), (6, 4)):
        for bits in (1, 2, 4, 8, 16) if colour == 0 else (8, 16):
            values = samples(channels, bits)
            kind, alpha = of(channels)
            for interlaced in (False, True):
                data = raw_png(values, bits, colour, interlaced)
                name = f"png-{kind}{'a' if alpha else ''}{bits}{'-interlaced' if interlaced else ''}"
                found[name] = Case(data, full(values, bits), kind, max(8, bits), alpha, ".png")
            if channels in (1, 3):
                key = values[5, 7].astype(">u2")
                clear = (values == values[5, 7]).all(axis=2, keepdims=True)
                truth = full(values, bits)
                alpha_plane = np.where(clear, 0, np.iinfo(truth.dtype).max).astype(truth.dtype)
                data = raw_png(values, bits, colour, False, [("tRNS", key.tobytes())])
                truth = np.concatenate([truth, alpha_plane], axis=2)
                found[f"png-{kind}{bits}-key"] = Case(data, truth, kind, max(8, bits), True, ".png")
    for bits in (1, 2, 4, 8):
        index = samples(1, bits)
        palette = np.random.default_rng(1).integers(0, 256, (1 << bits, 3)).astype(np.uint8)
        data = raw_png(index, bits, 3, False, [("PLTE", palette.tobytes())])
        found[f"png-palette{bits}"] = Case(data, palette[index[:, :, 0]], "palette", 8, False, ".png")
        opacity = np.full((1 << bits, 1), 255, np.uint8)
        opacity[0] = 40
        data = raw_png(index, bits, 3, False, [("PLTE", palette.tobytes()), ("tRNS", bytes([40]))])
        truth = np.concatenate([palette, opacity], axis=1)[index[:, :, 0]]
        found[f"png-palette{bits}-alpha"] = Case(data, truth, "palette", 8, True, ".png")
    frames = [Image.fromarray(samples(3, 8, seed)) for seed in (0, 1)]
    data = saved(frames[0], "PNG", save_all=True, append_images=frames[1:])
    found["png-animated"] = Case(data, samples(3, 8), "rgb", 8, False, ".png")
    return found


def raw_png(
    values: np.ndarray, bits: int, colour: int, interlaced: bool, chunks: list[tuple[str, bytes]] | None = None
) -> bytes:
    """A PNG without any filter, at every depth and with Adam7."""
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = b""
    for x, y, dx, dy in passes if interlaced else [(0, 0, 1, 1)]:
        part = values[y::dy, x::dx]
        if part.size:
            rows += b"".join(b"\0" + packed(row.reshape(-1), bits) for row in part)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, colour, 0, 0, int(interlaced))
    body = png.chunk("IHDR", header) + b"".join(png.chunk(*chunk) for chunk in chunks or [])
    return png.MAGIC + body + png.chunk("IDAT", zlib.compress(rows)) + png.chunk("IEND", b"")


def packed(row: np.ndarray, bits: int) -> bytes:
    """Samples side by side, the first in the highest bits."""
    if bits == 16:
        return row.astype(">u2").tobytes()
    if bits == 8:
        return row.astype(np.uint8).tobytes()
    digits = (row[:, None].astype(np.uint16) >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(digits.astype(np.uint8).reshape(-1)).tobytes()


def saved(image: Image.Image, name: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=name, **options)
    return stream.getvalue()


def tiff(pixels: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels, metadata=None, **options)
    return stream.getvalue()


def raw_tiff(
    values: np.ndarray, bits: int, photometric: int, extra: tuple[int, ...] = (), tags: dict[int, tuple] | None = None
) -> bytes:
    """An uncompressed TIFF of one strip, at any number of bits."""
    height, width, channels = values.shape
    strip = b"".join(packed(row.reshape(-1), bits) if bits != 16 else row.astype("<u2").tobytes() for row in values)
    entries: dict[int, tuple[int, tuple[int, ...]]] = {
        256: (4, (width,)), 257: (4, (height,)), 258: (3, (bits,) * channels), 259: (3, (1,)), 262: (3, (photometric,)),
        273: (4, (8,)), 277: (3, (channels,)), 278: (4, (height,)), 279: (4, (len(strip),)),
        **({338: (3, extra)} if extra else {}), **(tags or {}),
    }  # fmt: skip
    strip += bytes(len(strip) % 2)
    at = 8 + len(strip)
    tail_at, table, tail = at + 2 + 12 * len(entries) + 4, b"", b""
    for tag, (kind, numbers) in sorted(entries.items()):
        value = struct.pack(f"<{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        table += struct.pack("<HHI", tag, kind, len(numbers))
        table += value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", tail_at + len(tail))
        tail += value if len(value) > 4 else b""
    return b"II*\0" + struct.pack("<I", at) + strip + struct.pack("<H", len(entries)) + table + bytes(4) + tail


def make_tiff() -> dict[str, Case]:
    found = {}
    for bits in (1, 2, 4, 6, 8, 10, 12, 14, 16):
        for channels in (1, 3):
            values, kind = samples(channels, bits), of(channels)[0]
            if bits > 1 or channels == 1:
                data = raw_tiff(values, bits, 1 if channels == 1 else 2)
                found[f"tiff-{kind}{bits}"] = Case(data, full(values, bits), kind, 8 if bits <= 8 else 16, False, ".tif")
        gray = samples(1, bits)
        truth = full((1 << bits) - 1 - gray, bits)
        found[f"tiff-gray{bits}-white"] = Case(raw_tiff(gray, bits, 0), truth, "gray", 8 if bits <= 8 else 16, False, ".tif")
    for bits in (8, 16):
        peak = (1 << bits) - 1
        for channels in (2, 4):
            values, (kind, _) = samples(channels, bits), of(channels)
            name = {2: 1, 4: 2}[channels]
            found[f"tiff-{kind}a{bits}"] = Case(raw_tiff(values, bits, name, (2,)), values, kind, bits, True, ".tif")
            data = raw_tiff(values, bits, name, (0,))
            found[f"tiff-{kind}x{bits}"] = Case(data, values[:, :, :-1], kind, bits, False, ".tif")
            alpha = values[:, :, -1:].astype(np.float64)
            dark = np.minimum(values[:, :, :-1], alpha).astype(values.dtype)
            straight = np.divide(dark * float(peak), alpha, out=np.zeros(dark.shape), where=alpha > 0)
            truth = np.concatenate([np.rint(straight).astype(values.dtype), values[:, :, -1:]], axis=2)
            data = raw_tiff(np.concatenate([dark, values[:, :, -1:]], axis=2), bits, name, (1,))
            found[f"tiff-{kind}premultiplied{bits}"] = Case(data, truth, kind, bits, True, ".tif")
        palette = np.random.default_rng(1).integers(0, 256, (3, 256))
        index = samples(1, 8)
        data = raw_tiff(index, 8, 3, tags={320: (3, tuple((palette * 257).reshape(-1).tolist()))})
        found["tiff-palette8"] = Case(data, palette.T.astype(np.uint8)[index[:, :, 0]], "palette", 8, False, ".tif")
        for order in "<>":
            for big in (False, True):
                data = tiff(samples(3, bits), photometric="rgb", byteorder=order, bigtiff=big, rowsperstrip=5)
                name = f"tiff-rgb{bits}-{'big' if big else ''}{'le' if order == '<' else 'be'}"
                found[name] = Case(data, samples(3, bits), "rgb", bits, False, ".tif")
        for layout, options in {
            "strips": {"rowsperstrip": 7}, "tiles": {"tile": (16, 16)},
            "planes": {"planarconfig": "separate", "rowsperstrip": 7},
            "planes-tiles": {"planarconfig": "separate", "tile": (16, 16)},
        }.items():  # fmt: skip
            for compression in (None, "adobe_deflate", "lzw"):
                for predictor in (False, True) if compression else (False,):
                    values = samples(3, bits)
                    pixels = values.transpose(2, 0, 1) if "planes" in layout else values
                    data = tiff(pixels, photometric="rgb", compression=compression, predictor=predictor, **options)
                    name = f"tiff-rgb{bits}-{layout}-{compression}{'-predictor' if predictor else ''}"
                    found[name] = Case(data, values, "rgb", bits, False, ".tif")
    for compression in LOSSLESS_TIFF:
        bits = 8
        options = {"compressionargs": {"level": 100 if compression == "webp" else None}} if compression == "webp" else {}
        if compression == "webp":
            options = {"compressionargs": {"lossless": True}}
        data = tiff(samples(3, bits), photometric="rgb", compression=compression, rowsperstrip=HEIGHT, **options)
        found[f"tiff-rgb8-{compression}"] = Case(data, samples(3, bits), "rgb", 8, False, ".tif")
    for kind, dtype in (("half", np.float16), ("float", np.float32), ("double", np.float64)):
        values = samples(3, 16) / np.float64(65535)
        data = tiff(values.astype(dtype), photometric="rgb", compression="adobe_deflate", predictor=dtype != np.float16)
        found[f"tiff-{kind}"] = Case(data, values.astype(dtype).astype(np.float32), "rgb", 32, False, ".tif")
    data = tiff(samples(3, 8), photometric="rgb", compression="jpeg", tile=(16, 16))
    found["tiff-jpeg"] = Case(data, None, "rgb", 8, False, ".tif")
    stored = saved(Image.fromarray(samples(3, 8)), "TIFF", compression="jpeg")
    found["tiff-jpeg-tables"] = Case(stored, None, "rgb", 8, False, ".tif")
    inks = 65535 - np.dstack([samples(3, 16), np.full((HEIGHT, WIDTH, 1), 65535, np.uint16)])
    found["tiff-cmyk16"] = Case(raw_tiff(inks, 16, 5), samples(3, 16), "cmyk", 16, False, ".tif")
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        writer.write(samples(3, 8)[::4, ::4], photometric="rgb", subfiletype=1, metadata=None)
        writer.write(samples(3, 8), photometric="rgb", metadata=None)
        writer.write(samples(3, 8, 1), photometric="rgb", metadata=None)
    found["tiff-thumbnail-and-pages"] = Case(stream.getvalue(), samples(3, 8), "rgb", 8, False, ".tif")
    for turn in range(2, 9):
        data = tiff(samples(3, 8), photometric="rgb", rowsperstrip=4, extratags=[(274, 3, 1, turn, True)])
        found[f"tiff-turned{turn}"] = Case(data, turned(samples(3, 8), turn), "rgb", 8, False, ".tif")
    return found


def turned(pixels: np.ndarray, turn: int) -> np.ndarray:
    """By EXIF's definition of each orientation: which edge of the picture the first row and the first column are."""
    return {
        2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1], 5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, 3), 7: lambda p: np.rot90(p, 2).transpose(1, 0, 2), 8: lambda p: np.rot90(p, 1),
    }[turn](pixels)  # fmt: skip


def make_netpbm() -> dict[str, Case]:
    found = {}
    size = f"{WIDTH} {HEIGHT}".encode()
    for most in (1, 7, 255, 1023, 65535):
        for channels, raw, text in ((1, b"P5", b"P2"), (3, b"P6", b"P3")):
            values = (samples(channels, 16).astype(np.float64) / 65535 * most).round().astype(np.int64)
            kind = np.uint8 if most < 256 else np.uint16
            truth = np.rint(values * (np.iinfo(kind).max / most)).astype(kind)
            head = b"# a comment\n" + size + b"\n%d\n" % most
            bits, what = 8 * truth.itemsize, of(channels)[0]
            stored = values.astype(np.uint8 if most < 256 else ">u2").tobytes()
            found[f"pnm-{what}{most}"] = Case(raw + b"\n" + head + stored, truth, what, bits, False, ".ppm")
            words = b" ".join(b"%d" % value for value in values.reshape(-1))
            found[f"pnm-{what}{most}-text"] = Case(text + b"\n" + head + words + b"\n", truth, what, bits, False, ".ppm")
    dots = samples(1, 1)
    body = b"".join(np.packbits(row[:, 0]).tobytes() for row in dots)
    found["pnm-bitmap"] = Case(b"P4\n" + size + b"\n" + body, full(1 - dots, 1), "gray", 8, False, ".pbm")
    words = b"\n".join(b"".join(b"%d" % v for v in row[:, 0]) for row in dots)
    found["pnm-bitmap-text"] = Case(b"P1\n" + size + b"\n" + words, full(1 - dots, 1), "gray", 8, False, ".pbm")
    for bits in (8, 16):
        values = samples(4, bits)
        head = b"P7\nWIDTH %d\nHEIGHT %d\nDEPTH 4\nMAXVAL %d\nTUPLTYPE RGB_ALPHA\nENDHDR\n" % (WIDTH, HEIGHT, (1 << bits) - 1)
        data = head + values.astype(f">u{bits // 8}").tobytes()
        found[f"pnm-rgba{bits}"] = Case(data, values, "rgb", bits, True, ".pam")
    real = (samples(3, 16) / 65535).astype(np.float32)
    found["pnm-float"] = Case(b"PF\n" + size + b"\n-1.0\n" + real[::-1].astype("<f4").tobytes(), real, "rgb", 32, False, ".pfm")
    return found


def make_jpeg() -> dict[str, Case]:
    rgb, gray = Image.fromarray(samples(3, 8)), Image.fromarray(samples(1, 8)[:, :, 0])
    found = {
        "jpeg-gray": Case(saved(gray, "JPEG"), None, "gray", 8, False, ".jpg"),
        "jpeg-rgb": Case(saved(rgb, "JPEG", quality=90), None, "rgb", 8, False, ".jpg"),
        "jpeg-progressive": Case(saved(rgb, "JPEG", progressive=True), None, "rgb", 8, False, ".jpg"),
        "jpeg-restart": Case(saved(rgb, "JPEG", restart_marker_rows=1), None, "rgb", 8, False, ".jpg"),
        "jpeg-cmyk": Case(saved(rgb.convert("CMYK"), "JPEG"), None, "cmyk", 8, False, ".jpg"),
    }
    for bits in (12, 16):
        data = imagecodecs.jpeg8_encode(samples(1, bits)[:, :, 0], lossless=True, bitspersample=bits)
        found[f"jpeg-lossless{bits}"] = Case(data, full(samples(1, bits), bits), "gray", 16, False, ".jpg")
    data = imagecodecs.jpeg8_encode(samples(3, 12), level=98, bitspersample=12)
    found["jpeg-rgb12"] = Case(data, None, "rgb", 16, False, ".jpg")
    return found


def make_others() -> dict[str, Case]:
    rgb, rgba = Image.fromarray(samples(3, 8)), Image.fromarray(samples(4, 8))
    indexed, gray, dots = rgb.quantize(16), rgb.convert("L"), rgb.convert("1")
    turning = {"save_all": True, "append_images": [indexed.rotate(90)]}
    shown = np.array(indexed.convert("RGB"))
    frames = [Image.fromarray(samples(3, 8, seed)) for seed in (0, 1)]
    clear = np.dstack([shown, np.where(np.array(indexed) == 3, 0, 255).astype(np.uint8)])
    opaque = np.dstack([samples(3, 8), np.full((HEIGHT, WIDTH, 1), 255, np.uint8)])
    several = {"save_all": True, "append_images": frames[1:], "lossless": True}
    return {
        "webp-rgb": Case(saved(rgb, "WEBP", quality=80), None, "rgb", 8, False, ".webp"),
        "webp-rgba": Case(saved(rgba, "WEBP", quality=80), None, "rgb", 8, True, ".webp"),
        "webp-lossless": Case(saved(rgb, "WEBP", lossless=True), samples(3, 8), "rgb", 8, False, ".webp"),
        "webp-lossless-alpha": Case(saved(rgba, "WEBP", lossless=True, exact=True), samples(4, 8), "rgb", 8, True, ".webp"),
        "webp-animated": Case(saved(frames[0], "WEBP", **several), opaque, "rgb", 8, True, ".webp"),
        "gif": Case(saved(indexed, "GIF"), shown, "palette", 8, False, ".gif"),
        "gif-clear": Case(saved(indexed, "GIF", transparency=3), clear, "palette", 8, True, ".gif"),
        "gif-animated": Case(saved(indexed, "GIF", **turning), shown, "palette", 8, False, ".gif"),
        "bmp-rgb": Case(saved(rgb, "BMP"), samples(3, 8), "rgb", 8, False, ".bmp"),
        "bmp-rgbx": Case(saved(rgba, "BMP"), samples(4, 8)[:, :, :3], "rgb", 8, False, ".bmp"),
        "bmp-rgba": Case(alpha_bmp(samples(4, 8)), samples(4, 8), "rgb", 8, True, ".bmp"),
        "bmp-palette": Case(saved(indexed, "BMP"), shown, "palette", 8, False, ".bmp"),
        "bmp-gray": Case(saved(gray, "BMP"), np.array(gray)[:, :, None], "gray", 8, False, ".bmp"),
        "bmp-bilevel": Case(saved(dots, "BMP"), np.array(dots.convert("L"))[:, :, None], "gray", 8, False, ".bmp"),
    }  # fmt: skip


def alpha_bmp(values: np.ndarray) -> bytes:
    """A BMP with a header of the fourth version, which names the bits of alpha."""
    rows = np.ascontiguousarray(values[::-1, :, [2, 1, 0, 3]]).tobytes()
    header = struct.pack("<IiiHHIIiiII", 108, values.shape[1], values.shape[0], 1, 32, 3, len(rows), 2835, 2835, 0, 0)
    header += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    return b"BM" + struct.pack("<IHHI", 14 + 108 + len(rows), 0, 0, 122) + header + rows


def make_boxed() -> dict[str, Case]:
    found = {}
    for bits in (4, 8, 10, 12, 16):
        for channels in (1, 3, 4):
            values, (kind, alpha) = samples(channels, bits), of(channels)
            stored = values[:, :, 0] if channels == 1 else values
            for form in ("jp2", "j2k"):
                data = imagecodecs.jpeg2k_encode(stored, level=0, bitspersample=bits, codecformat=form, reversible=True)
                deep = 8 if bits <= 8 else 16
                name = f"{form}-{kind}{'a' if alpha else ''}{bits}"
                found[name] = Case(data, full(values, bits), kind, deep, alpha, f".{form}")
            if 4 < bits < 16 and (bits == 8 or channels > 1):
                data = imagecodecs.avif_encode(stored, level=100, bitspersample=bits, speed=10)
                name = f"avif-{kind}{'a' if alpha else ''}{bits}"
                found[name] = Case(data, None, kind, 8 if bits == 8 else 16, alpha, ".avif")
    frames = [Image.fromarray(samples(3, 8)).rotate(turn) for turn in (0, 180)]
    data = saved(frames[0], "AVIF", save_all=True, append_images=frames[1:], quality=95)
    found["avif-animated"] = Case(data, None, "rgb", 8, False, ".avif")
    stack = np.stack([samples(3, 10), samples(3, 10)[::-1]])
    data = imagecodecs.avif_encode(stack, level=95, bitspersample=10, speed=10)
    found["avif-rgb10-animated"] = Case(data, None, "rgb", 16, False, ".avif")
    if find_spec("pillow_heif") is not None:
        import pillow_heif

        for bits in (8, 10):
            for channels, mode in ((3, "RGB"), (4, "RGBA")):
                values = full(samples(channels, bits), bits)
                stream = io.BytesIO()
                pillow_heif.encode(f"{mode}{';16' if bits > 8 else ''}", (WIDTH, HEIGHT), values.tobytes(), stream, quality=-1)
                kind, alpha = of(channels)
                name = f"heif-{kind}{'a' if alpha else ''}{bits}"
                found[name] = Case(stream.getvalue(), None, kind, 8 if bits == 8 else 16, alpha, ".heic")
    return found
