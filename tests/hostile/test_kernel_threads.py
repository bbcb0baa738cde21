"""Every kernel of csrc/cpu called by eight threads at once, from the first call on, under ThreadSanitizer: no data race, and
the same bits in every thread. Each program of threads/ does so for the operator of its name.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastroute.backends import EXTENSION

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "cuda"))
import builds  # noqa: E402

REASON = builds.compiler_reason() or "; ".join(EXTENSION.reasons)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=str(REASON))]
PROGRAMS = sorted((HERE / "threads").glob("*.cpp"))
# Those that compile in seconds; the others belong to the long run.
QUICK = ("gather_groups", "group_by_class", "merge_regions")


def run(source: Path, *flags: str) -> subprocess.CompletedProcess:
    program = builds.cpu_link(source.stem, [source], "thread", flags)
    command = builds.thread_command(program)
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_every_operator_has_a_program():
    assert [path.stem for path in PROGRAMS] == sorted(path.stem for path in builds.CSRC.glob("cpu/**/*.cpp"))


@pytest.mark.parametrize(
    "source",
    [pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else pytest.mark.soak) for path in PROGRAMS],
)
def test_no_races(source):
    result = run(source)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_race_is_reported():
    result = run(HERE / "threads" / "gather_groups.cpp", "-DFASTROUTE_PLANT_RACE")
    assert result.returncode != 0
    assert "ThreadSanitizer: data race" in result.stderr
