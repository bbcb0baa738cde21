"""Encoders that run in bands of rows: the same numbers, with activations that mostly stay in the caches.

A layer that reads rows above and below keeps the last rows it has seen, so a band flows through all layers and no row is
computed twice. A layer with a kernel of 2p + 1 lags p rows behind its input. Where two paths meet, the shorter one waits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.models.carn import CARN, CascadingBlock, EfficientResidualBlock
from fastroute.models.srresnet import SLOPE, ResidualBlock, SRResNet
from fastroute.rewrite.convolutions import Conv1x1, Conv3x3


class LayerStage(ABC):
    """A part of a network that takes consecutive rows of an image and returns the rows of its output that are complete.

    Attributes:
        reach: pixels on each side of a pixel that its output depends on.
    """

    reach = 0

    @abstractmethod
    def push(self, x: Tensor, last: bool) -> Tensor:  # [B, C, n, w] -> [B, C', m, w]
        """Take the next rows. `last` says that none follow."""


class Pointwise(LayerStage):
    """A layer that reads one pixel at a time."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def push(self, x: Tensor, last: bool) -> Tensor:  # [B, C, n, w]
        """See :class:`LayerStage`."""
        return self.layer(x) if x.shape[2] else self.layer(x.new_zeros(x.shape[0], x.shape[1], 1, x.shape[3]))[:, :, :0]


class Product(LayerStage):
    """A 1 x 1 convolution as a matrix product, which is faster on channels_last rows."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.layer = layer

    def push(self, x: Tensor, last: bool) -> Tensor:  # [B, C, n, w]
        """See :class:`LayerStage`."""
        if isinstance(self.layer, Conv1x1):
            return self.layer(x)
        weight = self.layer.weight.flatten(1)
        return F.linear(x.permute(0, 2, 3, 1), weight, self.layer.bias).permute(0, 3, 1, 2)


class RowConvolution(LayerStage):
    """A convolution with an odd kernel that keeps the size of its input."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.layer, self.pad = layer, layer.kernel_size[0] // 2
        self.reach = self.pad
        self.held: Tensor | None = None

    def push(self, x: Tensor, last: bool) -> Tensor:  # [B, C, n, w]
        """See :class:`LayerStage`."""
        b, c, _, w = x.shape
        edge = x.new_zeros(b, c, self.pad, w).contiguous(memory_format=torch.channels_last)
        pieces = [edge if self.held is None else self.held, x, *([edge] if last else [])]
        rows = torch.cat(pieces, dim=2)
        # A copy, because a view would keep the whole band in memory.
        self.held = rows[:, :, max(rows.shape[2] - 2 * self.pad, 0) :].clone()
        layer = self.layer
        if rows.shape[2] <= 2 * self.pad:
            return x.new_zeros(b, layer.out_channels, 0, w)
        if isinstance(layer, Conv3x3):
            return layer.fused(rows, context=1)
        return F.conv2d(rows, layer.weight, layer.bias, padding=(0, self.pad), groups=layer.groups)


class Chain(LayerStage):
    """Stages one after the other."""

    def __init__(self, stages: Iterable[LayerStage]) -> None:
        self.stages = list(stages)
        self.reach = sum(stage.reach for stage in self.stages)

    def push(self, x: Tensor, last: bool) -> Tensor:  # [B, C, n, w]
        """See :class:`LayerStage`."""
        for stage in self.stages:
            x = stage.push(x, last)
        return x


class Waiting:
    """Rows of a short path that wait for those of a longer one."""

    def __init__(self) -> None:
        self.held: Tensor | None = None

    def take(self, x: Tensor, count: int) -> Tensor:  # [B, C, n, w] -> [B, C, count, w]
        """Add the next rows and return the first `count` waiting rows."""
        rows = x if self.held is None or self.held.shape[2] == 0 else torch.cat([self.held, x], dim=2)
        self.held = rows[:, :, count:].clone()
        return rows[:, :, :count]


class Residual(LayerStage):
    """body(x) + x, followed by a layer in place.

    Args:
        body: the layers.
        last: the layer applied to the sum.
    """

    def __init__(self, body: LayerStage, last: Callable[[Tensor], Tensor] = F.relu_) -> None:
        self.body, self.shortcut, self.last = body, Waiting(), last
        self.reach = body.reach

    def push(self, x: Tensor, last: bool) -> Tensor:  # [B, C, n, w]
        """See :class:`LayerStage`."""
        y = self.body.push(x, last)
        return self.last(y.add_(self.shortcut.take(x, y.shape[2])))


class Merge:
    """The layers of a cascade's merge. If they start with a product, the parts of their input are never joined."""

    def __init__(self, module: nn.Module) -> None:
        layers = list(module.children())
        self.first = layers[0]
        self.rest = Chain(make_stage(layer) for layer in layers[1:])

    def push(self, parts: Sequence[Tensor], last: bool) -> Tensor:  # [B, C, n, w] each -> [B, C', n, w]
        """Merge parts that hold the same rows."""
        assert isinstance(self.first, nn.Conv2d)
        if isinstance(self.first, Conv1x1):
            return self.rest.push(self.first.fused(parts), last)
        b, _, n, w = parts[0].shape
        # Each part has its own product, added to those before: joining the parts would move more than the product reads.
        weights = self.first.weight.flatten(1).split([part.shape[1] for part in parts], dim=1)
        total: Tensor | None = None
        for part, weight in zip(parts, weights, strict=True):
            rows = part.permute(0, 2, 3, 1).reshape(b * n * w, part.shape[1])
            total = F.linear(rows, weight, self.first.bias) if total is None else total.addmm_(rows, weight.t())
        assert total is not None
        return self.rest.push(total.view(b, n, w, self.first.out_channels).permute(0, 3, 1, 2), last)


class Cascade(LayerStage):
    """CARN's cascade: each merge reads the input and the outputs of all blocks so far."""

    def __init__(self, blocks: Sequence[LayerStage], merges: Sequence[Merge]) -> None:
        self.steps = list(zip(blocks, merges, strict=True))
        self.reach = sum(block.reach for block in blocks)
        self.waiting = [[Waiting() for _ in range(n + 1)] for n in range(len(self.steps))]

    def push(self, x: Tensor, last: bool) -> Tensor:  # [B, C, n, w]
        """See :class:`LayerStage`."""
        parts = [x]
        for (block, merge), waiting in zip(self.steps, self.waiting, strict=True):
            y = block.push(x, last)
            parts = [*(wait.take(part, y.shape[2]) for wait, part in zip(waiting, parts, strict=True)), y]
            x = merge.push(parts, last)
        return x


def unsupported_reasons(module: nn.Module) -> list[str]:
    """Why `module` cannot run in bands; "" if it can."""
    if isinstance(module, CARN) and module.upsample is not None:
        return ["it changes the size of its input"]
    if isinstance(module, SRResNet) and module.HRconv is not None:
        return ["it changes the size of its input"]
    if isinstance(module, nn.Sequential | CARN | CascadingBlock | EfficientResidualBlock | SRResNet | ResidualBlock):
        return [reason for child in module.children() for reason in unsupported_reasons(child)]
    if isinstance(module, nn.Conv2d):
        kernel = module.kernel_size
        plain = module.stride == (1, 1) and module.dilation == (1, 1) and module.padding_mode == "zeros"
        same = kernel[0] == kernel[1] and kernel[0] % 2 == 1 and module.padding == (kernel[0] // 2, kernel[0] // 2)
        return [] if plain and same else [f"{module} is not a plain convolution that keeps its size"]
    if isinstance(module, nn.ReLU | nn.LeakyReLU | nn.PReLU | nn.BatchNorm2d | nn.Identity):
        return []
    return [f"{type(module).__name__} is unknown"]


def make_stage(module: nn.Module) -> LayerStage:
    """`module` in bands, ready for the first row of an image."""
    if isinstance(module, CARN):
        # Stages have a state, so each use of a shared block is a stage of its own.
        blocks = [make_stage(block) for block in (module.b1, module.b2, module.b3)]
        merges = [Merge(merge) for merge in (module.c1, module.c2, module.c3)]
        return Chain([make_stage(module.entry), Cascade(blocks, merges)])
    if isinstance(module, CascadingBlock):
        merges = [Merge(merge) for merge in (module.c1, module.c2, module.c3)]
        return Cascade([make_stage(module.b1) for _ in merges], merges)
    if isinstance(module, EfficientResidualBlock):
        return Residual(make_stage(module.body))
    if isinstance(module, SRResNet):
        first = [make_stage(module.conv_first), Pointwise(nn.LeakyReLU(SLOPE, inplace=True))]
        return Chain([*first, make_stage(module.recon_trunk)])
    if isinstance(module, ResidualBlock):
        body = [make_stage(module.conv1), Pointwise(nn.ReLU(inplace=True)), make_stage(module.conv2)]
        return Residual(Chain(body), last=lambda y: y)
    if isinstance(module, nn.Sequential):
        return Chain(make_stage(child) for child in module)
    if isinstance(module, nn.Conv2d):
        return Product(module) if module.kernel_size == (1, 1) and module.groups == 1 else RowConvolution(module)
    if isinstance(module, nn.ReLU):
        return Pointwise(nn.ReLU(inplace=True))
    return Pointwise(module)


# The least number of rows of a band and, by default, the largest number of columns of a strip.
MIN_ROWS, MAX_COLUMNS = 16, 640


def rows_in_bands(
    module: nn.Module,
    read: Callable[[slice, slice], Tensor],  # rows, columns -> [B, C, n, m]
    height: int,
    width: int,
    pixels: int,
    min_rows: int = MIN_ROWS,
    max_columns: int = MAX_COLUMNS,
) -> Iterator[list[Tensor]]:  # [B, D, n, m] each
    """The output of `module` for the image that `read` returns, from top to bottom, about `pixels` pixels at a time.

    A convolution keeps two rows of the previous band, so bands of few rows would mostly be copied. Wide images therefore run in
    strips of columns, whose edges are computed twice. Each item holds the next rows of all strips, side by side.
    """
    count = -(-width // max_columns)
    edges = [width * n // count for n in range(count + 1)]
    stages = [make_stage(module) for _ in range(count)]
    spans = [slice(max(a - stages[0].reach, 0), min(b + stages[0].reach, width)) for a, b in pairwise(edges)]
    rows = max(min_rows, pixels // max(span.stop - span.start for span in spans))
    for top in range(0, height, rows):
        parts = []
        for stage, span, (left, right) in zip(stages, spans, pairwise(edges), strict=True):
            result = stage.push(read(slice(top, min(top + rows, height)), span), top + rows >= height)
            parts.append(result[:, :, :, left - span.start : right - span.start])
        if parts[0].shape[2]:
            yield parts
