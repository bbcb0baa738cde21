"""Micro-batch size and memory format of each branch, measured once per machine and remembered."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from fastroute.routing.json_cache import JsonCache

logger = logging.getLogger("fastroute")

BATCHES = (8, 16, 32, 64)
# A GPU is busy only with many patches.
GPU_BATCHES = (32, 64, 128, 256, 512, 1024)
# Formats are compared at this size, or at what may pass together if that is less.
FORMAT_BATCH, GPU_FORMAT_BATCH = 16, 256
# A race has this many rounds; once its seconds are used, LEAST_ROUNDS are enough.
REPEATS, LEAST_ROUNDS, SECONDS = 6, 3, 0.4
# A turn lasts at least as long, whatever the batch: a short pass would slip between disturbances that a long one meets.
TURN_SECONDS = 0.005
# Passes that take longer have nothing left to gain from more patches, and would take minutes to compare.
PASS_SECONDS = 1.0
# A larger batch must earn its memory: what is slower than the fastest by less than this is as good.
EARNED = 1.02
# Where the median turn of a candidate exceeds its fastest by more, something else was running.
STEADY = 1.25
# What was measured in another way has another key, and is measured again.
METHOD = 2

CACHE = JsonCache("tuning.json")

# Measurements of this process that no file holds: its routers all run alike.
_unwritten: dict[str, Tuning] = {}


@dataclass(frozen=True)
class Tuning:
    """How a branch runs fastest on one device.

    Attributes:
        batch: patches per pass.
        channels_last: memory format of its input and weights.
        milliseconds: measured time per patch.
    """

    batch: int
    channels_last: bool
    milliseconds: float

    @property
    def memory_format(self) -> torch.memory_format:
        """`channels_last` as torch names it."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


def tune(branch: nn.Module, example: Tensor, largest: int | None = None) -> Tuning:  # [1, C, p, p]
    """The fastest of the memory formats and batch sizes, by measurement; from the cache when it was measured before.

    What is measured while the machine is busy with something else holds for this process only.

    Args:
        branch: in evaluation mode, on the device of `example`.
        example: one patch, of the dtype in which the branch runs.
        largest: patches that may pass together at most; larger batches take too much memory. Default: the largest tried.
    """
    tried, first = (GPU_BATCHES, GPU_FORMAT_BATCH) if example.is_cuda else (BATCHES, FORMAT_BATCH)
    largest = largest or tried[-1]
    key = tuning_key(branch, example)
    known = _unwritten.get(key) or _read().get(key)
    if known is not None:
        return replace(known, batch=min(known.batch, largest))
    first = min(first, largest)
    with torch.inference_mode():
        formats, steady = _race(branch, example, [(first, True), (first, False)])
        # The better format at one size is the better one at all: batch sizes are tried for it alone.
        found = min(formats, key=_milliseconds)
        longest = max(first, 1e3 * PASS_SECONDS / max(found.milliseconds, 1e-9))
        batches = sorted({min(batch, largest) for batch in tried})
        sizes, still = _race(branch, example, [(batch, found.channels_last) for batch in batches if batch <= longest])
    fastest = min(map(_milliseconds, sizes))
    best = next(tuning for tuning in sizes if tuning.milliseconds <= EARNED * fastest)
    logger.info("tuned %s: batch %d, channels_last %s", type(branch).__name__, best.batch, best.channels_last)
    if not (steady and still):
        logger.info("tuning not remembered: the machine was busy")
    if not (steady and still and _remember(key, best)):
        _unwritten[key] = best
    return best


def _milliseconds(tuning: Tuning) -> float:
    return tuning.milliseconds


def _race(branch: nn.Module, example: Tensor, candidates: list[tuple[int, bool]]) -> tuple[list[Tuning], bool]:
    """Batches and formats in turn, round after round, so that what slows the machine slows all of them.

    Returns:
        The time of each, and whether the machine was quiet enough to believe them later.
    """
    times: list[list[float]] = [[] for _ in candidates]
    start = time.perf_counter()
    for done in range(REPEATS):
        if done >= LEAST_ROUNDS and time.perf_counter() - start > SECONDS:
            break
        for (batch, channels_last), taken in zip(candidates, times, strict=True):
            taken.append(_turn(branch, example, batch, channels_last))
    # Whatever else the machine does only adds time: the fastest turn is the true one, and first turns do no harm.
    found = [Tuning(*candidate, 1e3 * min(taken)) for candidate, taken in zip(candidates, times, strict=True)]
    return found, all(median(taken) <= STEADY * min(taken) for taken in times)


def _turn(branch: nn.Module, example: Tensor, batch: int, channels_last: bool) -> float:
    """Seconds per patch."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    branch.to(memory_format=memory_format)  # type: ignore[call-overload]
    patches = example.expand(batch, -1, -1, -1).contiguous(memory_format=memory_format)
    _wait(example.device)
    passes, start = 0, time.perf_counter()
    while True:
        branch(patches)
        _wait(example.device)
        passes += 1
        elapsed = time.perf_counter() - start
        if elapsed >= TURN_SECONDS:
            return elapsed / (passes * batch)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tuning_key(branch: nn.Module, example: Tensor) -> str:  # [1, C, p, p]
    """A name for what decides the speed of `branch` on patches like `example`: device, threads, versions and structure."""
    if example.is_cuda:
        device = torch.cuda.get_device_name(example.device)
    else:
        device = f"{platform.machine()} {cpu_name()} {torch.get_num_threads()} threads"
    # Structure and shapes decide the speed, not the values of the weights.
    shapes = [(name, tuple(p.shape)) for name, p in branch.named_parameters()]
    facts: list[object] = [METHOD, device, torch.__version__, str(example.dtype), tuple(example.shape), str(branch), shapes]
    if example.is_cuda:
        facts.append(GPU_BATCHES)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def cpu_name() -> str:
    """The processor as the system names it; empty where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _read() -> dict[str, Tuning]:
    return {key: Tuning(**entry) for key, entry in CACHE.read().items() if _is_tuning(entry)}


def _is_tuning(entry: dict[str, object]) -> bool:
    """Whether an entry of the file is one that this version wrote."""
    if set(entry) != set(Tuning.__dataclass_fields__):
        return False
    batch, milliseconds = entry["batch"], entry["milliseconds"]
    whole = type(batch) is int and batch >= 1 and type(entry["channels_last"]) is bool
    timed = isinstance(milliseconds, (int, float)) and not isinstance(milliseconds, bool)
    return whole and timed and 0 < milliseconds < math.inf  # type: ignore[operator]


def _remember(key: str, tuning: Tuning) -> bool:
    """Whether the file holds it now."""
    return CACHE.remember(key, asdict(tuning))
