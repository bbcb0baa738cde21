"""How much memory an upscale takes beside its input and output, and how high bands may be within a limit."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastroute import buffers
from fastroute.profiling import observed
from fastroute.runtime.devices import on_device

# Bytes that a band that is written may take at most. Higher bands gain nothing.
BAND_BYTES = 32 << 20
# In bytes, or None for no limit. By default, streamed runs have a limit that suits the device.
Limit = int | None | Literal["auto"]
AUTO: Literal["auto"] = "auto"
DEFAULT_LIMIT = {"cpu": 512 << 20, "cuda": 8 << 30}
# Bytes that a batch of patches may take in a branch. Larger batches gain nothing on a CPU; a GPU needs more work at a time.
ACTIVATIONS = {"cpu": 256 << 20, "cuda": 2 << 30}
# Libraries rearrange tensors for their kernels, so a pass takes up to this many times the bytes of its live tensors.
REARRANGED = 2


class Preferred(int):
    """A limit in bytes that nobody asked for: where nothing fits into it, the least that is possible is taken."""


@dataclass(frozen=True)
class WorkingSet:
    """A model of the memory that is held beside input and output.

    Attributes:
        fixed: bytes that do not depend on the height of the bands in which rows are read and written.
        row: bytes per output row of such a band; 0 where input and output are read and written in place.
        block: output rows of the lowest possible band.
        height: number of output rows.
    """

    fixed: int
    row: int = 0
    block: int = 1
    height: int = 1

    def bytes(self, rows: int) -> int:
        """The bytes held with bands of `rows` output rows."""
        return self.fixed + self.row * max(rows, self.block)

    def rows(self, limit: int | None, op: str = "upscale") -> int:
        """The number of output rows of a band within `limit` bytes.

        Raises:
            ValueError: even the lowest band does not fit. The message says which limit would.
        """
        least = self.bytes(self.block)
        if isinstance(limit, Preferred) and limit < least:
            return self.block
        if limit is not None and limit < least:
            raise ValueError(f"{op}: memory_limit must be at least {least} bytes ({least / 1e6:.0f} MB) here; got {limit}")
        if self.row == 0:
            return self.block
        rows = max(min(BAND_BYTES // self.row, self.height), self.block)
        return rows if limit is None else min(rows, (limit - self.fixed) // self.row)


def limit_on(device: torch.device, limit: Limit) -> int | None:
    """`limit` in bytes, or None for no limit."""
    # `check_limit` judges anything else.
    return Preferred(on_device(DEFAULT_LIMIT, device)) if isinstance(limit, str) and limit == AUTO else limit


def spare(device: torch.device) -> int:
    """The bytes that a call without a limit may take to work on more at a time: a quarter of a GPU's memory at most."""
    most = on_device(DEFAULT_LIMIT, device)
    return min(most, torch.cuda.get_device_properties(device).total_memory // 4) if device.type == "cuda" else most


def check_limit(op: str, limit: int | None) -> None:
    """Check that `limit` is a positive number of bytes.

    Raises:
        TypeError: `limit` is not a whole number.
        ValueError: `limit` is not positive.
    """
    if limit is None:
        return
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise TypeError(f"{op}: memory_limit must be a whole number of bytes; got {limit!r}")
    if limit < 1:
        raise ValueError(f"{op}: memory_limit must be positive; got {limit}")


@contextmanager
def advised(op: str, device: torch.device, used: int, streamed: Callable[[], WorkingSet], in_place: bool) -> Iterator[None]:
    """Add the limit that would fit to the message when the block runs out of memory.

    Args:
        op: the function that the user called.
        device: the device of the run.
        used: bytes of the working set of the run.
        streamed: the working set of a streamed run.
        in_place: whether the run holds all of its input and output, which a streamed one does not.
    """
    # The free memory of a GPU is read when the message is written, by when the run has taken some of it.
    on_gpu = device.type == "cuda"
    held, free = (torch.cuda.memory_allocated(device), 0) if on_gpu else (0, buffers.available(device, enough=2 * used))
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not buffers.is_exhausted(error):
            raise
        if on_gpu:
            free = buffers.available(device) + torch.cuda.memory_allocated(device) - held
        least = streamed().bytes(1)
        fits = max(least, min(used, free) * 4 // 5)
        if least > free:
            advice = f"the least that a streamed run needs is {least / 1e6:.0f} MB, and {free / 1e6:.0f} MB were free"
        elif in_place:
            advice = f"`stream` and `upscale_file`, which hold neither, fit with memory_limit={fits}"
        else:
            advice = f"memory_limit={fits} would fit"
        beside = " beside input and output" if in_place else ""
        message = f"{op}: out of memory with a working set of {used / 1e6:.0f} MB{beside}; {advice}"
        raise (torch.OutOfMemoryError if device.type == "cuda" else MemoryError)(message) from error


def pass_bytes(module: nn.Module, size: Sequence[int], dtype: torch.dtype) -> int:
    """The largest number of bytes alive at a time while `module` processes an input of `size`, found without running it."""
    return observed(module, size, dtype, LiveBytes).most


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators return for as long as anybody holds them.

    Attributes:
        now, most: bytes alive now, and the maximum so far.
        marked: the largest number of bytes alive at a call of `mark`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.holders: dict[int, int] = {}
        self.now = self.most = self.marked = 0

    def mark(self) -> None:
        """Record the number of bytes alive now."""
        self.marked = max(self.marked, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = result if isinstance(result, (tuple, list)) else [result]
        for x in given:
            if isinstance(x, Tensor) and not any(x is argument for argument in args):
                self._add(x)
        return result

    def _add(self, x: Tensor) -> None:  # [...]
        """Count `x` until it is freed."""
        if x.layout == torch.strided:
            storage = x.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
        else:
            # Tensors that a library has packed, as frozen TorchScript returns them, show no storage.
            key, size = id(x), x.numel() * x.element_size()
        if key not in self.holders:
            self.holders[key] = 0
            self.now += size
            self.most = max(self.most, self.now)
        self.holders[key] += 1
        weakref.finalize(x, self._gone, key, size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        if self.holders[key] == 0:
            del self.holders[key]
            self.now -= size
