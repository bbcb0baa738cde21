"""CARN: "Fast, Accurate, and Lightweight Super-Resolution with Cascading Residual Network", Ahn et al., ECCV 2018."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fastroute.models.fused import merge_pixels
from fastroute.models.precision import FullPrecision, sums_of

# The mean colour of DIV2K, in [0, 1].
RGB_MEAN = (0.4488, 0.4371, 0.4040)


class EfficientResidualBlock(nn.Module):
    """Two grouped 3 x 3 convolutions and a 1 x 1 convolution with a shortcut around them."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=groups),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, groups=groups),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w]
        """See the class."""
        *layers, last = self.body
        y = x
        for layer in layers:
            y = layer(y)
        return merge_pixels(last, [y], residual=x, slope=0.0)


class CascadingBlock(nn.Module):
    """Three passes through one residual block, each followed by a 1 x 1 convolution over all that came before."""

    def __init__(self, width: int, groups: int, batch_norm: bool, merge_bias: bool = True) -> None:
        super().__init__()
        self.b1 = EfficientResidualBlock(width, groups)
        self.c1, self.c2, self.c3 = (merge(n * width, width, batch_norm, merge_bias) for n in (2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w]
        """See the class."""
        return cascade(x, (self.b1, self.b1, self.b1), (self.c1, self.c2, self.c3))


class CARN(nn.Module):
    """CARN-M with the module names of the published checkpoints, whose residual blocks share weights within a block.

    Args:
        width: feature channels (36, 52 and 64 in ClassSR).
        scale: upscaling factor, 3 or a power of 2.
        groups: groups of the 3 x 3 convolutions.
        channels: image channels.
        upsample: if False, the network ends before the sub-pixel convolutions and returns features (B, width, H, W), as PCSR
            uses it for an encoder. The caller must then subtract the mean.
        mean: colour subtracted from the input and added to the output, one number per channel.
        mean_layers: keep that mean in two 1 x 1 convolutions, `sub_mean` and `add_mean`, as checkpoints of ClassSR and ARM do.
            Those of PCSR have none.
        batch_norm: normalise after each 1 x 1 merge. ARM's checkpoints have a bias instead, CDNSR's have neither.
        merge_bias: give each merge that is not normalised a bias.

    Shape:
        (B, channels, H, W) in [0, 1] to (B, channels, H * scale, W * scale).
    """

    def __init__(
        self,
        width: int = 64,
        scale: int = 4,
        groups: int = 4,
        channels: int = 3,
        upsample: bool = True,
        mean: Sequence[float] = RGB_MEAN,
        mean_layers: bool = False,
        batch_norm: bool = True,
        merge_bias: bool = True,
    ) -> None:
        super().__init__()
        if width % groups:
            raise ValueError(f"CARN: width must be a multiple of groups; got width={width} and groups={groups}")
        if upsample and len(mean) != channels:
            raise ValueError(f"CARN: mean must have one number per channel, {channels}; got {len(mean)}")
        self.width, self.scale, self.channels, self.mean = width, scale if upsample else 1, channels, tuple(mean)
        self.sub_mean: nn.Module | None = None
        self.add_mean: nn.Module | None = None
        if upsample:
            kind = MeanConvolution if mean_layers else MeanShift
            self.sub_mean, self.add_mean = kind([-m for m in mean]), kind(mean)
        self.entry = nn.Conv2d(channels, width, 3, padding=1)
        self.b1, self.b2, self.b3 = (CascadingBlock(width, groups, batch_norm, merge_bias) for _ in range(3))
        self.c1, self.c2, self.c3 = (merge(n * width, width, batch_norm, merge_bias) for n in (2, 3, 4))
        self.upsample: nn.Module | None = None
        self.exit: nn.Module | None = None
        if upsample:
            body = nn.Sequential(*subpixel_layers(width, scale, groups))
            # Nested only to get the published names, upsample.up.body.0 and so on.
            self.upsample = nn.Sequential(OrderedDict(up=nn.Sequential(OrderedDict(body=body))))
            self.exit = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        """See the class."""
        dtype = self.entry.weight.dtype
        if self.sub_mean is not None:
            # Means stay float32 around a network in a half type.
            x = self.sub_mean(x if x.dtype == dtype else x.to(sums_of(dtype)))
        x = cascade(self.entry(x.to(dtype)), (self.b1, self.b2, self.b3), (self.c1, self.c2, self.c3))
        if self.upsample is None or self.exit is None or self.add_mean is None:
            return x
        return self.add_mean(self.exit(self.upsample(x)).to(sums_of(dtype)))

    @torch.no_grad()
    def fold(self) -> None:
        """For inference, fold the last mixing of colours into the convolution before it."""
        if isinstance(self.add_mean, MeanConvolution) and isinstance(self.exit, nn.Conv2d):
            self.add_mean = self.add_mean.folded_into(self.exit)


class MeanShift(FullPrecision):
    """Adds a colour, which is not part of the state dict."""

    def __init__(self, colour: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("colour", torch.tensor(list(colour), dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        """See the class."""
        return x + self.get_buffer("colour").to(x.dtype)


class MeanConvolution(FullPrecision, nn.Conv2d):
    """Adds a colour by a 1 x 1 convolution, which begins as the identity and which ClassSR trains."""

    def __init__(self, colour: Sequence[float]) -> None:
        super().__init__(len(colour), len(colour), 1)
        with torch.no_grad():
            self.weight.copy_(torch.eye(len(colour))[:, :, None, None])
            if self.bias is not None:
                self.bias.copy_(torch.tensor(list(colour)))

    @torch.no_grad()
    def folded_into(self, layer: nn.Conv2d, unit: float = 1.0) -> MeanShift:
        """Let `layer`, in front of this one, mix the colours and divide them by `unit`.

        Returns what is left to add. It stays apart, because in a half type the layer would round it away.
        """
        assert layer.bias is not None and self.bias is not None  # for the type checker
        matrix = self.weight[:, :, 0, 0].double() / unit
        weight, bias = torch.einsum("oc,cikl->oikl", matrix, layer.weight.double()), matrix @ layer.bias.double()
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        return MeanShift((self.bias.double() / unit).tolist()).to(layer.weight.device)


def cascade(x: Tensor, blocks: Iterable[nn.Module], merges: Iterable[nn.Module]) -> Tensor:  # [B, C, h, w]
    """Run a cascade: each merge reads the input and the outputs of all blocks so far, each block reads the merge before it."""
    trail = [x]
    for block, merge_layers in zip(blocks, merges, strict=True):
        trail.append(block(x))
        first, *rest = merge_layers.children()
        x = merge_pixels(first, trail)
        for layer in rest:
            x = layer(x)
    return x


def merge(channels: int, width: int, batch_norm: bool, bias: bool = True) -> nn.Sequential:
    """The 1 x 1 convolution of a cascade, its normalisation and activation."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 1, bias=bias and not batch_norm)]
    if batch_norm:
        layers.append(nn.BatchNorm2d(width))
    return nn.Sequential(*layers, nn.ReLU())


def subpixel_layers(width: int, scale: int, groups: int) -> list[nn.Module]:
    """Convolution, ReLU and pixel shuffle, once by 3 or as often as needed by 2."""
    if scale != 3 and (scale < 2 or scale & (scale - 1)):
        raise ValueError(f"CARN: scale must be 3 or a power of 2 from 2; got {scale}")
    factor, steps = (3, 1) if scale == 3 else (2, int(math.log2(scale)))
    layers: list[nn.Module] = []
    for _ in range(steps):
        layers += [nn.Conv2d(width, factor**2 * width, 3, padding=1, groups=groups), nn.ReLU(), nn.PixelShuffle(factor)]
    return layers
