"""Tests of `adaptive_threshold`: a table, and sweeps against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import FLOATING, compiles_once, few, inductor_equals_eager, repeats, same
from torch.library import opcheck

from fastroute import adaptive_threshold
from fastroute.reference.adaptive_threshold import adaptive_threshold_reference

OP = torch.ops.fastroute.adaptive_threshold.default
DTYPES = (torch.int64, torch.int32, torch.uint8)


def scores(*shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    power = 0.3 + torch.rand(shape[0] if shape else 1, generator=generator, dtype=torch.float64) * 4
    values = torch.rand(shape, generator=generator, dtype=torch.float64) ** power.view(-1, *[1] * (len(shape) - 1))
    return values.to(dtype).to(device)


# The two sum in different orders: a score this near the last threshold, of scores spread over [0, 1], may change class.
BAND = 1e-12


def agrees(actual, score, dtype=torch.int64):
    """The reference's classes, but for scores at the threshold."""
    expected = adaptive_threshold_reference(score, dtype)
    assert actual.dtype == dtype
    assert actual.shape == score.shape
    assert actual.is_contiguous()
    for ids, other, value in zip(actual, expected, score.double(), strict=True):
        upper = value[other == 1]
        edge = upper.min() if upper.numel() else torch.tensor(float("inf"))
        assert ((ids == other) | ((value - edge).abs() <= BAND)).all()


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ([0, 0, 0, 1], [0, 0, 0, 1]),
        ([0, 1, 5], [0, 0, 1]),
        ([-10, -9.5, -7.5], [0, 0, 1]),
        ([0, 0.5, 0.5, 1], [0, 1, 1, 1]),
        # Half way between the centres 2 and 0 is class 1; see the reference's test.
        ([0] + [1] * 40 + [3] * 42, [0] + [1] * 82),
        ([0.3, 0.3, 0.3], [0, 0, 0]),
        ([0.7], [0]),
    ],
    ids=["two-values", "three-steps", "affine", "middle", "tie", "flat", "one-pixel"],
)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_table(backend, score, expected, dtype):
    assert adaptive_threshold(torch.tensor([score], dtype=dtype, device=backend.device)).tolist() == [expected]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 1), (3, 17), (2, 9, 31), (1, 250, 301), (2, 3, 4, 5)], ids=str)
def test_sweep(kernel, shape, dtype):
    for seed in few(range(3)):
        score = scores(*shape, dtype=dtype, device=kernel.device, seed=seed)
        for ids in DTYPES:
            agrees(adaptive_threshold(score, ids), score, ids)
        strided = torch.stack([score, -score], dim=-1)[..., 0]
        same(adaptive_threshold(strided), adaptive_threshold(score))
        turned = score.transpose(0, -1).contiguous().transpose(0, -1)
        same(adaptive_threshold(turned), adaptive_threshold(score))


@pytest.mark.slow
@given(values=st.lists(st.integers(-8, 8), min_size=1, max_size=30))
def test_whole_numbers_exactly(kernel, values):
    score = torch.tensor([values], dtype=torch.float32, device=kernel.device)
    same(adaptive_threshold(score), adaptive_threshold_reference(score))


def test_images_are_independent(backend):
    score = scores(5, 12, 13, device=backend.device)
    score[2] = 0.25
    together = adaptive_threshold(score)
    for one, ids in zip(score, together, strict=True):
        same(adaptive_threshold(one[None])[0], ids)


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(operator, grad):
    for shape in ((0, 3), (2, 7), (2, 4, 5)):
        for dtype in few(DTYPES, shape[0]):
            opcheck(OP, (scores(*shape, device=operator.device).requires_grad_(grad), dtype.itemsize))


def test_no_gradient(backend):
    assert not adaptive_threshold(scores(2, 9, device=backend.device).requires_grad_()).requires_grad


def test_poisoned(backend, poisoned):
    for shape in ((1, 1), (2, 777), (1, 300, 301)):
        score = scores(*shape, device=backend.device)
        agrees(adaptive_threshold(score, torch.uint8), score, torch.uint8)


def threshold(score):
    return adaptive_threshold(score, torch.uint8)


@pytest.mark.slow
def test_compiles_once_for_all_sizes(operator):
    compiles_once(threshold, [(scores(b, h, w, device=operator.device),) for b, h, w in ((4, 10, 7), (3, 9, 12), (5, 31, 8))])


@pytest.mark.slow
def test_compiles_with_inductor(operator):
    inductor_equals_eager(threshold, scores(2, 30, 7, device=operator.device))


@pytest.mark.slow
def test_deterministic(backend):
    score = scores(2, 310, 500, device=backend.device)
    repeats(lambda: adaptive_threshold(score), backend.device)


@pytest.mark.parametrize(
    ("kind", "args", "words"),
    [
        (TypeError, {"score": [[1.0]]}, "score Tensor list"),
        (ValueError, {"score": torch.rand(3)}, r"score \(B, ...\) \(3,\)"),
        (TypeError, {"score": torch.ones(2, 3, dtype=torch.int64)}, "score float32 int64"),
        (TypeError, {"dtype": torch.int16}, "dtype int64 uint8 int16"),
    ],
)
def test_errors(kind, args, words):
    with pytest.raises(kind, match="^adaptive_threshold: .*" + ".*".join(words.split(" "))):
        adaptive_threshold(**{"score": torch.rand(2, 3)} | args)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (1, -1)])
def test_infinite_score(backend, value, place):
    score = scores(2, 70_000, device=backend.device)
    score[place] = value
    with pytest.raises(ValueError, match=r"^adaptive_threshold: score must be finite, and so must its range$"):
        adaptive_threshold(score)
