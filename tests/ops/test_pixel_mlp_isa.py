"""Tests of `pixel_mlp` on each instruction set of this processor, which FASTROUTE_ISA narrows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import eager_pixel_mlp, in_layout
from test_pixel_mlp import inputs, make, reference

import fastroute
from fastroute.backends import unsupported_reasons

REASON = "; ".join(unsupported_reasons("pixel_mlp", "cpu", torch.device("cpu")))
pytestmark = pytest.mark.skipif(bool(REASON) or "FASTROUTE_SHIM" in os.environ, reason=REASON or "other kernels run")

ISAS = ("baseline", "avx2", "avx512", "widest")
TYPES = (torch.float32, torch.bfloat16, torch.float64)
# Odd and even widths, groups of units with every remainder, one class that is linear and one that is free.
HIDDEN = [[58] * 4, [74, 7, 33], [10] * 3, [21, 1], [], None]
SIZE, LARGE, DIM = (9, 23), (31, 92), 48
ROWS = (5, 24)
# What runs in a process of its own: neither tests nor the package, which would take seconds to import.
PROGRAM = """
import sys, torch
torch.ops.load_library(sys.argv[1])
problems = torch.load(sys.argv[2], weights_only=True)
torch.save([[torch.ops.fastroute.pixel_mlp(*args, *rows) for rows in bands] for args, bands in problems], sys.argv[3])
"""


def problem(dtype):
    """Features, MLPs, size, class map and residual."""
    features, residual, class_map = inputs(2, DIM, SIZE, LARGE, len(HIDDEN), dtype=dtype)
    return in_layout(features, "channels_last"), make(DIM, HIDDEN, dtype=dtype), LARGE, class_map, residual


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """By instruction set and type: the whole output, and the rows ROWS of it computed alone."""
    folder = tmp_path_factory.mktemp("isa")
    problems = []
    for dtype in TYPES:
        features, mlps, size, class_map, residual = problem(dtype)
        weights, biases = [w for mlp in mlps for w, _ in mlp], [b for mlp in mlps for _, b in mlp]
        args = (features, weights, biases, [len(mlp) for mlp in mlps], *size, class_map, residual, None)
        problems.append((args, ((0, LARGE[0]), ROWS)))
    torch.save(problems, folder / "problems.pt")
    found = {}
    for isa in ISAS:
        environment = {name: value for name, value in os.environ.items() if name != "FASTROUTE_ISA"}
        environment |= {} if isa == "widest" else {"FASTROUTE_ISA": isa}
        library = Path(fastroute.__file__).parent / "_ops.so"
        command = [sys.executable, "-c", PROGRAM, str(library), str(folder / "problems.pt"), str(folder / f"{isa}.pt")]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 0, result.stderr[-4000:]
        found[isa] = dict(zip(TYPES, torch.load(folder / f"{isa}.pt", weights_only=True), strict=True))
    return found


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_error_against_float64(outputs, isa, dtype):
    """At most twice that of eager PyTorch in that type, plus 8 units in the last place of the largest value."""
    arguments = problem(dtype)
    exact, plain = reference(*arguments, exact=True), eager_pixel_mlp(*arguments)
    if dtype == torch.float64:
        plain = reference(*arguments)
    floor = 8 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps * exact.abs().max()
    output, band = outputs[isa][dtype]
    assert (output.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + floor
    # Every pixel is summed in one order, so its bits depend on nothing but the instruction set.
    assert torch.equal(band, output[:, :, ROWS[0] : ROWS[1]])


def test_each_name_is_heeded(outputs):
    """Fused multiply-adds, and products of bfloat16, give other last bits: where there are such, they are used."""
    flags = Path("/proc/cpuinfo").read_text().split()
    single, half = ({isa: outputs[isa][dtype][0] for isa in ISAS} for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(single["baseline"], single["avx2"]) == ("fma" not in flags)
    assert torch.equal(half["avx512"], half["widest"]) == ("avx512_bf16" not in flags)
