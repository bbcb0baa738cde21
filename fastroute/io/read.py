"""Files to pictures and tensors."""

from __future__ import annotations

import io
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError
from torch import Tensor

from fastroute.io import png
from fastroute.io.count import count_pictures
from fastroute.io.files import ImageError
from fastroute.io.metadata import metadata_of, orientation_of
from fastroute.io.picture import Metadata, Origin, Picture
from fastroute.io.recognise import format_of_file

# Floats beyond this are no image in [0, 1] with some overshoot, but one in 0 … 255 or radiance.
FLOAT_PEAK = 2.0
GRAY_MODES = ("1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N", "I", "F")
AUTO = "auto"
# By content; those that start other programs, such as PostScript, are left out.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000")


def read_picture(path: str | Path, *, max_pixels: int | str | None = AUTO, white: float = 1.0) -> Picture:
    """An image file: PNG, JPEG, WebP, TIFF, BMP and some others, by content; upright, as its EXIF orientation says.

    Gray, RGB and palette pictures keep their values, 8 bits, 16 bits or floating point, and their alpha channel. CMYK becomes
    sRGB by its embedded profile, or without one by the plain formula. Of several pictures in a file the first is read;
    ``origin.pictures`` tells how many there are, and ``origin.notes`` what was left behind.

    Args:
        path: the file.
        max_pixels: a larger picture is refused before anything is allocated; None for no limit. By default, "auto", twice
            ``PIL.Image.MAX_IMAGE_PIXELS``.
        white: the value that floating-point samples have where they are white, say 255.

    Raises:
        ImageError: the file is missing, unreadable, no image, damaged, cut short or too large; or of a kind that is not known:
            floating point beyond [0, 2] once divided by `white`, or not a number.
    """
    limit = pixel_limit() if isinstance(max_pixels, str) else max_pixels
    with _explained(path):
        if not stat.S_ISREG(Path(path).stat().st_mode) and not Path(path).is_dir():
            raise ImageError(f"cannot read {path}: not a regular file")
        origin = _origin(path)
        depth = png.bit_depth(path)
        if depth != 16 and _is_deep_tiff(path):
            return _deep_tiff(path, limit, white, origin)
        with Image.open(path, formats=_formats()) as image:
            _check_size(image.width, image.height, limit)
            image.load()
            kind, metadata, orientation = _kind(image), metadata_of(image), orientation_of(image)
            if depth == 16:
                pixels = png.decode(path)
                kind = "gray" if pixels.ndim == 2 or pixels.shape[2] == 2 else "rgb"
            else:
                pixels, metadata = _pixels(image, metadata)
        return _picture(pixels.reshape(*pixels.shape[:2], -1), orientation, kind, metadata, white, origin)


def read_image(path: str | Path) -> Tensor:
    """An image file as a uint8 RGB tensor (3, H, W), upright as its EXIF orientation says; transparency is dropped.

    Depths beyond 8 bits are scaled. :func:`read_picture` keeps depth, transparency and metadata.

    Raises:
        ImageError: see :func:`read_picture`.
    """
    return read_picture(path).as_bits(8).color.contiguous()


def _origin(path: str | Path) -> Origin:
    pictures = count_pictures(path)
    notes = () if pictures == 1 else (f"of {pictures} pictures in the file, the first was read",)
    return Origin(format_of_file(path) or "", pictures=pictures, notes=notes)


def _check_size(width: int, height: int, limit: int | None) -> None:
    if limit is not None and width * height > limit:
        raise ValueError(f"{width} x {height} pixels are more than the limit of {limit:,}; raise max_pixels to read it")


def pixel_limit() -> int | None:
    """Pixels beyond which a file is refused: where Pillow draws the line."""
    return None if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS


@lru_cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _is_deep_tiff(path: str | Path) -> bool:
    with open(path, "rb") as file:
        if file.read(2) not in (b"II", b"MM"):
            return False
    from fastroute.io import tiff

    return tiff.is_deep(path)


def _deep_tiff(path: str | Path, limit: int | None, white: float, origin: Origin) -> Picture:
    from fastroute.io import tiff

    pixels, orientation, metadata = tiff.decode(path, limit)
    return _picture(pixels, orientation, "gray" if pixels.shape[2] < 3 else "rgb", metadata, white, origin)


def _kind(image: Image.Image) -> str:
    if image.mode in GRAY_MODES:
        return "gray"
    return {"P": "palette", "PA": "palette", "CMYK": "cmyk"}.get(image.mode, "rgb")


def _pixels(image: Image.Image, metadata: Metadata) -> tuple[np.ndarray, Metadata]:
    """The pixels as [H, W] or [H, W, C], gray or RGB, with alpha where the file has it; metadata that fits them."""
    clear = image.has_transparency_data
    if image.mode in ("I", "F"):
        pixels = np.array(image)
        if image.mode == "F":
            return pixels, metadata
        if pixels.size and (pixels.min() < 0 or pixels.max() > 65535):
            raise ValueError(f"values from {pixels.min()} to {pixels.max()} do not fit 16 bits")
        return pixels.astype(np.uint16), metadata
    if image.mode == "CMYK":
        return np.array(_from_cmyk(image, metadata.icc)), replace(metadata, icc=None)
    if image.mode.startswith("I;16"):
        return np.array(image).astype(np.uint16), metadata
    if image.mode in GRAY_MODES:
        straight = image.convert("LA") if image.mode == "La" else image
        # A gray value that stands for transparency is known to the way to RGBA alone.
        return np.array(straight.convert("RGBA"))[:, :, [0, 3]] if clear else np.array(straight.convert("L")), metadata
    return np.array(image.convert("RGBA" if clear else "RGB")), metadata


def _from_cmyk(image: Image.Image, icc: bytes | None) -> Image.Image:
    if icc is not None:
        try:
            source, target = ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(
                image, source, target, ImageCms.Intent.RELATIVE_COLORIMETRIC, "RGB", flags=ImageCms.Flags.BLACKPOINTCOMPENSATION
            )
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError):
            pass
    return image.convert("RGB")


def _picture(
    pixels: np.ndarray,  # [H, W, C]
    orientation: int,
    kind: str,
    metadata: Metadata,
    white: float,
    origin: Origin,
) -> Picture:
    if pixels.dtype.kind == "f" and white != 1:
        pixels = pixels / np.float32(white)
    # NaN fails both comparisons.
    if pixels.dtype.kind == "f" and not (pixels.min() >= -FLOAT_PEAK and pixels.max() <= FLOAT_PEAK):
        found = f"{pixels.min():g} to {pixels.max():g}"
        raise ValueError(f"floating-point values must lie in about [0, 1]; they are {found}: scale them first")
    planes = np.ascontiguousarray(np.moveaxis(_upright(pixels, orientation), 2, 0))
    if orientation >= 5 and metadata.dpi is not None:
        metadata = replace(metadata, dpi=metadata.dpi[::-1])
    tensor = torch.from_numpy(planes)
    alpha = tensor[-1] if len(planes) in (2, 4) else None
    return Picture(tensor[:1].expand(3, -1, -1) if len(planes) < 3 else tensor[:3], alpha, kind, metadata, origin)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:  # [H, W, C]
    """Pixels as their EXIF orientation means them."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    cols = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels[::rows, ::cols]


@contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    """Turn what readers raise into an ImageError that names the file."""
    try:
        yield
    except ImageError:
        raise
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise ImageError(f"cannot read {path}: {error.strerror}") from error
    except UnidentifiedImageError as error:
        empty = Path(path).stat().st_size == 0
        raise ImageError(f"cannot read {path}: {'it is empty' if empty else 'not an image that Pillow knows'}") from error
    except MemoryError as error:
        raise ImageError(f"cannot read {path}: out of memory") from error
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, RuntimeError, OverflowError, struct.error) as error:
        raise ImageError(f"cannot read {path}: {error}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"cannot read {path}: more pixels than the limit of {pixel_limit():,}") from error
