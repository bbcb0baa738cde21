"""Budgets on the command line: of one image, and of all together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from networks import as_image, picture, random_classsr, randomise
from test_pixel_router import make_model

import fastroute
from fastroute import io
from fastroute.budget.limits import Budget
from fastroute.budget.speed import Speed
from fastroute.cli import main
from fastroute.files import many_files
from fastroute.files.shared_budget import share_budget
from fastroute.models.checkpoints import save_checkpoint
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR

pytestmark = pytest.mark.usefixtures("quick_tuning")
SIZES = {"a.png": (45, 61), "b.png": (30, 33), "c.png": (17, 40)}


@pytest.fixture(scope="module", params=["patches", "pixels"])
def model(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / f"{request.param}.safetensors"
    if request.param == "patches":
        save_checkpoint(path, random_classsr((3, 5, 60), 2, 16), {"scale": 2, "patch": 16, "stride": 12})
    else:
        system = randomise(PCSR.build(FSRCNN(8, upsample=False), [[5], [40, 40]], [6]))
        torch.nn.init.normal_(system.classifier.layers[2].weight, std=10, generator=torch.Generator().manual_seed(0))
        save_checkpoint(path, system, {})
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "in").mkdir()
    for number, (name, size) in enumerate(SIZES.items()):
        image = picture(1, 3, *size, seed=number)[0]
        # Of different difficulty, so that sharing differs from one budget each.
        io.write_image(tmp_path / "in" / name, as_image(image if number else 0.1 * image + 0.4, torch.uint8))
    return tmp_path / "in"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["upscale", *map(str, arguments)])


def images(folder: Path) -> list[torch.Tensor]:
    return [io.read_image(folder / name) for name in SIZES]


@pytest.mark.slow
def test_flops_of_one_image(model, folder, tmp_path):
    source, router = folder / "a.png", fastroute.load(model)
    allowed = 0.8 * router.upscale(io.read_image(source), budget=1).stats.flops.dense
    result = call(source, tmp_path / "big.png", "--model", model, "--budget-flops", allowed)
    assert result.exit_code == 0, result.output
    expected = router.upscale(io.read_image(source), budget_flops=allowed)
    assert 0 < expected.stats.counts_per_class[-1] < sum(expected.stats.counts_per_class)
    assert torch.equal(io.read_image(tmp_path / "big.png"), expected.image)


@pytest.mark.slow
def test_milliseconds_of_one_image(model, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTROUTE_CACHE", str(tmp_path / "cache"))
    result = call(folder / "a.png", tmp_path / "big.png", "--model", model, "--budget-ms", 1e6)
    assert result.exit_code == 0 and "s of the 1e+06 ms asked for (" in result.output, result.output
    assert result.output.count("measuring how fast this device is") == 1
    router = fastroute.load(model)
    assert torch.equal(io.read_image(tmp_path / "big.png"), router.upscale(io.read_image(folder / "a.png"), budget=1).image)
    result = call(folder / "a.png", tmp_path / "none.png", "--model", model, "--budget-ms", 1e-6)
    assert result.exit_code == 2 and "Invalid value for --budget-ms: upscale: budget_ms must be at least" in result.output
    assert "measuring" not in result.output, "it is remembered"
    assert not (tmp_path / "none.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--budget", "--budget-flops"])
def test_one_budget_for_all(model, folder, tmp_path, option):
    router = fastroute.load(model)
    dense = sum(router.upscale(image, budget=1).stats.flops.dense for image in images(folder))
    name, value = ("budget", 0.85) if option == "--budget" else ("budget_flops", 0.9 * dense)
    (folder / "bad.png").write_text("no image")
    options = ("--model", model, option, value)
    result = call(folder, tmp_path / "out", *options, "--shared-budget", "--class-map", tmp_path / "maps")
    assert result.exit_code == 1 and "3 written" in result.output and "1 of 4 images failed" in result.output, result.output
    expected = [r.image for r in fastroute.upscale_many(router, images(folder), **{name: value})]
    written = [io.read_image(tmp_path / "out" / name) for name in SIZES]
    assert all(torch.equal(a, b) for a, b in zip(written, expected, strict=True))
    assert len(list((tmp_path / "maps").iterdir())) == 3
    (folder / "bad.png").unlink()
    assert call(folder, tmp_path / "each", *options, "--quiet").exit_code == 0
    assert not torch.equal(io.read_image(tmp_path / "each" / "a.png"), expected[0])


@pytest.mark.slow
def test_what_fails_in_its_turn_stops_no_other(model, folder, tmp_path, monkeypatch):
    router = fastroute.load(model)
    name = "answer" if isinstance(router, fastroute.PixelRouter) else "upscale"
    original = getattr(router, name)

    def failing(image, *arguments, **options):
        if image.shape[-1] == 33:
            raise MemoryError
        return original(image, *arguments, **options)

    monkeypatch.setattr(router, name, failing)
    jobs = many_files.plan_jobs([folder], tmp_path / "out")
    outcomes = list(many_files.run_jobs(router, jobs, shared_budget=True, budget=0.8, memory_limit=10**9))
    assert sorted((o.job.source.name, o.error.partition(": ")[2]) for o in outcomes) == [
        ("a.png", ""), ("b.png", "upscale: out of memory; use a smaller image or patch, or free memory"), ("c.png", ""),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_shared_budget_that_is_too_small(model, folder, tmp_path):
    result = call(folder, tmp_path / "out", "--model", model, "--budget-flops", 1000, "--shared-budget")
    assert result.exit_code == 2 and "Invalid value for --budget-flops: upscale: budget_flops must be at least" in result.output
    assert not list((tmp_path / "out").iterdir())


def test_a_shared_budget_of_time():
    """Of milliseconds what earlier images took really counts."""
    router = fastroute.PixelRouter(make_model(hidden=([5], [40, 40])))
    speed = Speed([10.0, 50.0], 0.0, 0.0, encode=0.0)
    router.speeds.known[(torch.float32, router.device, torch.get_num_threads(), 2.0)] = speed
    image = picture(1, 3, 12, 15)[0]
    pixels = 24 * 30
    shared = share_budget(router, Budget(ms=2 * pixels * 30), 2, "upscale", scale=2)
    shared.look(image)
    shared.look(image)
    shared.settle()
    shared.upscale(0, image)
    before = shared.budget.before
    assert 0 < before < 2000
    shared.budget.before = 2 * pixels * 30 - pixels * 20
    counts = shared.upscale(1, image).stats.counts_per_class
    assert 0.2 < counts[1] / pixels < 0.27


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget", 0.7, "--budget-ms", 40], "give one of --budget and --budget-ms: each decides alone"),
        (["--budget-flops", 1e9, "--penalty", 1], "give one of --budget-flops and --penalty"),
        (["--budget-ms", 40, "--adaptive"], "give one of --budget-ms and --adaptive"),
        (["--budget-flops", 0], "for --budget-flops: it must be positive and finite; got 0"),
        (["--budget-ms", "nan"], "for --budget-ms: it must be positive and finite; got nan"),
        (["--shared-budget"], "--shared-budget needs --budget, --budget-flops or --budget-ms"),
        (["--shared-budget", "--budget", 0.7, "--size", 9, 9], "--shared-budget needs --scale instead of --size"),
    ],
)
def test_refused_before_anything_is_loaded(folder, tmp_path, monkeypatch, options, words):
    monkeypatch.setattr(fastroute, "load", lambda *args: pytest.fail("a model was loaded"))
    for source, target in ((folder, tmp_path / "out"), (folder / "a.png", tmp_path / "a.png")):
        result = call(source, target, *options)
        assert result.exit_code == 2 and words in " ".join(result.output.split()), result.output
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_shared_budget_is_for_a_folder(folder, tmp_path):
    result = call(folder / "a.png", tmp_path / "a.png", "--budget", 0.7, "--shared-budget")
    assert result.exit_code == 2 and "--shared-budget is for an OUT that is a folder" in result.output
