"""How the networks of a patch router run: engines, batches, memory formats and threads, found on the work of calls."""

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
from fastroute.patch.prepared_networks import PreparedNetworks
from fastroute.runtime.devices import on_device
from fastroute.runtime.memory_plan import ACTIVATIONS
from fastroute.runtime.threads import side_by_side, workers
from fastroute.runtime.tuning import Setting, SettingSearch, Shape, Trial, default_setting, enabled, search_of, sizes_of

logger = logging.getLogger("fastroute")


class Branches(PreparedNetworks):
    """The prepared networks, and how each runs fastest.

    Args:
        branches, patch, optimized, channels, scale: see :class:`PreparedNetworks`.
        batch: patches per pass; default by measurement.
        tune: find out on the work of calls how they run fastest.
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
        super().__init__(branches, patch, optimized, channels, scale)
        self.batch, self.tune = batch, tune
        # What may run them: as the user said, of each branch, and what has been compiled.
        self.engine = TORCH
        self._choice: dict[int, list[str]] = {}
        self._programs = Programs()
        self._searches: dict[tuple[int, torch.device, int, int], SettingSearch] = {}
        self._formats: dict[int, bool] = {}  # whether the weights of a branch are channels_last, once they are arranged
        # While two memory formats are compared: a branch, and its copy in the other format.
        self._others: dict[int, tuple[nn.Module, nn.Module]] = {}
        self._timed: list[Trial] = []  # trials of a GPU whose time is not known yet

    def __getstate__(self) -> dict[str, Any]:
        # What is found or made anew, and belongs to this process.
        return {**vars(self), "_searches": {}, "_timed": [], "_programs": Programs()}

    def moved(self) -> None:
        """They are on another device, or compute in another type."""
        super().moved()
        self._searches.clear()
        self._timed.clear()
        self._renewed()

    def weights_changed(self) -> None:
        """They have other weights, of the same shapes."""
        super().weights_changed()
        self._renewed()

    def _renewed(self) -> None:
        """What was made of the weights is made anew."""
        self._formats.clear()
        self._others.clear()
        if self.engine != TORCH:
            self.compile(self.engine)

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


def even_parts(count: int, batch: int) -> list[int]:
    """Sizes of the passes of `count` patches, at most `batch` each: even, so that the last is not left with a few, which
    run at a fraction of the speed."""
    passes = -(-count // batch)
    return [count // passes + (i < count % passes) for i in range(passes)]
