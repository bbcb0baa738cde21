"""What a call of the router may be given: budgets, classes, and what it refuses before any work."""

from __future__ import annotations

import copy
import re
from itertools import pairwise

import pytest
import torch
from networks import picture, random_classsr
from support import bits
from torch import nn

from fastroute import PatchRouter, TileGrid
from fastroute.models.fsrcnn import FSRCNN
from fastroute.profiling import count_flops

pytestmark = pytest.mark.usefixtures("quick_tuning")
PATCH, STRIDE, SCALE = 8, 8, 2
STAGES = ["tune", "classify", "assign", "extract", "branches", "stitch", "total"]


@pytest.fixture(scope="module")
def system():
    return random_classsr((3, 10, 28), SCALE, PATCH)


@pytest.fixture
def router(system):
    return PatchRouter(system.branches, copy.deepcopy(system.classifier), patch=PATCH, stride=STRIDE, scale=SCALE, merge=1)


@pytest.fixture
def idle(router, monkeypatch):
    """A router whose networks must not run."""

    def ran(*args):
        pytest.fail("a network ran before the argument was refused")

    for module in (router.classifier, *router.branches):
        module.register_forward_pre_hook(ran)
    monkeypatch.setattr("fastroute.patch.assignment.classify_patches", ran)
    return router


@pytest.mark.slow
def test_budget_holds_and_is_spent(router):
    image = picture(1, 3, 88, 96, seed=3)
    grid = TileGrid(88, 96, PATCH, STRIDE, SCALE)
    share = torch.tensor(router.branch_flops, dtype=torch.float64) / max(router.branch_flops)
    assert share[0] < 0.45
    previous = None
    for budget in (0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1.0):
        result = router.upscale(image, budget=budget)
        used = share[result.class_map.long()].mean().item()
        assert used <= budget + 1e-9
        # What is left does not pay for one more patch of the most expensive class.
        assert used > budget - (1 - share[0]) / grid.num_patches
        assert result.stats.flops.dense == max(router.branch_flops) * grid.num_patches
        if previous is not None:
            assert (result.class_map >= previous).all(), "a larger budget made a patch cheaper"
        previous = result.class_map
    assert (previous == 2).all()


def test_impossible_budgets(idle):
    least = min(idle.branch_flops) / max(idle.branch_flops)
    for budget in (least * 0.9, 0, -1, 1.01, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=re.escape(f"budget must lie in [{least:.4g}, 1]")):
            idle.upscale(picture(1, 3, 20, 20), budget=budget)


def test_least_budget_takes_the_cheapest_branch_everywhere(router):
    result = router.upscale(picture(1, 3, 40, 40), budget=min(router.branch_flops) / max(router.branch_flops))
    assert result.stats.counts_per_class == [25, 0, 0]


def test_full_budget_does_not_classify(router, monkeypatch):
    monkeypatch.setattr("fastroute.patch.assignment.classify_patches", lambda *args: pytest.fail("classified"))
    result = router.upscale(picture(1, 3, 20, 24), budget=1)
    assert result.stats.counts_per_class == [0, 0, 9]
    assert result.stats.flops.fraction == 1 and result.stats.seconds["classify"] == 0


def test_full_budget_takes_the_most_expensive_branch_wherever_it_stands(system):
    router = PatchRouter([system.net3, system.net1], None, patch=PATCH, stride=STRIDE, scale=SCALE, merge=1)
    assert (router.upscale(picture(1, 3, 20, 24), budget=1).class_map == 0).all()


def test_penalty_moves_patches_to_cheaper_branches(router):
    image = picture(1, 3, 64, 64, seed=1)
    maps = [router.upscale(image, penalty=k).class_map for k in (-100, -0.5, 0, 0.5, 100)]
    assert all((expensive >= cheaper).all() for expensive, cheaper in pairwise(maps))
    assert (maps[0] == 2).all() and (maps[-1] == 0).all()
    assert torch.equal(maps[2], router.upscale(image).class_map)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_given_classes(router, dtype):
    image = picture(2, 3, 30, 41)
    first = router.upscale(image)
    again = router.upscale(image, class_map=first.class_map.to(dtype))
    assert torch.equal(bits(again.image), bits(first.image))
    assert torch.equal(again.class_map, first.class_map) and again.class_map.dtype == torch.uint8
    assert again.stats.seconds["classify"] == 0
    routed = sum(f * n for f, n in zip(router.branch_flops, again.stats.counts_per_class, strict=True))
    assert again.stats.flops.routed == routed < first.stats.flops.routed


def test_given_classes_of_one_image(router):
    image = picture(1, 3, 30, 41)[0]
    first = router.upscale(image)
    assert first.class_map.shape == (4, 6)
    for class_map in (first.class_map, first.class_map[None], first.class_map.t().contiguous().t()):
        again = router.upscale(image, class_map=class_map)
        assert torch.equal(again.image, first.image) and again.class_map.shape == (4, 6)


def test_classes_are_obeyed(system):
    """Without a classifier, and each branch in the place that the map says."""
    router = PatchRouter(system.branches, None, patch=PATCH, stride=STRIDE, scale=SCALE, merge=1)
    image = picture(1, 3, 24, 24)
    class_map = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 1, 0]])
    output = router.upscale(image, class_map=class_map).image
    dense = [router.upscale(image, class_map=torch.full((3, 3), k)).image for k in range(3)]
    for i in range(3):
        for j in range(3):
            place = (..., slice(16 * i, 16 * i + 16), slice(16 * j, 16 * j + 16))
            torch.testing.assert_close(output[place], dense[class_map[i, j]][place], rtol=0, atol=1e-5)
            assert not torch.allclose(output[place], dense[(class_map[i, j] + 1) % 3][place], rtol=0, atol=1e-2)


@pytest.mark.slow
def test_statistics(router, system):
    result = router.upscale(picture(2, 3, 30, 41))
    stats = result.stats
    assert stats.counts_per_class == torch.bincount(result.class_map.flatten(), minlength=3).tolist()
    assert sum(stats.counts_per_class) == result.class_map.numel() == 48
    assert router.branch_flops == [count_flops(branch, (1, 3, PATCH, PATCH)) for branch in system.branches]
    assert router.paper_flops == [count_flops(branch, (1, 3, PATCH, PATCH), "paper") for branch in system.branches]
    branches = sum(f * n for f, n in zip(router.branch_flops, stats.counts_per_class, strict=True))
    assert stats.flops.routed > branches, "the classifier is not counted"
    assert stats.paper_flops.routed == sum(f * n for f, n in zip(router.paper_flops, stats.counts_per_class, strict=True))
    assert stats.paper_flops.dense == 48 * max(router.paper_flops)
    assert list(stats.seconds) == STAGES
    assert all(seconds > 0 for stage, seconds in stats.seconds.items() if stage != "tune")
    assert sum(stats.seconds[stage] for stage in STAGES[:-1]) <= stats.seconds["total"]
    assert 0 <= stats.overhead <= 1
    assert "48 patches" in str(stats)


def test_statistics_of_no_image(router):
    result = router.upscale(picture(0, 3, 30, 41))
    assert result.image.shape == (0, 3, 60, 82) and result.class_map.shape == (0, 4, 6)
    assert result.stats.counts_per_class == [0, 0, 0]
    assert 0 <= result.stats.overhead <= 1
    assert isinstance(str(result.stats), str)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ([[0.5]], TypeError, "image must be a torch.Tensor; got list"),
        (torch.rand(9, 9), ValueError, "image must be (B, C, H, W) or (C, H, W); got (9, 9)"),
        (torch.rand(1, 1, 3, 9, 9), ValueError, "image must be (B, C, H, W) or (C, H, W); got (1, 1, 3, 9, 9)"),
        (torch.rand(1, 4, 9, 9), ValueError, "image must have 3 channels; got (1, 4, 9, 9)"),
        (torch.rand(9, 9, 3), ValueError, "image must have 3 channels; got (9, 9, 3)"),
        (torch.ones(3, 9, 9, dtype=torch.int32), TypeError, "image must be one of float32, float16, bfloat16, float64, uint8"),
        (torch.ones(3, 9, 9, dtype=torch.bool), TypeError, "got bool"),
        (torch.rand(3, 0, 9), ValueError, "image must have at least one pixel; got (3, 0, 9)"),
        (torch.rand(2, 3, 9, 0), ValueError, "image must have at least one pixel; got (2, 3, 9, 0)"),
        (torch.rand(3, 9, 9, device="meta"), ValueError, "image must be on cpu, where the networks are; got meta"),
    ],
)
def test_refused_images(idle, image, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        idle.upscale(image)
    assert str(caught.value).startswith("upscale: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_map": torch.zeros(3, 2, dtype=torch.int64)}, "class_map must be (1, 2, 3) for this image; got (3, 2)"),
        ({"class_map": torch.zeros(6, dtype=torch.int64)}, "class_map must be (1, 2, 3) for this image; got (6,)"),
        ({"class_map": torch.zeros(2, 2, 3, dtype=torch.int64)}, "class_map must be (1, 2, 3) for this image"),
        ({"class_map": torch.full((2, 3), 3)}, "got 3"),
        ({"class_map": torch.full((2, 3), -1)}, "got -1"),
        ({"class_map": torch.zeros(2, 3, dtype=torch.int64), "budget": 1}, "give either class_map or budget and penalty"),
        ({"class_map": torch.zeros(2, 3, dtype=torch.int64), "penalty": 1}, "give either class_map or budget and penalty"),
        ({"budget": 0.7, "penalty": 0.5}, "give either penalty or budget"),
        ({"penalty": float("nan")}, "penalty must be finite"),
    ],
)
def test_refused_options(idle, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        idle.upscale(picture(1, 3, 15, 20), **options)


@pytest.mark.slow
def test_refused_types_of_class_maps(idle):
    for class_map in (torch.zeros(2, 3), [[0, 0, 0], [0, 0, 0]]):
        with pytest.raises(TypeError, match="upscale: class_map must be"):
            idle.upscale(picture(1, 3, 15, 20), class_map=class_map)


def test_a_nan_in_the_image_is_an_error_of_its_score(router):
    image = picture(1, 3, 20, 24)
    image[0, 1, 3, 3] = float("nan")
    for module in router.branches:
        module.register_forward_pre_hook(lambda *args: pytest.fail("a branch ran"))
    with pytest.raises(ValueError, match="score must not be NaN"):
        router.upscale(image)


def test_no_classifier(system):
    router = PatchRouter(system.branches, None, patch=PATCH, stride=STRIDE, scale=SCALE, merge=1)
    for options in ({}, {"budget": 0.8}, {"penalty": 1}):
        with pytest.raises(ValueError, match="this router has no classifier; give a class_map or budget=1"):
            router.upscale(picture(1, 3, 20, 20), **options)
    assert router.upscale(picture(1, 3, 20, 20), budget=1).stats.counts_per_class == [0, 0, 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branches": []}, "branches must hold at least one network"),
        ({"stride": 9}, "stride must be at most patch (8)"),
        ({"stride": 0}, "stride must be at least 1; got 0"),
        ({"scale": 0}, "scale must be at least 1; got 0"),
        ({"patch": -1, "stride": 1}, "must be at least 1; got -1"),
        ({"window": "box"}, "window: must be one of"),
        ({"window": torch.ones(8)}, "window: must have shape (16,)"),
        ({"window": torch.zeros(16)}, "weights must be positive"),
    ],
)
def test_refused_routers(options, message):
    arguments = {"branches": [FSRCNN(4, 2)], "patch": PATCH, "stride": STRIDE, "scale": SCALE, **options}
    with pytest.raises(ValueError, match=re.escape(message)):
        PatchRouter(**arguments, merge=1)


@pytest.mark.parametrize("branch", [FSRCNN(4, 4), nn.Conv2d(3, 1, 1), nn.Sequential(FSRCNN(4, 2), nn.Conv2d(3, 1, 1))])
@pytest.mark.parametrize("first", [True, False])
def test_branch_of_another_size(branch, first):
    """A branch that does not fit is named, not broadcast: wherever it stands and whichever ran before it."""
    branches = [branch, FSRCNN(16, 2)] if first else [FSRCNN(4, 2), branch]
    router = PatchRouter(branches, None, patch=PATCH, stride=STRIDE, scale=SCALE, merge=1)
    with pytest.raises(ValueError, match="a branch must map 8 x 8 patches to"):
        router.upscale(picture(1, 3, 16, 16), class_map=torch.tensor([[0, 1], [1, 0]]))


@pytest.mark.parametrize("optimized", [True, False])
def test_given_networks_stay_as_they_are(optimized):
    """A router made in the middle of training does not end it."""
    system = copy.deepcopy(random_classsr((3, 6), SCALE, PATCH)).train()
    before = {name: bits(value.detach().clone()) for name, value in system.named_parameters()}
    strides = [p.stride() for p in system.parameters()]
    router = PatchRouter(
        system.branches, system.classifier, patch=PATCH, stride=STRIDE, scale=SCALE, optimized=optimized, merge=1
    )
    router.upscale(picture(1, 3, 30, 41))
    assert all(torch.equal(bits(value.detach()), before[name]) for name, value in system.named_parameters())
    assert [p.stride() for p in system.parameters()] == strides
    assert all(p.requires_grad for p in system.parameters())
    assert all(module.training for module in system.modules())


def test_to(router):
    assert router.to("cpu") is router and router.device == torch.device("cpu")


@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 3, 7, 300)])
def test_bytes_as_floats_are_refused(shape):
    router = PatchRouter([nn.Identity()], patch=8, stride=8, scale=1, channels=3, merge=1)
    with pytest.raises(ValueError, match=r"^upscale: a floating image must lie in about \[0, 1\]; it has values like 200: "):
        router.upscale(torch.full(shape, 200.0))
