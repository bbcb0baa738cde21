"""Networks of others, functions and free classes in a router; classes by one number per patch."""

from __future__ import annotations

import pytest
import torch
from networks import patches_of, picture, routed_plainly
from torch import nn
from torch.nn import functional as F

import fastroute
from fastroute import Bicubic, PatchRouter, ScoreClassifier, TileGrid
from fastroute.models.adapters import Described, Function, as_module
from fastroute.models.arm import edge_score
from fastroute.models.fsrcnn import FSRCNN

pytestmark = pytest.mark.usefixtures("quick_tuning")
SCORES = torch.tensor([-1e6, -3.0, 0.9, 1.0, 1.1, 2.5, 7.0, 7.1, 50.0, 1e6])


class Descriptor:
    """What spandrel's descriptors have and do, as far as a router uses it."""

    def __init__(self, model: nn.Module, scale: int, input_channels: int) -> None:
        self.model, self.scale, self.input_channels = model, scale, input_channels

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return self.model(image).clamp(0, 1)


def strength(patches: torch.Tensor) -> torch.Tensor:
    return patches.std(dim=(1, 2, 3))


def first_pixel(patches: torch.Tensor) -> torch.Tensor:
    return patches[:, 0, 0, 0]


def classes_of(classifier: nn.Module, scores: torch.Tensor, **how: float) -> list[int]:
    probability = classifier(scores.view(-1, 1, 1, 1).expand(-1, 1, 2, 2))
    costs = [1.0, 3.0, 4.0][: probability.shape[1]]
    return fastroute.assign_classes(probability, costs, **how).tolist()


def test_score_table():
    classifier = ScoreClassifier(first_pixel, (1.0, 7.0))
    assert classes_of(classifier, SCORES) == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert classes_of(ScoreClassifier(first_pixel, [0.0]), SCORES - 1) == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("thresholds", [(0.0,), (-4.0,), (1.0, 7.0), (1e-6, 2e-6), (-1e4, 1e4)])
def test_a_budget_moves_patches_in_the_order_of_their_scores(thresholds):
    classifier = ScoreClassifier(first_pixel, thresholds)
    scores = torch.randn(200, generator=torch.Generator().manual_seed(0)).double() * 30
    order = scores.argsort()
    before: list[int] | None = None
    for penalty in (-40.0, -5.0, -1.0, 0.0, 0.5, 1.0, 5.0, 40.0):
        classes = torch.tensor(classes_of(classifier, scores, penalty=penalty))[order]
        assert (classes.diff() >= 0).all()
        assert before is None or all(a >= b for a, b in zip(before, classes.tolist(), strict=True))
        before = classes.tolist()
    for budget in (0.4, 0.6, 0.9):
        classes = torch.tensor(classes_of(classifier, scores, budget=budget))[order]
        assert (classes.diff() >= 0).all()
        costs = torch.tensor([1.0, 3.0, 4.0][: len(thresholds) + 1])
        # Within one patch of the budget: no two patches are alike.
        assert budget - 1 / 200 <= (costs[classes] / costs[-1]).mean() <= budget + 1e-6 or classes.unique().numel() == 1


@pytest.mark.parametrize("thresholds", [(), (1.0, 1.0), (2.0, 1.0), (float("nan"),), (0.0, float("inf"))])
def test_thresholds_must_rise(thresholds):
    with pytest.raises(ValueError, match=r"^ScoreClassifier: thresholds must be finite and rise"):
        ScoreClassifier(first_pixel, thresholds)


def test_score_of_another_shape():
    with pytest.raises(ValueError, match=r"^ScoreClassifier: score must map \(2, C, p, p\) to \(2,\); got \(2, 3\)"):
        ScoreClassifier(lambda x: x.mean(dim=(2, 3)), (0.5,))(torch.rand(2, 3, 4, 4))


@pytest.mark.slow
def test_router_of_functions_free_classes_and_a_score():
    image, grid = picture(1, 3, 60, 45), TileGrid(60, 45, 16, 12, 2)
    score = edge_score(patches_of(image, grid))
    thresholds = score.quantile(torch.tensor([0.3, 0.6])).tolist()
    router = PatchRouter(
        [lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"), Bicubic(2), FSRCNN(3, 2)],
        ScoreClassifier(edge_score, thresholds),
        patch=16,
        stride=12,
        scale=2,
        merge=1,
    )
    result = router.upscale(image)
    assert result.class_map.flatten().tolist() == [sum(s > t for t in thresholds) for s in score.tolist()]
    assert min(result.stats.counts_per_class) > 0
    expected = routed_plainly(image, grid, router.branches, result.class_map.flatten())
    torch.testing.assert_close(result.image.double(), expected, rtol=0, atol=1e-5)
    cheap = router.upscale(image, budget=0.2)
    assert cheap.stats.counts_per_class[2] < result.stats.counts_per_class[2]


def test_identity_keeps_a_gray_image():
    image = picture(2, 1, 30, 41)
    classifier = ScoreClassifier(strength, (0.2,))
    router = PatchRouter(
        [nn.Identity(), nn.Conv2d(1, 1, 3, padding=1).bfloat16()], classifier, patch=16, stride=12, scale=1, merge=1
    )
    assert router.channels == 1 and router.dtype == torch.bfloat16
    result = router.upscale(image, class_map=torch.zeros(2, 3, 4, dtype=torch.int64))
    torch.testing.assert_close(result.image, image.bfloat16().float(), rtol=0, atol=2**-8)
    assert PatchRouter([nn.Identity()], scale=1, channels=4, merge=1).upscale(torch.rand(4, 9, 9)).image.shape == (4, 9, 9)


def test_descriptors_are_called_and_their_networks_moved():
    network = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.PixelShuffle(2))
    branch = as_module("PatchRouter", "branches", Descriptor(network, 2, 2))
    assert isinstance(branch, Described) and (branch.channels, branch.scale) == (2, 2)
    assert len(list(branch.parameters())) == 2
    image = 1.9 * picture(1, 2, 20, 20)
    router = PatchRouter([Descriptor(network, 2, 2)], patch=20, stride=20, scale=2, merge=1)
    with torch.no_grad():
        torch.testing.assert_close(router.upscale(image).image, network(image).clamp(0, 1), rtol=0, atol=1e-6)
    # A copy: what becomes of the caller's network does not matter.
    before = router.upscale(image).image
    nn.init.zeros_(network[0].weight)
    assert torch.equal(router.upscale(image).image, before)
    assert router.branches[0].networks[0] is router.branches[0].descriptor.model


def test_what_is_no_network():
    assert isinstance(as_module("op", "x", torch.tanh), Function)
    assert repr(Function(strength)) == "Function(test_adapters.strength)"
    module = nn.Identity()
    assert as_module("op", "x", module) is module
    for wrong in (3, "net.pth", nn.Identity, None):
        with pytest.raises(TypeError, match=r"^PatchRouter: branches must be a torch.nn.Module, .* got "):
            PatchRouter([wrong], merge=1)
