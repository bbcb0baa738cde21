"""Damaged files of every format raise an ImageError, or are read: no other error, no hang, no large allocation, no crash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastroute

# Numbers of damaged files: a process of its own for each part, which ends with them.
PARTS = [(0, 300)] + [pytest.param(first, first + 2500, marks=pytest.mark.soak) for first in range(0, 20_000, 2500)]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("first", "last"), PARTS)
def test_damaged_files(tmp_path, first, last):
    path = os.pathsep.join([str(Path(fastroute.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    script = Path(__file__).parent / "fuzzing.py"
    # Generous: a file that takes more than ten seconds is told by the script itself, and one that never ends by its number.
    done = subprocess.run(
        [sys.executable, script, str(first), str(last), tmp_path],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=120 + (last - first) // 4,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    told = [line for line in lines if line.startswith(("RAISED", "SLOW", "LARGE"))]
    assert not told, "\n".join(told)
    assert done.returncode == 0 and lines[-1].startswith("END"), f"ended {lines[-1]}: {done.stderr[-2000:]}"
    assert f"at {last - 1}" in lines and "'read/read'" in lines[-1] and "'refused/refused'" in lines[-1]
    assert "/" in lines[-1] and "raised" not in lines[-1]
