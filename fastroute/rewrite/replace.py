"""The convolutions of a network, replaced by those that run by kernels."""

from __future__ import annotations

import torch
from torch import nn

from fastroute.ops.conv3x3 import TAPS
from fastroute.rewrite.convolutions import Conv1x1, Conv3x3
from fastroute.rewrite.sequence import RECTIFIERS, FusedSequential, takes_all

# With fewer channels per group, the transforms take longer than what they save.
FEWEST = 3
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def replacement(layer: nn.Module) -> type[Conv3x3 | Conv1x1] | None:
    """What can replace `layer` and is faster, if it is such a convolution."""
    # A subclass may compute something else; a hook may look at the layer or change its weight.
    if type(layer) is not nn.Conv2d or _is_hooked(layer):
        return None
    size = layer.kernel_size[0]
    found = (layer.kernel_size, layer.stride, layer.dilation, layer.padding, layer.padding_mode)
    if found != ((size, size), (1, 1), (1, 1), (size // 2, size // 2), "zeros"):
        return None
    if size == TAPS and min(layer.in_channels, layer.out_channels) // layer.groups >= FEWEST:
        return Conv3x3
    return Conv1x1 if size == 1 and layer.groups == 1 else None


def is_rectifier(layer: nn.Module | None) -> bool:
    """Whether a convolution can take over `layer`, which follows it."""
    kind = next((kind for kind in RECTIFIERS if isinstance(layer, kind)), None)
    return kind is not None and layer is not None and type(layer).forward is kind.forward and not _is_hooked(layer)


def _is_hooked(layer: nn.Module) -> bool:
    """Whether `layer` has hooks of any kind, those of gradients too: it must stay what it is."""
    return any(getattr(layer, name) for name in HOOKS)


def replace_convolutions(module: nn.Module, owned: bool = False) -> nn.Module:
    """Let all convolutions within `module` that can do so run by the kernels `conv3x3` and `conv1x1`.

    The layers behind them are taken over in sequences that nothing else looks into: those of this package's networks.

    Args:
        module: a network, which is changed in place.
        owned: whether `module` itself is such a sequence, if it is one. A pixel shuffle at its end stays.

    Returns:
        `module`, or what takes its place.
    """
    return _replace(module, owned, True, {})


def _replace(module: nn.Module, owned: bool, outermost: bool, known: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in known:
        return known[module]
    known[module] = module
    kind = replacement(module)
    if kind is not None:
        known[module] = kind(module)  # type: ignore[arg-type]
    elif not isinstance(module, torch.jit.ScriptModule):
        sequence = type(module) is nn.Sequential
        if owned and sequence:
            _take_over(module, outermost)
        within = (owned and sequence) or type(module).__module__.startswith("fastroute.")
        for name, child in list(module.named_children()):
            module._modules[name] = _replace(child, within, False, known)
        if owned and sequence and takes_all(module._modules.values()):
            known[module] = FusedSequential(module)
    return known[module]


def _take_over(sequence: nn.Module, outermost: bool) -> None:
    """Replace convolutions of a sequence together with what follows them. The numbers of other layers stay."""
    layers = list(sequence._modules.items())
    for n, (name, layer) in enumerate(layers):
        kind = replacement(layer) if layer is not None else None
        if kind is None or layer is None:
            continue
        taken, rectifier, shuffle = [], None, 1
        following = layers[n + 1 :]
        if following and is_rectifier(following[0][1]):
            rectifier = following[0][1]
            taken.append(following.pop(0)[0])
        stays = outermost and len(following) == 1
        if kind is Conv3x3 and following and not stays and _is_fusible(following[0][1], layer):
            shuffle = following[0][1].upscale_factor  # type: ignore[union-attr, assignment]
            taken.append(following[0][0])
        sequence._modules[name] = kind(layer, rectifier, shuffle)  # type: ignore[arg-type]
        for gone in taken:
            sequence._modules[gone] = nn.Identity().train(layer.training)


def _is_fusible(shuffle: nn.Module | None, layer: nn.Module) -> bool:
    """Whether `shuffle` is a pixel shuffle that keeps the groups of `layer` apart."""
    if type(shuffle) is not nn.PixelShuffle or _is_hooked(shuffle):
        return False
    assert isinstance(layer, nn.Conv2d)
    return layer.out_channels % (layer.groups * shuffle.upscale_factor**2) == 0
