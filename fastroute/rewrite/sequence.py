"""Sequences whose convolutions run by kernels, with little between them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from fastroute.backends import select
from fastroute.rewrite.convolutions import PLAIN, Conv1x1, Conv3x3, FusedConv2d, version_of

RECTIFIERS = (nn.ReLU, nn.LeakyReLU, nn.PReLU)
# Layers that keep the type of their input and may stand between the convolutions.
OTHERS = (nn.Conv2d, nn.Identity, nn.PixelShuffle, *RECTIFIERS)


def takes_all(layers: Iterable[nn.Module | None]) -> bool:
    """Whether a :class:`FusedSequential` of these layers has anything to gain: several convolutions and no other networks."""
    found = list(layers)
    several = sum(type(layer) in (Conv3x3, Conv1x1) for layer in found) > 1
    # Subclasses of rectifiers are those of this package, in a sequence that nothing else looks into.
    return several and all(isinstance(layer, OTHERS) for layer in found)


class Step(NamedTuple):
    """A layer as it was when its call was prepared; of all but convolutions only the layer.

    Attributes:
        layer: the layer.
        weight, bias: its parameters.
        place: the version and the address of the weight.
        values: what the kernel reads, which keeps the memory at that address.
    """

    layer: nn.Module
    weight: Tensor | None = None
    bias: Tensor | None = None
    place: tuple[int, int] = (0, 0)
    values: tuple[Tensor, ...] = ()

    def holds(self, layer: nn.Module) -> bool:
        """Whether `layer` is still this one, unchanged."""
        if layer is not self.layer:
            return False
        if self.weight is None:
            return True
        weight = layer._parameters["weight"]
        return (
            weight is not None
            and weight is self.weight
            and layer._parameters["bias"] is self.bias
            and place_of(weight) == self.place
            and not _sees_calls(layer)
        )


def _sees_calls(layer: nn.Module) -> bool:
    """Whether `layer` has hooks that must see its calls in inference; asked in every pass."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def place_of(weight: Tensor) -> tuple[int, int]:  # [...]
    """The version and the address of a weight."""
    return version_of(weight), weight.data_ptr()


class FusedSequential(nn.Sequential):
    """:class:`torch.nn.Sequential` of a branch, whose convolutions are called at their operators.

    Between small layers PyTorch's modules and the checks of each layer take as long as a third of the layers themselves. They
    also hold the interpreter, so that passes side by side wait for each other. Here the calls are prepared once, and compared
    with the layers in every pass. Where anything differs from inference on a CPU, the layers run one after the other as usual.

    Args:
        layers: a sequence, whose layers and names it takes.
    """

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self._modules.update(layers._modules)  # type: ignore[arg-type]
        self.training = layers.training
        self._steps: list[Step] | None = None

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        """See :class:`torch.nn.Sequential`."""
        steps = self._ready(x)
        if steps is None:
            return super().forward(x)
        conv3x3, conv1x1 = torch.ops.fastroute.conv3x3.default, torch.ops.fastroute.conv1x1.default
        for layer, weight, bias, _, values in steps:
            if weight is None:
                x = x if type(layer) is nn.Identity else layer(x)
            elif isinstance(layer, Conv3x3):
                x = conv3x3(x, values[0], bias, layer._slopes(None), None, layer.out_channels, layer.shuffle, 0)
            elif isinstance(layer, Conv1x1):
                x = conv1x1([x], values[0], bias, layer._slopes(None), None)
        return x

    def _ready(self, x: Tensor) -> list[Step] | None:  # [B, C, H, W]
        """The calls, if they may be made for `x`."""
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or type(x) not in PLAIN
            or not x.is_cpu
            or modules._has_any_global_hook()
        ):
            return None
        steps, layers = self._steps, self._modules.values()
        if steps is None or len(steps) != len(layers) or not all(map(Step.holds, steps, layers)):
            self._steps = steps = self._prepared(x)
        if not steps:
            return None
        first = next((step.weight for step in steps if step.weight is not None), None)
        same = first is not None and x.dtype is first.dtype
        return steps if same and all(select(op, x.device) == "cpu" for op in ("conv3x3", "conv1x1")) else None

    def _prepared(self, x: Tensor) -> list[Step]:  # [B, C, H, W]
        """The calls; none if a convolution runs by other means."""
        steps = []
        for layer in self._modules.values():
            assert layer is not None  # for the type checker
            if not isinstance(layer, FusedConv2d):
                steps.append(Step(layer))
                continue
            if type(layer) not in (Conv3x3, Conv1x1) or _sees_calls(layer) or not layer.has_kernel(x):
                return []
            weight = layer._parameters["weight"]
            assert weight is not None  # for the type checker
            if isinstance(layer, Conv3x3):
                read = layer._transformed(layer.shuffle, 1.0)
                assert read is not None  # only compilers get none
                values: tuple[Tensor, ...] = (read, weight.detach())
            else:
                values = (weight.detach().flatten(1),)
            steps.append(Step(layer, weight, layer._parameters["bias"], place_of(weight), values))
        return steps

    def _apply(self, *arguments: Any, **options: Any) -> FusedSequential:
        self._steps = None
        return super()._apply(*arguments, **options)

    def __getstate__(self) -> dict[str, Any]:
        # Copies prepare their own.
        return {**vars(self), "_steps": None}
