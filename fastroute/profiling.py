"""FLOPs in two conventions, counted without running the network.

Both count two operations per multiply-add of convolutions and linear layers. The papers count a transposed convolution's kernel
at every *output* pixel ("paper"), which is the square of its stride more than what it does ("true").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastroute._arguments import real, whole
from fastroute._contexts import on_fake_tensors
from fastroute._copies import inference_copy

CONVENTIONS = ("true", "paper")
M = TypeVar("M", bound=TorchDispatchMode)


def count_flops(model: nn.Module, input_size: Sequence[int], convention: str = "true") -> int:
    """FLOPs of one pass of `model`, as it is written, over an input of `input_size`.

    Args:
        model: any module; a copy is run on fake tensors, so neither time nor memory is spent. What these cannot run, such as
            TorchScript, is run in earnest.
        input_size: shape of the input, batch included.
        convention: "true" is what :class:`torch.utils.flop_counter.FlopCounterMode` counts: multiply-adds done, times two.
            "paper" reproduces the tables of ClassSR, CDNSR, ARM and PCSR.

    Raises:
        ValueError: an unknown convention.

    Source: the figures of ClassSR (Kong et al., CVPR 2021), table 1, at 32 x 32 LR pixels.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"count_flops: convention must be one of {CONVENTIONS}; got {convention!r}")
    sizes = [whole("count_flops", "input_size", n, 1 << 40) for n in input_size]
    like = next(model.parameters(), torch.empty(0, dtype=torch.float32, device="cpu"))
    return observed(model, sizes, like.dtype, lambda: FlopCounter(paper=convention == "paper")).total


def observed(model: nn.Module, size: Sequence[int], dtype: torch.dtype, make: Callable[[], M]) -> M:
    """The mode that `make` gives, once it has seen all operators of a pass of `model` over an input of `size`.

    The pass is on fake tensors, or a real one of what these cannot run: TorchScript, operators that have no fake kernel, and
    networks that look at values.
    """
    from torch._subclasses import fake_tensor as fake

    copied = inference_copy(model, share=True)
    for part in copied.modules():
        if isinstance(part, torch.jit.ScriptModule):
            continue
        for name, own in part._parameters.items():
            if own is not None:
                # Networks that make weights anew in each pass would leave fake ones in those that are shared.
                part._parameters[name] = nn.Parameter(own.detach(), requires_grad=False)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def run() -> M:
        mode = make()
        with torch.no_grad(), mode:
            copied(torch.full(tuple(size), 0.5, dtype=dtype, device=device))
        return mode

    if not any(isinstance(part, torch.jit.ScriptModule) for part in copied.modules()):
        with suppress(
            fake.DataDependentOutputException, fake.DynamicOutputShapeException, fake.UnsupportedFakeTensorException,
            fake.UnsupportedOperatorException,
        ), on_fake_tensors():  # fmt: skip
            return run()
    return run()


class FlopCounter(TorchDispatchMode):
    """Counts the operators of the thread that entered it.

    :class:`torch.utils.flop_counter.FlopCounterMode` counts by modules too, with hooks on those of all threads.

    Args:
        paper: count the kernel of a transposed convolution at every output pixel.

    Attributes:
        total: FLOPs so far.
    """

    def __init__(self, paper: bool) -> None:
        super().__init__()
        # Here, since it imports Triton where that is installed.
        from torch.utils.flop_counter import flop_registry

        self.paper, self.total, self.registry = paper, 0, flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in self.registry:
            # What torch composes of others; the operators of other namespaces, such as `prim::device`, are not.
            with self:
                parts = func.decompose(*args, **kwargs) if func.namespace == "aten" else NotImplemented
            return func(*args, **kwargs) if parts is NotImplemented else parts
        out = func(*args, **kwargs)
        flops = self.registry[packet](*args, **kwargs, out_val=out)
        if self.paper and packet is torch.ops.aten.convolution and args[6]:
            # Its multiply-adds are counted at every input pixel.
            flops = flops * out[0, 0].numel() // args[0][0, 0].numel()
        self.total += flops
        return out


@dataclass(frozen=True)
class RoutedFlops:
    """FLOPs of a routed image beside those of the dense one.

    Attributes:
        routed: FLOPs of the chosen branches and the classifier.
        dense: FLOPs with every patch in the most expensive branch, merged likewise, and no classifier.
        one_pass: FLOPs of one pass of the most expensive network over the whole image, without patches that overlap: what a
            user would run instead. None where no image is known.
    """

    routed: float
    dense: float
    one_pass: float | None = None

    @property
    def fraction(self) -> float:
        """Routed over dense; 1 where there was nothing to do."""
        return self.routed / self.dense if self.dense else 1.0

    @property
    def of_one_pass(self) -> float | None:
        """Routed over one pass of the most expensive network; None where that is not known."""
        return self.routed / self.one_pass if self.one_pass else None


def mix_flops(branch_flops: Sequence[float], counts: Sequence[float], classifier_flops: float = 0.0) -> RoutedFlops:
    """FLOPs of a class mix.

    Args:
        branch_flops: per patch, one entry per class.
        counts: patches (or shares) per class; regions count by their area.
        classifier_flops: in all. The papers' tables leave it out.

    Raises:
        ValueError: lists of different lengths.
    """
    if len(branch_flops) != len(counts):
        raise ValueError(f"mix_flops: counts must have {len(branch_flops)} entries, one per class; got {len(counts)}")
    branch_flops = [real("mix_flops", "branch_flops", flops) for flops in branch_flops]
    counts = [real("mix_flops", "counts", count) for count in counts]
    routed = sum(f * n for f, n in zip(branch_flops, counts, strict=True)) + classifier_flops
    return RoutedFlops(routed, max(branch_flops) * sum(counts))
