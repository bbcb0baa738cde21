"""The kernels of `pixel_mlp` that keep their weights compile where they are used, from Hopper on, and nothing spills."""

from __future__ import annotations

import os

import pytest
from resources import compile_variant, describe

pytest.importorskip("triton.compiler", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)


@pytest.mark.parametrize("arch", [90, 100])
def test_kept_weights_fit(arch):
    from fastroute.triton.pixel_mlp import variants

    kept = list(variants(resident=True))
    assert kept, "no variant keeps its weights: the test would prove nothing"
    for variant in kept:
        used = compile_variant(variant, arch)
        assert used.local == 0, f"sm_{arch}: {describe(variant)}: {used}"
        assert used.shared <= 227 << 10, f"sm_{arch}: {describe(variant)}: {used}"
