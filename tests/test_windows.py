"""Tests of `make_window`."""

from __future__ import annotations

import math

import pytest
import torch

from fastroute import make_window
from fastroute.windows import WINDOWS


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ("uniform", [1, 1, 1, 1]),
        ("linear", [0.25, 0.75, 0.75, 0.25]),
        # sin²(π / 8) = (1 - cos(π / 4)) / 2
        ("hann", [(1 - math.sqrt(0.5)) / 2, (1 + math.sqrt(0.5)) / 2] * 2),
        # Standard deviation 4 / 8 pixel: the centres lie 3 and 1 of them from the middle.
        ("gaussian", [math.exp(-4.5), math.exp(-0.5)] * 2),
    ],
)
def test_table(window, expected):
    if window in ("hann", "gaussian"):
        expected = expected[:2] + expected[1::-1]
    weights = make_window(window, 4)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32), rtol=1e-7, atol=0)


@pytest.mark.parametrize("window", WINDOWS)
def test_named_windows_are_positive_symmetric_and_peak_in_the_middle(window):
    for size in (1, 2, 3, 7, 32, 128, 1024):
        weights = make_window(window, size)
        assert weights.shape == (size,)
        assert weights.device.type == "cpu"
        assert (weights > 0).all()
        torch.testing.assert_close(weights, weights.flip(0), rtol=1e-6, atol=0)
        assert (weights[: (size + 1) // 2].diff() >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_own_weights_are_kept(dtype):
    own = torch.tensor([0.5, 3.0, 1.0], dtype=dtype)
    weights = make_window(own, 3)
    assert weights.dtype == dtype
    assert torch.equal(weights, own)


@pytest.mark.parametrize("window", WINDOWS)
def test_result_belongs_to_the_caller(window):
    # Named windows may be remembered, but what a caller does to one must not reach the next.
    # A size of its own, so that a failure here is none elsewhere.
    before = make_window(window, 613).clone()
    make_window(window, 613).mul_(2)
    assert torch.equal(make_window(window, 613), before)


@pytest.mark.parametrize(
    ("kind", "window", "words"),
    [
        (ValueError, "boxcar", "uniform gaussian crop boxcar"),
        (ValueError, "crop", "stride 1 to 3 None"),
        (TypeError, None, "uniform NoneType"),
        (TypeError, [1.0, 1.0, 1.0], "uniform list"),
        (TypeError, torch.ones(3, dtype=torch.int64), "floating"),
        (ValueError, torch.ones(4), r"\(3,\) \(4,\)"),
        (ValueError, torch.ones(3, 3), r"\(3,\) \(3, 3\)"),
        (ValueError, torch.tensor([1.0, 0.0, 1.0]), "positive"),
        (ValueError, torch.tensor([1.0, -1.0, 1.0]), "positive"),
        (ValueError, torch.tensor([1.0, float("nan"), 1.0]), "finite"),
        (ValueError, torch.tensor([1.0, float("inf"), 1.0]), "finite"),
    ],
)
def test_errors(kind, window, words):
    with pytest.raises(kind, match="^window: .*" + ".*".join(words.split(" "))):
        make_window(window, 3)


@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [(4, 2, [0, 1, 1, 0]), (4, 4, [1, 1, 1, 1]), (5, 2, [0, 1, 1, 0, 0]), (3, 1, [0, 1, 0]), (1, 1, [1])],
)
def test_crop_is_the_middle_as_wide_as_the_stride(size, stride, expected):
    weights = make_window("crop", size, stride)
    assert weights.dtype == torch.float32
    assert weights.tolist() == expected


@pytest.mark.parametrize("stride", [0, 4, -1])
def test_crop_refuses_a_stride_that_leaves_gaps(stride):
    with pytest.raises(ValueError, match=f"^window: 'crop' .*1 to 3 .*{stride}$"):
        make_window("crop", 3, stride)
