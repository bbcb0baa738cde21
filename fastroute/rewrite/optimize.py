"""`optimize`: rewrites a network into its fastest exact form for inference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastroute._copies import evaluating, inference_copy
from fastroute.models.arm import Bicubic
from fastroute.models.fsrcnn import TransposedConv2d
from fastroute.models.precision import sums_of
from fastroute.models.subpixel import SubpixelPlan, dense_equivalent
from fastroute.ops._upsampled import SIZES, Upsampler, bias_of
from fastroute.rewrite.convolutions import Conv1x1, Conv3x3, FusedConv2d
from fastroute.rewrite.replace import replace_convolutions
from fastroute.rewrite.sequence import FusedSequential, takes_all


class OneSlope(nn.LeakyReLU):
    """A PReLU with a single slope, in place. The slope is a number, which state dicts hold nevertheless."""

    def __init__(self, slope: float) -> None:
        super().__init__(slope, inplace=True)

    def get_extra_state(self) -> Tensor:
        """The slope."""
        return torch.tensor(self.negative_slope, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:  # []
        """Set another slope."""
        self.negative_slope = float(state)


def optimize(branch: nn.Module) -> nn.Module:
    """A frozen copy of `branch` that computes the same numbers in less time.

    - A 3 x 3 convolution runs by :func:`fastroute.conv3x3` in float32 on a CPU, with the rectifier behind it.
    - A transposed convolution becomes a dense convolution and a pixel shuffle, if its output is stride times its input.
    - A batch norm behind a convolution is folded into it.
    - A PReLU of one slope behind a convolution becomes a leaky ReLU in place.
    - A network of this package folds what surrounds its convolutions into them: :meth:`fastroute.models.rcan.RCAN.fold`.
    - Nested sequences are flattened, so that the router finds a final pixel shuffle and leaves it to the stitching.

    In modules of other classes only whole transposed convolutions are replaced, because such a module may use its parts in ways
    that cannot be seen from outside. Every rewrite is exact up to the order of float32 sums (relative error about 1e-6). The
    original is not changed.

    Args:
        branch: any module. The result is in evaluation mode and needs no gradients.
    """
    return replace_convolutions(simplify(branch), owned=True)


def simplify(branch: nn.Module) -> nn.Module:
    """:func:`optimize`, but all convolutions run as they are."""
    result = inference_copy(branch)
    for module in result.modules():
        # Only for networks of this package: `fold` may mean anything elsewhere.
        if type(module).__module__.startswith("fastroute.") and callable(fold := getattr(module, "fold", None)):
            fold()
    as_sequential = getattr(result, "as_sequential", None)
    return evaluating(_rewrite(as_sequential() if callable(as_sequential) else result, owned=True))


def split_shuffle(branch: nn.Module) -> tuple[nn.Module, int]:
    """`branch` without its final pixel shuffle, and that shuffle's factor; (branch, 1) if it ends in another way."""
    if isinstance(branch, nn.Sequential) and len(branch) > 1 and isinstance(branch[-1], nn.PixelShuffle):
        return like(branch, list(branch)[:-1]), int(branch[-1].upscale_factor)
    return branch, 1


def like(branch: nn.Module, layers: Sequence[nn.Module]) -> nn.Sequential:
    """A sequence of some layers of `branch`, which run as they do there."""
    made = nn.Sequential(*layers)
    return FusedSequential(made) if isinstance(branch, FusedSequential) and takes_all(layers) else made


def split_upsampler(branch: nn.Module, shuffle: int) -> tuple[nn.Module, Upsampler] | None:
    """Split `branch`, whose final pixel shuffle of factor `shuffle` has been removed, into its first part and its last layers.

    Returns None if it does not end with layers for which there is a kernel, or if nothing else would be left.
    """
    layers: list[nn.Module] = []
    if type(branch) in (nn.Sequential, FusedSequential):
        layers += [layer for layer in branch.children() if type(layer) is not nn.Identity]
    last = _convolution(layers.pop()) if layers else None
    if last is None or (shuffle, last.kernel_size[0]) not in SIZES or sums_of(last.weight.dtype) != torch.float32:
        return None
    empty = last.weight.new_empty(0)
    expand, expand_bias, slope = empty.view(0, 0), empty, empty
    found = _rectified_convolution(layers)
    if found is not None and found[0].kernel_size == (1, 1):
        first, rectifier, number = found
        del layers[-number:]
        expand, expand_bias = first.weight.flatten(1), bias_of(first)
        slope = torch.full_like(expand_bias, rectifier.negative_slope)
    if not layers:
        return None
    expand, expand_bias, slope, weight, bias = (
        tensor.detach().float().contiguous() for tensor in (expand, expand_bias, slope, last.weight, bias_of(last))
    )
    return like(branch, layers), Upsampler(expand, expand_bias, slope, weight, bias, shuffle)


def _rectified_convolution(layers: list[nn.Module]) -> tuple[nn.Conv2d, nn.LeakyReLU, int] | None:
    """The convolution at the end of `layers`, the leaky ReLU behind it, and how many layers the two are."""
    end = layers[-1] if layers else None
    if isinstance(end, FusedConv2d):
        first, rectifier, number = _convolution(end, rectified=True), end.rectifier, 1
    else:
        first, rectifier, number = _convolution(layers[-2]) if len(layers) > 1 else None, end, 2
    if first is None or type(rectifier) not in (nn.LeakyReLU, OneSlope):
        return None
    return first, rectifier, number  # type: ignore[return-value]


def _convolution(layer: nn.Module, rectified: bool = False) -> nn.Conv2d | None:
    """`layer` if it is a plain square convolution that keeps the size, with a rectifier taken over or without one."""
    # A subclass may compute something else.
    if type(layer) not in (nn.Conv2d, Conv3x3, Conv1x1):
        return None
    if isinstance(layer, FusedConv2d) and ((layer.rectifier is not None) != rectified or layer.shuffle > 1):
        return None
    assert isinstance(layer, nn.Conv2d)  # for the type checker
    size = layer.kernel_size[0]
    expected = ((size, size), (1, 1), (1, 1), 1, (size // 2, size // 2), "zeros")
    found = (layer.kernel_size, layer.stride, layer.dilation, layer.groups, layer.padding, layer.padding_mode)
    return layer if found == expected and size % 2 == 1 else None


def interpolation(branch: nn.Module, patch: int) -> Upsampler | None:
    """`branch` as a separable interpolation of patches of `patch` x `patch` pixels, or None if it is not one."""
    if type(branch) is not Bicubic:
        return None
    empty = torch.empty(0, dtype=torch.float32)
    matrix = _bicubic_matrix(patch, branch.scale)
    return Upsampler(empty.view(0, branch.channels), empty, empty, matrix, empty, branch.scale)


def interpolated(upsampler: Upsampler, shape: tuple[int, int]) -> Upsampler:
    """The interpolation `upsampler` for regions of `shape` pixels (height and width) instead of patches."""
    matrices = [_bicubic_matrix(size, upsampler.shuffle).to(upsampler.weight.device) for size in shape]
    return upsampler._replace(weight=matrices[0], bias=matrices[1])


def _bicubic_matrix(size: int, scale: int) -> Tensor:  # [size * scale, size]
    # The response to each pixel of a column, in float64. At a factor of 1 along the other axis, columns do not mix.
    pixels = torch.eye(size, dtype=torch.float64)[None, None]
    return F.interpolate(pixels, (size * scale, size), mode="bicubic", align_corners=False)[0, 0].to(torch.float32)


def _rewrite(module: nn.Module, owned: bool) -> nn.Module:
    """Rewrite `module`. If it is `owned`, only the sequence around it uses it; otherwise anything may call or inspect it."""
    # Types are compared exactly throughout, because a subclass may compute something else.
    if type(module) in (nn.ConvTranspose2d, TransposedConv2d):
        assert isinstance(module, nn.ConvTranspose2d)  # for the type checker
        return module if SubpixelPlan.unsupported_reasons(module) else dense_equivalent(module).requires_grad_(False)
    sequence = type(module) is nn.Sequential
    within = (owned and sequence) or type(module).__module__.startswith("fastroute.")
    for name, child in module.named_children():
        setattr(module, name, _rewrite(child, within))
    return _rewrite_sequence(module) if sequence and owned else module  # type: ignore[arg-type]


def _rewrite_sequence(sequence: nn.Sequential) -> nn.Sequential:
    flat: list[nn.Module] = []
    for child in sequence:
        flat.extend(child.children() if type(child) is nn.Sequential else [child])
    layers: list[nn.Module] = []
    for layer in flat:
        previous = layers[-1] if layers else None
        if type(layer) is nn.BatchNorm2d and type(previous) is nn.Conv2d and layer.track_running_stats:
            layers[-1] = fuse_conv_bn_eval(previous, layer).requires_grad_(False)
        elif type(layer) is nn.PReLU and layer.num_parameters == 1 and type(previous) is nn.Conv2d:
            # Nothing else reads what the convolution wrote.
            layers.append(OneSlope(float(layer.weight)))
        elif type(layer) is nn.Identity:
            continue
        else:
            layers.append(layer)
    return nn.Sequential(*layers)


def parameter_dtype(module: nn.Module) -> torch.dtype:
    """The floating type in which `module` computes: that of most of its weights, or float32 without parameters."""
    weights: Counter[torch.dtype] = Counter()
    for p in module.parameters():
        if p.is_floating_point():
            weights[p.dtype] += p.numel()
    return max(weights, key=weights.__getitem__, default=torch.float32)
