"""Copies between host and device that go on while the device computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:  # [...]
    """Copy `x` to `device`. A copy to a GPU has a stream of its own, so that it does not wait for kernels."""
    if x.device == device or device.type != "cuda":
        return x.to(device)
    stream = _copy_stream(device)
    with torch.cuda.stream(stream):
        y = x.contiguous().pin_memory().to(device, non_blocking=True)
    current = torch.cuda.current_stream(device)
    current.wait_stream(stream)
    y.record_stream(current)
    return y


def to_host(x: Tensor) -> tuple[Tensor, Callable[[], None]]:  # [...]
    """Copy `x` to the CPU and return it with a function to call before it is read: a copy from a GPU runs asynchronously."""
    if x.device.type != "cuda":
        return x.cpu(), _nothing
    stream = _copy_stream(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        dense = x.contiguous()
        # An ordinary tensor, which a writer may change in place.
        with torch.inference_mode(False):
            host = torch.empty(dense.shape, dtype=x.dtype, pin_memory=True)
        host.copy_(dense, non_blocking=True)
        done = torch.cuda.Event()
        done.record(stream)
    x.record_stream(stream)
    return host, done.synchronize


def _nothing() -> None:
    pass


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
