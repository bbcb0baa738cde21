"""Every CUDA kernel compiles for every architecture, without warnings, and keeps its values in registers."""

from __future__ import annotations

import builds
import compiled
import pytest
import sass

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


@pytest.mark.slow
@pytest.mark.skipif(sass.reason() is not None, reason=str(sass.reason()))
@pytest.mark.parametrize("arch", sass.ARCHS)
@pytest.mark.parametrize("path", sass.FAST_PATHS, ids=lambda path: path.name)
def test_instructions_per_pixel(path, arch):
    assert sass.count(path, arch) <= path.most
    # Graphics cards have one unit for float64 where they have 64 for float32: fewer than one instruction per item belongs to
    # what is rare, and none to the others.
    assert len([line for line in sass.turn(path, arch) if sass.DOUBLES.search(line)]) < path.pixels
    assert not [line for line in sass.turn(path, arch) if "CALL" in line]
