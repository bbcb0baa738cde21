"""Tests of `pixel_mlp` on each instruction set of this processor, which FASTROUTE_ISA narrows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from instruction_sets import ISAS, has_fma, only_the_cpu_kernels, run_on_each
from support import eager_pixel_mlp, in_layout
from test_pixel_mlp import inputs, make, reference

pytestmark = [pytest.mark.slow, only_the_cpu_kernels("pixel_mlp")]

TYPES = (torch.float32, torch.bfloat16, torch.float64)
# Odd and even widths, groups of units with every remainder, one class that is linear and one that is free.
HIDDEN = [[58] * 4, [74, 7, 33], [10] * 3, [21, 1], [], None]
SIZE, LARGE, DIM = (9, 23), (31, 92), 48
ROWS = (5, 24)


def problem(dtype):
    """Features, MLPs, size, class map and residual."""
    features, residual, class_map = inputs(2, DIM, SIZE, LARGE, len(HIDDEN), dtype=dtype)
    return in_layout(features, "channels_last"), make(DIM, HIDDEN, dtype=dtype), LARGE, class_map, residual


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """By instruction set and type: the whole output, and the rows ROWS of it computed alone."""
    calls = []
    for dtype in TYPES:
        features, mlps, size, class_map, residual = problem(dtype)
        weights, biases = [w for mlp in mlps for w, _ in mlp], [b for mlp in mlps for _, b in mlp]
        args = (features, weights, biases, [len(mlp) for mlp in mlps], *size, class_map, residual, None)
        calls += [((*args, 0, LARGE[0]), {}), ((*args, *ROWS), {})]
    found = run_on_each("pixel_mlp.default", calls, tmp_path_factory.mktemp("isa"))
    return {isa: dict(zip(TYPES, zip(some[::2], some[1::2], strict=True), strict=True)) for isa, some in found.items()}


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
    assert torch.equal(single["baseline"], single["avx2"]) == (not has_fma())
    assert torch.equal(half["avx512"], half["widest"]) == ("avx512_bf16" not in flags)
