"""Super-resolution of pictures, preserving depth, gray, transparency and metadata."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastroute.cascades.router import CascadeRouter
from fastroute.files.alpha import enlarge_rows
from fastroute.io.hidden import fill_hidden
from fastroute.io.picture import Picture
from fastroute.patch.patch_router import PatchRouter
from fastroute.pixel.pixel_router import PixelRouter
from fastroute.runtime.results import Upscaled
from fastroute.runtime.transfer import to_device, to_host


def upscale_picture(
    router: PatchRouter | PixelRouter | CascadeRouter, picture: Picture, **options: Any
) -> tuple[Picture, Upscaled]:
    """Super-resolve a picture, whatever its kind.

    The colours go through the router at their own depth. For a gray picture, the three results are averaged. Visible colours
    nearby replace colours under full transparency, which nobody sees. The alpha channel is enlarged by bicubic interpolation.
    Metadata are kept.

    Args:
        router: a router, such as :func:`fastroute.load` returns.
        picture: a picture, such as :func:`fastroute.io.read_picture` returns.
        options: arguments of the router's `upscale`, such as `budget`.

    Returns:
        The picture, on the CPU, and the return value of the router.

    Raises:
        ValueError, TypeError: see the router's `upscale`.

    Example:
        >>> result, _ = upscale_picture(fastroute.load(), io.read_picture("scan.tif"))
        >>> io.write_picture("scan-x4.tif", result)
    """
    return upscaled_picture(picture, router.device, partial(router.upscale, **options))


def upscaled_picture(picture: Picture, device: torch.device, upscale: Callable[[Tensor], Upscaled]) -> tuple[Picture, Upscaled]:
    """:func:`upscale_picture` with a function that upscales the colours on `device`."""
    result = upscale(to_device(fill_hidden(picture.color, picture.alpha), device))
    color, arrived = to_host(result.image)
    arrived()
    if picture.kind == "gray":
        color = mean_of_channels(color).expand(3, -1, -1)
    alpha = None if picture.alpha is None else enlarge(picture.alpha, (color.shape[1], color.shape[2]))
    return replace(picture, color=color, alpha=alpha), result


def mean_of_channels(image: Tensor) -> Tensor:  # [3, H, W] -> [1, H, W]
    """The mean, rounded for integers."""
    if image.is_floating_point():
        return image.mean(dim=0, keepdim=True)
    planes = image.numpy()
    total = planes.sum(axis=0, dtype=np.uint32, keepdims=True)
    return torch.from_numpy(((total + 1) // 3).astype(planes.dtype))


def enlarge(alpha: Tensor, size: tuple[int, int]) -> Tensor:  # [h, w] -> [H, W]
    """Bicubic interpolation, within the range of the type."""
    height, width = alpha.shape
    return enlarge_rows(lambda first, last: alpha[first:last], (height, width), size, (0, size[0]))
