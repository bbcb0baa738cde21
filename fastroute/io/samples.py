"""Converts the samples of a decoder to pixels.

Every pixel depends only on its own samples, so it makes no difference how many rows are decoded at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fastroute.io.colour import from_cmyk

# Floats beyond this are not an image in [0, 1] with some overshoot, but one in 0 … 255, or radiance.
FLOAT_PEAK = 2.0
COLOURS = {"gray": 1, "rgb": 3, "palette": 1, "cmyk": 4}


@dataclass(frozen=True)
class Meaning:
    """The meaning of the samples of a pixel.

    Attributes:
        kind: "gray", "rgb", "palette" or "cmyk". These samples come first.
        bits: bits of an integer sample, 1 to 16; 0 for floating point. Up to 8 become uint8, more uint16, at full range.
        inverted: whether 0 is white.
        alpha: place of the sample that is transparency, or None.
        premultiplied: whether colours are multiplied by alpha.
        palette: [n, 3] uint8 or uint16.
        icc: colour profile of CMYK.
        white: value of white in floating-point samples.
    """

    kind: str
    bits: int
    inverted: bool = False
    alpha: int | None = None
    premultiplied: bool = False
    palette: np.ndarray | None = None
    icc: bytes | None = None
    white: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.bits <= 16:
            raise ValueError(f"{self.bits} bits a sample are not supported; 1 to 16 and floating point are")

    @property
    def dtype(self) -> np.dtype:
        """The type of the pixels."""
        if self.palette is not None:
            return self.palette.dtype
        return np.dtype(np.float32 if self.bits == 0 else np.uint8 if self.bits <= 8 else np.uint16)

    @property
    def channels(self) -> int:
        """The channels of a pixel: 1 for gray, 3 for RGB, and one more for alpha."""
        return (1 if self.kind == "gray" else 3) + (self.alpha is not None)

    def pixels(self, samples: np.ndarray) -> np.ndarray:  # [h, w, S] -> [h, w, C]
        """Convert samples to gray or RGB, with alpha if there is one, not premultiplied.

        Raises:
            ValueError: floating-point samples are not an image in about [0, 1].
        """
        count = COLOURS[self.kind]
        if self.palette is not None:
            colour = self.palette[np.minimum(samples[:, :, 0], len(self.palette) - 1)]
        else:
            colour = self._full(samples[:, :, :count])
        peak = 1 if self.bits == 0 else np.iinfo(colour.dtype).max
        if self.inverted:
            colour = peak - colour
        if self.kind == "cmyk":
            colour = from_cmyk(colour, self.icc)
        if self.alpha is None:
            return colour
        alpha = self._full(samples[:, :, self.alpha : self.alpha + 1])
        if self.palette is not None and alpha.dtype != colour.dtype:
            alpha = alpha.astype(colour.dtype) * (257 if colour.dtype == np.uint16 else 1)
        if self.premultiplied:
            colour = _unmultiplied(colour, alpha, peak)
        return np.concatenate([colour, alpha], axis=2)

    def _full(self, samples: np.ndarray) -> np.ndarray:
        """The samples, scaled to the full range of their type."""
        if self.bits == 0:
            real = samples.astype(np.float32)
            return check_range(real if self.white == 1 else real / np.float32(self.white))
        if self.bits in (8, 16):
            return samples.astype(self.sample_type, copy=False)
        return _table(self.bits)[np.minimum(samples, (1 << self.bits) - 1)]

    @property
    def sample_type(self) -> type:
        """The largest value of a sample at full range."""
        return np.uint8 if self.bits <= 8 else np.uint16


def check_range(pixels: np.ndarray) -> np.ndarray:
    """Return floating-point pixels after checking them.

    Raises:
        ValueError: the pixels are not in about [0, 1].
    """
    # NaN fails both comparisons.
    if pixels.size and not (pixels.min() >= -FLOAT_PEAK and pixels.max() <= FLOAT_PEAK):
        found = f"{pixels.min():g} to {pixels.max():g}"
        raise ValueError(
            f"floating-point values must lie in about [0, 1]; they are {found}: scale them first, or give their white, say 255"
        )
    return pixels


@lru_cache
def _table(bits: int) -> np.ndarray:
    """The full-range value of every sample with `bits` bits."""
    kind = np.uint8 if bits <= 8 else np.uint16
    return np.rint(np.arange(1 << bits) * (np.iinfo(kind).max / ((1 << bits) - 1))).astype(kind)


def _unmultiplied(colour: np.ndarray, alpha: np.ndarray, peak: int) -> np.ndarray:
    result = np.zeros(colour.shape, np.float32)
    np.divide(colour * np.float32(peak), alpha, out=result, where=alpha > 0)
    return result if colour.dtype == np.float32 else np.rint(np.clip(result, 0, peak)).astype(colour.dtype)
