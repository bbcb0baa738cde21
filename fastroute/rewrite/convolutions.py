"""Convolutions that run by `conv3x3` where its kernel is the fastest way: in float32, on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastroute.backends import requested, select
from fastroute.ops.conv3x3 import TAPS, transformed_weight

# With fewer channels per group, the transforms take longer than what they save.
FEWEST = 3
RECTIFIERS = (nn.ReLU, nn.LeakyReLU, nn.PReLU)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class WinogradConv2d(nn.Conv2d):
    """A 3 x 3 convolution, and the rectifier behind it if there is one.

    In float32 on a CPU it runs by :func:`fastroute.conv3x3`; wherever that does not apply, by PyTorch's own layers.

    Args:
        layer: a convolution for which :func:`is_replaceable` holds. Its parameters are shared.
        rectifier: a layer for which :func:`is_rectifier` holds.
    """

    def __init__(self, layer: nn.Conv2d, rectifier: nn.Module | None = None) -> None:
        channels = layer.in_channels, layer.out_channels
        super().__init__(*channels, TAPS, padding=1, groups=layer.groups, bias=False, device="meta")
        self.weight, self.bias, self.rectifier = layer.weight, layer.bias, rectifier
        self.train(layer.training)
        # The weight, its values and their version, and what they become.
        self._kept: tuple[Tensor, Tensor, int, Tensor] | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # [B, C, h, w], [B, O, h, w] -> [B, O, h, w]
        """The result of the layer, plus `residual`."""
        if self._runs_by_kernel(x, residual):
            slope = None if self.rectifier is None else _slopes(self.rectifier, self.out_channels)
            return torch.ops.fastroute.conv3x3(x, self._transformed(), self.bias, slope, residual, self.out_channels, 1)
        y = super().forward(x)
        if self.rectifier is not None:
            y = self.rectifier(y)
        return y if residual is None else y + residual

    def _runs_by_kernel(self, x: Tensor, residual: Tensor | None) -> bool:
        weight = self.weight
        return (
            x.dtype == torch.float32 == weight.dtype
            and x.is_cpu
            and weight.is_cpu
            and (residual is None or residual.dtype == torch.float32)
            and not torch.compiler.is_compiling()
            and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
            and requested() in (None, "cpu")
            and select("conv3x3", x.device) == "cpu"
        )

    def _transformed(self) -> Tensor:  # [36, G, C / G, P]
        """The transformed weight, made anew whenever the weight has changed."""
        weight, kept = self.weight, self._kept
        version = -1 if weight.is_inference() else weight._version
        # The values are kept beside it, so that no others can take their place in memory.
        if kept is None or kept[0] is not weight or kept[1].data_ptr() != weight.data_ptr() or kept[2] != version:
            with torch.inference_mode(False), torch.no_grad():
                values = weight.detach()
                kept = self._kept = (weight, values, version, transformed_weight(values, self.groups, 1))
        return kept[3]

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles make it again.
        return {**vars(self), "_kept": None}


def _slopes(rectifier: nn.Module, channels: int) -> Tensor:  # -> [channels]
    """The factors of negative numbers."""
    if isinstance(rectifier, nn.PReLU):
        return rectifier.weight.expand(channels)
    return torch.full((channels,), getattr(rectifier, "negative_slope", 0.0))


def is_replaceable(layer: nn.Module) -> bool:
    """Whether `layer` is a convolution that :class:`WinogradConv2d` can replace and is faster than."""
    # A subclass may compute something else; a hook may look at the layer or change its weight.
    if type(layer) is not nn.Conv2d or _is_hooked(layer):
        return False
    found = (layer.kernel_size, layer.stride, layer.dilation, layer.padding, layer.padding_mode)
    channels = min(layer.in_channels, layer.out_channels) // layer.groups
    return found == ((TAPS, TAPS), (1, 1), (1, 1), (1, 1), "zeros") and channels >= FEWEST


def is_rectifier(layer: nn.Module) -> bool:
    """Whether :class:`WinogradConv2d` can take over `layer`, which follows it."""
    return isinstance(layer, RECTIFIERS) and type(layer).forward in [kind.forward for kind in RECTIFIERS] and not _is_hooked(layer)


def _is_hooked(layer: nn.Module) -> bool:
    return any(getattr(layer, name) for name in HOOKS)


def replace_convolutions(module: nn.Module, owned: bool = False) -> nn.Module:
    """Let all convolutions within `module` that can do so run by :func:`fastroute.conv3x3`.

    The rectifiers behind them are taken over in sequences that nothing else looks into: those of this package's networks.

    Args:
        module: a network, which is changed in place.
        owned: whether `module` itself is such a sequence, if it is one.

    Returns:
        `module`, or what takes its place.
    """
    return _replace(module, owned, {})


def _replace(module: nn.Module, owned: bool, known: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in known:
        return known[module]
    known[module] = module
    if is_replaceable(module):
        known[module] = WinogradConv2d(module)  # type: ignore[arg-type]
    elif not isinstance(module, torch.jit.ScriptModule):
        sequence = type(module) is nn.Sequential
        within = (owned and sequence) or type(module).__module__.startswith("fastroute.")
        if owned and sequence:
            _take_over_rectifiers(module)
        for name, child in list(module.named_children()):
            module._modules[name] = _replace(child, within, known)
    return known[module]


def _take_over_rectifiers(sequence: nn.Module) -> None:
    """Replace convolutions of a sequence together with the rectifiers behind them. Numbers of other layers stay."""
    names = list(sequence._modules)
    for name, following in zip(names, names[1:], strict=False):
        layer, rectifier = sequence._modules[name], sequence._modules[following]
        if layer is not None and rectifier is not None and is_replaceable(layer) and is_rectifier(rectifier):
            sequence._modules[name] = WinogradConv2d(layer, rectifier)  # type: ignore[arg-type]
            sequence._modules[following] = nn.Identity()
