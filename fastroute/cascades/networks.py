"""The networks of a cascade, as they run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastroute._copies import inference_copy
from fastroute.models.adapters import Function
from fastroute.models.mixed import MIXED
from fastroute.models.network import AnySize, Facts
from fastroute.models.precision import HALVES, round_weights, sums_of
from fastroute.profiling import count_flops
from fastroute.rewrite.optimize import parameter_dtype
from fastroute.rewrite.replace import replace_convolutions

# Side of the input on which FLOPs are counted.
COUNTED = 64


class Networks(nn.Module):
    """Frozen copies of networks of one scale, the cheapest first.

    Args:
        modules: the networks.
        facts: of each.
    """

    def __init__(self, modules: Sequence[nn.Module], facts: Sequence[Facts]) -> None:
        super().__init__()
        self.members = nn.ModuleList([replace_convolutions(inference_copy(module)) for module in modules])
        self.facts = list(facts)
        self.dtype = torch.float32
        self._arrange()

    def halve(self, dtype: torch.dtype) -> None:
        """Round the weights to a half type, with care; `.to` would do so without."""
        round_weights(self.members, dtype)

    def _arrange(self) -> None:
        # The format in which convolutions of many channels run fastest, on CPUs and GPUs alike.
        for weight in self.parameters():
            if weight.ndim == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def run(self, k: int, images: Tensor) -> Tensor:  # [N, C, h, w] -> [N, C, h * scale, w * scale]
        """What network `k` makes of `images`, floating in [0, 1]; float32, or float64 as the networks are."""
        given, member = sums_of(self.dtype), self.members[k]
        taken = given if self.weightless(k) or self._mixed(k) else parameter_dtype(member)
        return member(images.to(taken).contiguous(memory_format=torch.channels_last)).to(given)

    def weightless(self, k: int) -> bool:
        """Whether network `k` is a function, such as interpolation, or has no weights."""
        member = self.members[k]
        return isinstance(member, Function) or next(member.parameters(), None) is None

    def _mixed(self, k: int) -> bool:
        """Whether network `k` keeps the image in float32 where its layers compute in a half type."""
        member = self.members[k]
        return isinstance(member.network if isinstance(member, AnySize) else member, MIXED)

    def flops(self) -> list[float]:
        """FLOPs of each per pixel of the input; those of one without weights are the values that it gives."""
        found = []
        for member, facts in zip(self.members, self.facts, strict=True):
            size = (1, facts.channels, *facts.padded(COUNTED, COUNTED))
            counted = float(count_flops(member, size)) / (size[2] * size[3])
            found.append(counted or 32.0 * facts.channels * facts.scale**2)
        return found


def unsupported_half(facts: Facts, dtype: torch.dtype) -> str:
    """Why a network cannot compute in `dtype`; "" where it can."""
    if dtype in HALVES and dtype not in facts.halves:
        name = str(dtype).removeprefix("torch.")
        return f"{facts.architecture} does not support {name}, as {facts.sources.get('halves', 'its author')} says"
    return ""
