"""The operators' own tests, with the CUDA kernels emulated on the CPU, under AddressSanitizer and UBSan."""

from __future__ import annotations

import re

import builds
import pytest

from fastroute.backends import EXTENSION

REASON = builds.compiler_reason() or "; ".join(EXTENSION.reasons) or None
OPS = [path.stem for path in builds.KERNELS]


@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_operators():
    files = sorted({str(path) for op in OPS for path in builds.ROOT.glob(f"tests/ops/test_{op}*.py")})
    own = [str(builds.HERE / name) for name in ("emulated_cases.py", "test_pixel_widths.py", "test_pixel_mlp_tf32.py")]
    result = builds.emulated(*files, *own)
    assert result.returncode == 0, f"{result.stdout[-10000:]}\n{result.stderr[:10000]}"
    launched = dict(re.findall(r"^test_(\w+): (\d+) kernels launched$", result.stdout, re.MULTILINE))
    assert all(int(launched[op]) > 0 for op in OPS)
