"""Budgets of the pixel path in fractions, FLOPs and milliseconds, of one image, a batch and a folder."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from statistics import median

import numpy as np
import pytest
import torch
from networks import as_image, picture
from test_pixel_router import make_model

from fastroute import PixelRouter, io, upscale_many
from fastroute.budget.speed import Speed
from fastroute.pixel import pixel_image, pixel_router, pixel_rows, pixel_speed
from fastroute.pixel.pixel_image import PixelImage
from fastroute.pixel.pixel_rows import PixelGrid
from fastroute.pixel.pixel_stats import Work
from fastroute.pixel.request import ClassRule, Request, make_grid
from fastroute.runtime.protocols import ArrayReader, ArrayWriter
from fastroute.runtime.results import Stopwatch
from fastroute.runtime.rows import TensorSource

HIDDEN = {2: ([5], [40, 40]), 3: (None, [5], [40, 40])}
IMAGE = picture(1, 3, 15, 20, seed=1)[0]
PIXELS, FEATURES = 60 * 80, 15 * 20


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTROUTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "speed.json"


@pytest.fixture(params=[2, 3], ids=["2 classes", "3 classes"])
def router(request) -> PixelRouter:
    return PixelRouter(make_model(hidden=HIDDEN[request.param]))


@pytest.fixture
def sampled(monkeypatch):
    """Rows are sampled, and images cut into many bands."""
    monkeypatch.setattr(pixel_rows, "BUDGET_SAMPLE", {"cpu": 4000})
    monkeypatch.setattr(pixel_rows, "WAITING_SAMPLE", 300)
    monkeypatch.setattr(pixel_rows, "OUTPUT_BAND", {"cpu": 500})


def with_pace(speed: Speed, dtype: torch.dtype = torch.float32, scale: float = 4.0, hidden=HIDDEN[2]) -> PixelRouter:
    router = PixelRouter(make_model(hidden=hidden))
    router.speeds.known[(dtype, router.device, torch.get_num_threads(), scale)] = dataclasses.replace(
        speed, branches=list(speed.branches)
    )
    return router


def shares(router: PixelRouter) -> torch.Tensor:
    cost = torch.tensor(router.class_cost(4.0), dtype=torch.float64)
    return cost / cost.max()


def flops_between(router: PixelRouter, share: float, images: int = 1) -> float:
    """From everything in the cheapest class to everything in the most expensive, classified."""
    work = Work(FEATURES, PIXELS, FEATURES, PIXELS, FEATURES)
    fixed, costs = router.flops.fixed(work), router.flops.costs
    return images * (fixed + PIXELS * (min(costs) + share * (max(costs) - min(costs))))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_flops_are_those_of_the_whole_call(router, share):
    budget = flops_between(router, share)
    stats = router.upscale(IMAGE, budget_flops=budget).stats
    # A class without layers counts none; under a budget its values do.
    spare = PIXELS * (router.flops.costs[0] - router.flops.pixel[0])
    assert budget - 2 * max(router.flops.costs) - spare < stats.flops.routed <= budget
    assert stats.seconds["classify"] > 0


@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_sample_never_overdraws(router, share):
    budget = flops_between(router, share) + router.flops.fixed(Work(classified=10 * 80, products=10 * 20))
    stats = router.upscale(IMAGE, budget_flops=budget).stats
    assert 0.85 * budget < stats.flops.routed <= budget
    fraction = float(shares(router).min()) * (1 - share) + share
    result = router.upscale(IMAGE, budget=fraction)
    assert fraction - 0.1 < shares(router)[result.class_map.long()].mean() <= fraction * (1 + 1e-9)


def test_nothing_is_classified_where_there_is_nothing_to_choose(router):
    most_expensive = router.upscale(IMAGE, budget=1)
    work = Work(FEATURES, PIXELS)
    enough = router.flops.all_in(router.num_classes - 1, work)
    assert enough == most_expensive.stats.flops.dense == most_expensive.stats.flops.routed
    for result in (most_expensive, router.upscale(IMAGE, budget_flops=enough)):
        assert (result.class_map == router.num_classes - 1).all() and result.stats.seconds["classify"] == 0
    least = router.flops.all_in(0, work)
    cheapest = router.upscale(IMAGE, budget_flops=least)
    assert not cheapest.class_map.any() and cheapest.stats.seconds["classify"] == 0
    assert cheapest.stats.flops.routed <= least
    with pytest.raises(ValueError, match=r"^upscale: budget_flops must be at least [\d.e+]+, with everything in .*; got"):
        router.upscale(IMAGE, budget_flops=0.99 * least)


def test_a_stream_has_the_same_budgets(router):
    budget = flops_between(router, 0.4)
    expected = router.upscale(IMAGE, budget_flops=budget)
    output = np.empty(tuple(expected.image.shape), np.float32)
    reader = ArrayReader(IMAGE.numpy(), channels_first=True)
    router.stream(reader, ArrayWriter(output, channels_first=True), budget_flops=budget)
    assert torch.equal(torch.from_numpy(output), expected.image)
    output[:] = -1
    with pytest.raises(ValueError, match="budget_flops must be at least"):
        router.stream(reader, ArrayWriter(output, True), budget_flops=1)
    assert (output == -1).all()


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_milliseconds_become_classes(monkeypatch, whole):
    """A speed that nobody has, so slow that the time of the test itself is next to nothing."""
    if not whole:
        monkeypatch.setattr(pixel_rows, "BUDGET_SAMPLE", {"cpu": 4000})
    speed = Speed([10.0, 50.0], 5.0, 2.0, encode=20.0)
    for share in (0.2, 0.7):
        budget = PIXELS * (speed.rest + 10 + share * 40) + (0 if whole else PIXELS * speed.classify)
        least = FEATURES * speed.encode + PIXELS * (speed.rest + 10)
        # What is encoded and classified when the classes are chosen has taken its own time, not the expected one.
        budget = max(budget, least)
        stats = with_pace(speed).upscale(IMAGE, budget_ms=budget).stats
        spent = sum(n * ms for n, ms in zip(stats.counts_per_class, speed.branches, strict=True))
        expected = budget - PIXELS * speed.rest - (0 if whole else PIXELS * speed.classify)
        if budget - speed.encode * FEATURES - PIXELS * (speed.classify + speed.rest) < PIXELS * 10:
            expected = PIXELS * 10
        assert expected - 2000 < spent <= expected
    enough = FEATURES * speed.encode + PIXELS * (speed.rest + 50)
    stats = with_pace(speed).upscale(IMAGE, budget_ms=enough).stats
    assert stats.counts_per_class == [0, PIXELS] and stats.seconds["classify"] == 0
    with pytest.raises(ValueError, match=r"^upscale: budget_ms must be at least [\d.e+]+ ms on this device, .*; got 1000$"):
        with_pace(speed).upscale(IMAGE, budget_ms=1000)


def test_an_expensive_class_that_runs_fast_is_used():
    """Milliseconds go by the clock, not by FLOPs."""
    speed = Speed([50.0, 1.0, 90.0], 0.5, 0.5)
    stats = with_pace(speed, hidden=HIDDEN[3]).upscale(IMAGE, budget_ms=PIXELS * 5).stats
    assert stats.counts_per_class[1] > 0.9 * PIXELS


@pytest.mark.slow
def test_milliseconds_are_met(monkeypatch):
    """Upsamplers that sleep: the time is theirs, whatever else the machine does."""
    mlp = pixel_image.pixel_mlp

    def slow(features, mlps, size, classes=None, *rest):
        result = mlp(features, mlps, size, classes, *rest)
        if classes is not None:
            expensive = int((classes == 1).sum())
            time.sleep(4e-6 * (classes.numel() - expensive) + 4e-5 * expensive)
        return result

    monkeypatch.setattr(pixel_image, "pixel_mlp", slow)
    monkeypatch.setattr(pixel_speed, "PICTURE", {"cpu": (16, 32)})
    router = PixelRouter(make_model(hidden=HIDDEN[2]))
    for ms in (80.0, 120.0, 170.0):
        stats = [router.upscale(IMAGE, budget_ms=ms).stats for _ in range(5)]
        assert abs(median(1e3 * s.seconds["total"] for s in stats) / ms - 1) < 0.15
        assert all(min(s.counts_per_class) > 0 for s in stats)


def test_speed_is_measured_once_and_remembered(cache, monkeypatch):
    monkeypatch.setattr(pixel_speed, "PICTURE", {"cpu": (16, 24)})
    router = PixelRouter(make_model())
    speed = router.speeds_at(torch.float32, 4.0)[0]
    assert len(speed.branches) == 2 and min(*speed.branches, speed.classify, speed.rest, speed.encode) > 0
    assert json.loads(cache.read_text())
    measured = []
    monkeypatch.setattr(
        pixel_router, "measure_pixel_speed", lambda *args: measured.append(args) or Speed([1.0, 2.0], 3.0, 4.0, 5.0)
    )
    again = PixelRouter(make_model())
    assert again.speeds_at(torch.float32, 4.0)[0] == speed and not measured
    # What decides the speed is measured apart.
    assert again.speeds_at(torch.uint8, 4.0)[0].encode == again.speeds_at(torch.float32, 2.5)[0].encode == 5.0
    assert len(measured) == 2


def test_learning():
    speed = Speed([1.0, 3.0], 1.0, 0.5, encode=2.0)
    # Both classes together took twice as long as expected; the rest as long, the encoder half.
    speed.learn([100, 100], 0.8, 0.2, 0.1, encode=0.05, encoded=50)
    assert speed == Speed([1.5, 4.5], 1.0, 0.5, encode=1.5)
    speed.learn([100, 0], 0.15, None, 0.05)
    assert speed == Speed([1.5, 4.5], 1.0, 0.5, encode=1.5)


def test_runs_are_learned_from():
    speed = Speed([10.0, 50.0], 5.0, 2.0, encode=20.0)
    router = with_pace(speed)
    router.upscale(IMAGE, penalty=0.1)
    [learned] = router.speeds.known.values()
    assert 4.9 < learned.branches[0] < 5.1 and 24.5 < learned.branches[1] < 25.5
    assert 2.4 < learned.classify < 2.6 and 0.9 < learned.rest < 1.1 and 9.9 < learned.encode < 10.1


def uneven() -> torch.Tensor:
    """A batch of a flat, a simple and a rich image."""
    batch = picture(3, 3, 15, 20, seed=5)
    return torch.stack([batch[0] * 0.02 + 0.5, batch[1] * 0.3 + 0.4, batch[2]])


@pytest.mark.parametrize("budget", [0.65, 0.8])
def test_a_batch_shares_one_budget(router, budget):
    batch = uneven()
    together = router.upscale(batch, budget=budget)
    used = shares(router)[together.class_map.long()].mean(dim=(1, 2))
    assert budget - 0.01 < used.mean() <= budget * (1 + 1e-9)
    alone = torch.stack([router.upscale(image, budget=budget).class_map for image in batch])
    assert (shares(router)[alone.long()].mean(dim=(1, 2)) - budget).abs().max() < 0.01
    assert used.max() - used.min() > 0.02
    if router.num_classes == 2:
        # No pixel of any image is cheap that would gain more than a expensive one of another.
        chance = make_model(hidden=HIDDEN[router.num_classes])(batch, scale=4).probability[:, 1]
        expensive = together.class_map == 1
        assert chance[expensive].min() >= chance[~expensive].max() - 1e-5
        assert used.argsort().tolist() == expensive.float().mean(dim=(1, 2)).argsort().tolist()
        assert chance[alone == 1].min() < chance[alone == 0].max() - 1e-3


@pytest.mark.slow
def test_features_of_a_batch_are_kept_as_far_as_they_fit(monkeypatch):
    monkeypatch.setattr(pixel_rows, "OUTPUT_BAND", {"cpu": 500})
    monkeypatch.setattr(pixel_rows, "ENCODER_BAND", {"cpu": 33})
    router, runs, rows = PixelRouter(make_model()), [], pixel_image.rows_in_bands
    monkeypatch.setattr(pixel_image, "rows_in_bands", lambda *args: runs.append(1) or rows(*args))
    batch = picture(6, 3, 60, 40)
    whole = router.upscale(batch, scale=2, budget=0.8, memory_limit=10**9)
    assert len(runs) == 6
    some = whole.stats.working_set - 3 * router.memory.features(PixelGrid((60, 40), (120, 80)), True)
    with pytest.raises(ValueError, match=r"memory_limit must be at least") as error:
        router.upscale(batch, scale=2, budget=0.8, memory_limit=10)
    for limit, passes in ((None, 6), (some, 9), (int(re.findall(r"least (\d+)", str(error.value))[0]), 12)):
        runs.clear()
        result = router.upscale(batch, scale=2, budget=0.8, memory_limit=limit)
        assert len(runs) == passes and (limit is None or result.stats.working_set <= limit)
        assert torch.equal(result.image, whole.image)


@pytest.mark.parametrize("budget", [0.65, 0.8])
def test_many_images_share_as_a_batch_does(budget):
    router, batch = PixelRouter(make_model(hidden=HIDDEN[2])), uneven()
    together = router.upscale(batch, budget=budget)
    results = list(upscale_many(router, list(batch), budget=budget))
    assert torch.equal(torch.stack([r.class_map for r in results]), together.class_map)
    assert torch.equal(torch.stack([r.image for r in results]), together.image)


@pytest.mark.parametrize("small", [True, False])
def test_many_images_of_all_kinds(router, tmp_path, request, small):
    if not small:
        request.getfixturevalue("sampled")
    flat = as_image(IMAGE * 0.1 + 0.4, torch.uint8)
    io.write_image(tmp_path / "one.png", flat)
    rich, opened = picture(1, 3, 25, 31, seed=9)[0], []
    sources = [tmp_path / "one.png", lambda: opened.append(1) or rich, torch.stack([IMAGE, IMAGE])]
    dense = [router.upscale(image, budget=1).stats.flops.dense for image in (flat, rich, IMAGE, IMAGE)]
    work = 4 * [FEATURES]
    work[1] = 25 * 31
    # Each is encoded and classified twice, or part of it.
    least = sum(router.flops.all_in(0, Work(f, 16 * f)) for f in work)
    assert least < sum(dense)
    twice = sum(router.flops.fixed(Work(0, 0, f, 16 * f, f)) for f in work)
    allowed = 0.7 * sum(dense) + twice
    results = list(upscale_many(router, sources, budget_flops=allowed))
    assert len(opened) == 2
    assert [tuple(r.image.shape) for r in results] == [(3, 60, 80), (3, 100, 124), (2, 3, 60, 80)]
    assert results[0].image.dtype == torch.uint8
    total = sum(r.stats.flops.routed for r in results)
    assert 0.75 * allowed < total <= allowed
    for result in results:
        seconds = result.stats.seconds
        assert sum(value for name, value in seconds.items() if name != "total") <= seconds["total"]
    with pytest.raises(ValueError, match=r"^upscale_many: budget_flops must be at least"):
        next(upscale_many(router, sources, budget_flops=least))
    # A budget of shares is kept too.
    maps = [r.class_map.flatten() for r in upscale_many(router, sources, budget=0.6)]
    assert 0.55 < shares(router)[torch.cat(maps).long()].mean() <= 0.6 * (1 + 1e-9)


def test_many_images_within_milliseconds():
    speed, images = Speed([10.0, 50.0], 5.0, 2.0, encode=20.0), [IMAGE, IMAGE.flip(1), IMAGE.flip(2)]
    router = with_pace(speed)
    each = PIXELS * (speed.classify + speed.rest + 30) + FEATURES * speed.encode
    first = next(upscale_many(router, images, budget_ms=3 * each)).stats
    spent = sum(n * ms for n, ms in zip(first.counts_per_class, speed.branches, strict=True))
    # A third of what is allowed and of what encoding and classifying the first one did not take.
    assert 0.9 < spent / (PIXELS * 30) < 1.3
    with pytest.raises(ValueError, match=r"^upscale_many: budget_ms must be at least .* on this device"):
        next(upscale_many(with_pace(speed), images, budget_ms=1000))


def test_an_image_that_changes_is_told():
    images = iter([IMAGE, IMAGE, IMAGE, picture(1, 3, 9, 9)[0]])
    results = upscale_many(PixelRouter(make_model()), 2 * [lambda: next(images)], budget=0.8)
    next(results)
    with pytest.raises(ValueError, match=r"^upscale_many: image 2 was \(3, 15, 20\) when it was looked at; got \(3, 9, 9\)"):
        next(results)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"budget": 0.5, "budget_ms": 10}, "give one of budget, budget_flops and budget_ms; got budget, budget_ms"),
        ({"budget_flops": 1e9, "penalty": 0.5}, "give one of penalty, adaptive and a budget; got penalty=0.5, budget_flops"),
        ({"budget_ms": 10, "adaptive": True}, "give one of penalty, adaptive and a budget; got adaptive, budget_ms"),
        ({"budget_ms": 0}, "budget_ms must be positive and finite; got 0"),
        ({"budget_flops": float("inf")}, "budget_flops must be positive and finite; got inf"),
        ({"budget_flops": -1.0}, "budget_flops must be positive and finite; got -1"),
    ],
)
def test_errors(arguments, words):
    with pytest.raises(ValueError, match=f"^upscale: .*{words}"):
        PixelRouter(make_model()).upscale(IMAGE, **arguments)


@pytest.mark.parametrize(
    ("images", "arguments", "words"),
    [
        ([], {"budget": 0.5}, "images must hold at least one image"),
        ([IMAGE], {}, "give one of budget"),
        ([IMAGE], {"budget": 0.01}, "budget must lie in"),
        ([IMAGE], {"budget": 0.5, "scale": -1}, "scale must be positive"),
        ([IMAGE], {"budget": 0.5, "memory_limit": -1}, "memory_limit"),
    ],
)
def test_errors_of_many(images, arguments, words):
    with pytest.raises(ValueError, match=words):
        upscale_many(PixelRouter(make_model()), images, **arguments)


def test_one_class_has_nothing_to_choose(monkeypatch):
    monkeypatch.setattr(pixel_speed, "PICTURE", {"cpu": (16, 24)})
    router = PixelRouter(make_model(hidden=([5],)))
    result = router.upscale(IMAGE, budget=1)
    assert not result.class_map.any() and result.stats.seconds["classify"] == 0
    assert router.upscale(IMAGE, budget_ms=1e6).stats.counts_per_class == [PIXELS]
    with pytest.raises(ValueError, match="budget_ms must be at least"):
        router.upscale(IMAGE, budget_ms=1e-6)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("scale", "step"), [(4.0, 3), (2.0, 7), (3.0, 5), (1.5, 4), (0.7, 3)])
def test_sampled_rows_have_the_logits_of_the_whole_image(keep, scale, step):
    """Rows that are classified together, each with the features that it reads."""
    router, image = PixelRouter(make_model()), picture(1, 3, 24, 17)
    grid = make_grid((24, 17), scale, None, router.device)[0]
    request, source = Request(grid, ClassRule([1.0, 2.0], budgeted=True)), TensorSource(image, router.device)
    one, other = (PixelImage(router.networks, source, 0, request, kept, Stopwatch(router.device)) for kept in (True, keep))
    whole = one._logits(one._start()[1], one.relative, 0, grid.size[0])
    rows = range(step // 2, grid.size[0], step)
    found = other._logits_of(other._start()[1], other.relative, rows)
    assert not found[:, 0].any() and found.shape[2] == len(rows) > 4
    expected = whole[:, :, rows.start :: step]
    # The size of a pixel is a power of two where its product with a weight is exact.
    if scale in (4.0, 2.0):
        assert torch.equal(found, expected)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
