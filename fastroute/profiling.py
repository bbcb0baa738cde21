"""FLOPs in three conventions, counted without running the network.

All count two operations per multiply-add of convolutions and linear layers. The papers count a transposed convolution's kernel
at every *output* pixel, which is the square of its stride times what is done ("true"). The tables of ClassSR, CDNSR and ARM
("paper") count nothing else and leave the classifier out; PCSR ("pcsr") also counts batch norms, PReLUs and its classifier.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastroute._arguments import real, whole
from fastroute._contexts import on_fake_tensors
from fastroute._copies import inference_copy

CONVENTIONS = ("true", "paper", "pcsr")
# Those whose figures the last two are, in :attr:`RoutedFlops.paper`.
TABLES, PCSR = "ClassSR", "PCSR"
# What ClassSR's code adds for its classifier to the FLOPs that it prints for FSRCNN, per patch.
CLASSSR_CLASSIFIER = 7.4e6
# FLOPs that PCSR counts per number which these operators read.
PER_INPUT = {
    "_prelu_kernel": 1,
    "native_batch_norm": 2,
    "_native_batch_norm_legit": 2,
    "_native_batch_norm_legit_no_training": 2,
    "_batch_norm_with_update": 2,
    "_batch_norm_no_update": 2,
    "cudnn_batch_norm": 2,
}
M = TypeVar("M", bound=TorchDispatchMode)


def count_flops(model: nn.Module, input_size: Sequence[int], convention: str = "true") -> int:
    """FLOPs of one pass of `model`, as it is written, over an input of `input_size`.

    Args:
        model: any module. A copy runs on fake tensors, which takes neither time nor memory. What fake tensors cannot run, such
            as TorchScript, runs on real ones.
        input_size: shape of the input, including the batch.
        convention: "true" counts as :class:`torch.utils.flop_counter.FlopCounterMode` does: multiply-adds done, times two.
            "paper" reproduces the tables of ClassSR, CDNSR and ARM. "pcsr" counts as the code of PCSR does, from which its
            tables are: two more per number that a batch norm reads, one per number that a PReLU reads.

    Raises:
        ValueError: an unknown convention.

    Source: the figures of ClassSR (Kong et al., CVPR 2021), table 1, at 32 x 32 LR pixels; flops.py of PCSR (Jeong et al.,
    ECCV 2024).
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"count_flops: convention must be one of {CONVENTIONS}; got {convention!r}")
    return count_each(model, input_size)[convention]


def count_each(model: nn.Module, input_size: Sequence[int]) -> dict[str, int]:
    """:func:`count_flops` by convention, from one pass."""
    sizes = [whole("count_flops", "input_size", n, 1 << 40) for n in input_size]
    like = next(model.parameters(), torch.empty(0, dtype=torch.float32, device="cpu"))
    return observed(model, sizes, like.dtype, FlopCounter).totals


def observed(model: nn.Module, size: Sequence[int], dtype: torch.dtype, make: Callable[[], M]) -> M:
    """The mode that `make` returns, after it has seen all operators of a pass of `model` over an input of `size`.

    The pass runs on fake tensors, or on real ones if fake tensors cannot run it: TorchScript, operators without a fake kernel,
    and networks that read values.
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

    :class:`torch.utils.flop_counter.FlopCounterMode` also counts by modules, with hooks on the modules of all threads.

    Attributes:
        totals: FLOPs so far by convention, see :func:`count_flops`.
    """

    def __init__(self) -> None:
        super().__init__()
        # Imported here, because it imports Triton if that is installed.
        from torch.utils.flop_counter import flop_registry

        self.totals, self.registry = dict.fromkeys(CONVENTIONS, 0), flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if each := PER_INPUT.get(packet.__name__):
            self.totals["pcsr"] += each * args[0].numel()
            return func(*args, **kwargs)
        if packet not in self.registry:
            # Operators that torch composes of others. Those of other namespaces, such as `prim::device`, cannot be decomposed.
            with self:
                parts = func.decompose(*args, **kwargs) if func.namespace == "aten" else NotImplemented
            return func(*args, **kwargs) if parts is NotImplemented else parts
        out = func(*args, **kwargs)
        flops = self.registry[packet](*args, **kwargs, out_val=out)
        self.totals["true"] += flops
        if packet is torch.ops.aten.convolution and args[6]:
            # Its multiply-adds are counted at every input pixel.
            flops = flops * math.prod(out.shape[2:]) // max(math.prod(args[0].shape[2:]), 1)
        self.totals["paper"] += flops
        self.totals["pcsr"] += flops
        return out


@dataclass(frozen=True)
class RoutedFlops:
    """The FLOPs of a routed image and of the dense one.

    Attributes:
        routed: FLOPs of the chosen branches and the classifier.
        dense: FLOPs with every patch in the most expensive branch, merged likewise, and no classifier.
        one_pass: FLOPs of one pass of the most expensive network over the whole image, without overlapping patches, which is
            what a user would run instead. None if no image is known.
        paper: whose count it is: "" for what is done; "ClassSR" for the tables of ClassSR, CDNSR and ARM, which leave the
            classifier out of `routed`; "PCSR", whose code counts it.
    """

    routed: float
    dense: float
    one_pass: float | None = None
    paper: str = ""

    @property
    def fraction(self) -> float:
        """Routed over dense FLOPs; 1 if there was nothing to do."""
        return self.routed / self.dense if self.dense else 1.0

    def with_classifier(self, patches: float, each: float = CLASSSR_CLASSIFIER) -> RoutedFlops:
        """The same with `each` FLOPs of a classifier for each of `patches`: what ClassSR's code prints for FSRCNN.

        That code adds 7.4 M per patch there and nothing for the other networks.
        """
        return replace(self, routed=self.routed + each * patches)

    @property
    def of_one_pass(self) -> float | None:
        """Routed FLOPs over those of one pass of the most expensive network; None if these are not known."""
        return self.routed / self.one_pass if self.one_pass else None


def mix_flops(
    branch_flops: Sequence[float], counts: Sequence[float], classifier_flops: float = 0.0, paper: str = ""
) -> RoutedFlops:
    """The FLOPs of a class mix.

    Args:
        branch_flops: FLOPs per patch, one entry per class.
        counts: patches (or shares) per class. Regions count by their area.
        classifier_flops: total FLOPs of the classifier, which the tables of ClassSR, CDNSR and ARM leave out.
        paper: see :class:`RoutedFlops`.

    Raises:
        ValueError: lists of different lengths.
    """
    if len(branch_flops) != len(counts):
        raise ValueError(f"mix_flops: counts must have {len(branch_flops)} entries, one per class; got {len(counts)}")
    branch_flops = [real("mix_flops", "branch_flops", flops) for flops in branch_flops]
    counts = [real("mix_flops", "counts", count) for count in counts]
    routed = sum(f * n for f, n in zip(branch_flops, counts, strict=True)) + classifier_flops
    return RoutedFlops(routed, max(branch_flops) * sum(counts), paper=paper)
