"""The networks of a patch router: what they cost, how they run fastest, and the memory that they take."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastroute._copies import inference_copy
from fastroute.engines import ANY, TORCH, Compiled, Programs, check_engine, compiled, engine_of, usable_engines
from fastroute.models.adapters import Function
from fastroute.models.carn import CARN
from fastroute.models.precision import HALVES, round_weights, sums_of
from fastroute.models.rcan import RCAN
from fastroute.models.srresnet import SRResNet
from fastroute.ops._upsampled import Upsampler, Upsamplers, upsamples
from fastroute.profiling import count_flops
from fastroute.rewrite.optimize import interpolation, optimize, parameter_dtype, split_shuffle, split_upsampler
from fastroute.runtime.devices import on_device
from fastroute.runtime.memory_plan import ACTIVATIONS, REARRANGED, pass_bytes
from fastroute.runtime.threads import side_by_side, workers
from fastroute.runtime.tuning import Setting, SettingSearch, Shape, Trial, default_setting, enabled, search_of, sizes_of

logger = logging.getLogger("fastroute")

Modules = Sequence[nn.Module] | nn.ModuleList

# Networks that compute in the type of their weights, but keep what is added last as it is.
MIXED = (CARN, SRResNet, RCAN)


class Branches:
    """One network per class, copied and prepared.

    Args:
        branches: as the router is given them.
        patch: LR patch size.
        optimized: run them in their fastest exact form.
        channels: of the patches; default as a branch says, else as a first convolution reads, else 3.
        batch: patches per pass; default by measurement.
        scale: of the outputs.
        tune: find out on the work of calls how they run fastest.

    Attributes:
        modules: the prepared networks.
        shuffle: factor of the pixel shuffle that was taken off all of them; 1 for none.
        channels: of the patches that they take.
        dtype: in which they compute.
        taken: type of the patches that they are given; float32 for half networks, some of which add to the image at the end.
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
        tune: bool = True,
    ) -> None:
        for name, number in (("channels", channels), ("batch", batch)):
            if number is not None and number < 1:
                raise ValueError(f"PatchRouter: {name} must be at least 1; got {number}")
        self.batch, self.channels, self.scale = batch, channels or guess_channels(branches), scale
        self.optimized, self.tune = optimized, tune
        self.size = (1, self.channels, patch, patch)
        self.flops = [count_flops(branch, self.size) for branch in branches]
        self.paper_flops = [count_flops(branch, self.size, "paper") for branch in branches]
        prepared = [optimize(b) if optimized else inference_copy(b) for b in branches]
        split = [split_shuffle(branch) for branch in prepared]
        # The stitching undoes a pixel shuffle on the way when all branches end with the same one; regions meet at LR pixels.
        self.shuffle = split[0][1] if len({factor for _, factor in split}) == 1 and scale % split[0][1] == 0 else 1
        self.modules = nn.ModuleList([body for body, _ in split] if self.shuffle > 1 else prepared)
        self._find_dtype()
        # What may run them: as the user said, of each branch, and what has been compiled.
        self.engine = TORCH
        self._choice: dict[int, list[str]] = {}
        self._programs = Programs()
        # What `split` found in which modules; a new one in its place is looked at anew.
        self._split: tuple[list[nn.Module], Modules, Upsamplers] | None = None
        self._exact: Upsamplers = []  # of half networks, what it was before they were rounded
        self._pass_bytes: dict[tuple[int, bool], int] = {}
        self._searches: dict[tuple[int, torch.device, int, int], SettingSearch] = {}
        self._formats: dict[int, bool] = {}  # whether the weights of a branch are channels_last, once they are arranged
        # Of the other memory format, while the two are compared; what of whom.
        self._others: dict[int, tuple[nn.Module, nn.Module]] = {}
        self._timed: list[Trial] = []  # trials of a GPU whose time is not known yet
        self._count_bytes()

    def __getstate__(self) -> dict[str, Any]:
        # What is found or made anew, and belongs to this process.
        return {**vars(self), "_searches": {}, "_timed": [], "_programs": Programs()}

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return next((p.device for branch in self.modules for p in branch.parameters()), torch.device("cpu"))

    @torch.no_grad()
    def before_halving(self, dtype: torch.dtype) -> None:
        """The weights are still exact, and will be made `dtype` next."""
        self._exact = self.cut(self.modules)[1]
        for module in self.modules:
            round_weights(module, dtype)

    def moved(self) -> None:
        """They are on another device, or compute in another type."""
        self._find_dtype()
        if self.dtype not in HALVES:
            self._exact = []
        self._pass_bytes.clear()
        self._searches.clear()
        self._timed.clear()
        self._count_bytes()
        self._renewed()

    def weights_changed(self) -> None:
        """They have other weights, of the same shapes."""
        self._exact = self.cut(self.modules)[1] if self.dtype in HALVES else []
        self._renewed()

    def _renewed(self) -> None:
        """What was made of the weights is made anew."""
        self._formats.clear()
        self._others.clear()
        self._split = None
        if self.engine != TORCH:
            self.compile(self.engine)

    def _find_dtype(self) -> None:
        # A class without weights computes in the type of the others.
        weighted = [branch for branch in self.modules if next(branch.parameters(), None) is not None]
        self.dtype = parameter_dtype([*weighted, *self.modules][0])
        self.taken = sums_of(self.dtype)
        self._mixed = bool(weighted) and all(isinstance(branch, MIXED) for branch in weighted)

    def given(self, device: torch.device) -> torch.dtype:
        """Type of what they give on `device`: float32 where last layers or sums are left to be done in it."""
        return self.taken if self._mixed or self.split(device)[1] else self.dtype

    def reads(self, c: int) -> torch.dtype:
        """Type in which branch `c` reads patches."""
        weighted = next(self.modules[c].parameters(), None) is not None
        return self.dtype if weighted and not isinstance(self.modules[c], MIXED) else self.taken

    def split(self, device: torch.device) -> tuple[Modules, Upsamplers]:
        """What of each branch runs on `device` before the stitching, and the last layers that are left to it, if any.

        They are where branches end with such as there are kernels for, and as many pixels and channels come out of them, or
        interpolate. A branch that ends otherwise finishes its patches; but if all end with a pixel shuffle, all are left at
        that.
        """
        if not self.optimized or self.taken != torch.float32 or self.scale < 2 or not upsamples(device):
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

    def setting(self, c: int, device: torch.device) -> Setting:
        """How branch `c` runs on `device` for all that is known now."""
        parallel = self._workers(c, device) > 1
        if self.batch is not None:
            default = default_setting(device, parallel, self._engines(c)[0])
            return replace(default, pixels=self.batch * self.size[2] * self.size[3])
        return self._search(c, device).best or default_setting(device, parallel, self._engines(c)[0])

    def compile(self, engine: str) -> None:
        """Let `engine` run them; "auto" lets the search compare those that are installed.

        Raises:
            ValueError: it cannot run here, cannot compile a branch, or computes something else than PyTorch.
        """
        if engine != ANY:
            check_engine(engine, self.device, self.dtype)
        names = usable_engines(self.device, self.dtype) if engine == ANY else [engine]
        before = self.engine, self._choice, self._programs
        self.engine, self._choice, self._programs = engine, {}, Programs()
        try:
            for c in range(len(self.modules)):
                self._choice[c] = [TORCH] if engine == ANY else []
                for name in names:
                    self._add_engine(c, name)
        except ValueError:
            self.engine, self._choice, self._programs = before
            raise
        self._searches.clear()

    def _add_engine(self, c: int, name: str) -> None:
        """Let `name` run branch `c`, where it agrees with PyTorch; one without weights has nothing to be compiled."""
        weightless = next(self.split(self.device)[0][c].parameters(), None) is None
        if name == TORCH or weightless:
            if TORCH not in self._choice[c]:
                self._choice[c].append(TORCH)
            return
        try:
            self._program(c, name)
        except ValueError as error:
            if self.engine != ANY:
                raise ValueError(f"{error} (branch {c})") from error
            logger.info("%s (branch %d)", error, c)
            return
        self._choice[c].append(name)

    def _engines(self, c: int) -> list[str]:
        return self._choice.get(c) or [TORCH]

    def _program(self, c: int, name: str) -> Compiled:
        """Branch `c` compiled by the engine `name`."""
        if (c, name) not in self._programs:
            with torch.inference_mode(False):
                module = self.split(self.device)[0][c]
                self._programs[c, name] = compiled(name, module, self.reads(c), self.size, self.dtype)
        return self._programs[c, name]

    def _workers(self, c: int, device: torch.device) -> int:
        """Passes of branch `c` that may run side by side; a function may have a state, and is called by one thread."""
        alone = device.type != "cpu" or any(isinstance(module, Function) for module in self.modules[c].modules())
        return 1 if alone else workers()

    def batch_of(self, c: int, device: torch.device) -> int:
        """Patches of the router's own size that pass together through branch `c` on `device`."""
        setting = self.setting(c, device)
        batch = setting.batch(self.size)
        return batch if self.batch is not None else min(batch, self._most_together(c, device, setting))

    def run(self, c: int, patches: Tensor) -> list[Tensor]:  # [N, C, h, w] -> [n, ...] each
        """What branch `c`, as :meth:`split` cuts it, makes of `patches`, pass by pass.

        As long as nobody knows how it runs fastest, some of the work is done in ways that are compared: see
        :class:`fastroute.runtime.tuning.SettingSearch`. Their results are as good as any others.
        """
        results: list[Tensor] = []
        left, shape = patches, (patches.shape[2], patches.shape[3])
        while left.shape[0]:
            trial = self._trial(c, left.shape[0], shape, patches.device)
            if trial is None:
                results += self._passes(c, left, self.setting(c, patches.device))
                break
            part, left = left[: trial.patches], left[trial.patches :]
            with trial:
                results += self._passes(c, part, trial.setting)
            self._timed.append(trial)
            if patches.device.type == "cpu":
                self.collect()
        return results

    def settled(self, c: int, device: torch.device) -> bool:
        """Whether nothing about branch `c` is measured any more."""
        return self.batch is not None or not self.tune or not enabled() or self._search(c, device).best is not None

    def collect(self) -> None:
        """Take note of what trials have taken; on a GPU all work must be done."""
        while self._timed:
            trial = self._timed.pop(0)
            trial.search.add(trial.shape, trial.setting, trial.seconds / (trial.patches * trial.shape[0] * trial.shape[1]))

    def remember(self) -> None:
        """At the end of a call, whose work on the device is done: keep what has been measured."""
        self.collect()
        for search in self._searches.values():
            search.remember()

    def _search(self, c: int, device: torch.device) -> SettingSearch:
        threads = self._workers(c, device)
        key = (c, device, torch.get_num_threads(), threads)
        if key not in self._searches:
            example = torch.empty(self.size, dtype=self.dtype, device=device)
            self._searches[key] = search_of(self.split(device)[0][c], example, threads, self._engines(c))
        return self._searches[key]

    def _trial(self, c: int, count: int, shape: Shape, device: torch.device) -> Trial | None:
        """The next trial of the search for how branch `c` runs fastest, where `count` patches are enough for one."""
        if self.settled(c, device):
            return None
        search = self._search(c, device)
        largest = self.largest(c, device, shape)
        patches = search.patches(shape, largest)
        setting = search.trial(shape, largest) if count >= patches else None
        return None if setting is None else Trial(search, shape, setting, patches, device)

    def _batch(self, c: int, patches: Tensor, setting: Setting) -> int:
        batch = setting.batch(patches.shape)
        if self.batch is not None:
            return batch
        return min(batch, self._most_together(c, patches.device, setting, (patches.shape[2], patches.shape[3])))

    def pieces(self, c: int, patches: Tensor, setting: Setting) -> tuple[nn.Module, Sequence[Tensor], torch.dtype]:
        """PyTorch's module of branch `c`, the patches of each of its passes, and the type of what they give."""
        module = self._arranged(c, patches.device, setting)
        batch = self._batch(c, patches, setting)
        patches = patches.to(self.reads(c)).contiguous(memory_format=setting.memory_format)
        return module, patches.split(even_parts(patches.shape[0], batch)), self.given(patches.device)

    def _passes(self, c: int, patches: Tensor, setting: Setting) -> list[Tensor]:
        if setting.engine != TORCH:
            return self.programmed(c, [patches], setting)[0]
        module, parts, given = self.pieces(c, patches, setting)

        def run(part: Tensor) -> Tensor:
            return module(part).to(given)

        # With fewer passes than threads some would have nothing to do.
        if setting.parallel and len(parts) >= self._workers(c, patches.device):
            return side_by_side(run, parts)
        return [run(part) for part in parts]

    def programmed(self, c: int, jobs: Sequence[Tensor], setting: Setting | None = None) -> list[list[Tensor]]:
        """What another engine than PyTorch makes of `jobs`, (N, C, h, w) each, by passes: all in one go, since it may run
        several at a time."""
        device = jobs[0].device
        setting = setting or self.setting(c, device)
        reads = self.taken if engine_of(setting.engine).FLOAT32_ENDS else self.reads(c)
        split = []
        for patches in jobs:
            arranged = patches.to(reads).contiguous(memory_format=setting.memory_format)
            split.append(arranged.split(even_parts(patches.shape[0], self._batch(c, patches, setting))))
        given = self.given(device)
        results = iter(self._program(c, setting.engine)([part for parts in split for part in parts]))
        return [[next(results).to(given) for _ in parts] for parts in split]

    def _arranged(self, c: int, device: torch.device, setting: Setting) -> nn.Module:
        """Branch `c` with its weights in the memory format of `setting`."""
        module, last = self.split(device)[0][c], setting.channels_last
        if self._formats.get(c) == last:
            return module
        # Weights that are made here must serve outside of inference mode too.
        with torch.inference_mode(False), torch.no_grad():
            if c in self._formats and self.setting(c, device).channels_last != last:
                # A copy, so that nothing changes but for the trial.
                if c not in self._others or self._others[c][0] is not module:
                    other = inference_copy(module)
                    self._others[c] = module, other.to(memory_format=setting.memory_format)  # type: ignore[call-overload]
                return self._others[c][1]
            self._others.pop(c, None)
            self._formats[c] = last
            return module.to(memory_format=setting.memory_format)  # type: ignore[call-overload]

    def largest(self, c: int, device: torch.device, shape: Shape | None = None) -> int:
        """Patches that may pass together, of the router's own size unless told otherwise."""
        height, width = shape or (self.size[2], self.size[3])
        each = self.pass_bytes(c, device) * height * width // (self.size[2] * self.size[3])
        return max(1, on_device(ACTIVATIONS, device) // max(each, 1))

    def _most_together(self, c: int, device: torch.device, setting: Setting, shape: Shape | None = None) -> int:
        """Patches per pass that memory allows."""
        return max(1, self.largest(c, device, shape) // (self._workers(c, device) if setting.parallel else 1))

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

    def batch_bytes(self, device: torch.device, region: float = 1.0) -> int:
        """What the batch that takes most holds on its way through a branch, in whichever way it may run.

        Args:
            device: where.
            region: the largest region, in patches, one of which every thread may run.
        """
        passes = (
            (self.pass_bytes(c, device), self._most(c, device), self._workers(c, device)) for c in range(len(self.modules))
        )
        return max(int(size * max(most, region * threads)) for size, most, threads in passes)

    def _most(self, c: int, device: torch.device) -> int:
        threads = self._workers(c, device)
        if self.batch is not None or not self.tune or not enabled() or self._search(c, device).best is not None:
            return self.batch_of(c, device) * (threads if self.setting(c, device).parallel else 1)
        ways = [max(sizes_of(device.type == "cpu", parallel)) * (threads if parallel else 1) for parallel in (True, False)]
        return min(Setting(max(ways)).batch(self.size), self.largest(c, device))

    def produced_bytes(self, device: torch.device) -> int:
        """What of a patch is held between its branch and the stitching."""
        upsamplers = self.split(device)[1] or [None]
        values = max(u.features if u else self.channels * self.scale**2 for u in upsamplers)
        return values * self.size[2] ** 2 * self.given(device).itemsize


def even_parts(count: int, batch: int) -> list[int]:
    """Sizes of the passes of `count` patches, at most `batch` each: even, so that the last is not left with a few, which
    run at a fraction of the speed."""
    passes = -(-count // batch)
    return [count // passes + (i < count % passes) for i in range(passes)]


def guess_channels(branches: Sequence[nn.Module]) -> int:
    """Channels of the images: as a branch says, else as a first convolution reads, else 3."""
    told = [channels for branch in branches if isinstance(channels := getattr(branch, "channels", None), int)]
    read = [m.in_channels for branch in branches for m in branch.modules() if isinstance(m, nn.Conv2d)]
    return [*told, *read, 3][0]
