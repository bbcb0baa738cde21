"""Tests of `conv3x3` on each instruction set of this processor."""

from __future__ import annotations

import pytest
import torch
from instruction_sets import ISAS, has_fma, only_the_cpu_kernels, run_on_each
from test_conv3x3 import CASES, close, normal, parameters, raw

pytestmark = [pytest.mark.slow, only_the_cpu_kernels("conv3x3")]
GIVEN = [(True, True, True), (False, False, False)]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """By instruction set, the results for all problems."""
    calls = [(raw(case, *given), {}) for case in CASES for given in GIVEN]
    return run_on_each("conv3x3.default", calls, tmp_path_factory.mktemp("isa"))


@pytest.mark.parametrize("isa", ISAS)
def test_error_against_float64(outputs, isa):
    results = iter(outputs[isa])
    for case in CASES:
        weight, *others = parameters(case)
        for given in GIVEN:
            rest = [x if wanted else None for x, wanted in zip(others, given, strict=True)]
            close(next(results), normal(*case[0]), weight, *rest, *case[2:])


def test_vectors_of_any_width_give_the_same_bits(outputs):
    assert all(torch.equal(a, b) for a, b in zip(outputs["avx2"], outputs["avx512"], strict=True))


def test_each_name_is_heeded(outputs):
    """Fused multiply-adds give other last bits: where there are such, they are used."""
    assert torch.equal(outputs["baseline"][0], outputs["avx2"][0]) == (not has_fma())
