"""The search of the pixel path for the penalty at which a budget is spent, on samples of logits."""

from __future__ import annotations

import pytest
import torch

import fastroute
from fastroute.pixel.pixel_budget import PixelBudget, Sample, WaitingImage, pooled
from fastroute.pixel.pixel_stats import Work


def relative(logits: torch.Tensor) -> torch.Tensor:  # [K, n] -> [1, K, n]
    return (logits - logits[:1])[None]


def prices(cost: list[float], ids: torch.Tensor) -> float:
    return float(torch.tensor(cost, dtype=torch.float64)[ids.long()].sum())


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_search(classes):
    logits = 3 * torch.randn(classes, 3000, generator=torch.Generator().manual_seed(classes))
    cost = [1.0, 3.0, 2.0, 7.0][:classes]
    sample, work = Sample(relative(logits), 1.0), Work(pixels=3000)
    for allowed in (3001.0, 4000.0, 7000.0, 3000.0 * max(cost)):
        budget = PixelBudget(cost, left=allowed)
        penalty = budget.solve(sample, work, 0.0)
        assert budget.mean * 3000 <= allowed * (1 + 1e-8) and budget.mean * 3000 > allowed - max(cost)
        ids = budget.take(sample.scores, penalty, 0.0)
        assert prices(cost, ids) == pytest.approx(budget.mean * 3000) == pytest.approx(allowed - budget.left)
        expected = fastroute.assign_classes(logits.softmax(0).t().double(), cost, budget=allowed / (3000 * max(cost)))
        assert torch.equal(expected, ids.long())
    budget = PixelBudget(cost, left=1.0)
    assert not budget.take(sample.scores, budget.solve(sample, work, 0.0), 0.0).any() and budget.mean == min(cost)


def test_pixels_of_a_pool_stand_for_as_many():
    ramp = torch.arange(12.0).expand(1, 2, 12)
    assert pooled([Sample(ramp, 3.0)]) is ramp
    # Each of the second stands for two, so every other one of the first is taken, and of the third every fourth.
    both = pooled([Sample(ramp, 1.0), Sample(ramp, 2.0), Sample(ramp, 0.5)])
    assert both[0, 1].tolist() == [*range(0, 12, 2), *range(12), *range(0, 12, 4)]
    assert pooled([Sample(ramp, 1.0), Sample(ramp[:, :, :1], 100.0)])[0, 0].tolist() == [0, 0]


def test_an_image_that_waits_has_its_part_of_the_budget():
    """Twice as many pixels wait, of which every other one was sampled; they gain more than those of the image itself."""
    own, other = (torch.randn(2, 1000, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    other[1] += 1.0
    waiting = WaitingImage(1, Work(pixels=2000), Sample(relative(other), 2.0))
    budget = PixelBudget([1.0, 5.0], left=3 * 1000 * 3.0, waiting=[waiting])
    penalty = budget.solve(Sample(relative(own), 1.0), Work(pixels=1000), 0.0)
    whole = torch.cat([own, other.repeat(1, 2)], dim=1)
    expected = fastroute.assign_classes(whole[None], [1.0, 5.0], budget=0.6, logits=True)[0, :1000]
    ids = budget.take(relative(own), penalty, 1.0)
    assert 100 < expected.sum() < 450 and (ids != expected).sum() < 30 and budget.pixels == 2000


def test_a_purse_is_not_overdrawn():
    scores = relative(torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)))
    budget = PixelBudget([1.0, 5.0], left=2000.0, pixels=1000)
    # An exponent at which all would be expensive.
    spent_so_far = [prices(budget.cost, budget.take(part, -100.0, reserve=1.0)) for part in scores.split(100, dim=2)]
    assert sum(spent_so_far) == 2000.0 and spent_so_far[0] == 500.0 and spent_so_far[-1] == 100.0
    assert budget.left == 0 and budget.pixels == 0
