"""Images from and to files, through Pillow."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")


class ImageError(ValueError):
    """An image file that cannot be read or written; the message names the file and the reason."""


def list_images(folder: str | Path) -> list[Path]:
    """Image files below `folder`, sorted by path.

    Raises:
        ValueError: `folder` is no folder or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"images: {folder} is not a folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise ValueError(f"images: {folder} holds no image file ({', '.join(SUFFIXES)})")
    return paths


def read_image(path: str | Path) -> Tensor:
    """An image file as a uint8 RGB tensor (3, H, W), upright as its EXIF orientation says; transparency is dropped.

    Raises:
        ImageError: the file is missing, unreadable, no image, damaged or cut short.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):
                # Pillow would clip 16-bit values at 255.
                gray = np.rint(np.array(upright).astype(np.float32) / 257).astype(np.uint8)
                pixels = np.repeat(gray[:, :, None], 3, axis=2)
            elif upright.mode in ("I", "F"):
                raise ImageError(f"cannot read {path}: pixels of mode {upright.mode} (32 bits) are not supported")
            else:
                pixels = np.array(upright.convert("RGB"))
    except ImageError:
        raise
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ImageError(f"cannot read {path}: {error.strerror}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"cannot read {path}: not an image that Pillow knows") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"cannot read {path}: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def check_writable(path: str | Path) -> None:
    """Fail now rather than after the work.

    Raises:
        ImageError: the folder is missing or not writable, `path` is a folder, or its ending names no known format.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ImageError(f"cannot write {path}: its ending must be one of {', '.join(SUFFIXES)}")
    if path.is_dir():
        raise ImageError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise ImageError(f"cannot write {path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ImageError(f"cannot write {path}: permission denied")


def write_image(path: str | Path, image: Tensor) -> None:  # [C, H, W]
    """Write a uint8 image (C, H, W), C = 1 or 3; the format follows the file's ending. All or nothing.

    Raises:
        ImageError: see :func:`check_writable`; or the encoder failed.
    """
    check_writable(path)
    pixels = image.permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))
    file_format = Image.registered_extensions()[Path(path).suffix.lower()]
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {"compress_level": 3}}.get(file_format, {})
    try:
        write_atomically(path, lambda file: picture.save(file, format=file_format, **options))
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot write {path}: {error}") from error


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write` on a temporary file beside `path` and rename it when whole; an interrupted run leaves `path` as it was."""
    path = Path(path)
    # The name keeps a hint of the target and stays short of what file systems allow.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:80]}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; give the result the permissions any new file would have.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
