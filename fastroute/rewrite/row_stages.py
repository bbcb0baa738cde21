"""Encoders that run in bands of rows: the same numbers, with activations that mostly stay in the caches.

A layer that reads rows above and below keeps the last rows it has seen, so a band flows through all layers and no row is
computed twice. A layer with a kernel of 2p + 1 lags p rows behind its input. Where two paths meet, the shorter one waits. Every
stage writes its rows behind those that its reader sees again, so rows are never joined: stages are made from the last to the
first, each knowing what its reader wants.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.models.carn import CARN, CascadingBlock, EfficientResidualBlock
from fastroute.models.fused import rectify_
from fastroute.models.srresnet import SLOPE, ResidualBlock, SRResNet
from fastroute.rewrite.convolutions import Conv1x1, Conv3x3
from fastroute.rewrite.rows import History, Room, Rows


class Sum(NamedTuple):
    """What follows the last convolution of a residual block.

    Attributes:
        shortcut: rows that are added to its output.
        slope: of the leaky ReLU behind the sum; None for none.
    """

    shortcut: Rows
    slope: float | None


class LayerStage(ABC):
    """A part of a network that takes consecutive rows of an image and returns the rows of its output that are complete.

    Attributes:
        reach: pixels on each side of a pixel that its output depends on.
        before: rows before the new ones that it reads again. Whoever hands it rows keeps them by a :class:`History`.
        beyond: rows of zeros above and below the image that it reads.
    """

    reach = 0
    before = 0
    beyond = 0

    @property
    def room(self) -> tuple[int, int]:
        """What must have a place in the memory of its input: rows before the new ones, and rows beyond the image."""
        return self.before, self.beyond

    @abstractmethod
    def push(self, rows: Rows, last: bool, following: Sum | None = None) -> Rows:
        """Take the next rows, (B, C, n, w), and return (B, C', m, w). `last` says that none follow."""


class Pointwise(LayerStage):
    """A layer that reads one pixel at a time.

    Args:
        layer: the layer.
        before, beyond: what the reader of the output wants, as for every other stage.
    """

    def __init__(self, layer: nn.Module, before: int = 0, beyond: int = 0) -> None:
        self.layer, self.out = layer, Room(before, beyond)

    @property
    def room(self) -> tuple[int, int]:
        """In place, its output is where its input was."""
        return (self.out.before, self.out.beyond) if self._in_place else (0, 0)

    @property
    def _in_place(self) -> bool:
        return isinstance(self.layer, nn.Identity) or bool(getattr(self.layer, "inplace", False))

    def push(self, rows: Rows, last: bool, following: Sum | None = None) -> Rows:
        """See :class:`LayerStage`."""
        assert following is None  # the last layer of a residual block is a convolution
        x = rows.new
        if self._in_place:
            if x.shape[2]:
                self.layer(x)
            return rows
        return self.out.fill(x.shape, x, last, lambda out: _written(self.layer(x), out))


class Convolution(LayerStage):
    """A convolution with an odd kernel that keeps the size of its input, or the merge of a cascade, whose kernel has one tap.

    Args:
        layer: the convolution.
        before, beyond: what the reader of the output wants.
    """

    def __init__(self, layer: nn.Conv2d, before: int = 0, beyond: int = 0) -> None:
        self.layer, self.pad = layer, layer.kernel_size[0] // 2
        self.reach, self.before, self.beyond = self.pad, 2 * self.pad, self.pad
        self.out = Room(before, beyond)

    def push(self, rows: Rows, last: bool, following: Sum | None = None) -> Rows:
        """See :class:`LayerStage`."""
        begin = self.out.next
        end = max(rows.end if last else rows.end - self.pad, begin)
        parts = [rows.between(begin - self.pad, end + self.pad)] if end > begin else [rows.new]
        return self.merge(parts, end - begin, last, following)

    def merge(
        self,
        parts: Sequence[Tensor],  # [B, C, n, w] each
        count: int,
        last: bool,
        following: Sum | None = None,
    ) -> Rows:
        """The next `count` rows, of the joined channels of `parts`, (B, C, n, w) each."""
        batch, _, _, width = parts[0].shape
        begin = self.out.next
        shortcut = None if following is None else following.shortcut.between(begin, begin + count)
        slope = None if following is None else following.slope

        def make(out: Tensor | None) -> Tensor:  # [B, O, m, w] -> [B, O, m, w]
            if isinstance(self.layer, Conv1x1):
                return self.layer.fused(parts, slope, shortcut, out)
            if isinstance(self.layer, Conv3x3) and slope is None:
                return self.layer.fused(parts[0], residual=shortcut, out=out, context=1)
            y = self.layer.fused(parts[0], context=1) if isinstance(self.layer, Conv3x3) else self._plain(parts)
            y = y if shortcut is None else y.add_(shortcut)
            return _written(y if slope is None else rectify_(y, slope), out)

        return self.out.fill((batch, self.layer.out_channels, count, width), parts[0], last, make)

    def _plain(self, parts: Sequence[Tensor]) -> Tensor:  # [B, C, n, w] each -> [B, O, n - 2 p, w]
        layer = self.layer
        if self.pad or layer.groups > 1:
            return F.conv2d(parts[0], layer.weight, layer.bias, padding=(0, self.pad), groups=layer.groups)
        # Products, which are faster on channels_last rows. Each part has its own, added to those before: joining the parts
        # would move more than the product reads.
        weights = layer.weight.flatten(1).split([part.shape[1] for part in parts], dim=1)
        batch, _, count, width = parts[0].shape
        total: Tensor | None = None
        for part, weight in zip(parts, weights, strict=True):
            pixels = part.permute(0, 2, 3, 1).reshape(batch * count * width, part.shape[1])
            total = F.linear(pixels, weight, layer.bias) if total is None else total.addmm_(pixels, weight.t())
        assert total is not None  # there is at least one part
        return total.view(batch, count, width, layer.out_channels).permute(0, 3, 1, 2)


def _written(y: Tensor, out: Tensor | None) -> Tensor:  # [B, C, n, w], [B, C, n, w] -> [B, C, n, w]
    return y if out is None else out.copy_(y)


class Chain(LayerStage):
    """Stages one after the other."""

    def __init__(self, stages: Sequence[LayerStage]) -> None:
        self.stages = list(stages)
        self.histories = [History(stage.before) for stage in self.stages]
        self.reach = sum(stage.reach for stage in self.stages)
        self.before, self.beyond = self.stages[0].before, self.stages[0].beyond

    @property
    def room(self) -> tuple[int, int]:
        """That of the first stage."""
        return self.stages[0].room

    def push(self, rows: Rows, last: bool, following: Sum | None = None) -> Rows:
        """See :class:`LayerStage`."""
        for number, (stage, history) in enumerate(zip(self.stages, self.histories, strict=True)):
            final = number == len(self.stages) - 1
            # The rows of the first stage are complete.
            given = history.complete(rows, last) if number and (stage.before or stage.beyond) else rows
            rows = stage.push(given, last, following if final else None)
        return rows


class Residual(LayerStage):
    """body(x) + x and a leaky ReLU, both by the last convolution of the body.

    Args:
        body: the layers.
        slope: of the leaky ReLU; None for none.
    """

    def __init__(self, body: LayerStage, slope: float | None) -> None:
        self.body, self.slope = body, slope
        self.reach, self.beyond = body.reach, body.beyond
        self.before = max(body.before, body.reach)

    def push(self, rows: Rows, last: bool, following: Sum | None = None) -> Rows:
        """See :class:`LayerStage`."""
        return self.body.push(rows, last, Sum(rows, self.slope))


class Cascade(LayerStage):
    """CARN's cascade: each merge reads the input and the outputs of all blocks so far.

    Args:
        blocks: functions that make each block for what its reader wants: rows before, and rows beyond.
        merges: the layers of each merge, the first of which reads all of them.
        before, beyond: what the reader of the output wants.
    """

    def __init__(
        self,
        blocks: Sequence[Callable[[int, int], LayerStage]],
        merges: Sequence[nn.Module],
        before: int = 0,
        beyond: int = 0,
    ) -> None:
        reaches = [block(0, 0).reach for block in blocks]
        self.reach = sum(reaches)
        # The output of a block waits until the last merge has read it.
        self.blocks = [block(self.reach - lag, 0) for block, lag in zip(blocks, accumulate(reaches), strict=True)]
        self.merges = []
        for merge, reader in zip(merges, [*self.blocks[1:], None], strict=True):
            wanted = (before, beyond) if reader is None else reader.room
            rest = make_chain(list(merge.children())[1:], *wanted)
            first = next(merge.children())
            assert isinstance(first, nn.Conv2d)
            self.merges.append((Convolution(first, *rest.room), rest))
        self.inputs = [History(block.before) for block in self.blocks]
        self.outputs = [History(self.reach - lag) for lag in accumulate(reaches)]
        self.before, self.beyond = max(self.blocks[0].before, self.reach), self.blocks[0].beyond

    def push(self, rows: Rows, last: bool, following: Sum | None = None) -> Rows:
        """See :class:`LayerStage`."""
        trail = [rows]
        for number, (block, (first, rest)) in enumerate(zip(self.blocks, self.merges, strict=True)):
            # The input of the first block is complete.
            given = self.inputs[number].complete(rows, last) if number else rows
            trail.append(self.outputs[number].complete(block.push(given, last), last))
            new = trail[-1]
            merged = first.merge([part.between(new.begin, new.end) for part in trail], new.end - new.begin, last)
            rows = rest.push(merged, last)
        return rows


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


def make_stage(module: nn.Module, before: int = 0, beyond: int = 0) -> LayerStage:
    """`module` in bands, ready for the first row of an image, for a reader that wants rows before the new ones and beyond."""
    if isinstance(module, CARN):
        blocks = [partial(make_stage, block) for block in (module.b1, module.b2, module.b3)]
        cascade = Cascade(blocks, (module.c1, module.c2, module.c3), before, beyond)
        return Chain([make_stage(module.entry, *cascade.room), cascade])
    if isinstance(module, CascadingBlock):
        # Stages have a state, so each use of the shared block is a stage of its own.
        return Cascade([partial(make_stage, module.b1)] * 3, (module.c1, module.c2, module.c3), before, beyond)
    if isinstance(module, EfficientResidualBlock):
        return Residual(make_stage(module.body, before, beyond), slope=0.0)
    if isinstance(module, SRResNet):
        activation = nn.LeakyReLU(SLOPE, inplace=True)
        return make_chain([module.conv_first, activation, *module.recon_trunk], before, beyond)
    if isinstance(module, ResidualBlock):
        return Residual(make_chain([module.conv1, nn.ReLU(inplace=True), module.conv2], before, beyond), slope=None)
    if isinstance(module, nn.Sequential):
        return make_chain(list(module), before, beyond)
    if isinstance(module, nn.Conv2d):
        return Convolution(module, before, beyond)
    if isinstance(module, nn.ReLU):
        return Pointwise(nn.ReLU(inplace=True), before, beyond)
    return Pointwise(module, before, beyond)


def make_chain(modules: Sequence[nn.Module], before: int, beyond: int) -> Chain:
    """The stages of `modules`, made from the last to the first: each knows what its reader wants."""
    stages: list[LayerStage] = []
    for module in reversed(modules or [nn.Identity()]):
        stages.insert(0, make_stage(module, before, beyond))
        before, beyond = stages[0].room
    return Chain(stages)


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
    inlets = [(Room(*stage.room), History(stage.before)) for stage in stages]
    for top in range(0, height, rows):
        parts = []
        for stage, (room, history), span, (left, right) in zip(stages, inlets, spans, pairwise(edges), strict=True):
            x, last = read(slice(top, min(top + rows, height)), span), top + rows >= height
            result = stage.push(history.complete(room.fill(x.shape, x, last, partial(_written, x)), last), last).new
            parts.append(result[:, :, :, left - span.start : right - span.start])
        if parts[0].shape[2]:
            yield parts
