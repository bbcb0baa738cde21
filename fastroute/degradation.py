"""How LR images are made of HR ones: by antialiased bicubic downscaling, rounded to 8 bits, as the papers do."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def downscale(image: Tensor, scale: float) -> Tensor:  # [B, C, H, W] -> [B, C, H / s, W / s]
    """Bicubic downscaling with antialiasing, the kernel of MATLAB's imresize (a = -0.5, widened by the factor).

    Args:
        image: float32 in [0, 1].
        scale: factor >= 1; the output sides are rounded to the nearest pixel.
    """
    size = [max(1, round(side / scale)) for side in image.shape[-2:]]
    return F.interpolate(image, size=size, mode="bicubic", antialias=True).clamp(0, 1)


def to_uint8(image: Tensor) -> Tensor:
    """[0, 1] floats to 0 … 255, rounded half to even: the precision in which the papers store LR images."""
    return image.clamp(0, 1).mul(255).round().to(torch.uint8)


def make_pair(hr: Tensor, scale: int) -> tuple[Tensor, Tensor]:  # [C, H, W] -> [C, h, w], [C, h·s, w·s]
    """An (LR, HR) pair of uint8 images: HR is cropped to a multiple of `scale`, LR is its bicubic reduction."""
    height, width = (side // scale * scale for side in hr.shape[-2:])
    hr = hr[:, :height, :width]
    lr = downscale(hr[None].float() / 255, scale)[0]
    return to_uint8(lr), hr.contiguous()
