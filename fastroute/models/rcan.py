"""RCAN: "Image Super-Resolution Using Very Deep Residual Channel Attention Networks", Zhang et al., ECCV 2018."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastroute.models.carn import RGB_MEAN, MeanConvolution
from fastroute.models.precision import HALVES, sums_of


class ChannelAttention(nn.Module):
    """Weights each channel by a gate computed from the means of all channels."""

    def __init__(self, width: int, reduction: int) -> None:
        super().__init__()
        squeezed = max(1, width // reduction)
        self.conv_du = nn.Sequential(
            nn.Conv2d(width, squeezed, 1), nn.ReLU(inplace=True), nn.Conv2d(squeezed, width, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w]
        """See the class."""
        return x * self.conv_du(x.mean(dim=(2, 3), keepdim=True))


class Shortcut(nn.Module):
    """A sequence of layers, `body`, with its input added to its output."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w]
        """See the class."""
        # The last layer is a convolution or a product, neither of which needs its own output for a gradient.
        return self.body(x).add_(x)


class RCAN(nn.Module):
    """RCAN with the module names of ClassSR's checkpoints.

    Args:
        width: feature channels (36, 50 and 64 in ClassSR).
        scale: upscaling factor, 3 or a power of 2.
        groups, blocks: number of residual groups, and of attention blocks in each.
        reduction: channels per channel of the attention's hidden layer.
        channels: image channels.
        input_range: value of white inside the network. ClassSR's checkpoints compute in 0 … 255 and images are in [0, 1], so
            input and output are scaled.
        mean: colour subtracted from the input and added to the output, in the units of the layers, by two trained 1 x 1
            convolutions.
        upsample: if False, the network ends before its tail and returns features (B, width, H, W), divided by `input_range`, as
            PCSR uses it for an encoder.

    Shape:
        (B, channels, H, W) in [0, 1] to (B, channels, H * scale, W * scale).
    """

    def __init__(
        self,
        width: int = 64,
        scale: int = 4,
        groups: int = 10,
        blocks: int = 20,
        reduction: int = 16,
        channels: int = 3,
        input_range: float = 255.0,
        mean: Sequence[float] = RGB_MEAN,
        upsample: bool = True,
    ) -> None:
        super().__init__()
        if min(width, groups, blocks, reduction) < 1 or not input_range > 0:
            raise ValueError(
                "RCAN: width, groups, blocks, reduction and input_range must be positive; got "
                f"{width}, {groups}, {blocks}, {reduction} and {input_range}"
            )
        if len(mean) != channels:
            raise ValueError(f"RCAN: mean must have one number per channel, {channels}; got {len(mean)}")
        self.width, self.scale, self.channels = width, scale if upsample else 1, channels
        self.input_range = float(input_range)
        self.sub_mean: nn.Module = MeanConvolution([-m for m in mean])
        self.add_mean: nn.Module | None = MeanConvolution(mean) if upsample else None
        self.head = nn.Sequential(conv3(channels, width))
        grouped = [Shortcut(*(attention_block(width, reduction) for _ in range(blocks)), conv3(width, width))
                   for _ in range(groups)]  # fmt: skip
        self.body = nn.Sequential(*grouped, conv3(width, width))
        self.tail: nn.Sequential | None = None
        if upsample:
            self.tail = nn.Sequential(nn.Sequential(*upsampling_layers(width, scale)), conv3(width, channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """He initialisation, scaled by a tenth, so that the network begins close to its shortcuts."""
        for part in filter(None, (self.head, self.body, self.tail)):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight).mul_(0.1)
                    module.bias.zero_()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        """See the class."""
        unit, first = self.input_range, self.head[0]
        assert isinstance(first, nn.Conv2d)  # for the type checker
        dtype = first.weight.dtype
        if dtype in HALVES:
            x = x.to(sums_of(dtype))
        features = self.head(self.sub_mean(x if unit == 1 else x * unit).to(dtype))
        features = self.body(features).add_(features)
        if self.tail is None or self.add_mean is None:
            return features if unit == 1 else features / unit
        result = self.tail(features)
        if dtype in HALVES:
            # Means and the last addition stay float32 around a network in a half type.
            result = result.to(sums_of(dtype))
        result = self.add_mean(result)
        return result if unit == 1 else result / unit

    @torch.no_grad()
    def fold(self) -> None:
        """For inference, fold the input range into the convolutions next to it, and likewise the last mixing of colours.

        The mean of the input is not folded: the convolution after it pads with zeros, which then means the mean colour.
        """
        if not isinstance(self.add_mean, MeanConvolution) or self.tail is None:
            return
        first, last = self.sub_mean, self.tail[-1]
        assert isinstance(first, nn.Conv2d) and isinstance(last, nn.Conv2d)  # for the type checker
        first.weight.mul_(self.input_range)
        self.add_mean = self.add_mean.folded_into(last, self.input_range)
        self.input_range = 1.0


def conv3(fan_in: int, fan_out: int) -> nn.Conv2d:
    """A 3 x 3 convolution that keeps the size."""
    return nn.Conv2d(fan_in, fan_out, 3, padding=1)


def attention_block(width: int, reduction: int) -> Shortcut:
    """Two convolutions and channel attention with a shortcut around them."""
    return Shortcut(conv3(width, width), nn.ReLU(inplace=True), conv3(width, width), ChannelAttention(width, reduction))


def upsampling_layers(width: int, scale: int) -> list[nn.Module]:
    """Convolution and pixel shuffle, once by 3 or as often as needed by 2."""
    if scale != 3 and (scale < 2 or scale & (scale - 1)):
        raise ValueError(f"RCAN: scale must be 3 or a power of 2 from 2; got {scale}")
    factor, steps = (3, 1) if scale == 3 else (2, scale.bit_length() - 1)
    return [layer for _ in range(steps) for layer in (conv3(width, factor**2 * width), nn.PixelShuffle(factor))]
