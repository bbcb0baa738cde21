"""Tests of where tensors lie."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys

import pytest
import torch

from fastroute import buffers


@pytest.mark.slow
def test_memory_that_was_let_go_is_used_again(monkeypatch):
    monkeypatch.setattr(buffers, "BUFFER_FROM", 1)
    buffers.release()
    cpu = torch.device("cpu")
    first = buffers.empty((3, 1000), torch.float32, cpu)
    place, view = first.data_ptr(), first[1]
    second = buffers.empty((3, 1000), torch.float32, cpu)
    assert second.data_ptr() != place
    del first
    gc.collect()
    # A view holds the memory.
    assert buffers.empty((3, 1000), torch.float32, cpu).data_ptr() != place
    buffers.release()
    view.fill_(3)
    del view
    gc.collect()
    assert buffers.empty((2, 1400), torch.float32, cpu).data_ptr() == place
    buffers.release()


@pytest.mark.slow
def test_at_most_a_few_buffers_are_kept(monkeypatch):
    monkeypatch.setattr(buffers, "BUFFER_FROM", 1)
    buffers.release()
    cpu = torch.device("cpu")
    held = [buffers.empty((100,), torch.float32, cpu) for _ in range(buffers.KEEP_BUFFERS + 3)]
    held.clear()
    gc.collect()
    assert len(buffers._spare) == buffers.KEEP_BUFFERS
    monkeypatch.setattr(buffers, "KEEP_BYTES", 5 << 20)
    held.append(buffers.empty((100,), torch.float32, cpu))
    held.clear()
    gc.collect()
    assert sum(map(len, buffers._spare)) <= buffers.KEEP_BYTES
    buffers.release()


# What a training step does: it asks for more than is given back at once, lets go of all of it, and again.
STEPS = """
import resource, sys, torch
from fastroute import buffers
kept = len(sys.argv) > 1 and buffers.keep_freed()
def step():
    held = [torch.full((6 << 20,), 1.0) for _ in range(6)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library decides for itself")
@pytest.mark.slow
def test_freed_memory_is_kept_for_training():
    """Pages that the system maps in the later steps; else it depends on where other things happen to lie."""
    given_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}

    def pages(*argument: str) -> list[int]:
        command = [sys.executable, "-c", STEPS, *argument]
        found = subprocess.run(command, env=given_back, capture_output=True, text=True, check=True)
        return [int(word) for word in found.stdout.split()]

    kept, anew = pages("keep")
    assert kept == 1
    assert anew * 20 < pages()[1]
