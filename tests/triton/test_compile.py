"""Every Triton kernel compiles for every architecture, without a GPU, and nothing spills to memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from resources import ARCHS, OPS, compile_variant, describe, variants

pytest.importorskip("triton.compiler", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

# Bytes of shared memory that a program may have on the smallest of the architectures.
SHARED = 163 << 10


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", OPS)
def test_compiles_without_spills(op, arch):
    for variant in variants(op):
        used = compile_variant(variant, arch)
        assert used.local == 0, f"sm_{arch}: {describe(variant)}: {used}"
        assert used.shared <= SHARED, f"sm_{arch}: {describe(variant)}: {used}"


@pytest.mark.parametrize("op", OPS)
def test_variants_name_all_kernels(op):
    """Each jitted kernel of a file is compiled by some variant of some file."""
    named = {variant.kernel.__name__ for other in OPS for variant in variants(other)}
    source = (Path(__file__).parents[2] / "fastroute" / "triton" / f"{op}.py").read_text()
    kernels = [line.split("(")[0].removeprefix("def ") for line in source.splitlines() if line.startswith("def ")]
    assert {name for name in kernels if name.endswith("_kernel")} <= named
