"""The search for the fastest way to run each branch on a machine: done on the work of calls, trial by trial, and remembered."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fastroute.engines import ENGINES, TORCH, engine_of
from fastroute.runtime.json_cache import JsonCache

logger = logging.getLogger("fastroute")

# Pixels of the image that pass through a branch together: about what fits the caches of a CPU, and more for a GPU, which needs
# many to be busy. The first number is used before anything has been measured.
PIXELS = (1 << 13, 1 << 12, 1 << 14, 1 << 15)
# The same for passes side by side, each of which has the caches of its own processor.
PARALLEL_PIXELS = (1 << 12, 1 << 11, 1 << 13, 1 << 14)
# Regions of up to so many pixels take passes of so many, side by side, however larger ones run: an image has regions of many
# shapes and classes, whose small passes all threads together run badly.
SMALL_PASS = 1 << 13
GPU_PIXELS = (1 << 20, 1 << 15, 1 << 16, 1 << 17, 1 << 18, 1 << 19)
# The least number of pixels of a trial: times that are too short cannot be compared.
TRIAL_PIXELS = {"cpu": 1 << 15, "cuda": 1 << 20}
# Trials of each candidate, and the most trials if those of one candidate disagree.
ROUNDS, MOST_ROUNDS = 3, 6
# More pixels per pass must be worth their memory: a candidate that is slower than the fastest by less than this is as good.
EARNED = 1.02
# If the median trial of a candidate exceeds its fastest one by more than this, something else was running.
STEADY = 1.25
# Part of every key: results that were measured in another way are measured again.
METHOD = 4
# The environment variable that turns off all measuring if it is "0".
SWITCH = "FASTROUTE_TUNE"
# Logged when measuring begins.
MEASURING = "finding out while upscaling how this machine runs %s fastest; nothing is computed twice"

CACHE = JsonCache("tuning.json")

Shape = tuple[int, int]  # height and width of a patch


@dataclass(frozen=True)
class Setting:
    """One way to run a branch.

    Attributes:
        pixels: number of pixels of the image that pass through the branch together.
        channels_last: memory format of its input and weights.
        engine: engine that executes it, see :mod:`fastroute.engines`.
        parallel: whether passes run side by side, one on each thread of a CPU, if there are enough of them. Otherwise all
            threads share each pass.
    """

    pixels: int
    channels_last: bool = True
    parallel: bool = False
    engine: str = TORCH

    @property
    def memory_format(self) -> torch.memory_format:
        """`channels_last` as torch names it."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def batch(self, shape: Sequence[int]) -> int:
        """The number of patches of `shape` per pass. Height and width are its last two entries."""
        return max(1, self.pixels // (shape[-2] * shape[-1]))


def default_setting(device: torch.device, parallel: bool, engine: str = TORCH) -> Setting:
    """The setting that is used before anything has been measured."""
    parallel = parallel and (engine == TORCH or engine_of(engine).PARALLEL)
    return Setting(sizes_of(device.type == "cpu", parallel)[0], engine == TORCH, parallel, engine)


def sizes_of(on_cpu: bool, parallel: bool) -> tuple[int, ...]:
    """The numbers of pixels per pass that are compared. The first one is used before anything has been measured."""
    return (PARALLEL_PIXELS if parallel else PIXELS) if on_cpu else GPU_PIXELS


def enabled() -> bool:
    """Whether the environment allows measuring."""
    return os.environ.get(SWITCH, "1") != "0"


class SettingSearch:
    """The search for the fastest setting of one branch.

    Memory formats are compared first, then how many pixels pass together. A trial is part of the work of a call, whose results
    are kept: nothing is computed only to be measured. Trials on patches of one shape are compared only with each other; the
    winner is used for all shapes. A search continues from call to call and from process to process. It ends after
    `MOST_ROUNDS` trials of each candidate at the latest: if even these disagree, the machine was busy, and the result holds for
    this process only.

    Args:
        key: key of the entry in the cache.
        name: name of the branch, for the log.
        device: device on which it runs.
        threads: number of passes that may run side by side.
        engines: engines that may run it. The first one does so until more is known.

    Attributes:
        best: the fastest setting, once it is known.
        rate: seconds per pixel with that setting.
    """

    def __init__(self, key: str, name: str, device: torch.device, threads: int = 1, engines: Sequence[str] = (TORCH,)) -> None:
        self.device, self.engines = device, tuple(engines)
        self.key, self.name, self.on_cpu, self.threads = key, name, device.type == "cpu", threads
        self.best: Setting | None = None
        self.rate = math.inf
        self._trials: dict[Shape, dict[Setting, list[float]]] = {}
        self._largest: dict[Shape, int] = {}
        self._given: Counter[tuple[Shape, Setting]] = Counter()  # trials that have no time yet
        self._new = self._told = False
        self._lock = threading.Lock()
        self._restore(CACHE.read().get(key, {}))

    def trial(self, shape: Shape, largest: int) -> Setting | None:
        """The setting for the next trial on patches of `shape`, or None if no trial is needed now.

        Args:
            shape: height and width of the patches.
            largest: the largest number of these patches that may pass together.
        """
        with self._lock:
            # Trials that run side by side would disturb each other.
            if self.best is not None or (self.on_cpu and self._given):
                return None
            self._largest[shape] = largest
            found = self._next(shape, largest)
            if found is None:
                return None
            if not self._told:
                self._told = True
                logger.info(MEASURING, self.name)
            self._given[shape, found] += 1
            return found

    def patches(self, shape: Shape, largest: int) -> int:
        """The number of patches of `shape` in a trial: as many as in the largest pass, and enough to be timed."""
        pixels = max(max(sizes_of(self.on_cpu, parallel)) * self._beside(parallel) for parallel in self._ways)
        fewest = TRIAL_PIXELS["cpu" if self.on_cpu else "cuda"]
        return max(min(Setting(pixels).batch(shape), largest), -(-fewest // (shape[0] * shape[1])))

    def add(self, shape: Shape, setting: Setting, seconds: float | None) -> None:
        """Report the seconds per pixel of a trial that :meth:`trial` returned, or None if it failed."""
        with self._lock:
            self._given[shape, setting] -= 1
            self._given += Counter()  # without zeros
            if seconds is None or self.best is not None:
                return
            self._trials.setdefault(shape, {}).setdefault(setting, []).append(seconds)
            self._new = True
            # The last trial ends the search.
            self._next(shape, self._largest[shape])

    def remember(self) -> None:
        """Write new results to the cache, except those that were measured while the machine was busy with something else."""
        with self._lock:
            if not self._new:
                return
            self._new = False
            entry: dict[str, Any] = {"best": None, "seconds": None, "trials": []}
            if self.best is not None:
                entry.update(best=asdict(self.best), seconds=self.rate)
            else:
                entry["trials"] = [
                    {"shape": list(shape), "setting": asdict(setting), "seconds": times}
                    for shape, trials in self._trials.items()
                    for setting, times in trials.items()
                ]
        CACHE.remember(self.key, entry)

    @property
    def made(self) -> int:
        """The number of trials that have been timed since the search began; 0 again once it has ended."""
        with self._lock:
            return sum(len(times) for trials in self._trials.values() for times in trials.values())

    @property
    def _first(self) -> list[Setting]:
        """The settings that are compared first. Other engines than PyTorch have their own memory format and threads."""
        others = [name for name in self.engines if name != TORCH]
        found = [default_setting(self.device, self.threads > 1, name) for name in others]
        if TORCH in self.engines:
            found += [
                Setting(sizes_of(self.on_cpu, parallel)[0], last, parallel) for parallel in self._ways for last in (True, False)
            ]
        return found

    @property
    def _ways(self) -> tuple[bool, ...]:
        return (True, False) if self.threads > 1 else (False,)

    def _beside(self, parallel: bool) -> int:
        return self.threads if parallel else 1

    def _next(self, shape: Shape, largest: int) -> Setting | None:
        """The candidate that has the next trial, or None when the search is settled."""
        trials = self._trials.get(shape, {})
        candidates = self._first
        for stage in range(2):
            counted = {s: len(trials.get(s, ())) + self._given[shape, s] for s in candidates}
            waiting = any(self._given[shape, s] for s in candidates)
            steady = all(is_steady(trials.get(s, ())) for s in candidates)
            rounds = min(counted.values())
            if rounds < (ROUNDS if steady or waiting else MOST_ROUNDS):
                return min(candidates, key=counted.__getitem__)
            if waiting:
                return None
            fastest = min(min(trials[s]) for s in candidates)
            if stage:
                within = [s for s in candidates if min(trials[s]) <= EARNED * fastest]
                self._settle(min(within, key=lambda s: s.pixels), fastest, steady)
                return None
            winner = min(candidates, key=lambda s: min(trials[s]))
            # Candidates that memory limits to the same number of patches count as one.
            most = max(1, largest // self._beside(winner.parallel))
            pixels = sorted(sizes_of(self.on_cpu, winner.parallel))
            sizes = {min(replace(winner, pixels=p).batch(shape), most): p for p in pixels}
            sizes[min(winner.batch(shape), most)] = winner.pixels
            candidates = [replace(winner, pixels=p) for p in sizes.values()]
        return None

    def _settle(self, best: Setting, rate: float, steady: bool) -> None:
        self.best, self.rate = best, rate
        self._trials.clear()
        self._new = steady
        way = "passes side by side" if best.parallel else "one pass at a time"
        words = (self.name, best.engine, best.pixels, best.channels_last, way)
        logger.info("%s runs fastest by %s with %d pixels per pass, channels_last %s, %s", *words)
        if not steady:
            logger.info("not remembered: the machine was busy")

    def _restore(self, entry: dict[str, Any]) -> None:
        """Take over an entry of the cache, as far as this version wrote it."""
        best, rate = read_setting(entry.get("best")), entry.get("seconds")
        if best is not None and is_time(rate) and best.engine in self.engines:
            self.best, self.rate = best, float(rate)  # type: ignore[arg-type]
            return
        trials = entry.get("trials")
        for trial in trials if isinstance(trials, list) else []:
            if not isinstance(trial, dict):
                continue
            shape, setting, times = trial.get("shape"), read_setting(trial.get("setting")), trial.get("seconds")
            if setting is None or not isinstance(shape, list) or not isinstance(times, list):
                continue
            if len(shape) == 2 and all(type(n) is int and n > 0 for n in shape) and all(map(is_time, times)):
                self._trials.setdefault((shape[0], shape[1]), {})[setting] = times[:MOST_ROUNDS]


class Trial:
    """The time of some patches of `shape` in a branch, run with `setting`. On a GPU it is known once the device is done."""

    def __init__(self, search: SettingSearch, shape: Shape, setting: Setting, patches: int, device: torch.device) -> None:
        self.search, self.shape, self.setting, self.patches, self.device = search, shape, setting, patches, device
        self.begin = self.taken = 0.0
        self.events: list[torch.cuda.Event] = []

    @property
    def seconds(self) -> float:
        """The seconds that the trial took."""
        return self.events[0].elapsed_time(self.events[1]) / 1e3 if self.events else self.taken

    def __enter__(self) -> None:
        self._mark()

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self._mark()
        if kind is not None:
            self.search.add(self.shape, self.setting, None)

    def _mark(self) -> None:
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                self.events.append(torch.cuda.Event(enable_timing=True))
                self.events[-1].record(torch.cuda.current_stream(self.device))
        else:
            self.begin, self.taken = time.perf_counter(), time.perf_counter() - self.begin


def is_steady(times: Sequence[float]) -> bool:
    """Whether trials of one candidate agree."""
    return not times or median(times) <= STEADY * min(times)


def is_time(value: object) -> bool:
    """Whether `value` may be a number of seconds."""
    return isinstance(value, float) and 0 < value < math.inf


def read_setting(value: object) -> Setting | None:
    """The setting that an entry of the cache holds, or None if it does not hold one."""
    if not isinstance(value, dict) or set(value) != {field.name for field in fields(Setting)}:
        return None
    pixels, last, parallel, engine = value["pixels"], value["channels_last"], value["parallel"], value["engine"]
    whole = type(pixels) is int and pixels > 0 and type(last) is bool and type(parallel) is bool and engine in ENGINES
    return Setting(pixels, last, parallel, engine) if whole else None


# The searches of this process, by the file of their results and their key. Routers with the same branch share one.
_searches: dict[tuple[Path, str], SettingSearch] = {}
_races_lock = threading.Lock()


def search_of(
    branch: nn.Module, example: Tensor, threads: int = 1, engines: Sequence[str] = (TORCH,)
) -> SettingSearch:  # [1, C, p, p]
    """The search for the fastest setting of `branch` on patches like `example`, and on regions of several patches.

    Args:
        branch: the branch.
        example: a patch.
        threads: number of passes that may run side by side.
        engines: engines that may run it.
    """
    key = tuning_key(branch, example) + (f"-{threads}" if threads > 1 else "")
    if tuple(engines) != (TORCH,):
        key += "-" + "-".join(engines)
    with _races_lock:
        place = (CACHE.path, key)
        if place not in _searches:
            _searches[place] = SettingSearch(key, type(branch).__name__, example.device, threads, engines)
        return _searches[place]


def tuning_key(branch: nn.Module, example: Tensor) -> str:  # [1, C, p, p]
    """A key for everything that decides the speed of `branch` on such patches: device, threads, versions and structure."""
    if example.is_cuda:
        device = torch.cuda.get_device_name(example.device)
    else:
        device = f"{platform.machine()} {cpu_name()} {torch.get_num_threads()} threads"
    # Structure and shapes decide the speed, not the values of the weights.
    shapes = [(name, tuple(p.shape)) for name, p in branch.named_parameters()]
    facts: list[object] = [METHOD, device, torch.__version__, str(example.dtype), tuple(example.shape), str(branch), shapes]
    # If other engines are compared, the search is repeated.
    facts.append(GPU_PIXELS if example.is_cuda else [PIXELS, PARALLEL_PIXELS])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def cpu_name() -> str:
    """The name of the processor, or "" if the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
