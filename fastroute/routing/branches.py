"""The networks of a patch router: what they cost, how they run fastest, and the memory that they take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastroute.models.adapters import inference_copy
from fastroute.models.optimize import interpolation, optimize, parameter_dtype, split_shuffle, split_upsampler
from fastroute.ops._upsampled import Upsampler, Upsamplers, upsamples
from fastroute.profiling import count_flops
from fastroute.routing.devices import on_device
from fastroute.routing.tuning import Tuning, tune
from fastroute.routing.working_set import ACTIVATIONS, REARRANGED, pass_bytes


class Branches:
    """One network per class, copied and prepared.

    Args:
        branches: as the router is given them.
        patch: LR patch size.
        optimized: run them in their fastest exact form.
        channels: of the patches; default as a branch says, else as a first convolution reads, else 3.
        batch: patches per pass; default by measurement.
        scale: of the outputs.

    Attributes:
        modules: the prepared networks.
        shuffle: factor of the pixel shuffle that was taken off all of them; 1 for none.
        channels, dtype: of the patches that they take.
        flops, paper_flops: of each per patch, as it was written.
    """

    def __init__(
        self,
        branches: Sequence[nn.Module],
        patch: int,
        optimized: bool,
        channels: int | None = None,
        batch: int | None = None,
        scale: int = 1,
    ) -> None:
        for name, number in (("channels", channels), ("batch", batch)):
            if number is not None and number < 1:
                raise ValueError(f"PatchRouter: {name} must be at least 1; got {number}")
        self.batch, self.channels, self.scale = batch, channels or guess_channels(branches), scale
        self.optimized = optimized
        # A class without weights computes in the type of the others.
        weighted = [branch for branch in branches if next(branch.parameters(), None) is not None]
        self.dtype = parameter_dtype([*weighted, *branches][0])
        self.size = (1, self.channels, patch, patch)
        self.flops = [count_flops(branch, self.size) for branch in branches]
        self.paper_flops = [count_flops(branch, self.size, "paper") for branch in branches]
        prepared = [optimize(b) if optimized else frozen_copy(b) for b in branches]
        split = [split_shuffle(branch) for branch in prepared]
        # The stitching undoes a pixel shuffle on the way when all branches end with the same one.
        self.shuffle = split[0][1] if len({factor for _, factor in split}) == 1 else 1
        self.modules = [body for body, _ in split] if self.shuffle > 1 else prepared
        self._device = torch.device("cpu")  # of branches without weights
        # What `split` found in which modules; a new one in its place is looked at anew.
        self._split: tuple[list[nn.Module], Sequence[nn.Module], Upsamplers] | None = None
        self._pass_bytes: dict[tuple[int, bool], int] = {}
        self._tunings: dict[tuple[int, torch.device, int], Tuning] = {}

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return next((p.device for branch in self.modules for p in branch.parameters()), self._device)

    def to(self, device: str | torch.device) -> None:
        """Move them."""
        for module in self.modules:
            module.to(device)
        # As tensors name it: a GPU by its number.
        self._device = torch.empty(0, device=device).device
        self._tunings.clear()
        self._split = None

    def split(self, device: torch.device) -> tuple[Sequence[nn.Module], Upsamplers]:
        """What of each branch runs on `device` before the stitching, and the last layers that are left to it, if any.

        They are where branches end with such as there are kernels for, and as many pixels and channels come out of them, or
        interpolate. A branch that ends otherwise finishes its patches; but if all end with a pixel shuffle, all are left at
        that.
        """
        if not self.optimized or self.dtype != torch.float32 or self.scale < 2 or not upsamples(device):
            return self.modules, []
        if self._split is None or any(a is not b for a, b in zip(self._split[0], self.modules, strict=True)):
            self._split = list(self.modules), *self.cut(self.modules)
        return self._split[1], self._split[2]

    def cut(self, modules: Sequence[nn.Module]) -> tuple[Sequence[nn.Module], Upsamplers]:
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

    def known(self, c: int, device: torch.device) -> Tuning | None:
        """How branch `c` runs on `device`, where this has been found."""
        return self._tunings.get((c, device, torch.get_num_threads()))

    def tuning(self, c: int, device: torch.device) -> Tuning:
        """How branch `c`, as :meth:`split` cuts it, runs on `device`; measured on the first call."""
        key = (c, device, torch.get_num_threads())
        if key not in self._tunings:
            example = torch.full(self.size, 0.5, dtype=self.dtype, device=device)
            module = self.split(device)[0][c]
            fixed = None if self.batch is None else Tuning(self.batch, False, 0.0)
            self._tunings[key] = fixed or tune(module, example, self.largest(c, device))
            module.to(memory_format=self._tunings[key].memory_format)  # type: ignore[call-overload]
        return self._tunings[key]

    def largest(self, c: int, device: torch.device) -> int:
        """Patches that may pass together."""
        return max(1, on_device(ACTIVATIONS, device) // self.pass_bytes(c, device))

    def pass_bytes(self, c: int, device: torch.device) -> int:
        """What a patch takes on its way through branch `c`, as `split` cuts it."""
        branches, upsamplers = self.split(device)
        key = (c, bool(upsamplers))
        if key not in self._pass_bytes:
            self._pass_bytes[key] = REARRANGED * pass_bytes(branches[c], self.size, self.dtype)
        return self._pass_bytes[key]

    def batch_bytes(self, device: torch.device) -> int:
        """What the batch that takes most holds on its way through a branch."""
        tunings = {c: self.known(c, device) for c in range(len(self.modules))}
        return max(self.pass_bytes(c, device) * (t.batch if t else 0) for c, t in tunings.items())

    def produced_bytes(self, device: torch.device) -> int:
        """What of a patch is held between its branch and the stitching."""
        upsamplers = self.split(device)[1] or [None]
        values = max(u.features if u else self.channels * self.scale**2 for u in upsamplers)
        return values * self.size[2] ** 2 * self.dtype.itemsize


def even_parts(count: int, batch: int) -> list[int]:
    """Sizes of the passes of `count` patches, at most `batch` each: even, so that the last is not left with a few, which
    run at a fraction of the speed."""
    passes = -(-count // batch)
    return [count // passes + (i < count % passes) for i in range(passes)]


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy for inference; the caller's own stays as it is."""
    return inference_copy(module)


def guess_channels(branches: Sequence[nn.Module]) -> int:
    """Channels of the images: as a branch says, else as a first convolution reads, else 3."""
    told = [channels for branch in branches if isinstance(channels := getattr(branch, "channels", None), int)]
    read = [m.in_channels for branch in branches for m in branch.modules() if isinstance(m, nn.Conv2d)]
    return [*told, *read, 3][0]
