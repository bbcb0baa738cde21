"""The tests of the operators, run through Triton's interpreter in a process that has it switched on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from resources import OPS

pytest.importorskip("triton.runtime", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process runs the interpreter already", allow_module_level=True)

ROOT = Path(__file__).parents[2]
# The interpreter takes milliseconds per program. Left out are tests that repeat others in larger numbers or with more types;
# `TRITON_INTERPRET=1 python -m pytest tests/ops -k triton-cpu` runs them all.
LAYOUTS = "transposed or expanded or channels_last"
GEOMETRIES = "(sweep_of_geometries and not 11 and not 17)"
POISONED = "(poisoned and not float32)"
ROWS = "(test_rows and (crop or uint8)) or (types and float64)"
REPEATED = {
    "assign_classes": "deterministic or budget_holds or no_smaller or sweep_against or unit_of_cost or equal_items",
    "extract_patches": f"deterministic or {POISONED} or {LAYOUTS} or {GEOMETRIES} or (types and float64)",
    "gather_groups": "deterministic or complex64 or int16 or uint8",
    "group_by_class": "deterministic or poisoned or torch.int16 or torch.int32",
    "scatter_groups": "deterministic or complex64 or int16 or uint8",
    "stitch_patches": f"deterministic or {POISONED} or {LAYOUTS} or {GEOMETRIES} or inductor or through_shuffle or {ROWS}",
}


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_through_the_interpreter(op):
    files = sorted(path for path in (ROOT / "tests" / "ops").glob(f"test_{op}*.py") if not path.stem.endswith("_reference"))
    words = "triton-cpu" + (f" and not ({REPEATED[op]})" if op in REPEATED else "")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files), "-k", words],
        env={**os.environ, "TRITON_INTERPRET": "1", "FASTROUTE_BACKEND": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) >= 10, result.stdout[-2000:]
    # A kernel that the backend refuses would be skipped without a word.
    assert "skipped" not in result.stdout, result.stdout[-2000:]
