"""SRResNet: "Photo-Realistic Single Image Super-Resolution Using a GAN", Ledig et al., CVPR 2017, without batch norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.models.fused import convolve
from fastroute.models.precision import HALVES, sums_of

SLOPE = 0.1


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with a shortcut around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w]
        """See the class."""
        return convolve(self.conv2, convolve(self.conv1, x, slope=0.0), residual=x)


class SRResNet(nn.Module):
    """The MSRResNet of ClassSR, with the module names of its checkpoints.

    Args:
        width: feature channels (36, 52 and 64 in ClassSR).
        scale: upscaling factor, 2, 3 or 4.
        blocks: residual blocks.
        channels: image channels.
        upsample: if False, the network ends after the residual blocks and returns features (B, width, H, W), as PCSR uses it
            for an encoder.

    Shape:
        (B, channels, H, W) in [0, 1] to (B, channels, H * scale, W * scale). The output of the layers is added to the bilinear
        image.
    """

    def __init__(self, width: int = 64, scale: int = 4, blocks: int = 16, channels: int = 3, upsample: bool = True) -> None:
        super().__init__()
        if scale not in (2, 3, 4):
            raise ValueError(f"SRResNet: scale must be 2, 3 or 4; got {scale}")
        if width < 1 or blocks < 1:
            raise ValueError(f"SRResNet: width and blocks must be at least 1; got {width} and {blocks}")
        self.width, self.scale, self.channels = width, scale if upsample else 1, channels
        self.factor = 3 if scale == 3 else 2
        self.conv_first = nn.Conv2d(channels, width, 3, padding=1)
        self.recon_trunk = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.upconv1: nn.Module | None = None
        self.upconv2: nn.Module | None = None
        self.HRconv: nn.Module | None = None
        self.conv_last: nn.Module | None = None
        if upsample:
            self.upconv1 = nn.Conv2d(width, width * self.factor**2, 3, padding=1)
            self.upconv2 = nn.Conv2d(width, width * self.factor**2, 3, padding=1) if scale == 4 else None
            self.HRconv = nn.Conv2d(width, width, 3, padding=1)
            self.conv_last = nn.Conv2d(width, channels, 3, padding=1)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """He initialisation, scaled by a tenth, so that the network begins close to its shortcuts."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight).mul_(0.1)
                module.bias.zero_()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        """See the class."""
        dtype = self.conv_first.weight.dtype
        features = self.recon_trunk(convolve(self.conv_first, x.to(dtype), SLOPE))
        if self.HRconv is None or self.conv_last is None:
            return features
        for layer in (self.upconv1, self.upconv2):
            if layer is not None:
                # Before the shuffle the activation has the same effect, and it can run in place.
                features = convolve(layer, features, SLOPE, self.factor)
        residual = self.conv_last(convolve(self.HRconv, features, SLOPE))
        if dtype in HALVES:
            # The output of the layers is small, and the image that it is added to stays float32.
            x, residual = x.to(sums_of(dtype)), residual.to(sums_of(dtype))
        return residual.add_(F.interpolate(x, scale_factor=self.scale, mode="bilinear", align_corners=False))
