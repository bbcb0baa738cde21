"""Operators run on each instruction set of this processor, which FASTROUTE_ISA narrows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import fastroute
from fastroute.backends import unsupported_reasons

ISAS = ("baseline", "avx2", "avx512", "widest")
# What runs in a process of its own: neither tests nor the package, which would take seconds to import.
PROGRAM = """
import sys, torch
torch.ops.load_library(sys.argv[1])
packet, overload = sys.argv[2].split(".")
operator = getattr(getattr(torch.ops.fastroute, packet), overload)
results = []
for args, out in torch.load(sys.argv[3], weights_only=True):
    result = operator(*args, **out)
    results.append(out.get("out", result))
torch.save(results, sys.argv[4])
"""


def only_the_cpu_kernels(op: str) -> pytest.MarkDecorator:
    """Skip where `op` has no kernel for instruction sets to differ in."""
    reason = "; ".join(unsupported_reasons(op, "cpu", torch.device("cpu")))
    return pytest.mark.skipif(bool(reason) or "FASTROUTE_SHIM" in os.environ, reason=reason or "other kernels run")


def run_on_each(operator: str, calls: Sequence[tuple[tuple, dict]], folder: Path) -> dict[str, list[Any]]:
    """Results of `operator`, named with its overload, for each (arguments, tensors to write), by instruction set: what it
    returns, or `out` where it has one.

    "widest" names none: what the processor has, products of bfloat16 too.
    """
    torch.save(list(calls), folder / "calls.pt")
    found = {}
    for isa in ISAS:
        environment = {name: value for name, value in os.environ.items() if name != "FASTROUTE_ISA"}
        environment |= {} if isa == "widest" else {"FASTROUTE_ISA": isa}
        library = Path(fastroute.__file__).parent / "_ops.so"
        files = [str(folder / "calls.pt"), str(folder / f"{isa}.pt")]
        command = [sys.executable, "-c", PROGRAM, str(library), operator, *files]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 0, result.stderr[-4000:]
        found[isa] = torch.load(folder / f"{isa}.pt", weights_only=True)
    return found


def has_fma() -> bool:
    """Whether wider instruction sets than the baseline have fused multiply-adds, whose last bits differ."""
    return "fma" in Path("/proc/cpuinfo").read_text().split()
