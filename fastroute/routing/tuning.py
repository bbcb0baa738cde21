"""Micro-batch size and memory format of each branch, measured once per machine and remembered."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fastroute import io

logger = logging.getLogger("fastroute")

BATCHES = (8, 16, 32, 64)
REPEATS = 3


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


def cache_path() -> Path:
    """Where measurements are remembered: FASTROUTE_CACHE, or the user's cache folder."""
    folder = os.environ.get("FASTROUTE_CACHE")
    if folder is None:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "fastroute")
    return Path(folder) / "tuning.json"


def tune(branch: nn.Module, example: Tensor, largest: int = BATCHES[-1]) -> Tuning:  # [1, C, p, p]
    """The fastest of the memory formats and batch sizes, by measurement; from the cache when it was measured before.

    Args:
        branch: in evaluation mode, on the device of `example`.
        example: one patch, of the dtype in which the branch runs.
        largest: patches that may pass together at most; larger batches take too much memory.
    """
    key = tuning_key(branch, example)
    remembered = _read().get(key)
    if remembered is not None:
        return replace(remembered, batch=min(remembered.batch, largest))
    best: Tuning | None = None
    with torch.inference_mode():
        for channels_last in (True, False):
            # The better format at one size is the better one at all: batch sizes are tried for it alone.
            tuning = _measure(branch, example, min(16, largest), channels_last)
            best = tuning if best is None or tuning.milliseconds < best.milliseconds else best
        assert best is not None
        for batch in sorted({min(batch, largest) for batch in BATCHES}):
            tuning = _measure(branch, example, batch, best.channels_last)
            # A larger batch must earn its memory; where one does not, a still larger one is not tried.
            better = tuning.milliseconds < 0.98 * best.milliseconds
            if not better and batch > best.batch:
                break
            best = tuning if better else best
    logger.info("tuned %s: batch %d, channels_last %s", type(branch).__name__, best.batch, best.channels_last)
    _remember(key, best)
    return best


def _measure(branch: nn.Module, example: Tensor, batch: int, channels_last: bool) -> Tuning:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    branch.to(memory_format=memory_format)  # type: ignore[call-overload]
    patches = example.expand(batch, -1, -1, -1).contiguous(memory_format=memory_format)
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        branch(patches)
        if example.is_cuda:
            torch.cuda.synchronize(example.device)
        times.append(time.perf_counter() - start)
    # Whatever else the machine does only adds time.
    return Tuning(batch, channels_last, 1e3 * min(times[1:]) / batch)


def tuning_key(branch: nn.Module, example: Tensor) -> str:  # [1, C, p, p]
    """A name for what decides the speed of `branch` on patches like `example`: device, threads, versions and structure."""
    if example.is_cuda:
        device = torch.cuda.get_device_name(example.device)
    else:
        device = f"{platform.machine()} {cpu_name()} {torch.get_num_threads()} threads"
    # Structure and shapes decide the speed, not the values of the weights.
    shapes = [(name, tuple(p.shape)) for name, p in branch.named_parameters()]
    facts = [device, torch.__version__, str(example.dtype), tuple(example.shape), str(branch), shapes]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def cpu_name() -> str:
    """The processor as the system names it; empty where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _read() -> dict[str, Tuning]:
    try:
        table = json.loads(cache_path().read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(table, dict):
        return {}
    return {key: Tuning(**entry) for key, entry in table.items() if _is_tuning(entry)}


def _is_tuning(entry: object) -> bool:
    """Whether an entry of the file is one that this version wrote."""
    if not isinstance(entry, dict) or set(entry) != set(Tuning.__dataclass_fields__):
        return False
    whole = type(entry["batch"]) is int and entry["batch"] >= 1
    return whole and type(entry["channels_last"]) is bool and isinstance(entry["milliseconds"], (int, float))


def _remember(key: str, tuning: Tuning) -> None:
    path = cache_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({k: asdict(v) for k, v in {**_read(), key: tuning}.items()}, indent=1)
        io.write_atomically(path, lambda file: file.write(text.encode()))
    except OSError as error:
        # A read-only home costs a second of measuring next time, nothing else.
        logger.info("tuning not remembered in %s: %s", path, error)
