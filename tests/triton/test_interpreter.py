"""The tests of the operators, run through Triton's interpreter in a process that has it switched on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

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
VECTORS = "(in_vectors and (hann or bfloat16 or uint16 or float32 or 4-torch.float16-torch.uint8 or 1-torch.float16-None))"
POISONED = "(poisoned and not float32)"
ROWS = "(test_rows and (crop or uint8)) or (in_rows and not float32 and not 2-2)"
TYPES = "(types and (float64 or (sliced and not float32)))"
# All sizes in float32; in the other types one or a few of them.
SIZES = "small1 or small2 or small3 or small4 or small6"
REPEATED = {
    "adaptive_threshold": "(sweep and not float32 and not 31) or (test_table and not float32 and not tie)",
    "assign_classes": "(opcheck and False) or inductor or budget_holds or no_smaller or sweep_against or unit_of_cost or "
    "equal_items or (sweep_of_penalties and not float32 and not 300)",
    "extract_patches": f"{POISONED} or {LAYOUTS} or {GEOMETRIES} or (types and float64)",
    "gather_groups": "complex64 or int16 or uint8",
    "group_by_class": "torch.int16 or torch.int32 or (70001 and uint8)",
    "merge_regions": "torch.int16 or torch.int32 or inductor",
    "pixel_mlp": f"(sweep and not float32 and ({SIZES})) or (opcheck and (False-True or True-False or tf32)) or hidden0 or "
    "40-classes",
    "refine_boundaries": "(sweep and not float32 and not 22)",
    "scatter_groups": "complex64 or int16 or uint8",
    "stitch_patches": f"{VECTORS} or {POISONED} or {LAYOUTS} or compiles or through_shuffle or {ROWS} or {TYPES}",
}


@pytest.fixture
def outcomes(tmp_path):
    """Of each operator, (test, what went wrong or "") of all its tests, from one run: a process takes seconds to start."""
    report = tmp_path / "report.xml"
    left_out = " or ".join(f"(test_{op} and ({words}))" for op, words in REPEATED.items())
    files = [path for op in OPS for path in sorted((ROOT / "tests").glob(f"[co]*/test_{op}*.py"))]
    files = [str(path) for path in files if not path.stem.endswith("_reference")]
    words = ["-k", f"triton-cpu and not deterministic and not ({left_out})", f"--junitxml={report}"]
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *words],
        env={**os.environ, "TRITON_INTERPRET": "1", "FASTROUTE_BACKEND": ""},
        cwd=ROOT,
        capture_output=True,
        timeout=1200,
    )
    found = {op: [] for op in OPS}
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.get("classname").split(".")[-1]
        op = next(op for op in OPS if file.startswith(f"test_{op}"))
        # A kernel that the backend refuses would be skipped without a word.
        wrong = [f"{x.tag}: {x.get('message')}\n{x.text}" for x in case if x.tag in ("failure", "error", "skipped")]
        found[op].append((case.get("name"), "\n".join(wrong)))
    return found


@pytest.mark.slow
def test_through_the_interpreter(outcomes):
    # Of all tests, not of a share of them, every operator has several.
    least = 10 if os.environ.get("FASTROUTE_TEST_SHARE", "1") == "1" else 1
    assert all(len(found) >= least for found in outcomes.values())
    failed = [f"{name}\n{wrong}" for found in outcomes.values() for name, wrong in found if wrong]
    assert not failed, "\n".join(failed)[-4000:]
