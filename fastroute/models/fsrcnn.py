"""FSRCNN: "Accelerating the Super-Resolution Convolutional Neural Network", Dong et al., ECCV 2016."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastroute.models.subpixel import SubpixelPlan


class TransposedConv2d(nn.ConvTranspose2d):
    """A transposed convolution that trains in its sub-pixel form.

    The numbers are those of :class:`torch.nn.ConvTranspose2d`. In training mode the product is computed as a dense
    convolution and a pixel shuffle, whose forward and backward passes are about twice as fast on a CPU.
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # [N, C, h, w]
        """See :class:`torch.nn.ConvTranspose2d`."""
        if not self.training or output_size is not None:
            return super().forward(input, output_size)
        return SubpixelPlan.of(self).upsample(input, self.weight, self.bias)


# Taps of the transposed convolution on each axis.
TAIL = 9


def tail_padding(scale: int) -> int:
    """The padding of the transposed convolution.

    3 puts the centre of a tap half an HR pixel from that of the LR pixel. A stride of 2 only allows 4.
    """
    return 3 if scale >= 3 else 4


def tail_distances(scale: int) -> Tensor:  # -> [9]
    """How far each tap of the transposed convolution writes from its LR pixel, in LR pixels.

    Output pixel o lies at LR coordinate (o + 0.5) / scale - 0.5. Tap t of LR pixel i writes o = scale * i - padding + t.
    """
    return (torch.arange(TAIL, dtype=torch.float32) - tail_padding(scale) + 0.5) / scale - 0.5


def resampled_tail(kernel: Tensor, old: int, new: int) -> Tensor:  # [C, O, 9, 9]
    """The kernel of the transposed convolution by `old` as one by `new`, linearly interpolated between taps; 0 beyond them."""
    at = (tail_distances(new) - tail_distances(old)[0]) * old  # in taps of the old one
    weights = (1 - (at[:, None] - torch.arange(TAIL)).abs()).clamp(min=0).to(kernel)
    return weights @ kernel @ weights.t()


class FSRCNN(nn.Module):
    """FSRCNN with the module names of the published checkpoints.

    Args:
        width: feature channels d of the first and last stage (16, 36 and 56 in ClassSR).
        scale: upscaling factor.
        shrink: channels s of the mapping stage.
        depth: number m of 3 x 3 mapping convolutions.
        channels: image channels.
        upsample: if False, the network ends before the transposed convolution and returns features (B, width, H, W), as PCSR
            uses it for an encoder.

    Shape:
        (B, channels, H, W) in [0, 1] to (B, channels, H * scale, W * scale).
    """

    def __init__(
        self,
        width: int = 56,
        scale: int = 4,
        shrink: int = 12,
        depth: int = 4,
        channels: int = 3,
        upsample: bool = True,
    ) -> None:
        super().__init__()
        if width < channels or shrink < channels:
            raise ValueError(f"FSRCNN: width and shrink must be at least channels ({channels}); got {width} and {shrink}")
        self.width, self.scale, self.channels = width, scale if upsample else 1, channels
        self.head_conv = nn.Sequential(nn.Conv2d(channels, width, 5, padding=2), nn.PReLU())
        body: list[nn.Module] = [nn.Sequential(nn.Conv2d(width, shrink, 1), nn.PReLU())]
        body += [nn.Conv2d(shrink, shrink, 3, padding=1) for _ in range(depth)]
        body += [nn.PReLU(), nn.Sequential(nn.Conv2d(shrink, width, 1), nn.PReLU())]
        self.body_conv = nn.Sequential(*body)
        self.tail_conv: TransposedConv2d | None = None
        if upsample:
            padding = tail_padding(scale)
            extra = scale - TAIL + 2 * padding
            self.tail_conv = TransposedConv2d(width, channels, TAIL, scale, padding, output_padding=extra)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """He initialisation, except that the first `channels` features start as a bilinear upscaler of the input.

        A network that begins as an interpolator need not learn to interpolate in its first thousands of steps.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_in))
                module.bias.zero_()  # type: ignore[union-attr]
                middle = module.kernel_size[0] // 2
                for c in range(self.channels):
                    module.weight[c] = 0
                    module.weight[c, c, middle, middle] = 1
        if self.tail_conv is None:
            return
        nn.init.normal_(self.tail_conv.weight, std=0.001)
        self.tail_conv.bias.zero_()  # type: ignore[union-attr]
        hat = (1 - tail_distances(self.scale).abs()).clamp(min=0)
        for c in range(self.channels):
            self.tail_conv.weight[c] = 0
            self.tail_conv.weight[c, c] = hat[:, None] * hat[None, :]

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        """The image, or without `upsample` the features."""
        x = self.body_conv(self.head_conv(x))
        return x if self.tail_conv is None else self.tail_conv(x)

    @staticmethod
    def mixture(branches: Sequence[FSRCNN], x: Tensor, weights: Tensor) -> Tensor:  # [B, C, H, W], [B, K]
        """The weighted sum of the branches' images: (B, C, H * scale, W * scale).

        A transposed convolution is linear, so the last layers of the branches form a single layer on all their features, and
        the images are never computed one by one.

        Args:
            branches: networks whose upsamplers have the same kernel, stride and padding. Widths may differ.
            x: images.
            weights: weight of each branch for each image.
        """
        tails = [branch.tail_conv for branch in branches if branch.tail_conv is not None]
        plans = {SubpixelPlan.of(tail) for tail in tails}
        if len(tails) != len(branches) or len(plans) != 1:
            raise ValueError("FSRCNN: branches must all end with a transposed convolution of one kernel, stride and padding")
        features = [branch.body_conv(branch.head_conv(x)) for branch in branches]
        weighted = [part * weights[:, k, None, None, None] for k, part in enumerate(features)]
        image = plans.pop().upsample(torch.cat(weighted, dim=1), torch.cat([tail.weight for tail in tails]), None)
        biases = torch.stack([tail.bias for tail in tails])  # type: ignore[misc]
        return image + (weights @ biases)[:, :, None, None]

    def as_sequential(self) -> nn.Sequential:
        """The same layers as one sequence, for :func:`fastroute.rewrite.optimize.optimize`."""
        layers = [self.head_conv, self.body_conv]
        return nn.Sequential(*layers) if self.tail_conv is None else nn.Sequential(*layers, self.tail_conv)
