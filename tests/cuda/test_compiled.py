"""Every CUDA kernel compiles for every architecture, without warnings, and keeps its values in registers."""

from __future__ import annotations

import builds
import compiled
import pytest

REASON = compiled.nvcc_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

# What a block may use of shared memory without asking for more.
STATIC_SHARED = 48 << 10


@pytest.mark.slow
@pytest.mark.parametrize("source", builds.KERNELS, ids=lambda path: path.stem)
def test_no_spills(source):
    found = compiled.kernels(source)
    assert {kernel.arch for kernel in found} == set(compiled.ARCHS)
    assert any(kernel.name.startswith(("gather_rows", source.stem, "sort_")) for kernel in found)
    assert not [kernel for kernel in found if kernel.spills]
    assert max(kernel.shared for kernel in found) <= STATIC_SHARED
