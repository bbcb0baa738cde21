"""Tests of `cell_mlp` on each instruction set of this processor."""

from __future__ import annotations

import pytest
import torch
from instruction_sets import ISAS, has_fma, only_the_cpu_kernels, run_on_each
from support import random
from test_cell_mlp import CASES, close, layers_of

pytestmark = [pytest.mark.slow, only_the_cpu_kernels("cell_mlp")]

TYPES = (torch.float32, torch.float16, torch.float64)
SOURCES = (torch.float32, torch.uint8)
# Cases of several tiles, blocks and layers, and of units that fill no vector.
SOME = [CASES[n] for n in (0, 1, 3, 6, 7)]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """By instruction set, the results for all problems."""
    calls = []
    for dtype in TYPES:
        for source in SOURCES:
            for case in SOME:
                layers = layers_of(case, dtype)
                calls.append(((random(case[0], source), [w for w, _ in layers], [b for _, b in layers], 0.1, *case[1:4]), {}))
    return run_on_each("cell_mlp.default", calls, tmp_path_factory.mktemp("isa"))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_error_against_float64(outputs, isa, dtype):
    results = iter(outputs[isa][TYPES.index(dtype) * len(SOURCES) * len(SOME) :])
    for source in SOURCES:
        for case in SOME:
            close(next(results), random(case[0], source), layers_of(case, dtype), *case[1:4])


def test_each_name_is_heeded(outputs):
    """Fused multiply-adds give other last bits: where there are such, they are used."""
    assert torch.equal(outputs["baseline"][0], outputs["avx2"][0]) == (not has_fma())
