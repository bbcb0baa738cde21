"""Compact: a plain chain of convolutions over the nearest-neighbour image, the network of Real-ESRGAN's small models.

"Real-ESRGAN", Wang et al., ICCV Workshops 2021, whose code calls it SRVGGNetCompact.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.models.precision import HALVES, sums_of


class Compact(nn.Module):
    """Convolutions of one width, an activation after each, a pixel shuffle; what they find is added to the nearest neighbour.

    Args:
        width: feature channels; 64 in what is published.
        depth: convolutions between the first and the last; 16 or 32 in what is published.
        scale: upscaling factor.
        channels: image channels.

    Shape:
        (B, channels, H, W) in [0, 1] to (B, channels, H * scale, W * scale).
    """

    def __init__(self, width: int = 64, depth: int = 16, scale: int = 4, channels: int = 3) -> None:
        super().__init__()
        for name, number, least in (("width", width, 1), ("depth", depth, 0), ("scale", scale, 1), ("channels", channels, 1)):
            if number < least:
                raise ValueError(f"Compact: {name} must be at least {least}; got {number}")
        self.width, self.depth, self.scale, self.channels = width, depth, scale, channels
        layers: list[nn.Module] = []
        for number in range(depth + 1):
            layers += [nn.Conv2d(width if number else channels, width, 3, padding=1), nn.PReLU(width)]
        self.body = nn.Sequential(*layers, nn.Conv2d(width, channels * scale**2, 3, padding=1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """He initialisation; the last layer a tenth as strong, so that the network begins close to the nearest neighbour."""
        convolutions = [layer for layer in self.body if isinstance(layer, nn.Conv2d)]
        for layer in convolutions:
            nn.init.kaiming_normal_(layer.weight, a=0.25)
            layer.bias.zero_()  # type: ignore[union-attr]
        convolutions[-1].weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        """See the class."""
        dtype = next(self.body.parameters()).dtype
        found = F.pixel_shuffle(self.body(x.to(dtype)), self.scale)
        if dtype in HALVES:
            # What the layers find is small: the image that it is added to stays float32.
            x, found = x.to(sums_of(dtype)), found.to(sums_of(dtype))
        return found.add_(F.interpolate(x, scale_factor=float(self.scale), mode="nearest"))
