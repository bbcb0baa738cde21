"""Threads of a CPU: passes that run side by side, each on one thread, and threads that do not spin on a busy machine.

Torch shares every layer among its threads, which wait for each other, spinning, at the end of each layer. If another process
wants the processor too, a thread is late at every layer, and all others wait for it. Passes side by side wait only once, at
their end.
"""

from __future__ import annotations

import contextvars
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastroute.backends import requested, use_backend

T = TypeVar("T")
R = TypeVar("R")
_Region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def openmp() -> Any:
    """The OpenMP library that torch has loaded, or None if it cannot be asked to run functions."""
    names = ("libgomp", "libomp", "libiomp5")
    found = list(Path(torch.__file__).parent.glob("lib/*"))
    with suppress(OSError):
        found = [Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line]
    for path in dict.fromkeys(path for path in found if path.name.startswith(names)):
        try:
            library = ctypes.CDLL(str(path))
            library.GOMP_parallel.restype = None
            if torch.get_num_threads() == library.omp_get_max_threads() and library.omp_in_parallel() in (0, 1):
                return library
        except (OSError, AttributeError):
            continue
    return None


def workers() -> int:
    """The number of threads that may run side by side now: 1 while torch is observed or traced, which covers one thread."""
    observed = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    if _forked or observed or torch.compiler.is_compiling() or torch.get_num_threads() < 2 or openmp() is None:
        return 1
    return 1 if openmp().omp_in_parallel() else torch.get_num_threads()


def side_by_side(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """``[function(item) for item in items]``, where each thread of torch takes the next item and runs it alone.

    The items run in a parallel region of torch's own threads. Gradient and inference mode, and context variables such as the
    backend, are those of the caller. The first exception is raised once all threads have finished their current item.
    """
    threads = min(workers(), len(items))
    if threads < 2:
        return [function(item) for item in items]
    results: list[Any] = [None] * len(items)
    failed: list[tuple[int, BaseException]] = []
    queue = iter(range(len(items)))
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    backend = requested()
    contexts = [contextvars.copy_context() for _ in range(threads)]

    def take() -> None:
        asked = use_backend(backend) if backend is not None else nullcontext()
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients), asked:
            # Only one thread at a time may advance an iterator.
            for n in queue:
                if failed:
                    return
                try:
                    results[n] = function(items[n])
                except BaseException as error:
                    failed.append((n, error))

    def work(_: object) -> None:
        try:
            contexts.pop().run(take)
        except BaseException as error:
            failed.append((len(items), error))

    openmp().GOMP_parallel(_Region(work), None, ctypes.c_uint(threads), ctypes.c_uint(0))
    if failed:
        raise min(failed, key=lambda pair: pair[0])[1]
    return results


@contextmanager
def patiently(device: torch.device) -> Iterator[None]:
    """Within the block, on a busy machine, threads that wait soon give up the processor instead of spinning.

    GNU's OpenMP does so by itself when it manages more threads than there are processors. A few threads that only sleep are
    therefore enough: they exist from the first call on a busy machine until the first one on a quiet machine. If
    OMP_WAIT_POLICY or GOMP_SPINCOUNT is set, nothing is changed.
    """
    if device.type == "cpu" and sys.platform == "linux" and "libgomp" in str(getattr(openmp(), "_name", "")):
        decided = "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ
        _sleepers.wanted(not decided and not _forked and torch.get_num_threads() > 1 and is_busy())
    yield


def is_busy() -> bool:
    """Whether more threads than processors would want to run, counting ours."""
    try:
        running = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0])
    except (OSError, ValueError, IndexError):
        return False
    return running - 1 + torch.get_num_threads() > processors()


def processors() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Sleepers:
    """A thread that holds idle threads of OpenMP."""

    def __init__(self) -> None:
        self._lock, self._end = threading.Lock(), None

    _end: threading.Event | None

    def wanted(self, wanted: bool) -> None:
        """Start the idle threads or end them."""
        with self._lock:
            if wanted == (self._end is not None):
                return
            if self._end is not None:
                self._end.set()
                self._end = None
                return
            # Torch's own threads are counted too.
            number = max(2, processors() - torch.get_num_threads() + 2)
            there, end = threading.Event(), threading.Event()

            def hold() -> None:
                openmp().GOMP_parallel(_Region(lambda _: None), None, ctypes.c_uint(number), ctypes.c_uint(0))
                there.set()
                end.wait()

            threading.Thread(target=hold, name="fastroute-sleepers", daemon=True).start()
            there.wait()
            self._end = end


_sleepers = _Sleepers()
_forked = False


def _in_child() -> None:
    # Threads of OpenMP do not survive a fork, and a process that asks for them afterwards waits forever.
    global _forked, _sleepers
    _forked, _sleepers = True, _Sleepers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
