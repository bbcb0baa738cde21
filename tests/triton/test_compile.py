"""Every Triton kernel compiles for every architecture, without a GPU, and nothing spills to memory."""

from __future__ import annotations

import os

import pytest
from resources import FOLDER, OPS, compile_variant, describe, variants

pytest.importorskip("triton.compiler", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

# Bytes of shared memory that a program may have.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
ARCHS = [int(arch) for arch in os.environ.get("FASTROUTE_TEST_ARCHS", "80 90 100").split()]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", OPS)
def test_compiles_without_spills(op, arch):
    for variant in variants(op):
        if arch in variant.archs:
            used = compile_variant(variant, arch)
            assert used.local == 0, f"sm_{arch}: {describe(variant)}: {used}"
            assert used.shared <= SHARED[arch], f"sm_{arch}: {describe(variant)}: {used}"


def test_variants_name_all_kernels():
    """Each jitted kernel of each file is compiled by some variant, for each architecture."""
    lines = [line for path in FOLDER.glob("*.py") for line in path.read_text().splitlines() if line.startswith("def ")]
    names = {line.split("(")[0].removeprefix("def ") for line in lines}
    kernels = {name for name in names if name.endswith("_kernel")}
    assert len(kernels) > len(OPS)
    for arch in ARCHS:
        assert {v.kernel.__name__ for op in OPS for v in variants(op) if arch in v.archs} == kernels
