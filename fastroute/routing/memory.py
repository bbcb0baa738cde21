"""Large buffers on huge pages."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

# Below this, glibc's largest mmap threshold, the allocator reuses memory that is mapped already.
HUGE_PAGES_FROM = 32 << 20


def empty(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor; a large one on a CPU asks the kernel for huge pages.

    Mapping 100 MB in 4 KiB pages takes several times as long as filling it.
    """
    count = math.prod(size)
    bytes_needed = count * dtype.itemsize
    if device.type != "cpu" or bytes_needed < HUGE_PAGES_FROM or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=dtype, device=device)
    buffer = mmap.mmap(-1, bytes_needed, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(buffer, dtype=dtype, count=count).view(*size)
