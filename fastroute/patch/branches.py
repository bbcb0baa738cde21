"""The execution of the networks of a patch router: engines, batches, memory formats and threads, tuned on the work of calls."""

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
from fastroute.runtime.tuning import (
    SMALL_PASS,
    Setting,
    SettingSearch,
    Shape,
    Trial,
    default_setting,
    enabled,
    search_of,
    sizes_of,
)

logger = logging.getLogger("fastroute")


class Branches(PreparedNetworks):
    """The prepared networks and the fastest way to run each of them.

    Args:
        branches, patch, optimized, channels, scale: see :class:`PreparedNetworks`.
        batch: patches per pass. Default: by measurement.
        tune: find out on the work of calls how the networks run fastest.
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
        # The engine that the user chose, the engines that may run each branch, and the compiled programs.
        self.engine = TORCH
        self._choice: dict[int, list[str]] = {}
        self._programs = Programs()
        self._searches: dict[tuple[int, torch.device, int, int], SettingSearch] = {}
        self._formats: dict[int, bool] = {}  # whether the weights of a branch are channels_last, once they are arranged
        # While two memory formats are compared, a branch and its copy in the other format.
        self._others: dict[int, tuple[nn.Module, nn.Module]] = {}
        self._timed: list[Trial] = []  # trials of a GPU whose time is not known yet

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to this process, and is found or made again in another one.
        return {**vars(self), "_searches": {}, "_timed": [], "_programs": Programs()}

    def moved(self) -> None:
        """Called after the networks have moved to another device or changed their type."""
        super().moved()
        self._searches.clear()
        self._timed.clear()
        self._renewed()

    def weights_changed(self) -> None:
        """Called after the networks have got other weights of the same shapes."""
        super().weights_changed()
        self._renewed()

    def _renewed(self) -> None:
        """Drop everything that was made from the weights."""
        self._formats.clear()
        self._others.clear()
        if self.engine != TORCH:
            self.compile(self.engine)

    def setting(self, c: int, device: torch.device) -> Setting:
        """The best known way to run branch `c` on `device`."""
        parallel = self._workers(c, device) > 1
        if self.batch is not None:
            default = default_setting(device, parallel, self._engines(c)[0])
            return replace(default, pixels=self.batch * self.size[2] * self.size[3])
        return self._search(c, device).best or default_setting(device, parallel, self._engines(c)[0])

    def compile(self, engine: str) -> None:
        """Let `engine` run the networks. With "auto" the search compares the installed engines.

        Raises:
            ValueError: the engine cannot run here, cannot compile a branch, or computes something else than PyTorch.
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
        """Let engine `name` run branch `c` if it agrees with PyTorch. A branch without weights is not compiled."""
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
        """Branch `c`, compiled by the engine `name`."""
        if (c, name) not in self._programs:
            with torch.inference_mode(False):
                module = self.split(self.device)[0][c]
                self._programs[c, name] = compiled(name, module, self.reads(c), self.size, self.dtype)
        return self._programs[c, name]

    def _workers(self, c: int, device: torch.device) -> int:
        """How many passes of branch `c` may run side by side. A function may have a state, so only one thread calls it."""
        alone = device.type != "cpu" or any(isinstance(module, Function) for module in self.modules[c].modules())
        return 1 if alone else workers()

    def batch_of(self, c: int, device: torch.device) -> int:
        """How many patches of the router's own size pass together through branch `c` on `device`."""
        setting = self.setting(c, device)
        batch = setting.batch(self.size)
        return batch if self.batch is not None else min(batch, self._most_together(c, device, setting))

    def run(self, c: int, patches: Tensor) -> list[Tensor]:  # [N, C, h, w] -> [n, ...] each
        """The outputs of branch `c`, as :meth:`split` cuts it, for `patches`, pass by pass.

        Until it is known how the branch runs fastest, some of the work is done in several ways that are compared: see
        :class:`fastroute.runtime.tuning.SettingSearch`. The results of all ways are equally good.
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
        """Whether the measurements of branch `c` are complete."""
        return self.batch is not None or not self.tune or not enabled() or self._search(c, device).best is not None

    def trials(self, c: int, device: torch.device) -> int:
        """The number of trials of branch `c` so far, while it is measured."""
        return 0 if self.settled(c, device) else self._search(c, device).made

    def collect(self) -> None:
        """Record the times of the trials. On a GPU, all work must be done."""
        while self._timed:
            trial = self._timed.pop(0)
            trial.search.add(trial.shape, trial.setting, trial.seconds / (trial.patches * trial.shape[0] * trial.shape[1]))

    @property
    def measuring(self) -> bool:
        """Whether there are trials whose time is still to be recorded."""
        return bool(self._timed)

    def remember(self) -> None:
        """Store the measurements at the end of a call, when its work on the device is done."""
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
        """The next trial of the search for the fastest way to run branch `c`, if `count` patches are enough for one."""
        if self.settled(c, device):
            return None
        search = self._search(c, device)
        largest = self.largest(c, device, shape)
        patches = search.patches(shape, largest)
        setting = search.trial(shape, largest) if count >= patches else None
        return None if setting is None else Trial(search, shape, setting, patches, device)

    def _batch(self, c: int, patches: Tensor, setting: Setting) -> int:  # [N, C, h, w]
        batch = setting.batch(patches.shape)
        if self.batch is not None:
            return batch
        return min(batch, self._most_together(c, patches.device, setting, (patches.shape[2], patches.shape[3])))

    def pieces(
        self,
        c: int,
        patches: Tensor,  # [N, C, h, w]
        setting: Setting,
    ) -> tuple[nn.Module, Sequence[Tensor], torch.dtype]:
        """PyTorch's module of branch `c`, the patches of each of its passes, and the type of the outputs."""
        module = self._arranged(c, patches.device, setting)
        batch = self._batch(c, patches, setting)
        patches = patches.to(self.reads(c)).contiguous(memory_format=setting.memory_format)
        return module, patches.split(even_parts(patches.shape[0], batch)), self.given(patches.device)

    def _passes(self, c: int, patches: Tensor, setting: Setting) -> list[Tensor]:  # [N, C, h, w]
        if setting.engine != TORCH:
            return self.programmed(c, [patches], setting)[0]
        module, parts, given = self.pieces(c, patches, setting)

        def run(part: Tensor) -> Tensor:  # [n, C, h, w]
            return module(part).to(given)

        # With fewer passes than threads, some threads would have nothing to do.
        if setting.parallel and len(parts) >= self._workers(c, patches.device):
            return side_by_side(run, parts)
        return [run(part) for part in parts]

    def programmed(
        self,
        c: int,
        jobs: Sequence[Tensor],  # [N, C, h, w] each
        setting: Setting | None = None,
    ) -> list[list[Tensor]]:
        """The outputs of another engine than PyTorch for `jobs`, (N, C, h, w) each, by passes.

        All jobs are handed over at once, because the engine may run several at a time.
        """
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
        # Weights that are made here must also be usable outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            if c in self._formats and self.setting(c, device).channels_last != last:
                # A copy, so that nothing changes outside the trial.
                if c not in self._others or self._others[c][0] is not module:
                    other = inference_copy(module)
                    self._others[c] = module, other.to(memory_format=setting.memory_format)  # type: ignore[call-overload]
                return self._others[c][1]
            self._others.pop(c, None)
            self._formats[c] = last
            return module.to(memory_format=setting.memory_format)  # type: ignore[call-overload]

    def largest(self, c: int, device: torch.device, shape: Shape | None = None) -> int:
        """How many patches may pass together, by default of the router's own size."""
        height, width = shape or (self.size[2], self.size[3])
        each = self.pass_bytes(c, device) * height * width // (self.size[2] * self.size[3])
        return max(1, on_device(ACTIVATIONS, device) // max(each, 1))

    def _most_together(self, c: int, device: torch.device, setting: Setting, shape: Shape | None = None) -> int:
        """How many patches per pass memory allows."""
        return max(1, self.largest(c, device, shape) // (self._workers(c, device) if setting.parallel else 1))

    def batch_bytes(self, device: torch.device, region: float = 1.0) -> int:
        """The bytes that the largest batch holds on its way through a branch, in whichever way it runs.

        Args:
            device: the device on which it runs.
            region: the largest region, in patches. Every thread may run one.
        """
        # Small passes run side by side, see :func:`fastroute.patch.passes.run_regions`.
        small = Setting(SMALL_PASS).batch(self.size) if device.type == "cpu" and self.batch is None else 0
        passes = (
            (self.pass_bytes(c, device), self._most(c, device), self._workers(c, device)) for c in range(len(self.modules))
        )
        return max(int(size * max(most, region * threads, small * threads)) for size, most, threads in passes)

    def _most(self, c: int, device: torch.device) -> int:
        threads = self._workers(c, device)
        if self.batch is not None or not self.tune or not enabled() or self._search(c, device).best is not None:
            return self.batch_of(c, device) * (threads if self.setting(c, device).parallel else 1)
        ways = [max(sizes_of(device.type == "cpu", parallel)) * (threads if parallel else 1) for parallel in (True, False)]
        return min(Setting(max(ways)).batch(self.size), self.largest(c, device))


def even_parts(count: int, batch: int) -> list[int]:
    """The sizes of the passes of `count` patches, at most `batch` each.

    They are even, so that the last pass is not left with a few patches, which run at a fraction of the speed.
    """
    passes = -(-count // batch)
    return [count // passes + (i < count % passes) for i in range(passes)]
