"""The networks of a patch router, copied and prepared, with their costs, types and memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastroute._copies import evaluating, inference_copy
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.mixed import MIXED
from fastroute.models.precision import HALVES, round_weights, sums_of
from fastroute.ops._upsampled import Upsampler, Upsamplers, upsamples
from fastroute.profiling import count_each
from fastroute.rewrite.optimize import interpolation, optimize, parameter_dtype, split_shuffle, split_upsampler
from fastroute.runtime.memory_plan import REARRANGED, pass_bytes

Modules = Sequence[nn.Module] | nn.ModuleList

# Networks that add nothing to an image at their end, so that all of their output is rounded. In bfloat16, whose numbers have 8
# bits, they would lose tenths of a decibel and gain little, so they stay float32.
WHOLLY_ROUNDED = (FSRCNN,)


class PreparedNetworks:
    """One network per class, copied and rewritten.

    Args:
        branches: the networks given to the router.
        patch: LR patch size.
        optimized: whether they are rewritten in their fastest exact form.
        channels: number of channels. Default: what a branch names, else what a first convolution reads, else 3.
        scale: upscaling factor.

    Attributes:
        modules: the prepared networks.
        shuffle: factor of the pixel shuffle that was taken off all of them; 1 for none.
        channels: number of channels of the patches.
        size: shape of a patch, (1, C, p, p).
        dtype: type in which they compute.
        taken: type of the patches that they get; float32 for half networks, some of which add to the image at the end.
        flops, paper_flops: FLOPs of each network per patch, as it was written.
    """

    def __init__(self, branches: Sequence[nn.Module], patch: int, optimized: bool, channels: int | None, scale: int) -> None:
        self.channels, self.scale, self.optimized = channels or guess_channels(branches), scale, optimized
        self.size = (1, self.channels, patch, patch)
        counted = [count_each(branch, self.size) for branch in branches]
        self.flops, self.paper_flops = [flops["true"] for flops in counted], [flops["paper"] for flops in counted]
        self._wholly_rounded = [any(isinstance(m, WHOLLY_ROUNDED) for m in branch.modules()) for branch in branches]
        prepared = [optimize(b) if optimized else inference_copy(b) for b in branches]
        split = [split_shuffle(branch) for branch in prepared]
        # The stitching undoes a pixel shuffle that all branches end with. Regions then meet at LR pixels.
        self.shuffle = split[0][1] if len({factor for _, factor in split}) == 1 and scale % split[0][1] == 0 else 1
        self.modules = nn.ModuleList([body for body, _ in split] if self.shuffle > 1 else prepared)
        evaluating(self.modules)
        self.finishes = False  # whether all patches are finished before they are stitched
        # The results of `split` and the modules they are for: a replaced module is split again.
        self._split: tuple[list[nn.Module], Modules, Upsamplers] | None = None
        self._exact: Upsamplers = []  # the exact last layers of half networks, before they were rounded
        self._pass_bytes: dict[tuple[int, bool], int] = {}
        self._find_dtype()
        self._count_bytes()

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return next((p.device for branch in self.modules for p in branch.parameters()), torch.device("cpu"))

    def exact_in(self, dtype: torch.dtype) -> list[Tensor]:
        """The weights that stay float32 if the others are converted to `dtype`."""
        if dtype != torch.bfloat16 or self.dtype != torch.float32:
            return []
        kept = [module for module, whole in zip(self.modules, self._wholly_rounded, strict=True) if whole]
        return [x for module in kept for x in (*module.parameters(), *module.buffers())]

    @torch.no_grad()
    def before_halving(self, dtype: torch.dtype) -> None:
        """Called while the weights are still exact, before they are converted to `dtype`."""
        self._exact = self.cut(self.modules)[1]
        spared = {id(x) for x in self.exact_in(dtype)}
        for module in self.modules:
            if not any(id(p) in spared for p in module.parameters()):
                round_weights(module, dtype)

    def moved(self) -> None:
        """Called after the networks have moved to another device or changed their type."""
        self._find_dtype()
        if self.dtype not in HALVES:
            self._exact = []
        self._split = None
        self._pass_bytes.clear()
        self._count_bytes()

    def weights_changed(self) -> None:
        """Called after the networks have got other weights of the same shapes."""
        self._exact = self.cut(self.modules)[1] if self.dtype in HALVES else []
        self._split = None

    def _find_dtype(self) -> None:
        # A class without weights computes in the type of the others.
        weighted = [branch for branch in self.modules if next(branch.parameters(), None) is not None]
        types = [parameter_dtype(branch) for branch in [*weighted, *self.modules][: max(len(weighted), 1)]]
        self.dtype = next((dtype for dtype in types if dtype in HALVES), types[0])
        self.taken = sums_of(self.dtype)
        # Whether all outputs have the type of the inputs, or a more exact one than the networks compute in.
        exact = [isinstance(branch, MIXED) or dtype == self.taken for branch, dtype in zip(weighted, types, strict=False)]
        self._mixed = self.dtype in HALVES and bool(exact) and all(exact)

    def given(self, device: torch.device) -> torch.dtype:
        """The type of the outputs on `device`: float32 if last layers or sums are left to be computed in it."""
        return self.taken if self._mixed or self.split(device)[1] else self.dtype

    def reads(self, c: int) -> torch.dtype:
        """The type of the patches that branch `c` reads."""
        weighted = next(self.modules[c].parameters(), None) is not None
        return parameter_dtype(self.modules[c]) if weighted and not isinstance(self.modules[c], MIXED) else self.taken

    def split(self, device: torch.device) -> tuple[Modules, Upsamplers]:
        """The part of each branch that runs on `device` before the stitching, and the last layers left to it, if any.

        Last layers are left to the stitching if there are kernels for them and they give the right number of pixels and
        channels, or if the branch interpolates. A branch that ends in another way finishes its patches. But if all branches end
        with a pixel shuffle, only the shuffle is left to the stitching.
        """
        if self.finishes or not self.optimized or self.taken != torch.float32 or self.scale < 2 or not upsamples(device):
            return self.modules, []
        if self._split is None or any(a is not b for a, b in zip(self._split[0], self.modules, strict=True)):
            bodies, upsamplers = self.cut(self.modules)
            # In the precision that they had before the networks were converted to a half type.
            self._split = list(self.modules), bodies, self._exact or upsamplers
        return self._split[1], self._split[2]

    def cut(self, modules: Modules) -> tuple[Modules, Upsamplers]:
        """:meth:`split` for `modules`, copies of the networks, on a device that has kernels."""
        found = [self._cut(module) for module in modules]
        parts = [part for part in found if part is not None]
        if not parts or (self.shuffle > 1 and len(parts) < len(found)):
            return modules, []
        bodies = [part[0] if part else module for part, module in zip(found, modules, strict=True)]
        return bodies, [part[1] if part else None for part in found]

    def _cut(self, module: nn.Module) -> tuple[nn.Module, Upsampler] | None:
        body, shuffle = (module, self.shuffle) if self.shuffle > 1 else split_shuffle(module)
        upsampler = interpolation(module, self.size[2])
        part = split_upsampler(body, shuffle) if upsampler is None else (nn.Identity(), upsampler)
        fits = part is not None and (part[1].shuffle, part[1].channels) == (self.scale, self.channels)
        return part if fits else None

    def pass_bytes(self, c: int, device: torch.device) -> int:
        """The bytes that a patch takes on its way through branch `c`, as `split` cuts it."""
        branches, upsamplers = self.split(device)
        key = (c, bool(upsamplers))
        if key not in self._pass_bytes:
            self._pass_bytes[key] = REARRANGED * pass_bytes(branches[c], self.size, self.reads(c))
        return self._pass_bytes[key]

    def _count_bytes(self) -> None:
        """Count in advance what a first call would count, so that it runs no branch more often than later calls do."""
        for c in range(len(self.modules)):
            self.pass_bytes(c, self.device)

    def produced_bytes(self, device: torch.device) -> int:
        """The bytes of a patch that are held between its branch and the stitching."""
        upsamplers = self.split(device)[1] or [None]
        values = max(u.features if u else self.channels * self.scale**2 for u in upsamplers)
        return values * self.size[2] ** 2 * self.given(device).itemsize


def guess_channels(branches: Sequence[nn.Module]) -> int:
    """The number of channels of the images: what a branch names, else what a first convolution reads, else 3."""
    told = [channels for branch in branches if isinstance(channels := getattr(branch, "channels", None), int)]
    read = [m.in_channels for branch in branches for m in branch.modules() if isinstance(m, nn.Conv2d)]
    return [*told, *read, 3][0]
