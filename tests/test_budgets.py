"""Budgets in FLOPs and milliseconds, of one image, a batch and a folder."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from statistics import median

import numpy as np
import pytest
import torch
from networks import as_image, picture, random_classsr
from torch import nn

from fastroute import PatchRouter, ScoreClassifier, io, upscale_many
from fastroute.budget import speed as speeds
from fastroute.budget.limits import Budget, assign_within
from fastroute.budget.speed import Speed
from fastroute.patch import assignment, patch_router
from fastroute.runtime.protocols import ArrayReader, ArrayWriter

# Threads that wait for each other take long beside another busy process.
pytestmark = pytest.mark.usefixtures("quick_tuning", "one_thread")
PATCH, STRIDE, SCALE = 16, 12, 4
IMAGES = [picture(1, 3, 90, 70, seed=1)[0], picture(1, 3, 40, 101, seed=2)[0], picture(1, 3, 16, 16, seed=3)[0]]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTROUTE_CACHE", str(tmp_path))
    return tmp_path / "speed.json"


@pytest.fixture(scope="module")
def router() -> PatchRouter:
    system = random_classsr((3, 12, 40), SCALE, PATCH)
    return PatchRouter(system.branches, system.classifier, patch=PATCH, stride=STRIDE, scale=SCALE, merge=1)


class Sleep(nn.Module):
    """Takes its time per patch."""

    def __init__(self, milliseconds: float) -> None:
        super().__init__()
        self.milliseconds = milliseconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor:
            time.sleep(1e-3 * self.milliseconds * len(x))
        return x


def sleeper(milliseconds: tuple[float, ...] = (0.2, 3.0)) -> PatchRouter:
    classifier = ScoreClassifier(lambda x: x.std(dim=(1, 2, 3)), [0.1 * k for k in range(1, len(milliseconds))])
    return PatchRouter([Sleep(ms) for ms in milliseconds], classifier, patch=PATCH, stride=STRIDE, scale=1, merge=1)


def pace_of(router: PatchRouter, dtype: torch.dtype = torch.float32) -> Speed:
    return router.speed(dtype)


@pytest.mark.slow
def test_flops_are_those_of_the_whole_call(router):
    image = picture(2, 3, 90, 70)
    number, each = 2 * 8 * 6, router.branch_flops
    classifier = router.upscale(image, penalty=0.0).stats
    classifier_flops = classifier.flops.routed - sum(n * f for n, f in zip(classifier.counts_per_class, each, strict=True))
    assert classifier_flops > 0
    for share in (0.1, 0.5, 0.9):
        least, most = number * min(each) + classifier_flops, number * max(each)
        budget = least + share * (most - least)
        stats = router.upscale(image, budget_flops=budget).stats
        assert budget - max(each) < stats.flops.routed <= budget * (1 + 1e-6)
    stats = router.upscale(image, budget_flops=number * max(each)).stats
    assert stats.counts_per_class == [0, 0, number]
    assert stats.seconds["classify"] == 0
    for below in (number * min(each) - 1, number * min(each) + classifier_flops - 1):
        with pytest.raises(ValueError, match=r"^upscale: budget_flops must be at least [\d.e+]+, with everything .*; got"):
            router.upscale(image, budget_flops=below)


@pytest.mark.slow
def test_a_stream_has_the_same_budgets(router):
    image = IMAGES[0]
    allowed = 0.7 * 48 * max(router.branch_flops)
    expected = router.upscale(image, budget_flops=allowed)
    output = np.empty(tuple(expected.image.shape), np.float32)
    reader, writer = ArrayReader(image.numpy(), channels_first=True), ArrayWriter(output, channels_first=True)
    streamed = router.stream(reader, writer, budget_flops=allowed)
    assert torch.equal(streamed.class_map, expected.class_map)
    assert torch.equal(torch.from_numpy(output), expected.image)
    output[:] = -1
    with pytest.raises(ValueError, match="budget_ms must be at least"):
        sleeper().stream(reader, ArrayWriter(output, True), budget_ms=3)
    assert (output == -1).all()


@pytest.mark.slow
def test_milliseconds_are_met():
    """Branches that sleep: the time is theirs, whatever else the machine does."""
    router, image = sleeper(), IMAGES[0]
    number = 48
    for ms in (40.0, 70.0, 110.0):
        stats = [router.upscale(image, budget_ms=ms).stats for _ in range(5)]
        taken = median(1e3 * (s.seconds["total"] - s.seconds["tune"]) for s in stats)
        assert abs(taken / ms - 1) < 0.15
        assert all(min(s.counts_per_class) > 0 for s in stats)
    stats = router.upscale(image, budget_ms=1e4).stats
    assert stats.counts_per_class == [0, number] and stats.seconds["classify"] == 0
    with pytest.raises(ValueError, match=r"^upscale: budget_ms must be at least [\d.]+ ms on this device, .*; got 3$"):
        router.upscale(image, budget_ms=3)


@pytest.mark.slow
def test_an_expensive_class_that_runs_fast_is_used():
    """Milliseconds go by the clock, not by FLOPs."""
    router = sleeper((2.0, 0.1, 4.0))
    assert router.upscale(IMAGES[0], budget_ms=45).stats.counts_per_class[0] == 0


@pytest.mark.slow
def test_speed_is_measured_once_and_remembered(cache, monkeypatch):
    speed = pace_of(sleeper())
    assert speed.branches == pytest.approx([0.2, 3.0], rel=0.5) and min(speed.classify, speed.rest) > 0
    assert json.loads(cache.read_text())
    measured = []
    monkeypatch.setattr(patch_router, "measure_patch_speed", lambda *args: measured.append(args) or Speed([1.0, 2.0], 3.0, 4.0))
    assert pace_of(sleeper()) == speed
    assert not measured
    # What decides the speed is measured apart.
    assert pace_of(sleeper(), torch.uint8).rest == 4.0
    assert pace_of(sleeper((0.2, 3.0, 5.0))) is not speed
    assert len(measured) == 2


GOOD = asdict(Speed([1.0, 2.0], 0.5, 0.0))


@pytest.mark.parametrize(
    "entry",
    [
        "",
        3,
        {"rest": 1},
        *({**GOOD, "branches": b} for b in ([0, 1], [1, "x"], [1], ["1", "2"], {"1": 1, "2": 2}, [[1]] * 2, [True] * 2, None)),
        *({**GOOD, "branches": [x, 1.0]} for x in (math.nan, math.inf, -1.0, 5e-324, 1e308, 10**400)),
        *({**GOOD, name: x} for name in ("rest", "classify", "encode") for x in (None, "1", -1.0, math.nan, 1e308, True)),
        {**GOOD, "more": 1},
    ],
)
def test_a_damaged_file_is_measured_anew(cache, entry):
    cache.write_text(json.dumps({"key": GOOD}))
    assert speeds.recall("key", 2) is not None
    cache.write_text(json.dumps({"key": entry}))
    assert speeds.recall("key", 2) is None
    speed = speeds.remember("key", Speed([1.0, 2.0], 0.5, 0.0))
    assert speeds.recall("key", 2) == speed


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTROUTE_CACHE", str(tmp_path / "file"))
    assert speeds.remember("key", Speed([1.0], 0.0, 0.0)).branches == [1.0]
    assert speeds.recall("key", 1) is None


def test_learning():
    speed = Speed([1.0, 2.0, 4.0], 1.0, 0.5)
    speed.learn([0, 0, 0], [0, 0, 0], 0.1, 0.1)
    assert speed == Speed([1.0, 2.0, 4.0], 1.0, 0.5)
    # Everything takes twice as long, a class that was not used too.
    speed.learn([100, 0, 50], [0.2, 0.0, 0.4], 0.3, 0.15)
    assert speed.branches == pytest.approx([1.5, 3.0, 6.0]) and speed.classify == 1.5 and speed.rest == 0.75
    # One class alone does, and has patches enough to be believed.
    speed.learn([1600, 0, 1600], [4.8, 0.0, 9.6], None, 2.4)
    assert speed.branches[0] == pytest.approx(2.25, rel=0.01) and speed.branches[2] == pytest.approx(6.0, rel=0.01)
    assert 3.0 < speed.branches[1] < 4.5 and speed.classify == 1.5
    # What came between is not believed in full; what was faster is.
    speed = Speed([1.0, 2.0], 1.0, 0.5)
    speed.learn([100, 100], [30.0, 40.0], 50.0, 60.0)
    assert speed == Speed([1.5, 3.0], 1.5, 0.75)
    speed.learn([100, 100], [0.0, 0.0], 0.0, 0.0)
    assert speed == Speed([0.75, 1.5], 0.75, 0.375)


def test_what_is_allowed_is_spent():
    score = torch.softmax(torch.randn(300, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    costs = torch.tensor([1.0, 3.0, 2.0])
    for allowed in (301.0, 450.0, 800.0):
        spent = costs[assign_within(score, costs.tolist(), allowed)].sum()
        assert allowed - 3 < spent <= allowed
    assert not assign_within(score, costs.tolist(), -5.0).any()
    assert assign_within(score, costs.tolist(), 1e9).eq(1).all()
    assert assign_within(score[:0], costs.tolist(), 1.0).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"budget": 0.5, "budget_ms": 10}, "give one of budget, budget_flops and budget_ms; got budget, budget_ms"),
        ({"budget_flops": 1e9, "budget_ms": 10}, "give one of"),
        ({"budget_flops": 1e9, "penalty": 1.0}, "either penalty or a budget"),
        ({"budget_ms": 0}, "budget_ms must be positive and finite; got 0"),
        ({"budget_flops": float("inf")}, "budget_flops must be positive and finite; got inf"),
        ({"budget_ms": float("nan")}, "budget_ms must be positive"),
        ({"budget_ms": 10, "class_map": torch.zeros(2, 2, dtype=torch.int64)}, "either class_map or budget"),
    ],
)
def test_errors(router, arguments, words):
    with pytest.raises(ValueError, match=f"^upscale: .*{words}"):
        router.upscale(picture(1, 3, 28, 28)[0], **arguments)


@pytest.mark.parametrize("budget", [0.5, 0.6, 0.9])
def test_many_images_share_as_a_batch_does(router, budget):
    batch = picture(3, 3, 50, 61, seed=5)
    # Images of different difficulty, so that sharing differs from one budget each.
    batch[0] = batch[0] * 0.05 + 0.5
    together = router.upscale(batch, budget=budget)
    results = list(upscale_many(router, list(batch), budget=budget))
    assert torch.equal(torch.stack([r.class_map for r in results]), together.class_map)
    torch.testing.assert_close(torch.stack([r.image for r in results]), together.image, rtol=0, atol=1e-5)
    assert sum(r.stats.flops.routed for r in results) == together.stats.flops.routed
    spent = [sum(n * c for n, c in zip(r.stats.counts_per_class, router.costs, strict=True)) for r in results]
    assert sum(spent) <= budget * together.class_map.numel() * max(router.costs)
    alone = [router.upscale(image, budget=budget).class_map for image in batch]
    assert not torch.equal(torch.stack(alone), together.class_map)


def test_many_images_of_all_kinds(router, tmp_path):
    image = as_image(IMAGES[0], torch.uint8)
    io.write_image(tmp_path / "one.png", image)
    opened = []
    sources = [tmp_path / "one.png", lambda: opened.append(1) or IMAGES[1], picture(2, 3, 30, 30)]
    number = 48 + 27 + 2 * 9
    least, allowed = number * min(router.branch_flops), 0.7 * number * max(router.branch_flops)
    with pytest.raises(ValueError, match=r"^upscale_many: budget_flops must be at least"):
        next(upscale_many(router, sources, budget_flops=least))
    opened.clear()
    results = list(upscale_many(router, sources, budget_flops=allowed))
    assert len(opened) == 2
    assert [tuple(r.image.shape) for r in results] == [(3, 360, 280), (3, 160, 404), (2, 3, 120, 120)]
    assert results[0].image.dtype == torch.uint8
    assert torch.equal(results[0].image, router.upscale(image, class_map=results[0].class_map).image)
    spent = sum(r.stats.flops.routed for r in results)
    assert allowed - max(router.branch_flops) < spent <= allowed
    assert all(r.stats.seconds["classify"] > 0 for r in results)


@pytest.mark.slow
def test_many_images_within_milliseconds():
    router = sleeper()
    pace_of(router)
    stats = [r.stats for r in upscale_many(router, IMAGES, budget_ms=120)]
    assert abs(sum(1e3 * (s.seconds["total"] - s.seconds["tune"]) for s in stats) / 120 - 1) < 0.2
    with pytest.raises(ValueError, match=r"^upscale_many: budget_ms must be at least .* on this device"):
        next(upscale_many(router, IMAGES, budget_ms=2))


@pytest.mark.parametrize(
    ("images", "arguments", "words"),
    [
        ([], {"budget": 0.5}, "images must hold at least one image"),
        (IMAGES, {}, "give one of budget"),
        (IMAGES, {"budget": 0.5, "budget_ms": 3}, "give one of budget"),
        (IMAGES, {"budget": 0.01}, "budget must lie in"),
    ],
)
def test_errors_of_many(router, images, arguments, words):
    with pytest.raises(ValueError, match=words):
        upscale_many(router, images, **arguments)
    with pytest.raises(ValueError, match="has no classifier"):
        upscale_many(PatchRouter([nn.Identity()], scale=1, merge=1), IMAGES, budget=0.5)


def test_one_class_has_nothing_to_choose():
    router = PatchRouter([Sleep(1.0)], None, patch=PATCH, stride=STRIDE, scale=1, merge=1)
    assert router.upscale(IMAGES[2], budget_ms=100).stats.counts_per_class == [1]
    with pytest.raises(ValueError, match="budget_ms must be at least"):
        router.upscale(IMAGES[0], budget_ms=10)
    assert assignment.affords_all(Budget(1.0), 3.0, 3, [1.0], None)
