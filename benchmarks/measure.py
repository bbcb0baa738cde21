"""Timing rules shared by all benchmarks: alternating runs, medians and quartiles, everything recorded with its machine."""

from __future__ import annotations

import json
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import fastroute
from fastroute import io
from fastroute.backends import EXTENSION
from fastroute.routing.tuning import cpu_name

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Wall time in seconds: median and quartiles of `runs` runs."""

    median: float
    low: float
    high: float
    runs: int

    def __str__(self) -> str:
        return f"{1e3 * self.median:9.2f} ms  [{1e3 * self.low:.2f}, {1e3 * self.high:.2f}]"


def alternate(
    variants: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1, limit: float = math.inf
) -> dict[str, Timing]:
    """Time all variants in turn, `rounds` times over, so that whatever slows the machine slows them alike.

    Args:
        variants: what to call, by name. Each call must have finished its work when it returns.
        rounds: runs per variant.
        warm_up: untimed runs of each before the first.
        limit: seconds after which half of the rounds are enough.
    """
    for _ in range(warm_up):
        for run in variants.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    begun = time.perf_counter()
    for done in range(rounds):
        if done >= max(1, rounds // 2) and time.perf_counter() - begun > limit:
            break
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: summary(taken) for name, taken in seconds.items()}


def summary(seconds: list[float]) -> Timing:
    """Median and quartiles."""
    if len(seconds) < 2:
        return Timing(seconds[0], seconds[0], seconds[0], 1)
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, low, high, len(seconds))


def device_facts() -> dict[str, object]:
    """What a number was measured on and with."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or f"{cpu_name() or platform.machine()}, {torch.get_num_threads()} threads",
        "fastroute": fastroute.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "extension": {k: EXTENSION.info[k] for k in ("compiler", "cuda") if k in EXTENSION.info},
        "command": " ".join(["python", "-m", "pytest", *sys.argv[1:]]),
    }


def device_folder() -> Path:
    """Where the results of this device are kept."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", str(device_facts()["device"]).lower()).strip("-")


def save(name: str, rows: list[dict], notes: str) -> Path:
    """Write `rows` to benchmarks/results/<device>/<name>.json and return the path."""
    facts, folder = device_facts(), device_folder()
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"facts": facts, "notes": notes, "rows": rows}, indent=1, default=asdict) + "\n"
    io.write_atomically(folder / f"{name}.json", lambda file: file.write(text.encode()))
    return folder / f"{name}.json"


def copy_bandwidth(bytes_moved: int) -> Callable[[], object]:
    """A copy that reads and writes `bytes_moved` bytes in all, into mapped memory: the floor of a movement op."""
    source = torch.ones(bytes_moved // 8, dtype=torch.float32)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def clone_bandwidth(bytes_moved: int) -> Callable[[], object]:
    """The same copy into a newly allocated tensor, as an operator that returns its result must do it."""
    source = torch.ones(bytes_moved // 8, dtype=torch.float32)
    return source.clone
