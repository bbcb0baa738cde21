"""Timing rules shared by all benchmarks: alternating runs, medians and quartiles, everything recorded with its machine."""

from __future__ import annotations

import ctypes
import functools
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastroute
from fastroute import buffers, io
from fastroute.backends import EXTENSION, select
from fastroute.runtime.tuning import cpu_name

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# What a number may depend on, beside torch.
PACKAGES = ("triton", "numpy", "kornia", "monai", "tiler", "openvino", "onnxruntime")
# Quartiles of fewer runs say nothing; what takes longer than so many seconds has few.
MIN_ROUNDS, FEW_ROUNDS, LONG_SECONDS = 5, 3, 0.1
# Where a CPU says how large its last cache is, and what is taken for it elsewhere, GPUs included.
LAST_CACHE, USUAL_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size"), 128 << 20
# Sides of matrix products that stay in the caches of a CPU, or fill a GPU.
PRODUCTS = {"cpu": (256, 512, 768), "cuda": (4096, 8192)}

_chosen: list[torch.device] = []


def device() -> torch.device:
    """Where the benchmarks run: what `use_device` said, else the GPU if there is one."""
    return _chosen[-1] if _chosen else torch.device("cuda" if torch.cuda.is_available() else "cpu")


def use_device(name: str) -> None:
    """Run on this device from now on."""
    _chosen[:] = [torch.device(name)]


def synchronise() -> None:
    """Wait for all work given to the device; a CPU has done it when the call returns."""
    if device().type == "cuda":
        torch.cuda.synchronize(device())


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
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    limit: float = math.inf,
    slow: float = math.inf,
    kept: Collection[str] = (),
    before: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time all variants in turn, `rounds` times over, so that whatever slows the machine slows them alike.

    Args:
        variants: what to call, by name. The device is waited for before and after each call.
        rounds: runs per variant.
        warm_up: untimed runs of each before the first.
        limit: seconds for all runs. A variant that has used its share sits out once it has MIN_ROUNDS runs, or FEW_ROUNDS
            of more than LONG_SECONDS.
        slow: seconds of a run. A variant whose first one takes longer has no other.
        kept: names of those that have all their runs all the same.
        before: called before each run, untimed.
    """
    for _ in range(warm_up):
        for run in variants.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    share = limit / max(len(variants), 1)
    for _ in range(rounds):
        for name, run in variants.items():
            taken = seconds[name]
            if taken and taken[0] > slow and name not in kept:
                continue
            least = FEW_ROUNDS if taken and min(taken) > LONG_SECONDS else MIN_ROUNDS
            if len(taken) >= least and sum(taken) > share:
                continue
            if before is not None:
                before()
            synchronise()
            start = time.perf_counter()
            run()
            synchronise()
            taken.append(time.perf_counter() - start)
    return {name: summary(taken) for name, taken in seconds.items()}


def summary(seconds: list[float]) -> Timing:
    """Median and quartiles."""
    if len(seconds) < 2:
        return Timing(seconds[0], seconds[0], seconds[0], 1)
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, low, high, len(seconds))


@dataclass(frozen=True)
class First:
    """The first run of a variant: its result, seconds and bytes at its peak."""

    result: Any
    seconds: float
    peak: int | None


def first(run: Callable[[], Any]) -> First:
    """Run once, looking at time and memory."""
    results, seconds = [], []

    def once() -> None:
        begin = time.perf_counter()
        results.append(run())
        synchronise()
        seconds.append(time.perf_counter() - begin)

    peak = peak_memory(once)
    return First(results[0], seconds[0], peak)


def exactly(run: Callable[[], Any]) -> Any:
    """The result of a call whose float32 convolutions a GPU does not round to TF32, as it otherwise may.

    For comparisons: two forms of one network differ by that rounding. Times are those of torch's own settings.
    """
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        return run()


def exact_result(run: Callable[[], Any], begun: First) -> Any:
    """What :func:`exactly` gives; on a CPU it is the result of the first run."""
    return begun.result if device().type == "cpu" else exactly(run)


def peak_memory(run: Callable[[], object]) -> int | None:
    """Bytes that a call needs at its peak beyond what is held before, its result included; None where nothing tells.

    On a CPU these are pages of the process: the kernel's high-water mark is reset before the call, and memory that was freed
    but is kept for later is given back.
    """
    if device().type == "cuda":
        synchronise()
        torch.cuda.reset_peak_memory_stats(device())
        held = torch.cuda.memory_allocated(device())
        run()
        return torch.cuda.max_memory_allocated(device()) - held
    buffers.release()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        run()
        return None
    held = _resident("VmRSS")
    run()
    return max(_resident("VmHWM") - held, 0)


def _resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


@functools.cache
def _sweep_buffer(place: torch.device) -> torch.Tensor:
    size = USUAL_CACHE
    if place.type == "cpu" and LAST_CACHE.exists():
        size = int(LAST_CACHE.read_text().strip().removesuffix("K")) << 10
    return torch.zeros(2 * size // 4, device=place)


def sweep_caches() -> None:
    """Leave nothing of use in the caches: write twice as much as the last of them holds."""
    _sweep_buffer(device()).add_(1)


@functools.cache
def peak_flops(dtype: torch.dtype = torch.float32, convolutions: bool = False) -> float:
    """FLOPs per second of the best of some matrix products, measured once: the ceiling of what computes.

    Of `convolutions` it is that of products which a GPU rounds to TF32 as it does theirs.
    """
    place, matmul = device(), torch.backends.cuda.matmul
    was, matmul.allow_tf32 = matmul.allow_tf32, torch.backends.cudnn.allow_tf32 if convolutions else matmul.allow_tf32
    if place.type == "cpu" and dtype == torch.float16:
        # Many CPUs emulate it, far below the rate of the float32 that kernels compute in.
        dtype = torch.float32
    squares = {n: torch.randn(n, n, device=place).to(dtype) for n in PRODUCTS[place.type]}
    try:
        times = alternate({str(n): lambda n=n: squares[n] @ squares[n] for n in squares}, 9, warm_up=2)
    finally:
        matmul.allow_tf32 = was
    return max(2 * n**3 / times[str(n)].low for n in squares)


def copy_bandwidth(bytes_moved: int) -> Callable[[], object]:
    """A copy that reads and writes `bytes_moved` bytes in all, into mapped memory: the floor of a movement op."""
    source = torch.ones(bytes_moved // 8, dtype=torch.float32, device=device())
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def clone_bandwidth(bytes_moved: int) -> Callable[[], object]:
    """The same copy into a newly allocated tensor, as an operator that returns its result must do it."""
    source = torch.ones(bytes_moved // 8, dtype=torch.float32, device=device())
    return source.clone


@functools.cache
def commit() -> str:
    """The commit, marked dirty where sources differ from it; results that are being written do not count."""

    def git(*arguments: str) -> str:
        found = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT, check=False)
        return found.stdout.strip()

    written = [f":!{path}" for path in ("benchmarks/results", "README.md", "docs/benchmarks.md", "docs/pretrained.md")]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    return (git("describe", "--always") or "unknown") + ("-dirty" if changed else "")


def device_facts() -> dict[str, object]:
    """What a number was measured on and with."""
    place = device()
    threads = torch.get_num_threads()
    cpu = f"{cpu_name() or platform.machine()}, {threads} thread{'' if threads == 1 else 's'}"
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else cpu,
        **({"instructions": torch.backends.cpu.get_cpu_capability()} if place.type == "cpu" else {}),
        "fastroute": fastroute.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "packages": versions,
        "extension": {k: EXTENSION.info[k] for k in ("compiler", "cuda") if k in EXTENSION.info},
        "backends": sorted({select(op.stem, place) for op in (ROOT / "fastroute" / "ops").glob("[a-z]*.py")}),
        **({"cudnn_tf32": torch.backends.cudnn.allow_tf32} if place.type == "cuda" else {}),
        "command": " ".join(["python", "-m", "pytest", *sys.argv[1:]]),
    }


def device_folder(results: Path | None = None) -> Path:
    """Where the results of this device are kept."""
    return (results or RESULTS) / re.sub(r"[^a-z0-9]+", "-", str(device_facts()["device"]).lower()).strip("-")


def save(name: str, rows: list[dict], notes: str, results: Path | None = None, command: str | None = None) -> Path:
    """Write `rows` to <results>/<device>/<name>.json and return the path; `command` is that which measured, if not pytest."""
    facts, folder = device_facts(), device_folder(results)
    facts |= {} if command is None else {"command": command}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"facts": facts, "notes": notes, "rows": rows}, indent=1, default=asdict) + "\n"
    io.write_atomically(folder / f"{name}.json", lambda file: file.write(text.encode()))
    return folder / f"{name}.json"
