"""One op, one name: in every folder, file and function that concerns it."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import fastroute
from fastroute.backends import PRODUCTS

ROOT = Path(__file__).parents[1]
OPS = sorted(path.stem for path in (ROOT / "fastroute" / "ops").glob("*.py") if not path.stem.startswith("_"))
FIXED_LINES = ("Differentiable:", "Deterministic:", "Synchronises:", "CUDA-graph safe:", "Memory layout:")


def test_there_are_ops():
    assert {"extract_patches", "stitch_patches", "group_by_class"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_public_function(op):
    assert op in fastroute.__all__
    function = getattr(fastroute, op)
    assert inspect.isfunction(function)
    assert function.__module__ == f"fastroute.ops.{op}"


def test_what_an_operator_takes_is_public():
    for name in ("conv3x3_weight", "Conv3x3Weight"):
        assert getattr(fastroute, name).__module__ == "fastroute.ops.conv3x3"
    assert "conv3x3_weight" in fastroute.__all__


@pytest.mark.parametrize("op", OPS)
def test_docstring_has_the_fixed_lines(op):
    lines = [line.strip() for line in inspect.getdoc(getattr(fastroute, op)).splitlines()]
    for start in FIXED_LINES:
        found = [line for line in lines if line.startswith(start)]
        assert len(found) == 1, f"one line must start with '{start}'"
        assert len(found[0]) > len(start), f"'{start}' says nothing"


@pytest.mark.parametrize("op", OPS)
def test_schemas(op):
    schemas = importlib.import_module(f"fastroute.ops.{op}").SCHEMAS
    names = [schema.split("(")[0] for schema in schemas]
    assert names[0] == op
    # Overloads such as op.out aside, there is at most a gradient beside the op.
    assert {name.split(".")[0] for name in names} <= {op, f"_{op}_backward"}
    for name in names:
        packet, _, overload = name.partition(".")
        assert hasattr(getattr(torch.ops.fastroute, packet), overload or "default")


@pytest.mark.parametrize("op", OPS)
def test_reference(op):
    module = importlib.import_module(f"fastroute.reference.{op}")
    assert getattr(module, f"{op}_reference").__module__ == module.__name__


@pytest.mark.parametrize("op", OPS)
def test_cpu_kernel(op):
    # An operator of more than two files has a folder.
    folder = ROOT / "csrc" / "cpu" / op
    assert not folder.exists() or len(list(folder.iterdir())) > 2
    source = ((folder if folder.exists() else folder.parent) / f"{op}.cpp").read_text()
    common = ROOT / "csrc" / "common" / f"{op}.h"
    # What devices have in common stands once; those that run by a GPU's own products have no other.
    assert common.exists() or op in PRODUCTS
    assert re.search(rf"\b{op}\(", common.read_text() if common.exists() else source)
    assert f'FASTROUTE_IMPL(m, "{op}", {op})' in source.replace(f"{op}::", "")


@pytest.mark.parametrize("op", OPS)
def test_other_kernels(op):
    cuda, triton = ROOT / "csrc" / "cuda" / f"{op}.cu", ROOT / "fastroute" / "triton" / f"{op}.py"
    if cuda.exists():
        assert f'FASTROUTE_IMPL(m, "{op}", {op})' in cuda.read_text().replace(f"{op}::", "")
        assert re.search(rf"\b{op}\(", (ROOT / "tests" / "cuda" / "races" / f"{op}.cpp").read_text())
    if triton.exists():
        assert re.search(rf"^def {op}_triton\(", triton.read_text(), re.MULTILINE)
        assert re.search(r"^def unsupported_reasons\(", triton.read_text(), re.MULTILINE)


@pytest.mark.parametrize("op", OPS)
def test_has_tests(op):
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").exists()


@pytest.mark.parametrize(
    "pattern", ["fastroute/reference/*.py", "fastroute/triton/*.py", "csrc/cpu/**/*.cpp", "csrc/cuda/*.cu"]
)
def test_no_other_names(pattern):
    stems = {path.stem for path in ROOT.glob(pattern) if not path.stem.startswith("_")}
    assert stems <= set(OPS)


def test_test_files_start_with_an_op():
    for path in (ROOT / "tests" / "ops").glob("test_*.py"):
        assert path.stem.removeprefix("test_").startswith(tuple(OPS)), path.name


def test_campaigns_are_described():
    told = (ROOT / "CONTRIBUTING.md").read_text()
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if "marks=pytest" + ".mark.soak" in path.read_text()]
    assert len(files) > 5
    assert not [path for path in files if f"`{path.relative_to(ROOT).as_posix()}`" not in told]
