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
    for _ in range(2):
        # Rows, which are read in one piece, then columns as rows.
        image = _fewer_rows(image, max(1, round(image.shape[2] / scale))).transpose(2, 3).contiguous()
    return image.clamp(0, 1)


def _fewer_rows(image: Tensor, size: int) -> Tensor:  # [B, C, H, W] -> [B, C, size, W]
    """`image` with `size` rows: one weighted tap after the other."""
    places, weights = taps(image.shape[2], size)
    total: Tensor | None = None
    for place, weight in zip(places.to(image.device), weights.to(image), strict=True):
        rows = image.index_select(2, place).mul_(weight[:, None])
        total = rows if total is None else total.add_(rows)
    assert total is not None  # there are four taps or more
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
