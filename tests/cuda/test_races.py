"""Every CUDA kernel runs as threads of the system under ThreadSanitizer, in the programs of races/."""

from __future__ import annotations

import subprocess

import builds
import pytest

REASON = builds.compiler_reason()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


@pytest.mark.parametrize("source", builds.KERNELS, ids=lambda path: path.stem)
def test_no_races(source):
    program = builds.shim_link(source.stem, [builds.HERE / "races" / f"{source.stem}.cpp"], "thread")
    result = subprocess.run(builds.thread_command(program), capture_output=True, text=True, timeout=300, check=False)
    assert (result.returncode, result.stderr) == (0, "")
