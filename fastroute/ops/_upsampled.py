"""`stitch_patches.upsampled_out`: the last layers of the branches and the stitching in one pass, for :class:`PatchRouter`.

Between the branches and the image a patch is then the few features that its last layers read, in FSRCNN a quarter of the
bytes of its pixels, and the taps that are 0 in the sub-pixel form of a transposed convolution cost nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.backends import select
from fastroute.grid import TileGrid
from fastroute.ops._library import call, register

# Instead of the number of an upsampler.
FINISHED = -1
# (shuffle, kernel) for which there are kernels.
SIZES = ((2, 3), (2, 5), (3, 3), (4, 3))


class Upsampler(NamedTuple):
    """The last layers of a branch: x -> pixel_shuffle(conv(leaky_relu(expand(x)))), or without `expand`.

    Attributes:
        expand: (D, F), weight of a 1 x 1 convolution; empty where there is none.
        expand_bias: (D,).
        slope: (D,), of the leaky rectifier.
        weight: (C * r * r, D, K, K), of a convolution that keeps the size.
        bias: (C * r * r,).
        shuffle: r.
    """

    expand: Tensor
    expand_bias: Tensor
    slope: Tensor
    weight: Tensor
    bias: Tensor
    shuffle: int

    @property
    def features(self) -> int:
        """Channels that it reads."""
        return self.expand.shape[1] if self.expand.numel() else self.weight.shape[1]

    @property
    def layers(self) -> list[Tensor]:
        """The tensors, as the operator takes them."""
        return [self.expand, self.expand_bias, self.slope, self.weight, self.bias]


# Of every branch, None for one that finishes its patches; empty where nothing is left to the stitching.
Upsamplers = Sequence[Upsampler | None]


def split_upsampler(branch: nn.Module, shuffle: int) -> tuple[nn.Module, Upsampler] | None:
    """`branch`, which lacks its final pixel shuffle of factor `shuffle`, in two: what comes before its last layers, and those.

    None where it does not end with layers for which there is a kernel, or would have nothing left.
    """
    layers = list(branch) if type(branch) is nn.Sequential else []
    last = _convolution(layers.pop()) if layers else None
    if last is None or (shuffle, last.kernel_size[0]) not in SIZES or last.weight.dtype != torch.float32:
        return None
    empty = last.weight.new_empty(0)
    expand, expand_bias, slope = empty.view(0, 0), empty, empty
    if len(layers) > 1 and type(rectifier := layers[-1]) is nn.LeakyReLU:
        first = _convolution(layers[-2])
        if first is not None and first.kernel_size == (1, 1):
            del layers[-2:]
            expand, expand_bias = first.weight.flatten(1), bias_of(first)
            slope = torch.full_like(expand_bias, rectifier.negative_slope)
    if not layers:
        return None
    expand, expand_bias, slope, weight, bias = (
        tensor.detach().contiguous() for tensor in (expand, expand_bias, slope, last.weight, bias_of(last))
    )
    return nn.Sequential(*layers), Upsampler(expand, expand_bias, slope, weight, bias, shuffle)


def _convolution(layer: nn.Module) -> nn.Conv2d | None:
    """`layer` if it is a plain square convolution that keeps the size."""
    # A subclass may compute something else.
    if type(layer) is not nn.Conv2d:
        return None
    size = layer.kernel_size[0]
    expected = ((size, size), (1, 1), (1, 1), 1, (size // 2, size // 2), "zeros")
    found = (layer.kernel_size, layer.stride, layer.dilation, layer.groups, layer.padding, layer.padding_mode)
    return layer if found == expected and size % 2 == 1 else None


def bias_of(layer: nn.Conv2d) -> Tensor:  # [out_channels]
    """The bias of `layer`, zeros where it has none."""
    return layer.weight.new_zeros(layer.out_channels) if layer.bias is None else layer.bias


def upsamples(device: torch.device) -> bool:
    """Whether :func:`stitch_upsampled` has a kernel on `device`, and does not only run its layers one after another."""
    return select("stitch_patches", device) == "cpu"


def stitch_upsampled(
    batches: Sequence[Tensor],  # [M_i, F, p, p] or [M_i, C, P, P] each
    kinds: Sequence[int],
    upsamplers: Sequence[Upsampler],
    grid: TileGrid,
    window: Tensor,  # [P]
    inverse: Tensor,  # [N]
    rows: tuple[int, int],
    out: Tensor,  # [B, C, rows, W·s]
) -> Tensor:  # [K + 1]
    """:func:`fastroute.stitch_patches` of what `upsamplers` make of `batches`.

    Args:
        batches: float32 features with p = grid.patch * grid.scale / shuffle, of one memory format, or finished patches,
            contiguous; they stand for their concatenation along M.
        kinds: for each batch, which of `upsamplers` it goes through; FINISHED for patches that go through none.
        upsamplers: K of one shuffle and number of features.
        window: float32 weights, as :func:`fastroute.make_window` gives them.
        grid, inverse, rows, out: see :func:`fastroute.stitch_patches`.

    Returns:
        float64 (K + 1,): time of all threads together in each upsampler, and in everything else; only ratios mean something.
    """
    op, device = "stitch_patches.upsampled_out", out.device
    shuffle = upsamplers[0].shuffle
    spent = torch.zeros(len(upsamplers) + 1, dtype=torch.float64)
    layers = [tensor for upsampler in upsamplers for tensor in upsampler.layers]
    geometry = (grid.height, grid.width, grid.patch, grid.stride, grid.scale, grid.crop, shuffle)
    held = (list(batches), list(kinds), layers, inverse, window)
    call(op, _reference_upsampled, device, *held, *geometry, *rows, out=out, spent=spent)
    return spent


def _reference_upsampled(
    batches: list[Tensor],
    kinds: list[int],
    layers: list[Tensor],
    inverse: Tensor | None,
    window: Tensor,
    *rest: Any,
    out: Tensor,
    spent: Tensor,
) -> None:
    spent.zero_()
    patches = []
    for batch, kind in zip(batches, kinds, strict=True):
        if kind == FINISHED:
            # As a branch would leave it before the shuffle, which is the last number of `rest` but for the rows.
            patches.append(F.pixel_unshuffle(batch, rest[-3]))
            continue
        begin = time.perf_counter()
        expand, expand_bias, slope, weight, bias = layers[5 * kind : 5 * kind + 5]
        if expand.numel():
            batch = F.prelu(F.conv2d(batch, expand[:, :, None, None], expand_bias), slope)
        patches.append(F.conv2d(batch, weight, bias, padding=weight.shape[2] // 2).contiguous())
        spent[kind] += time.perf_counter() - begin
    begin = time.perf_counter()
    torch.ops.fastroute.stitch_patches.out(torch.cat(patches), inverse, window, *rest, out=out)
    spent[-1] += time.perf_counter() - begin


register("stitch_patches.upsampled_out", _reference_upsampled, lambda *args, out, spent: None)
