"""How LR images are made of HR ones: by bicubic downscaling as MATLAB's `imresize` does it, rounded to 8 bits as in the papers.

The cubic of a = -0.5 (Keys, 1981) is widened by the factor, so that it is antialiasing, and an image is continued by its mirror
image beyond its borders. PyTorch's antialiased interpolation leaves the taps beyond the border out instead, which changes a
ring of 2 LR pixels by up to 17 levels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Of the cubic.
SHARPNESS = -0.5


def downscale(image: Tensor, scale: float) -> Tensor:  # [B, C, H, W] -> [B, C, H / s, W / s]
    """Bicubic downscaling with antialiasing and mirrored borders.

    Args:
        image: float32 in [0, 1].
        scale: factor >= 1. The output sides are rounded to the nearest pixel.
    """
    for dim in (2, 3):
        image = _reduced(image, dim, max(1, round(image.shape[dim] / scale)))
    return image.clamp(0, 1)


def _reduced(image: Tensor, dim: int, size: int) -> Tensor:
    """`image` with `size` entries along `dim`: one weighted tap after the other."""
    places, weights = taps(image.shape[dim], size)
    shape = [-1 if d == dim else 1 for d in range(image.ndim)]
    total = torch.zeros((), dtype=image.dtype, device=image.device)
    for place, weight in zip(places.to(image.device), weights.to(image), strict=True):
        total = total + image.index_select(dim, place) * weight.view(shape)
    return total


def taps(length: int, size: int) -> tuple[Tensor, Tensor]:  # -> [T, size], [T, size]
    """What of a line of `length` pixels each of `size` pixels is made of: places, mirrored into the line, and weights."""
    factor = length / size
    width = max(factor, 1.0)
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) * factor - 0.5
    reach = math.ceil(2 * width)
    place = centre.floor().long() + torch.arange(-reach, reach + 2)[:, None]
    weight = cubic((place - centre) / width)
    weight = weight / weight.sum(dim=0)
    # 0 1 2 | 2 1 0 | 0 1 2 …
    place = place.remainder(2 * length)
    return torch.minimum(place, 2 * length - 1 - place), weight


def cubic(distance: Tensor) -> Tensor:
    """Keys' cubic, which is 0 from a distance of 2 on."""
    d, a = distance.abs(), SHARPNESS
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


def to_uint8(image: Tensor) -> Tensor:
    """Convert floats in [0, 1] to 0 … 255, rounded half to even: the precision in which the papers store LR images."""
    return image.clamp(0, 1).mul(255).round().to(torch.uint8)


def make_pair(hr: Tensor, scale: int) -> tuple[Tensor, Tensor]:  # [C, H, W] -> [C, h, w], [C, h·s, w·s]
    """An (LR, HR) pair of uint8 images: HR is the image cropped to a multiple of `scale`, LR is its bicubic reduction."""
    height, width = (side // scale * scale for side in hr.shape[-2:])
    hr = hr[:, :height, :width]
    lr = downscale(hr[None].float() / 255, scale)[0]
    return to_uint8(lr), hr.contiguous()
