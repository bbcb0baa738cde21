"""Netpbm's formats: PBM, PGM, PPM and PAM, as text or as bytes, and PFM with floating point."""

from __future__ import annotations

import re

import numpy as np

from fastroute.io.decoded import Decoded, Limits, check_size
from fastroute.io.picture import Metadata, Origin
from fastroute.io.samples import check_range

# A number after blanks and comments.
TOKEN = re.compile(rb"(?:\s|#[^\r\n]*[\r\n])*([^\s#]+)")
MOST_HEADER = 1 << 16


def decode(data: bytes, limit: Limits, white: float) -> Decoded:
    """A file of Netpbm. Sample values are scaled to the full range of 8 or 16 bits."""
    magic = data[:2]
    if magic in (b"PF", b"Pf"):
        pixels = _real(data, limit, white)
    elif magic == b"P7":
        pixels = _any_map(data, limit)
    else:
        pixels = _old(data, limit, magic[1] - ord("0"))
    kind = "gray" if pixels.shape[2] < 3 else "rgb"
    return Decoded(pixels, kind, Metadata(), 1, Origin("PNM"))


def _old(data: bytes, limit: Limits, number: int) -> np.ndarray:
    bitmap, channels = number in (1, 4), 3 if number in (3, 6) else 1
    values, at = _tokens(data, 2, 2 if bitmap else 3)
    width, height, *rest = map(int, values)
    check_size(width, height, limit)
    most = rest[0] if rest else 1
    if number <= 3:
        samples = _text(data[at:], height * width * channels, bitmap)
        return _scaled(samples.reshape(height, width, channels), most, bitmap)
    body = data[at + 1 :]
    if bitmap:
        stride = (width + 7) // 8
        rows = np.frombuffer(_enough(body, stride * height), np.uint8).reshape(height, stride)
        return _scaled(np.unpackbits(rows, axis=1)[:, :width, None], 1, True)
    return _scaled(_binary(body, (height, width, channels), most), most, False)


def _any_map(data: bytes, limit: Limits) -> np.ndarray:
    end = data.find(b"ENDHDR\n", 0, MOST_HEADER)
    if end < 0:
        raise ValueError("it is damaged: its header does not end")
    lines = [line.split(None, 1) for line in data[3:end].split(b"\n") if line.strip() and not line.startswith(b"#")]
    header = {line[0]: line[1] for line in lines if len(line) == 2}
    width, height, channels, most = (int(header[key]) for key in (b"WIDTH", b"HEIGHT", b"DEPTH", b"MAXVAL"))
    check_size(width, height, limit)
    kind = header.get(b"TUPLTYPE", b"").strip()
    if not 1 <= channels <= 4:
        raise ValueError(f"a PAM of {channels} channels is not supported; 1 to 4 are")
    if channels in (2, 4) and not kind.endswith(b"_ALPHA"):
        raise ValueError(f"a PAM of {channels} channels must be GRAYSCALE_ALPHA or RGB_ALPHA; got {kind.decode('latin-1')}")
    return _scaled(_binary(data[end + 7 :], (height, width, channels), most), most, False)


def _real(data: bytes, limit: Limits, white: float) -> np.ndarray:
    values, at = _tokens(data, 2, 3)
    width, height, scale = int(values[0]), int(values[1]), float(values[2])
    check_size(width, height, limit)
    channels = 3 if data[:2] == b"PF" else 1
    body = np.frombuffer(_enough(data[at + 1 :], 4 * width * height * channels), "<f4" if scale < 0 else ">f4")
    # Rows are stored from bottom to top.
    rows = body.reshape(height, width, channels)[::-1].astype(np.float32)
    return check_range(rows if white == 1 else rows / np.float32(white))


def _tokens(data: bytes, at: int, count: int) -> tuple[list[bytes], int]:
    found = []
    for _ in range(count):
        match = TOKEN.match(data, at, MOST_HEADER)
        if match is None:
            raise ValueError("it is damaged: its header is cut short")
        found.append(match[1])
        at = match.end()
    return found, at


def _text(body: bytes, count: int, bitmap: bool) -> np.ndarray:
    plain = re.sub(rb"#[^\r\n]*", b"", body)
    if bitmap:
        digits = re.sub(rb"\s+", b"", plain)
        return np.frombuffer(_enough(digits, count), np.uint8) - ord("0")
    values = plain.split(None, count)[:count]
    if len(values) < count:
        raise ValueError("it is cut short")
    return np.array(values).astype(np.int64)


def _binary(body: bytes, shape: tuple[int, int, int], most: int) -> np.ndarray:
    kind = np.dtype(np.uint8) if most < 256 else np.dtype(">u2")
    count = shape[0] * shape[1] * shape[2]
    return np.frombuffer(_enough(body, count * kind.itemsize), kind).reshape(shape)


def _enough(body: bytes, length: int) -> bytes:
    if len(body) < length:
        raise ValueError("it is cut short")
    return body[:length]


def _scaled(samples: np.ndarray, most: int, inverted: bool) -> np.ndarray:
    """Scale values from 0 … most to the full range."""
    if not 1 <= most <= 65535:
        raise ValueError(f"the largest value must lie in 1 … 65535; it is {most}")
    if samples.size and (samples.min() < 0 or samples.max() > most):
        raise ValueError(f"samples of up to {samples.max()} are more than the largest value of {most}")
    kind = np.uint8 if most < 256 else np.uint16
    peak = np.iinfo(kind).max
    table = np.rint(np.arange(most + 1) * (peak / most)).astype(kind)
    pixels = samples.astype(kind) if most == peak else table[samples]
    return peak - pixels if inverted else pixels
