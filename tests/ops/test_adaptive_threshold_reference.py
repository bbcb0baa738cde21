"""`adaptive_threshold`: the reference against tables worked by hand and against the published wording."""

from __future__ import annotations

import pytest
import torch

from fastroute.reference import adaptive_threshold as module
from fastroute.reference.adaptive_threshold import adaptive_threshold_reference

# 0 once, 1 forty times, 3 forty-two times: the mean is 2, so the ones lie half way between the centres 2 and 0. The
# centres then move by (2 / 82) / 3 on the scale of [0, 1], whose square is below 1e-4: this assignment is the last.
TIED = [0.0] + [1.0] * 40 + [3.0] * 42


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ([0, 0, 0, 1], [0, 0, 0, 1]),
        # Centres (2, 0), then (3, 0), then (5, 0.5).
        ([0, 1, 5], [0, 0, 1]),
        # The same, moved and scaled.
        ([-10, -9.5, -7.5], [0, 0, 1]),
        # Nearest to the mean 0.5 is everything from 0.25 up; the next threshold is 0.375, and no class changes.
        ([0, 0.5, 0.5, 1], [0, 1, 1, 1]),
        (TIED, [0] + [1] * 82),
        ([0.3, 0.3, 0.3], [0, 0, 0]),
        ([0.7], [0]),
        ([], []),
    ],
    ids=["two-values", "three-steps", "affine", "middle", "tie", "flat", "one-pixel", "no-pixel"],
)
def test_table(score: list[float], expected: list[int]) -> None:
    assert adaptive_threshold_reference(torch.tensor([score])).tolist() == [expected]


@pytest.mark.parametrize(("assignments", "expected"), [(1, [0, 1, 1]), (2, [0, 0, 1])])
def test_classes_are_those_of_the_last_assignment(
    monkeypatch: pytest.MonkeyPatch, assignments: int, expected: list[int]
) -> None:
    monkeypatch.setattr(module, "MAX_ASSIGNMENTS", assignments)
    assert adaptive_threshold_reference(torch.tensor([[0.0, 1.0, 5.0]])).tolist() == [expected]


def test_images_are_independent() -> None:
    rows = torch.stack([torch.rand(12, generator=torch.Generator().manual_seed(s)) ** (s + 1) for s in range(6)])
    rows[3] = 0.25
    together = adaptive_threshold_reference(rows.view(6, 3, 4))
    assert together.shape == (6, 3, 4)
    for row, classes in zip(rows, together, strict=True):
        assert torch.equal(adaptive_threshold_reference(row[None]).view(3, 4), classes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(8))
def test_against_published_wording(seed: int, dtype: torch.dtype) -> None:
    """Rescale to [0, 1], distances to both centres, in float64: the same classes for every pixel."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(1, 23, 31, generator=generator, dtype=torch.float64).pow(0.3 + seed).to(dtype)
    value = score.double().flatten()
    value = (value - value.min()) / (value.max() - value.min())
    centres = torch.stack([value.mean(), value.new_zeros(())])
    for _ in range(19):
        label = (value[:, None] - centres).square().argmin(dim=1)
        fresh = torch.stack([value[label == c].mean() for c in (0, 1)])
        moved, centres = (fresh - centres).square().sum(), fresh
        if moved <= 1e-4:
            break
    expected = (label == 0).long().view(score.shape)
    assert torch.equal(adaptive_threshold_reference(score), expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_dtype(dtype: torch.dtype) -> None:
    assert adaptive_threshold_reference(torch.tensor([[0.0, 1.0]]), dtype).dtype == dtype


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5)])
def test_empty(shape: tuple[int, ...]) -> None:
    assert adaptive_threshold_reference(torch.empty(shape)).shape == shape
