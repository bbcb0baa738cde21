"""The networks of a patch router, copied and prepared: what they cost, in which types they compute, and what they hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastroute._copies import evaluating, inference_copy
from fastroute.models.carn import CARN
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.precision import HALVES, round_weights, sums_of
from fastroute.models.rcan import RCAN
from fastroute.models.srresnet import SRResNet
from fastroute.ops._upsampled import Upsampler, Upsamplers, upsamples
from fastroute.profiling import count_flops
from fastroute.rewrite.optimize import interpolation, optimize, parameter_dtype, split_shuffle, split_upsampler
from fastroute.runtime.memory_plan import REARRANGED, pass_bytes

Modules = Sequence[nn.Module] | nn.ModuleList

# Networks that compute in the type of their weights, but keep what is added last as it is.
MIXED = (CARN, SRResNet, RCAN)
# Networks that add nothing to an image at their end, so that all of it is rounded: in bfloat16, whose numbers have 8 bits, they
# lose tenths of a decibel and gain little, and stay float32.
WHOLLY_ROUNDED = (FSRCNN,)


class PreparedNetworks:
    """One network per class, copied and rewritten.

    Args:
        branches: as the router is given them.
        patch: LR patch size.
        optimized: whether they are rewritten in their fastest exact form.
        channels: of the patches; default as a branch says, else as a first convolution reads, else 3.
        scale: of the outputs.

    Attributes:
        modules: the prepared networks.
        shuffle: factor of the pixel shuffle that was taken off all of them; 1 for none.
        channels: of the patches that they take.
        size: of a patch, (1, C, p, p).
        dtype: in which they compute.
        taken: type of the patches that they are given; float32 for half networks, some of which add to the image at the end.
        flops, paper_flops: of each per patch, as it was written.
    """

    def __init__(self, branches: Sequence[nn.Module], patch: int, optimized: bool, channels: int | None, scale: int) -> None:
        self.channels, self.scale, self.optimized = channels or guess_channels(branches), scale, optimized
        self.size = (1, self.channels, patch, patch)
        self.flops = [count_flops(branch, self.size) for branch in branches]
        self.paper_flops = [count_flops(branch, self.size, "paper") for branch in branches]
        self._wholly_rounded = [any(isinstance(m, WHOLLY_ROUNDED) for m in branch.modules()) for branch in branches]
        prepared = [optimize(b) if optimized else inference_copy(b) for b in branches]
        split = [split_shuffle(branch) for branch in prepared]
        # The stitching undoes a pixel shuffle on the way when all branches end with the same one; regions meet at LR pixels.
        self.shuffle = split[0][1] if len({factor for _, factor in split}) == 1 and scale % split[0][1] == 0 else 1
        self.modules = nn.ModuleList([body for body, _ in split] if self.shuffle > 1 else prepared)
        evaluating(self.modules)
        self.finishes = False  # whether all patches are finished before they are stitched
        # What `split` found in which modules; a new one in its place is looked at anew.
        self._split: tuple[list[nn.Module], Modules, Upsamplers] | None = None
        self._exact: Upsamplers = []  # the last layers of half networks before they were rounded
        self._pass_bytes: dict[tuple[int, bool], int] = {}
        self._find_dtype()
        self._count_bytes()

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return next((p.device for branch in self.modules for p in branch.parameters()), torch.device("cpu"))

    def exact_in(self, dtype: torch.dtype) -> list[Tensor]:
        """Weights that stay float32 where the others are `dtype`."""
        kept = [module for module, whole in zip(self.modules, self._wholly_rounded, strict=True) if whole]
        tensors = [x for module in kept for x in (*module.parameters(), *module.buffers())]
        return tensors if dtype == torch.bfloat16 and self.dtype == torch.float32 else []

    @torch.no_grad()
    def before_halving(self, dtype: torch.dtype) -> None:
        """The weights are still exact, and will be made `dtype` next."""
        self._exact = self.cut(self.modules)[1]
        spared = {id(x) for x in self.exact_in(dtype)}
        for module in self.modules:
            if not any(id(p) in spared for p in module.parameters()):
                round_weights(module, dtype)

    def moved(self) -> None:
        """They are on another device, or compute in another type."""
        self._find_dtype()
        if self.dtype not in HALVES:
            self._exact = []
        self._split = None
        self._pass_bytes.clear()
        self._count_bytes()

    def weights_changed(self) -> None:
        """They have other weights, of the same shapes."""
        self._exact = self.cut(self.modules)[1] if self.dtype in HALVES else []
        self._split = None

    def _find_dtype(self) -> None:
        # A class without weights computes in the type of the others.
        weighted = [branch for branch in self.modules if next(branch.parameters(), None) is not None]
        types = [parameter_dtype(branch) for branch in [*weighted, *self.modules][: max(len(weighted), 1)]]
        self.dtype = next((dtype for dtype in types if dtype in HALVES), types[0])
        self.taken = sums_of(self.dtype)
        # Whether all give what they were given, or more exact numbers than they compute in.
        exact = [isinstance(branch, MIXED) or dtype == self.taken for branch, dtype in zip(weighted, types, strict=False)]
        self._mixed = self.dtype in HALVES and bool(exact) and all(exact)

    def given(self, device: torch.device) -> torch.dtype:
        """Type of what they give on `device`: float32 where last layers or sums are left to be done in it."""
        return self.taken if self._mixed or self.split(device)[1] else self.dtype

    def reads(self, c: int) -> torch.dtype:
        """Type in which branch `c` reads patches."""
        weighted = next(self.modules[c].parameters(), None) is not None
        return parameter_dtype(self.modules[c]) if weighted and not isinstance(self.modules[c], MIXED) else self.taken

    def split(self, device: torch.device) -> tuple[Modules, Upsamplers]:
        """What of each branch runs on `device` before the stitching, and the last layers that are left to it, if any.

        They are where branches end with such as there are kernels for, and as many pixels and channels come out of them, or
        interpolate. A branch that ends otherwise finishes its patches; but if all end with a pixel shuffle, all are left at
        that.
        """
        if self.finishes or not self.optimized or self.taken != torch.float32 or self.scale < 2 or not upsamples(device):
            return self.modules, []
        if self._split is None or any(a is not b for a, b in zip(self._split[0], self.modules, strict=True)):
            bodies, upsamplers = self.cut(self.modules)
            # As they were before the networks were made half.
            self._split = list(self.modules), bodies, self._exact or upsamplers
        return self._split[1], self._split[2]

    def cut(self, modules: Modules) -> tuple[Modules, Upsamplers]:
        """:meth:`split` of `modules`, copies of these, where there are kernels."""
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
        """What a patch takes on its way through branch `c`, as `split` cuts it."""
        branches, upsamplers = self.split(device)
        key = (c, bool(upsamplers))
        if key not in self._pass_bytes:
            self._pass_bytes[key] = REARRANGED * pass_bytes(branches[c], self.size, self.reads(c))
        return self._pass_bytes[key]

    def _count_bytes(self) -> None:
        """Count now what a first call would otherwise count: it should run no branch more often than the next one does."""
        for c in range(len(self.modules)):
            self.pass_bytes(c, self.device)

    def produced_bytes(self, device: torch.device) -> int:
        """What of a patch is held between its branch and the stitching."""
        upsamplers = self.split(device)[1] or [None]
        values = max(u.features if u else self.channels * self.scale**2 for u in upsamplers)
        return values * self.size[2] ** 2 * self.given(device).itemsize


def guess_channels(branches: Sequence[nn.Module]) -> int:
    """Channels of the images: as a branch says, else as a first convolution reads, else 3."""
    told = [channels for branch in branches if isinstance(channels := getattr(branch, "channels", None), int)]
    read = [m.in_channels for branch in branches for m in branch.modules() if isinstance(m, nn.Conv2d)]
    return [*told, *read, 3][0]
