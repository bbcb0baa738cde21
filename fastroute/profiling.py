"""FLOPs in two conventions, counted without running the network.

Both count two operations per multiply-add of convolutions and linear layers. The papers count a transposed convolution's kernel
at every *output* pixel ("paper"), which is the square of its stride more than what it does ("true").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CONVENTIONS = ("true", "paper")


def count_flops(model: nn.Module, input_size: Sequence[int], convention: str = "true") -> int:
    """FLOPs of one pass of `model`, as it is written, over an input of `input_size`.

    Args:
        model: any module; it is run on fake tensors, so neither time nor memory is spent.
        input_size: shape of the input, batch included.
        convention: "true" is what :class:`torch.utils.flop_counter.FlopCounterMode` counts: multiply-adds done, times two.
            "paper" reproduces the tables of ClassSR, CDNSR, ARM and PCSR.

    Raises:
        ValueError: an unknown convention.

    Source: the figures of ClassSR (Kong et al., CVPR 2021), table 1, at 32 x 32 LR pixels.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"count_flops: convention must be one of {CONVENTIONS}; got {convention!r}")
    # Here, since it imports Triton where that is installed.
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    extra = 0

    def count_outputs(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal extra
        if isinstance(module, nn.ConvTranspose2d):
            taps = 2 * module.in_channels * module.out_channels // module.groups
            taps *= module.kernel_size[0] * module.kernel_size[1] * output.shape[0]
            extra += taps * (output.shape[2] * output.shape[3] - inputs[0].shape[2] * inputs[0].shape[3])

    training = [(module, module.training) for module in model.modules()]
    handles = [module.register_forward_hook(count_outputs) for module in model.modules()]
    like = next(model.parameters(), torch.empty(0))
    try:
        model.eval()
        with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(tuple(input_size), dtype=like.dtype, device=like.device))
    finally:
        for module, was in training:
            module.training = was
        for handle in handles:
            handle.remove()
    return counter.get_total_flops() + (extra if convention == "paper" else 0)


@dataclass(frozen=True)
class RoutedFlops:
    """FLOPs of a routed image beside those of the dense one.

    Attributes:
        routed: FLOPs of the chosen branches and the classifier.
        dense: FLOPs with every patch in the dearest branch and no classifier.
    """

    routed: float
    dense: float

    @property
    def fraction(self) -> float:
        """Routed over dense; 1 where there was nothing to do."""
        return self.routed / self.dense if self.dense else 1.0


def mix_flops(branch_flops: Sequence[float], counts: Sequence[float], classifier_flops: float = 0.0) -> RoutedFlops:
    """FLOPs of a class mix.

    Args:
        branch_flops: per patch, one entry per class.
        counts: patches (or shares) per class.
        classifier_flops: in all. The papers' tables leave it out.

    Raises:
        ValueError: lists of different lengths.
    """
    if len(branch_flops) != len(counts):
        raise ValueError(f"mix_flops: counts must have {len(branch_flops)} entries, one per class; got {len(counts)}")
    routed = sum(f * n for f, n in zip(branch_flops, counts, strict=True)) + classifier_flops
    return RoutedFlops(routed, max(branch_flops) * sum(counts))
