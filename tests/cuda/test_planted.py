"""The emulation finds mistakes: kernels that have one are reported."""

from __future__ import annotations

import subprocess

import builds
import pytest

REASON = builds.compiler_reason()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


def run(sanitizer: str, mistake: str) -> subprocess.CompletedProcess:
    program = builds.shim_link("planted", [builds.HERE / "planted.cpp"], sanitizer)
    command = builds.thread_command(program) if sanitizer == "thread" else [str(program)]
    return subprocess.run([*command, mistake], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("sanitizer", "mistake", "words"),
    [
        ("address", "global_bounds", "AddressSanitizer: heap-buffer-overflow"),
        ("address", "shared_bounds", "AddressSanitizer: use-after-poison"),
        ("address", "deadlock", "cuda shim: deadlock"),
        ("thread", "no_barrier", "ThreadSanitizer: data race"),
        ("thread", "no_warp_barrier", "ThreadSanitizer: data race"),
        ("thread", "two_blocks", "ThreadSanitizer: data race"),
    ],
)
def test_is_reported(sanitizer, mistake, words):
    result = run(sanitizer, mistake)
    assert result.returncode != 0
    assert words in result.stderr


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_nothing_else_is(sanitizer):
    result = run(sanitizer, "none")
    # Where fibers are those of the system, AddressSanitizer warns of them.
    said = [line for line in result.stderr.splitlines() if "makecontext/swapcontext" not in line]
    assert (result.returncode, result.stdout, said) == (0, "finished\n", [])
