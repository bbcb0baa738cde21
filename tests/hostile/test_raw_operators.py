"""The registered operators past the checks of Python: every hostile call ends in an error that names its operator, or right.

On the kernels as they are built, and on the same kernels under AddressSanitizer and UBSan, as tests/cuda does with those for
GPUs: csrc/cpu is compiled for any processor and registered over the kernels of the package.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import raw_cases

from fastroute.backends import EXTENSION
from fastroute.ops._library import OPERATORS

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "cuda"))
import builds  # noqa: E402

NO_KERNELS = "; ".join(EXTENSION.reasons)
NO_COMPILER = builds.compiler_reason() or NO_KERNELS
needs_kernels = pytest.mark.skipif(bool(NO_KERNELS), reason=NO_KERNELS)
needs_compiler = pytest.mark.skipif(bool(NO_COMPILER), reason=str(NO_COMPILER))
NAMES = list(raw_cases.cases())


def test_every_operator_has_a_good_call():
    assert {op for op, _ in raw_cases.GOOD} == set(OPERATORS) - {"pixel_mlp.tf32"}
    for op, given in raw_cases.GOOD:
        assert raw_cases.outcome(op, given) == "right", op


def sample(number: int) -> list[str]:
    return NAMES if number == 0 else random.Random(0).sample(NAMES, number)


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("number", [300, pytest.param(0, marks=pytest.mark.soak)])
def test_hostile_calls(number):
    wrong = [(name, told) for name, told in raw_cases.run(sample(number)) if told.startswith(("WRONG", "CRASH"))]
    assert wrong == []


def sanitized(kernels: list[Path]) -> Path:
    """A library that registers `kernels` of csrc/cpu in the place of those that are built."""
    return builds.cpu_link("cpu.so", kernels, "address", ["-DFASTROUTE_PORTABLE"], "-shared")


# Those that compile in a quarter of a minute at most; the others belong to the long run.
QUICK = ("assign_classes", "gather_groups", "group_by_class", "refine_boundaries")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("ops", [QUICK, pytest.param((), marks=pytest.mark.soak)], ids=["quick", "all"])
def test_hostile_calls_under_sanitizers(ops):
    kernels = [path for path in sorted(builds.CSRC.glob("cpu/**/*.cpp")) if not ops or path.stem in ops]
    environment = {
        **os.environ,
        "FASTROUTE_SANITIZED": str(sanitized(kernels)),
        "LD_PRELOAD": builds.runtime("asan"),
        # What Python and torch never free is not ours to report. Sizes that no machine has are an error, as without.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1:max_allocation_size_mb=4096",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(builds.ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    parts = [f"-{op}-" for op in ops] + [f"-_{op}_backward-" for op in ops] + [f"-{op}." for op in ops]
    command = [sys.executable, str(HERE / "raw_cases.py"), *parts]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    reports = re.findall(r"SUMMARY: .*|.*runtime error: .*", result.stderr)
    # Where memory ends in torch's own buffers the sanitizer ends the process; the plain build has a MemoryError there.
    ended = [report for report in reports if "AddressSanitizer: out-of-memory" in report]
    assert (reports, [line for line in lines if "\tWRONG" in line]) == (ended, []), result.stderr[-10000:]
    assert sum("\tCRASH" in line for line in lines) == len(ended), result.stderr[-10000:]
    assert lines[-1].endswith(f" calls, {len(ended)} wrong")
