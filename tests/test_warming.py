"""`warmup` compiles and measures ahead of the first image, and tells what it did."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from networks import picture, random_classsr
from test_pixel_router import make_model

import fastroute
from fastroute.cli import main
from fastroute.patch import branches
from fastroute.runtime import tuning

SIZE = (100, 64)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTROUTE_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_searches", {})
    monkeypatch.setattr(branches, "workers", lambda: 1)
    return tmp_path / "tuning.json"


@pytest.fixture
def short_trials(monkeypatch):
    """A trial needs one region of 4 x 4 patches."""
    monkeypatch.setattr(tuning, "PIXELS", (1 << 9, 1 << 10))
    monkeypatch.setattr(tuning, "TRIAL_PIXELS", {"cpu": 1 << 9})
    monkeypatch.setattr(tuning, "STEADY", 1e9)


def make_router(**options) -> fastroute.PatchRouter:
    system = random_classsr((3, 5), 4, 16)
    return fastroute.PatchRouter(system.branches, system.classifier, patch=16, stride=12, scale=4, **options)


@pytest.mark.slow
@pytest.mark.usefixtures("short_trials")
def test_a_search_is_completed_and_kept(cache):
    router = make_router()
    warmed = fastroute.warmup(router, SIZE, budget=0.95)
    assert warmed.measured == (True, True) and warmed.images >= 5 and warmed.seconds > 0
    assert "still" not in str(warmed) and f"{warmed.images} images" in str(warmed)
    entries = json.loads(cache.read_text())
    assert len(entries) == 2 and all(entry["best"] for entry in entries.values())
    # Nothing is left to find out for an image, in this process or in another one.
    again = make_router()
    for ready in (router, again):
        ready.upscale(picture(1, 3, *SIZE))
        assert all(ready.networks.settled(c, ready.device) for c in range(2)) and not ready.networks.measuring
    assert fastroute.warmup(again, SIZE).images == 1 + 2 + 1 + 2


def test_images_too_small_for_a_trial_end_it():
    warmed = fastroute.warmup(make_router(), (40, 40), dtype=torch.float32)
    assert warmed.measured == (False, False) and warmed.images == 1 + 2 + 1 + 2
    assert str(warmed).endswith("; still to be measured: class 0, 1")


def test_routers_of_pixels():
    router = fastroute.PixelRouter(make_model())
    warmed = fastroute.warmup(router, (20, 30), dtype=torch.uint16, scale=2, budget=0.9)
    assert warmed.images == 3 and warmed.measured == ()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (((0, 5),), {}, ValueError, "warmup: size must be"),
        (((5, 5),), {"dtype": torch.int64}, TypeError, "warmup: dtype must be"),
        (((20, 20),), {"budget": 7}, ValueError, "budget must lie in"),
        (((20, 20),), {"adaptive": True}, TypeError, "adaptive"),
    ],
)
def test_what_is_refused(arguments, options, error, words):
    with pytest.raises(error, match=words):
        fastroute.warmup(make_router(), *arguments, **options)


def test_what_is_no_router():
    with pytest.raises(TypeError, match="warmup: router must be a router; got Identity"):
        fastroute.warmup(torch.nn.Identity(), SIZE)


@pytest.mark.slow
def test_command_line():
    def run(*arguments):
        return CliRunner().invoke(main, ["warmup", *arguments])

    result = run("pcsr-fsrcnn-x4", "--image-size", "30", "20", "--budget", "0.6", "--scale", "2")
    assert result.exit_code == 0 and result.output.startswith("3 images in "), result.output
    assert run("classsr-fsrcnn-x4", "--image-size", "40", "40", "--quiet").output == ""
    for wrong in (["--image-size", "0", "5"], [], ["--image-size", "9", "9", "--budget", "0.5", "--budget-ms", "9"]):
        assert run("classsr-fsrcnn-x4", *wrong).exit_code == 2
