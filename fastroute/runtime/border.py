"""What networks see beyond the edge of an image: zeros, as most were trained, or the repeated edge.

Networks pad with zeros, which makes a flat white image up to 11 levels darker along its border. Repeating the edge first avoids
this. It costs photographs a hundredth of a decibel, because the networks learned to recognise the border, and some time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastroute.runtime.results import Upscaled

ZERO, EDGE = "zero", "edge"
BORDERS = (ZERO, EDGE)
# Input pixels by which an image is extended: about as many as the networks see around a pixel.
MARGIN = 4


def check_border(op: str, border: str) -> str:
    """Return `border` if it is a known one.

    Raises:
        ValueError: it is unknown.
    """
    if border not in BORDERS:
        raise ValueError(f"{op}: border must be one of {', '.join(BORDERS)}; got {border!r}")
    return border


def refuse_edge(op: str, router: Any) -> None:
    """Raise a ValueError if `router` repeats the edge of images, which `op` cannot do."""
    if router.border == EDGE:
        raise ValueError(f"{op}: a router with border='edge' needs the whole image in one call of upscale; load it with 'zero'")


def continued(image: Tensor) -> Tensor:  # [..., H, W] -> [..., H + 2 * MARGIN, W + 2 * MARGIN]
    """The image with its edge repeated around it, bit for bit."""
    rows, columns = (torch.arange(-MARGIN, n + MARGIN, device=image.device).clamp(0, n - 1) for n in image.shape[-2:])
    return image[..., rows, :][..., columns]


def cut(result: Upscaled, scale: int, per_pixel: bool) -> Upscaled:
    """Crop a result to the image itself. A class map of patches remains that of the extended image."""
    inner = slice(MARGIN * scale, -MARGIN * scale)
    # Results are ordinary tensors.
    with torch.inference_mode(False), torch.no_grad():
        image = result.image[..., inner, inner].clone(memory_format=torch.contiguous_format)
        maps = result.class_map
        if per_pixel:
            maps = maps[..., inner, inner].clone(memory_format=torch.contiguous_format)
    return dataclasses.replace(result, image=image, class_map=maps)


def shown_continued(image: Tensor, scale: int) -> Tensor:  # [3, H, W] uint8 -> with its edge repeated
    """The result extended like its input was, for the picture of its classes."""
    margin = MARGIN * scale
    return F.pad(image[None].float(), (margin,) * 4, mode="replicate")[0].to(image.dtype)
