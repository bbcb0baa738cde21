"""RRDBNet: the generator of ESRGAN, Wang et al., ECCV Workshops 2018, in the layout of Real-ESRGAN's checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.models.fused import Fused, cached_bytes, convolve, is_fused

SLOPE = 0.2
# What a dense block and a chain of three add to their input.
RESIDUAL = 0.2
# Side of the tiles of the last layers, and how far these see, both in pixels of the features: one at twice their size, three
# at four times.
TILE, REACH = 96, 2
CHAIN = ("rdb1", "rdb2", "rdb3")
# Convolutions of a dense block.
LAYERS = 5
# Rows of a tile of `conv3x3`: a band is a whole number of them.
TILE_ROWS = 4


class DenseBlock(nn.Module):
    """Five convolutions, each of which sees the input and what all before it found.

    Args:
        width: channels of the input and the output.
        growth: channels that each of the first four convolutions adds.
    """

    conv5: nn.Conv2d

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        for number in range(1, LAYERS + 1):
            out = growth if number < LAYERS else width
            self.add_module(f"conv{number}", nn.Conv2d(width + (number - 1) * growth, out, 3, padding=1))

    def forward(self, x: Tensor, around: Tensor | None = None) -> Tensor:  # [B, C, h, w], [B, C, h, w]
        """See the class. The last block of a chain also adds its result to `around`, the input of the chain."""
        *layers, last = (getattr(self, f"conv{number}") for number in range(1, LAYERS + 1))
        if is_fused(last) and last.has_kernel(x):
            row = x.shape[0] * last.in_channels * x.shape[3] * x.element_size()
            if not torch.compiler.is_compiling() and row * x.shape[2] > (cached := cached_bytes()):
                return self._banded(x, around, layers, last, cached // row)
            return _added(around, self._joined(x, layers, last))
        found = [x]
        for layer in layers:
            found.append(convolve(layer, torch.cat(found, dim=1) if len(found) > 1 else x, SLOPE))
        return _added(around, torch.add(x, last(torch.cat(found, dim=1)), alpha=RESIDUAL))

    @staticmethod
    def _joined(x: Tensor, layers: Sequence[Fused], last: Fused) -> Tensor:  # [B, C, h, w]
        """Each layer writes its channels behind those that it reads, so that nothing is joined."""
        size = (x.shape[0], last.in_channels, *x.shape[2:])
        joined = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        joined[:, : x.shape[1]] = x
        for layer in layers:
            end = layer.in_channels + layer.out_channels
            layer.fused(joined[:, : layer.in_channels], slope=SLOPE, out=joined[:, layer.in_channels : end])
        return last.fused(joined, factor=RESIDUAL, residual=x)

    @staticmethod
    def _banded(
        x: Tensor,  # [B, C, h, w]
        around: Tensor | None,  # [B, C, h, w]
        layers: Sequence[Fused],
        last: Fused,
        rows: int,
    ) -> Tensor:  # [B, C, h, w]
        """The same for so many rows after the other: layer k lags k tiles behind, until the last band.

        What the layers still read of the band before lies above the new rows; the first band has a row of zeros there, and the
        last one below. A row would be enough of a lag; with whole tiles all of them lie as they do in an image that is computed
        at once, and the numbers are the same, bit for bit.
        """
        batch, width, height = x.shape[:3]
        kept = LAYERS * TILE_ROWS + 1
        rows = max(rows - kept, kept) // TILE_ROWS * TILE_ROWS + TILE_ROWS
        joined = torch.empty(
            (batch, last.in_channels, kept + rows + 1, x.shape[3]),
            dtype=x.dtype, device=x.device, memory_format=torch.channels_last,
        )  # fmt: skip
        joined[:, :, kept - 1] = 0
        result = torch.empty_like(x, memory_format=torch.channels_last)
        for begin in range(0, height, rows):
            end, top = min(begin + rows, height), begin - kept
            joined[:, :width, kept : end - top] = x[:, :, begin:end]
            if end == height:
                joined[:, :, end - top] = 0
            for number, layer in enumerate((*layers, last), 1):
                lag = number * TILE_ROWS
                first, after = max(begin - lag, 0), height if end == height else end - lag
                read = joined[:, : layer.in_channels, first - 1 - top : after + 1 - top]
                if layer is last:
                    found = result[:, :, first:after]
                    last.fused(read, factor=RESIDUAL, residual=x[:, :, first:after], out=found, context=1)
                    if around is not None:
                        torch.add(around[:, :, first:after], found, alpha=RESIDUAL, out=found)
                else:
                    written = joined[:, layer.in_channels : layer.in_channels + layer.out_channels]
                    layer.fused(read, slope=SLOPE, out=written[:, :, first - top : after - top], context=1)
            if end < height:
                joined[:, :, :kept] = joined[:, :, rows : rows + kept]
        return result


def _added(around: Tensor | None, found: Tensor) -> Tensor:  # [B, C, h, w], [B, C, h, w]
    """What a chain finds, added to its input."""
    return found if around is None else torch.add(around, found, alpha=RESIDUAL)


class Chain(nn.Module):
    """Three dense blocks around a shortcut: a residual in residual dense block."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        for name in CHAIN:
            self.add_module(name, DenseBlock(width, growth))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w]
        """See the class."""
        first, second, third = (getattr(self, name) for name in CHAIN)
        result: Tensor = third(second(first(x)), x)
        return result


class RRDBNet(nn.Module):
    """Chains of dense blocks, then two enlargements by nearest neighbours with a convolution each.

    Args:
        width, blocks, growth: feature channels, chains of three dense blocks, channels that a layer of a dense block adds.
        scale: upscaling factor, 4, 2 or 1; below 4 the image is first folded into channels.
        channels: image channels.

    Shape:
        (B, channels, H, W) in [0, 1] to (B, channels, H * scale, W * scale). Below a scale of 4 the sides are continued to a
        multiple of 4 / scale by reflection, or by the edge where the image is too small to be reflected.
    """

    def __init__(self, width: int = 64, blocks: int = 23, growth: int = 32, scale: int = 4, channels: int = 3) -> None:
        super().__init__()
        if scale not in (1, 2, 4):
            raise ValueError(f"RRDBNet: scale must be 1, 2 or 4; got {scale}")
        for name, number in (("width", width), ("blocks", blocks), ("growth", growth), ("channels", channels)):
            if number < 1:
                raise ValueError(f"RRDBNet: {name} must be at least 1; got {number}")
        self.width, self.scale, self.channels, self.fold = width, scale, channels, 4 // scale
        self.conv_first = nn.Conv2d(channels * self.fold**2, width, 3, padding=1)
        self.body = nn.Sequential(*(Chain(width, growth) for _ in range(blocks)))
        self.conv_body = nn.Conv2d(width, width, 3, padding=1)
        self.conv_up1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_up2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_hr = nn.Conv2d(width, width, 3, padding=1)
        self.conv_last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        """See the class."""
        height, width = x.shape[-2:]
        if self.fold > 1:
            below, right = -height % self.fold, -width % self.fold
            if below or right:
                small = below >= height or right >= width
                x = F.pad(x, (0, right, 0, below), mode="replicate" if small else "reflect")
            x = F.pixel_unshuffle(x, self.fold)
        first = self.conv_first(x.to(self.conv_first.weight.dtype))
        features = convolve(self.conv_body, self.body(first), residual=first)
        return self._enlarged(features)[..., : height * self.scale, : width * self.scale]

    def _enlarged(self, features: Tensor) -> Tensor:  # [B, C, h, w] -> [B, channels, 4 * h, 4 * w]
        """The last layers, over tiles with the `REACH` pixels that they see around each: the whole would take most memory."""
        height, width = features.shape[-2:]
        if self.training or height * width <= TILE * TILE:
            return self._last(features)
        batch = features.shape[0]
        output = features.new_empty(batch, self.channels, 4 * height, 4 * width)
        for top in range(0, height, TILE):
            for left in range(0, width, TILE):
                bottom, right = min(top + TILE, height), min(left + TILE, width)
                y, x = max(top - REACH, 0), max(left - REACH, 0)
                tile = self._last(features[..., y : bottom + REACH, x : right + REACH])
                inner = slice(4 * (top - y), 4 * (bottom - y)), slice(4 * (left - x), 4 * (right - x))
                output[..., 4 * top : 4 * bottom, 4 * left : 4 * right] = tile[..., inner[0], inner[1]]
        return output

    def _last(self, features: Tensor) -> Tensor:  # [B, C, h, w] -> [B, channels, 4 * h, 4 * w]
        for layer in (self.conv_up1, self.conv_up2):
            features = convolve(layer, F.interpolate(features, scale_factor=2.0, mode="nearest"), SLOPE)
        # Rounded once more, values near 1 would be a whole level of 8 bits apart.
        return self.conv_last(convolve(self.conv_hr, features, SLOPE))
