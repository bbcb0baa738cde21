"""What the routers wait for on a GPU, where there is none: its clock is made up, and its tensors have no values."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections import deque

import pytest
import torch
from networks import picture, random_classsr
from test_gpu_sizes import make_router
from test_pixel_router import make_model
from torch import Tensor, nn
from waits import GPU, WaitError, no_waits

from fastroute import Bicubic, PatchRouter, PixelRouter
from fastroute.budget.limits import Budget
from fastroute.budget.speed import Speed
from fastroute.files import shared_budget
from fastroute.files.shared_budget import share_budget
from fastroute.grid import TileGrid
from fastroute.patch import assignment, patch_memory, patch_router, patch_speed
from fastroute.patch.bands import band_of_patches, plan_bands
from fastroute.pixel import pixel_image, pixel_router, pixel_rows
from fastroute.runtime.results import Stopwatch
from fastroute.windows import window_on

pytestmark = pytest.mark.usefixtures("quick_tuning")
CUDA = torch.device("cuda", 0)


class Clock:
    """A GPU whose time passes when told; in the place of `torch.cuda`'s functions."""

    def __init__(self) -> None:
        self.now, self.done, self.waits = 0.0, 0.0, 0

    def work(self, seconds: float) -> None:
        """Queue so much: nobody has waited for it."""
        self.now += seconds

    def synchronize(self, device: torch.device) -> None:
        self.done, self.waits = self.now, self.waits + 1


@pytest.fixture
def clock(monkeypatch) -> Clock:
    gpu = Clock()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "current"
            self.at = gpu.now

        def query(self) -> bool:
            return self.at <= gpu.done

        def synchronize(self) -> None:
            gpu.synchronize(CUDA)

        def elapsed_time(self, end: Event) -> float:
            assert end.at <= gpu.done, "nobody has waited for the event"
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current")
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    return gpu


@pytest.fixture
def timed(clock, monkeypatch) -> Clock:
    """Routers on the CPU take their times as on a GPU."""
    for module in (patch_router, pixel_router, shared_budget, patch_speed):
        monkeypatch.setattr(module, "Stopwatch", lambda device: Stopwatch(CUDA))
    return clock


def test_stages_last_from_event_to_event(clock):
    watch = Stopwatch(CUDA)
    with watch.stage("a"):
        clock.work(2.0)
    for part, seconds in ((0, 0.5), (1, 0.25), (0, 1.0)):
        with watch.stage("b", part):
            clock.work(seconds)
    clock.work(7.0)
    assert clock.waits == 0 and watch.seconds == {} and watch.parts == {}
    watch.move("b", "c", {})
    found = watch.finish()
    assert clock.waits == 1
    assert {name: found[name] for name in "ab"} == {"a": 2.0, "b": 1.75} and watch.parts == {0: 1.5, 1: 0.25}
    assert watch.finish() | {"total": 0} == found | {"total": 0}, "an event counts twice"


def test_a_stage_that_waits_is_known_at_once(clock):
    watch = Stopwatch(CUDA)
    with watch.waited("tune"):
        time.sleep(0.01)
    assert watch.seconds["tune"] >= 0.01 and clock.waits == 2
    assert watch.finish()["tune"] == watch.seconds["tune"]


def test_a_failed_stage_has_no_time(clock):
    watch = Stopwatch(CUDA)
    with pytest.raises(KeyError), watch.stage("a"):
        raise KeyError
    assert "a" not in watch.finish()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"budget": 0.8}, {"penalty": 0.3}], ids=str)
def test_patches_are_waited_for_when_statistics_are_asked_for(timed, monkeypatch, options):
    monkeypatch.setattr(patch_memory, "PATCHES_PER_BAND", {"cpu": 8})
    router, image = make_router(), picture(1, 3, 101, 61)
    expected = router.upscale(image, budget=1)
    timed.waits = 0
    timed.work(1.0)
    result = router.upscale(image, **options)
    timed.work(3.0)  # of the next image
    assert timed.waits == 0, "statistics that nobody asked for are waited for"
    assert sum(result.stats.counts_per_class) and result.stats.seconds["total"] < 3.0 and timed.waits == 1
    assert set(result.stats.seconds) == set(expected.stats.seconds) and result.stats.seconds["tune"] == 0


def test_pixels_are_waited_for_when_statistics_are_asked_for(timed, monkeypatch):
    monkeypatch.setattr(pixel_rows, "OUTPUT_BAND", {"cpu": 500})
    router, image = PixelRouter(make_model()), picture(1, 3, 30, 20)
    for number, options in enumerate([{}, {"penalty": 0.3}, {"budget": 0.9}, {"adaptive": True}], start=1):
        timed.work(1.0)
        stats = router.upscale(image, scale=2, **options).stats
        assert timed.waits == number - 1
        assert sum(stats.counts_per_class) == 60 * 40 and stats.working_set > 0 and stats.seconds["total"] >= 0
        assert timed.waits == number


@pytest.mark.slow
def test_a_budget_of_time_waits_for_the_classifier(timed, monkeypatch):
    router, image, asked = make_router(), picture(1, 3, 101, 61), []
    speed = Speed([1.0, 2.0, 3.0], 1.0, 0.0)
    monkeypatch.setattr(patch_router, "measure_patch_speed", lambda *args: speed)
    score = assignment.score_image

    def scored(*args):
        found = score(*args)
        timed.work(5.0)
        return dataclasses.replace(found, flops=0)

    def within(score, costs, allowed, merging):
        asked.append((allowed, timed.done == timed.now))
        return torch.zeros(len(score), dtype=torch.int64)

    monkeypatch.setattr(assignment, "score_image", scored)
    monkeypatch.setattr(assignment, "within", within)
    for limit in ({"budget_flops": 30 * max(router.flop_costs)}, {"budget_ms": 80.0}):
        router.upscale(image, **limit)
    assert [waited for _, waited in asked] == [False, True]


def test_only_a_budget_of_time_asks_for_the_time(monkeypatch):
    router, image, asked = PixelRouter(make_model()), picture(1, 3, 30, 20), []
    monkeypatch.setattr(Stopwatch, "elapsed", lambda self: asked.append(1) or 1e-3)
    monkeypatch.setattr(pixel_router, "measure_pixel_speed", lambda *args: Speed([1.0, 2.0], 1e-5, 1e-5, 1e-5))
    router.upscale(image, scale=2, budget=0.9)
    assert len(asked) == 1  # the total
    router.upscale(image, scale=2, budget_ms=1.5 * 60 * 40)
    assert len(asked) == 3


def test_looking_at_a_shared_budget_waits(timed, monkeypatch):
    router = make_router()
    looking, score = share_budget(router, Budget(fraction=0.9), 1, "upscale_many"), shared_budget.score_image
    monkeypatch.setattr(shared_budget, "score_image", lambda *args: timed.work(2.0) or score(*args))
    looking.look(picture(1, 3, 40, 40))
    assert timed.waits == 1 and looking.seconds == [2.0]


class Once:
    """Values read back: of a run on the CPU, then given to the same run without values."""

    def __init__(self, monkeypatch) -> None:
        self.values, self.rows, self.read = deque(), deque(), 0
        tolist = Tensor.tolist

        def replay(x: Tensor):
            if x.device != GPU:
                found = tolist(x)
                if x.dtype in (torch.int64, torch.float64):
                    (self.values.append if x.ndim == 1 else self.rows.extend)(found)
                return found
            self.read += 1
            # What several bands have spent is read together.
            found = [self.rows.popleft() for _ in x] if x.ndim == 2 else self.values.popleft()
            assert len(found) == len(x)
            return found

        monkeypatch.setattr(Tensor, "tolist", replay)


class Brightness(nn.Module):
    def forward(self, patches):
        bright = patches.mean(dim=(1, 2, 3))
        return torch.stack([1.02 - bright, bright, bright * 0], dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("cells", [True, False])
@pytest.mark.parametrize(("options", "count"), [({}, 1), ({}, 3), ({"budget": 0.8}, 3), ({"class_map": True}, 3)], ids=str)
def test_patches_read_back_once(monkeypatch, cells, options, count):
    """And nothing is copied from the host."""
    monkeypatch.setattr(patch_memory, "PATCHES_PER_BAND", {"cpu": 8})
    system = random_classsr((3, 5, 8), 4, 16)
    classifier = system.classifier if cells else Brightness()
    image, once = picture(count, 3, 100, 64), Once(monkeypatch)
    router = PatchRouter(system.branches, classifier, patch=16, stride=12, scale=4, batch=8)
    if options.get("class_map"):
        options = {"class_map": router.upscale(image).class_map}
        once.values.clear()
    router.upscale(image, **options)
    router.to(GPU)
    options = {name: x.to(GPU) if isinstance(x, Tensor) else x for name, x in options.items()}
    image = image.to(GPU)
    window_on("uniform", 64, 48, GPU, torch.float32)  # kept from the first call on
    with no_waits(monkeypatch) as seen:
        result = router.upscale(image, **options)
    assert result.image.shape == (count, 3, 400, 256) and once.read == 1 and "stitch_patches" in seen.names


@pytest.mark.parametrize("options", [{}, {"penalty": 0.4}, {"refine": False}, {"budget": 1}], ids=str)
def test_pixels_read_back_once(monkeypatch, options):
    monkeypatch.setattr(pixel_rows, "OUTPUT_BAND", {"cpu": 500})
    router, image, once = PixelRouter(make_model()), picture(2, 3, 30, 20), Once(monkeypatch)
    router.upscale(image, scale=2, **options)
    router.to(GPU)
    image = image.to(GPU)
    with no_waits(monkeypatch) as seen:
        router.upscale(image, scale=2, **options)
    assert once.read == 1 and "pixel_mlp" in seen.names


@pytest.mark.slow
@pytest.mark.parametrize(("sample", "most"), [(1 << 22, 3), (2000, 13)], ids=["whole", "rows"])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_budget_of_pixels_waits_for_no_step_of_its_search(monkeypatch, classes, sample, most):
    """Two images: for the exponent of the first and for what it spent, and for all counts. Where rows are sampled, for the
    exponent of each and at most once for each of its five bands."""
    monkeypatch.setattr(pixel_rows, "OUTPUT_BAND", {"cpu": 500})
    monkeypatch.setattr(pixel_rows, "BAND_PARTS", (1,))
    monkeypatch.setattr(pixel_rows, "BUDGET_SAMPLE", {"cpu": sample})
    monkeypatch.setattr(pixel_rows, "WAITING_SAMPLE", 700)
    hidden = ([5], [40, 40]) if classes == 2 else (None, [5], [40, 40])
    router, image, once = PixelRouter(make_model(hidden=hidden)), picture(2, 3, 30, 20), Once(monkeypatch)
    router.upscale(image, scale=2, budget=0.8)
    router.to(GPU)
    image = image.to(GPU)
    with no_waits(monkeypatch) as seen:
        router.upscale(image, scale=2, budget=0.8)
    assert 3 <= once.read <= most and not once.values and "assign_classes" in seen.names


def test_counting_classes(monkeypatch):
    ids = torch.randint(0, 3, (2, 7, 5), dtype=torch.uint8)
    expected = pixel_image.count_classes(ids, 4)
    assert expected.tolist() == [int((ids == c).sum()) for c in range(4)]
    with no_waits(monkeypatch):
        there = torch.empty(2, 7, 5, dtype=torch.uint8, device=GPU)
        assert pixel_image.count_classes(there, 4).shape == expected.shape
        with pytest.raises(WaitError):
            torch.bincount(there.flatten(), minlength=4)


def test_one_image_within_a_budget_is_not_waited_for(monkeypatch):
    """Its exponent and its classes stay on the device; only statistics, here those of a CPU, read the counts."""
    router, image, once = PixelRouter(make_model()), picture(1, 3, 30, 20), Once(monkeypatch)
    router.upscale(image, scale=2, budget=0.8)
    assert len(once.values) == 1
    router.to(GPU)
    image = image.to(GPU)
    with no_waits(monkeypatch):
        router.upscale(image, scale=2, budget=0.8)
    assert once.read == 1 and not once.values and not once.rows


@pytest.mark.parametrize(("count", "size"), [(1, (101, 61)), (5, (20, 30)), (3, (60, 40))])
def test_bands_of_patches(count, size):
    grid = TileGrid(*size, 16, 12, 4)
    bands = plan_bands(count, grid, 8)
    numbers = [number for number, band in enumerate(bands) for _ in range(band.num_patches(grid))]
    assert band_of_patches(bands, grid, torch.device("cpu")).tolist() == numbers
    assert len(numbers) == count * grid.num_patches and band_of_patches(bands, grid, GPU).device == GPU


@pytest.mark.slow
def test_routers_without_weights_stay_where_they_are_moved():
    for function in (Bicubic(4), lambda x: x.repeat(1, 1, 4, 4)):
        router = PatchRouter([function])
        assert router.device == torch.device("cpu")
        assert copy.deepcopy(router).to("meta").device == GPU and router.to("cpu").device == torch.device("cpu")
        assert copy.deepcopy(router.to("meta")).device == GPU
    assert make_router().to("meta").device == GPU
