"""`stitch_patches.upsampled_out`: the last layers of the branches and the stitching in one pass, for :class:`PatchRouter`.

Between the branches and the image a patch is then the few features that its last layers read, in FSRCNN a quarter of the
bytes of its pixels, and the taps that are 0 in the sub-pixel form of a transposed convolution cost nothing. An interpolated
patch is then its LR pixels.
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
from fastroute.ops import _checks as check
from fastroute.ops._library import call, register
from fastroute.ops.stitch_patches import reference_batches

# Instead of the number of an upsampler.
FINISHED = -1
# (shuffle, kernel) for which there are kernels.
SIZES = ((2, 3), (2, 5), (3, 3), (4, 3))


class Upsampler(NamedTuple):
    """The last layers of a branch: x -> pixel_shuffle(conv(leaky_relu(expand(x)))), or without `expand`.

    Or a separable interpolation of each channel, x -> weight x acrossᵀ; `expand` is then (0, C), `bias` is `across`, or empty
    where that is `weight` too, and the rest is empty.

    Attributes:
        expand: (D, F), weight of a 1 x 1 convolution; empty where there is none.
        expand_bias: (D,).
        slope: (D,), of the leaky rectifier.
        weight: (C * r * r, D, K, K), of a convolution that keeps the size; or (P, p), each row of at most 8 numbers side by
            side, none further left than in the row above.
        bias: (C * r * r,); of an interpolation (Q, q), where columns are interpolated by another matrix than rows.
        shuffle: r, or P / p.
    """

    expand: Tensor
    expand_bias: Tensor
    slope: Tensor
    weight: Tensor
    bias: Tensor
    shuffle: int

    @property
    def interpolates(self) -> bool:
        """Whether it is an interpolation."""
        return self.weight.ndim == 2

    @property
    def features(self) -> int:
        """Channels that it reads."""
        return features_of(self)

    @property
    def channels(self) -> int:
        """Channels that it writes."""
        return self.features if self.interpolates else self.weight.shape[0] // self.shuffle**2

    @property
    def layers(self) -> list[Tensor]:
        """The tensors, as the operator takes them."""
        return list(self[:-1])


def features_of(upsampler: Upsampler) -> int:
    """Channels that `upsampler` reads, where torch may compile: version 2.10 sees no properties of a named tuple."""
    expand, weight = upsampler.expand, upsampler.weight
    return expand.shape[1] if weight.ndim == 2 or expand.numel() else weight.shape[1]


# Of every branch, None for one that finishes its patches; empty where nothing is left to the stitching.
Upsamplers = Sequence[Upsampler | None]


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
    region: Tensor | None = None,  # [N]
) -> Tensor:  # [K + 1]
    """:func:`fastroute.stitch_patches` of what `upsamplers` make of `batches`.

    Args:
        batches: float32 features with p = grid.patch * grid.scale / shuffle, those of a kind of one memory format, or
            finished patches, contiguous; they stand for their concatenation along M. With `region` they are regions, those of
            an interpolation of the size that its matrices read.
        kinds: for each batch, which of `upsamplers` it goes through; FINISHED for patches that go through none.
        upsamplers: K of one shuffle and number of channels.
        window: float32 weights, as :func:`fastroute.make_window` gives them.
        grid, inverse, rows, out, region: see :func:`fastroute.stitch_patches`.

    Returns:
        float64 (K + 1,): time of all threads together in each upsampler, and in everything else; only ratios mean something.
    """
    op, device = "stitch_patches.upsampled_out", out.device
    shuffle = upsamplers[0].shuffle
    spent = torch.zeros(len(upsamplers) + 1, dtype=torch.float64, device="cpu")
    # Their `layers`, which torch 2.10 could not compile, as in `features_of`.
    layers = [tensor for upsampler in upsamplers for tensor in upsampler[:-1]]
    geometry = (grid.height, grid.width, grid.patch, grid.stride, grid.scale, grid.crop, shuffle)
    held = (list(batches), list(kinds), layers, inverse, region, window)
    call(op, _reference_upsampled, device, *held, *geometry, *rows, out=out, spent=spent)
    return spent


def _reference_upsampled(
    batches: list[Tensor],  # [M_i, C, P, P] each
    kinds: list[int],
    layers: list[Tensor],  # [...] each
    inverse: Tensor | None,  # [N]
    region: Tensor | None,  # [N]
    window: Tensor,  # [P]
    *rest: Any,
    out: Tensor,  # [B, C, rows, W·s]
    spent: Tensor,  # [K + 1]
) -> None:
    check.written("stitch_patches", "out", out, batches)
    check.written("stitch_patches", "spent", spent, [out])
    spent.zero_()
    patches = []
    for batch, kind in zip(batches, kinds, strict=True):
        if kind == FINISHED:
            # As a branch would leave it before the shuffle, which is the last number of `rest` but for the rows.
            patches.append(F.pixel_unshuffle(batch, rest[-3]))
            continue
        begin = time.perf_counter()
        expand, expand_bias, slope, weight, bias = layers[5 * kind : 5 * kind + 5]
        if weight.ndim == 2:
            across = bias if bias.ndim == 2 else weight
            patches.append(F.pixel_unshuffle(weight @ batch @ across.t(), rest[-3]))
        else:
            if expand.numel():
                batch = F.prelu(F.conv2d(batch, expand[:, :, None, None], expand_bias), slope)
            patches.append(F.conv2d(batch, weight, bias, padding=weight.shape[2] // 2).contiguous())
        spent[kind] += time.perf_counter() - begin
    begin = time.perf_counter()
    # Whole batches of one memory format.
    reference_batches([batch.contiguous() for batch in patches], inverse, region, window, *rest, out=out)
    spent[-1] += time.perf_counter() - begin


register("stitch_patches.upsampled_out", _reference_upsampled, lambda *args, out, spent: None)
