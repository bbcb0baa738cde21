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
# What runs in a process of its own, and there in one for each instruction set: neither tests nor the package, which would take
# seconds to import, as torch does once.
PROGRAM = """
import os, sys, torch
library, operator, calls, *isas = sys.argv[1:]
for isa in isas:
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0, isa
        continue
    os.environ.pop("FASTROUTE_ISA", None)
    if isa != "widest":
        os.environ["FASTROUTE_ISA"] = isa
    torch.ops.load_library(library)
    packet, overload = operator.split(".")
    run = getattr(getattr(torch.ops.fastroute, packet), overload)
    results = []
    for args, out in torch.load(calls, weights_only=True):
        result = run(*args, **out)
        results.append(out.get("out", result))
    torch.save(results, f"{calls}-{isa}")
    os._exit(0)
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
    given, library = folder / "calls.pt", Path(fastroute.__file__).parent / "_ops.so"
    torch.save(list(calls), given)
    command = [sys.executable, "-c", PROGRAM, str(library), operator, str(given), *ISAS]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return {isa: torch.load(f"{given}-{isa}", weights_only=True) for isa in ISAS}


def has_fma() -> bool:
    """Whether wider instruction sets than the baseline have fused multiply-adds, whose last bits differ."""
    return "fma" in Path("/proc/cpuinfo").read_text().split()
