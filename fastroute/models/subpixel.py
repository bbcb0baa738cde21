"""The sub-pixel form of a transposed convolution: a dense convolution followed by a pixel shuffle.

A transposed convolution with kernel k, stride s and padding p writes output pixel o = s·i − p + t from LR pixel i through
tap t. All outputs of one phase r = o mod s therefore read the same few LR neighbours, so s² small dense convolutions,
interleaved by a pixel shuffle, give the same sums (Shi et al., "Is the deconvolution layer the same as a convolutional
layer?", 2016).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class SubpixelPlan:
    """How a square, ungrouped, undilated transposed convolution becomes a dense one.

    Attributes:
        kernel, scale, padding: parameters of the transposed convolution, whose stride is `scale`.
        before, after: LR pixels read before and after the current one. The dense kernel is before + 1 + after wide.
    """

    kernel: int
    scale: int
    padding: int
    before: int
    after: int

    @staticmethod
    def unsupported_reasons(layer: nn.ConvTranspose2d) -> list[str]:
        """The reasons why `layer` has no sub-pixel form here; empty if it has one."""
        reasons = []
        kernel, stride, padding, extra = layer.kernel_size, layer.stride, layer.padding, layer.output_padding
        if layer.groups != 1 or layer.dilation != (1, 1):
            reasons.append("grouped or dilated")
        if any(pair[0] != pair[1] for pair in (kernel, stride, padding, extra)):
            reasons.append("not square")
        # Only then is the output exactly stride times the input, which is what a pixel shuffle produces.
        elif kernel[0] - 2 * int(padding[0]) + extra[0] != stride[0]:
            reasons.append("its output is not stride times its input")
        return reasons

    @staticmethod
    def of(layer: nn.ConvTranspose2d) -> SubpixelPlan:
        """The plan of `layer`.

        Raises:
            ValueError: `layer` is grouped, dilated, not square, or its output is not stride times its input.
        """
        reasons = SubpixelPlan.unsupported_reasons(layer)
        if reasons:
            raise ValueError(f"the transposed convolution has no sub-pixel form: {', '.join(reasons)}")
        kernel, scale, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
        # Output phase r reads LR offset j through tap t = r + p - s·j, so j takes all values with 0 <= t < k.
        after = (scale - 1 + padding) // scale
        before = (kernel - 1 - padding) // scale
        return SubpixelPlan(kernel, scale, padding, before, after)

    @property
    def width(self) -> int:
        """The size of the dense kernel."""
        return self.before + 1 + self.after

    def weight(self, weight: Tensor) -> Tensor:  # [Cin, Cout, k, k] -> [Cout·s·s, Cin, width, width]
        """The dense kernel. It is differentiable, so that training may run in this form."""
        index, valid = self._taps(weight.device)
        columns = weight.flatten(2)[:, :, index.flatten()] * valid.flatten().to(weight.dtype)
        c_in, c_out = weight.shape[:2]
        s, w = self.scale, self.width
        dense = columns.view(c_in, c_out, s, s, w, w).permute(1, 2, 3, 0, 4, 5)
        return dense.reshape(c_out * s * s, c_in, w, w)

    def bias(self, bias: Tensor) -> Tensor:  # [Cout] -> [Cout·s·s]
        """One bias per output phase."""
        return bias.repeat_interleave(self.scale**2)

    @property
    def symmetric(self) -> bool:
        """Whether a convolution's own padding keeps the LR size."""
        return self.before == self.after

    def upsample(
        self,
        x: Tensor,  # [N, Cin, h, w]
        weight: Tensor,  # [Cin, Cout, k, k]
        bias: Tensor | None,  # [Cout]
    ) -> Tensor:  # [N, Cout, h·s, w·s]
        """Apply the transposed convolution of `weight` (Cin, Cout, k, k) and `bias` (Cout) in this form; differentiable."""
        if not self.symmetric:
            x = F.pad(x, (self.before, self.after, self.before, self.after))
        bias = None if bias is None else self.bias(bias)
        return F.pixel_shuffle(F.conv2d(x, self.weight(weight), bias, padding=self.before * self.symmetric), self.scale)

    def _taps(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Flat tap index and validity, each [s, s, width, width]."""
        phase = torch.arange(self.scale, device=device)[:, None]
        offset = torch.arange(-self.before, self.after + 1, device=device)[None, :]
        tap = phase + self.padding - self.scale * offset  # [s, width]
        valid = (tap >= 0) & (tap < self.kernel)
        tap = tap.clamp(0, self.kernel - 1)
        index = tap[:, None, :, None] * self.kernel + tap[None, :, None, :]
        return index, valid[:, None, :, None] & valid[None, :, None, :]


def dense_equivalent(layer: nn.ConvTranspose2d) -> nn.Sequential:
    """`layer` as a convolution and a pixel shuffle with the same output.

    Raises:
        ValueError: see :meth:`SubpixelPlan.of`.
    """
    plan = SubpixelPlan.of(layer)
    c_in, c_out = layer.in_channels, layer.out_channels * plan.scale**2
    conv = nn.Conv2d(
        c_in,
        c_out,
        plan.width,
        padding=plan.before if plan.symmetric else 0,
        bias=layer.bias is not None,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )
    with torch.no_grad():
        conv.weight.copy_(plan.weight(layer.weight))
        if layer.bias is not None:
            assert conv.bias is not None  # made so above; for the type checker
            conv.bias.copy_(plan.bias(layer.bias))
    layers: list[nn.Module] = [conv, nn.PixelShuffle(plan.scale)]
    if not plan.symmetric:
        layers.insert(0, nn.ZeroPad2d((plan.before, plan.after, plan.before, plan.after)))
    return nn.Sequential(*layers).train(layer.training)
