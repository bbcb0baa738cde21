"""Tests of `conv1x1` on each instruction set of this processor."""

from __future__ import annotations

import pytest
import torch
from instruction_sets import ISAS, has_fma, only_the_cpu_kernels, run_on_each
from test_conv1x1 import CASES, arguments, close

pytestmark = [pytest.mark.slow, only_the_cpu_kernels("conv1x1")]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """By instruction set, the results for all problems."""
    calls = []
    for case in CASES:
        images, weight, *rest = arguments(case)
        calls += [((images, weight, *rest), {}), ((images, weight, None, None, None), {})]
    return run_on_each("conv1x1.default", calls, tmp_path_factory.mktemp("isa"))


@pytest.mark.parametrize("isa", ISAS)
def test_error_against_float64(outputs, isa):
    results = iter(outputs[isa])
    for case in CASES:
        images, weight, *rest = arguments(case)
        close(next(results), images, weight, *rest)
        close(next(results), images, weight, None, None, None)


def test_vectors_of_any_width_give_the_same_bits(outputs):
    assert all(torch.equal(a, b) for a, b in zip(outputs["avx2"], outputs["avx512"], strict=True))


def test_each_name_is_heeded(outputs):
    """Fused multiply-adds give other last bits: where there are such, they are used."""
    assert torch.equal(outputs["baseline"][0], outputs["avx2"][0]) == (not has_fma())
