"""Large buffers on huge pages, which are reused instead of being mapped again."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import re
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

# Below this size the allocator of the C library itself keeps memory mapped.
BUFFER_FROM = 4 << 20
HUGE_PAGE = 2 << 20

# Mapping 100 MB takes several times as long as filling it, so the last freed buffers are kept, within these limits.
KEEP_BUFFERS = 4
KEEP_BYTES = 512 << 20
_spare: list[mmap.mmap] = []
_lock = threading.Lock()


def empty(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor.

    A large one on a CPU uses huge pages if the system has them, and the memory of an earlier one of about its size that nobody
    refers to any more. So a pipeline that never holds more than two results maps memory only twice.
    """
    count = math.prod(size)
    needed = count * dtype.itemsize
    if device.type != "cpu" or needed < BUFFER_FROM or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=dtype, device=device)
    buffer = _reuse(needed) or _map(needed)
    view = (ctypes.c_char * needed).from_buffer(buffer)
    # The tensor holds the view. When both are gone, the memory is free again.
    weakref.finalize(view, _keep, buffer).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=count).view(*size)


def release() -> None:
    """Return the memory that is kept for the next results to the system."""
    with _lock:
        _spare.clear()


def give_back() -> None:
    """Give the system what is kept here and what the C library's heap has free, so that work within a limit begins without.

    It takes milliseconds: pages that are free in the middle of the heap are given back too.
    """
    release()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


# mallopt's parameters for the size from which a block is mapped separately, and for returning the end of the heap.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
HEAP_UP_TO, TRIM_FROM = 32 << 20, 2**31 - 1  # the maximum that glibc accepts


def keep_freed() -> bool:
    """Let the C library keep freed memory for the next tensors of this process. Returns whether it can.

    This is for training on a CPU: each step frees hundreds of megabytes and allocates them again, and getting them from the
    system again, page by page, takes as long as half the step. The setting lasts until the process ends.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and mallopt(M_TRIM_THRESHOLD, TRIM_FROM) == mallopt(M_MMAP_THRESHOLD, HEAP_UP_TO) == 1


def _map(needed: int) -> mmap.mmap:
    length = -(-needed // HUGE_PAGE) * HUGE_PAGE
    try:
        buffer = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"cannot allocate {needed} bytes: {error.strerror}") from error
    buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def _reuse(needed: int) -> mmap.mmap | None:
    """A kept buffer of about this size, preferably the latest."""
    with _lock:
        for place in reversed(range(len(_spare))):
            if needed <= len(_spare[place]) <= needed + needed // 4 + HUGE_PAGE:
                return _spare.pop(place)
    return None


def _keep(buffer: mmap.mmap) -> None:
    with _lock:
        _spare.append(buffer)
        while len(_spare) > KEEP_BUFFERS or sum(map(len, _spare)) > KEEP_BYTES:
            del _spare[0]


def available(device: torch.device, enough: int = sys.maxsize) -> int:
    """The bytes that `device` could still provide, as far as the system tells, or a smaller number of at least `enough`."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        # Not counting what caches of files would release.
        unused = os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE
        if limit == resource.RLIM_INFINITY and unused >= enough:
            return unused
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    except (ImportError, OSError, StopIteration, ValueError):
        return sys.maxsize
    return free if limit == resource.RLIM_INFINITY else max(0, min(free, limit - used))


# What oneDNN and Python say where they get no memory, and in other cases: only with so little left it is the first.
UNCLEAR, SCARCE = ("could not create a primitive", "can't start new thread"), 1 << 30
# A message that names the remedy already.
ADVISED = re.compile(r"out of memory.*; ", re.DOTALL)


def is_exhausted(error: BaseException) -> bool:
    """Whether `error` means that memory ran out. torch's CPU allocator has no exception class for this."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return True
    unclear = isinstance(error, SystemError) or any(words in str(error) for words in UNCLEAR)
    return unclear and available(torch.device("cpu"), enough=SCARCE) < SCARCE


@contextmanager
def explained(op: str, remedy: str) -> Iterator[None]:
    """Memory that runs out within the block, or in a function so decorated, is an error that says what to do.

    Args:
        op: what the user called.
        remedy: what to do, unless the error names something better already.

    Raises:
        MemoryError, torch.OutOfMemoryError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError, SystemError) as error:
        if not is_exhausted(error) or (ADVISED.search(str(error)) and isinstance(error, (MemoryError, torch.OutOfMemoryError))):
            raise
        kind = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else MemoryError
        raise kind(f"{op}: out of memory; {remedy}") from error
