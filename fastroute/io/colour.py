"""Colours: CMYK to sRGB, and colour profiles from PNG's own chunks."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageCms

# CICP's codes (ITU-T H.273): red, green, blue as x, y; the white point is D65 but for DCI-P3.
PRIMARIES = {
    1: (0.64, 0.33, 0.30, 0.60, 0.15, 0.06),
    5: (0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    7: (0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    9: (0.708, 0.292, 0.17, 0.797, 0.131, 0.046),
    12: (0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
}
D65 = (0.3127, 0.329)
# The transfer functions that a profile can express exactly: exponents, and that of sRGB.
GAMMAS = {4: 2.2, 5: 2.8, 8: 1.0}
SRGB_TRANSFER = 13
# The values of gAMA for which pictures are shown as sRGB.
SRGB_GAMMA = 45455
COLOUR_CHUNKS = ("cICP", "mDCV", "cLLI", "sRGB", "cHRM", "gAMA")


def from_cmyk(inks: np.ndarray, icc: bytes | None) -> np.ndarray:  # [h, w, 4] -> [h, w, 3]
    """Convert uint8, uint16 or float32 to sRGB by the profile of the inks, or by the plain formula without a usable profile."""
    if inks.dtype != np.uint8:
        deep = inks if inks.dtype == np.uint16 else np.rint(np.clip(inks, 0, 1) * 65535).astype(np.uint16)
        rgb = _from_deep_cmyk(deep, icc)
        return rgb if inks.dtype == np.uint16 else (rgb / np.float32(65535)).astype(np.float32)
    image = Image.fromarray(np.ascontiguousarray(inks), "CMYK")
    if icc is not None:
        try:
            source, target = ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(
                image, source, target, ImageCms.Intent.RELATIVE_COLORIMETRIC, "RGB", flags=ImageCms.Flags.BLACKPOINTCOMPENSATION
            )
            if converted is not None:
                return np.array(converted)
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass
    return np.array(image.convert("RGB"))


def _from_deep_cmyk(inks: np.ndarray, icc: bytes | None) -> np.ndarray:  # [h, w, 4] -> [h, w, 3] uint16
    if icc is not None:
        import imagecodecs

        try:
            target = imagecodecs.cms_profile("srgb")
            flags = imagecodecs.CMS.FLAGS.BLACKPOINTCOMPENSATION
            intent = imagecodecs.CMS.INTENT.RELATIVE_COLORIMETRIC
            rgb: np.ndarray = imagecodecs.cms_transform(
                np.ascontiguousarray(inks), icc, target, colorspace="cmyk", outcolorspace="rgb", intent=intent, flags=flags
            )
            return rgb
        except (imagecodecs.CmsError, ValueError, RuntimeError):
            pass
    light = 65535 - inks.astype(np.uint32)
    return ((light[:, :, :3] * light[:, :, 3:] + 32767) // 65535).astype(np.uint16)


def profile_of_chunks(chunks: Mapping[str, bytes]) -> bytes | None:
    """A colour profile equivalent to PNG's chunks; None if they mean sRGB, or something that no simple profile can express.

    Args:
        chunks: contents by name, of `COLOUR_CHUNKS`.
    """
    import imagecodecs

    primaries, white, gamma = PRIMARIES[1], D65, None
    if "cICP" in chunks:
        space, transfer, _, full = chunks["cICP"]
        if space not in PRIMARIES or not full or (transfer not in GAMMAS and transfer != SRGB_TRANSFER):
            return None
        primaries, gamma = PRIMARIES[space], GAMMAS.get(transfer)
    elif "sRGB" not in chunks:
        if "cHRM" in chunks:
            numbers = [value / 100000 for value in struct.unpack(">8I", chunks["cHRM"])]
            white, primaries = (numbers[0], numbers[1]), tuple(numbers[2:])
        if "gAMA" in chunks:
            stored = struct.unpack(">I", chunks["gAMA"])[0]
            gamma = None if abs(stored - SRGB_GAMMA) <= 100 else 100000 / max(stored, 1)
    if gamma is None and max(abs(a - b) for a, b in zip(primaries + white, PRIMARIES[1] + D65, strict=True)) < 1e-3:
        return None
    try:
        curve = np.linspace(0, 1, 4096)
        curve = np.where(curve <= 0.04045, curve / 12.92, ((curve + 0.055) / 1.055) ** 2.4).astype(np.float32)
        form = {"transferfunction": curve} if gamma is None else {"gamma": gamma}
        points = [number for i in (0, 2, 4) for number in (*primaries[i : i + 2], 1.0)]
        made: bytes = imagecodecs.cms_profile("rgb", whitepoint=[*white, 1.0], primaries=points, **form)
        # The library stores the date and a digest, which are removed so that the same chunks give the same bytes.
        return made[:24] + struct.pack(">6H", 2000, 1, 1, 0, 0, 0) + made[36:84] + bytes(16) + made[100:]
    except (imagecodecs.CmsError, ValueError, RuntimeError):
        return None


def is_plain_srgb(chunks: Mapping[str, bytes]) -> bool:
    """Whether PNG's chunks mean sRGB, which is assumed for a picture without them."""
    if "cICP" in chunks:
        return chunks["cICP"][:2] == bytes([1, SRGB_TRANSFER])
    if "sRGB" in chunks:
        return True
    gamma = "gAMA" not in chunks or abs(struct.unpack(">I", chunks["gAMA"])[0] - SRGB_GAMMA) <= 100
    if "cHRM" not in chunks:
        return gamma
    numbers = struct.unpack(">8I", chunks["cHRM"])
    return gamma and all(abs(a / 100000 - b) < 1e-3 for a, b in zip(numbers, D65 + PRIMARIES[1], strict=True))
