"""From a folder of images to a calibrated cascade: tables, promises, files, students, the command line."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import random
from torch import Tensor, nn

import fastroute
from fastroute import io
from fastroute.cascades import score
from fastroute.cascades.calibrate import best_of_classes, best_of_scores
from fastroute.cascades.cells import CELL, Cells, edge_scores
from fastroute.cascades.decision import Table
from fastroute.cascades.distil import width_for
from fastroute.cascades.measured import Measured
from fastroute.cascades.plan import make_plan
from fastroute.cascades.promise import learnt_from
from fastroute.cascades.student import Recipe, Student
from fastroute.cascades.table_fit import rising
from fastroute.cascades.teacher_crops import TRAIN, Crops, crops_in, read_part
from fastroute.cli import main
from fastroute.models.checkpoints import save_checkpoint
from fastroute.models.compact import Compact
from fastroute.models.rrdbnet import RRDBNet


def picture(seed: int, height: int = 320, width: int = 352) -> Tensor:  # uint8 [3, height, width]
    """Smooth on the left, rough on the right, more and less so."""
    y, x = torch.meshgrid(torch.linspace(0, 5, height), torch.linspace(0, 1, width), indexing="ij")
    smooth = 0.5 + 0.2 * torch.stack([(y * (1 + k) + seed).sin() for k in range(3)])
    rough = random((3, height, width), seed=seed).clamp(0, 1) - 0.5
    return ((smooth + (0.2 + 0.1 * (seed % 3)) * x.pow(3) * rough).clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures, a heavy network and a light one that does nearly the same where little happens."""
    place = tmp_path_factory.mktemp("calibration")
    (place / "images").mkdir()
    for seed in range(4):
        io.write_image(place / "images" / f"{seed}.png", picture(seed))
    torch.manual_seed(3)
    heavy = RRDBNet(8, 1, 8, 2)
    with torch.no_grad():
        # Near the nearest neighbour, which the light network is exactly.
        for name, parameter in heavy.named_parameters():
            parameter.mul_(0.7 if "rdb" in name else 1.0)
    save_checkpoint(place / "heavy.pth", heavy)
    light = Compact(4, 1, 2)
    save_checkpoint(place / "light.safetensors", light)
    return place


class Sharper(nn.Module):
    """Interpolation and details, which are strongest where edges are."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.channels = 2, 3
        self.conv = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False)
        self.conv.weight.data.copy_((torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]]) / 8).expand(3, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(x + self.conv(x), scale_factor=2.0, mode="bicubic")


def made(cell: int = 8, pictures: int = 8, spread: float = 0.0) -> list[Measured]:
    """Cells whose error is the square of their score, times what is the picture's own."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(pictures):
        scores = 20 * torch.rand(cell, cell, generator=generator, dtype=torch.float64).pow(2) + 0.1
        own = math.exp(spread * (number % 4 - 1.5))
        errors = (scores / 255).square()[None] * own
        border = tuple((c, scores.flatten()[:12], errors[0].flatten()[:12] * 0.05 / c) for c in (8, 16))
        inner = tuple((c, s, 0.1 * e) for c, s, e in border)
        found.append(Measured(number, Cells(cell * CELL, cell * CELL), scores, errors, border, inner))
    return found


def test_values_that_fall_are_averaged():
    ones = torch.ones(5)
    assert rising(torch.tensor([1.0, 3, 2, 4, 4]), ones).tolist() == [1.0, 2.5, 2.5, 4, 4]
    assert rising(torch.tensor([4.0, 3, 2, 1, 0]), ones).tolist() == [2.0] * 5
    # Nothing is known of the third and the first.
    counts = torch.tensor([0.0, 1, 0, 3, 1])
    assert rising(torch.tensor([0.0, 2, 0, 4, 1]), counts).tolist() == [2.0, 2.0, 2.0, 3.25, 3.25]


@pytest.mark.slow
def test_a_table_learns_the_law_of_its_cells():
    found = learnt_from(made(), [0.01, 1.0], 40.0, (8, 16))
    scores = torch.tensor([1.0, 4.0, 12.0], dtype=torch.float64)
    expected = found.table.expected(scores)[0]
    torch.testing.assert_close(expected, (scores / 255).square(), rtol=0.25, atol=2e-6)
    assert found.table.shares[1] == pytest.approx(0.5, rel=0.2) and found.table.inner == pytest.approx(0.1, rel=0.2)
    assert found.table.margin < 1.2 and min(found.reached) > 40 - 0.8


def with_another(cells: Measured, factor: float, wrong: float) -> Measured:
    """A cheapest class beside that of `made`: `factor` times its errors, and in every fifth cell `wrong` times these."""
    errors = cells.errors * factor
    errors.view(-1)[cells.picture % 5 :: 5] *= wrong
    return replace(cells, errors=torch.cat([errors, cells.errors]))


@pytest.mark.slow
def test_a_network_that_costs_more_than_it_saves_is_left_out():
    costs, asked = [0.001, 0.05, 1.0], (36.0, (8, 16))
    useless = [with_another(c, 1.5, 300.0) for c in made(spread=0.2)]
    found, both = best_of_classes(useless, costs, *asked), best_of_scores(useless, costs, *asked)
    alone = best_of_scores(made(spread=0.2), costs[1:], *asked)
    assert found.classes == (1, 2) and found.left_out == {0: both.spent} and found.costs == (0.05, 1.0)
    assert found.spent == alone.spent < both.spent
    assert torch.equal(found.table.errors, alone.table.errors)

    useful = [with_another(c, 1.0, 1.0) for c in made(spread=0.2)]
    found = best_of_classes(useful, costs, *asked)
    assert 0 in found.classes and found.spent < alone.spent


def test_every_cascade_that_is_tried_is_shown():
    told = []
    best_of_classes([with_another(c, 1.0, 1.0) for c in made(4, 4)], [0.1, 0.2, 1.0], 36.0, (8,), lambda *x: told.append(x))
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.slow
def test_pictures_that_differ_ask_for_a_margin():
    found = learnt_from(made(spread=0.5), [0.01, 1.0], 40.0, (8, 16))
    assert found.table.margin > 1.5
    assert sum(value >= 40 for value in found.reached) >= 0.9 * len(found.reached)
    alike = learnt_from(made(spread=0.0), [0.01, 1.0], 40.0, (8, 16))
    assert alike.table.margin < found.table.margin


@pytest.mark.slow
def test_fidelity_is_kept_where_the_table_is_right():
    """A router whose table is that of the very image reaches what it promises, and spends more for more."""
    torch.manual_seed(0)
    router = fastroute.cascade(["bicubic", Sharper()], costs=[1.0, 50.0])
    image = picture(1).float() / 255
    dense = router.upscale(image, budget=1).image
    cheap = nn.functional.interpolate(image[None], scale_factor=2.0, mode="bicubic")[0]
    squares = (cheap - dense).square().mean(0, keepdim=True)[None]
    errors = nn.functional.avg_pool2d(squares, 2 * CELL)[0, 0].double()
    scores, order = edge_scores(image[None])[0].flatten().double().sort()
    table = Table(scores.cummax(0).values + 1e-9 * torch.arange(len(scores)),
                  torch.stack([errors.flatten()[order].cummax(0).values, torch.zeros(len(scores))]))  # fmt: skip
    router.decision = type(router.decision)(table)
    costs = []
    for fidelity in (30.0, 36.0, 42.0, 48.0, 120.0):
        result = router.upscale(image, fidelity=fidelity)
        found = -10 * math.log10(max(float((result.image - dense).square().mean()), 1e-12))
        assert found >= fidelity - 0.2
        own = result.stats.work_per_class
        costs.append(own[0] / 50 + own[1])
    assert costs == sorted(costs) and costs[0] < costs[-1]
    assert bool((result.class_map == 1).all()) and torch.equal(result.image, dense)


@pytest.fixture(autouse=True)
def quick_score(monkeypatch):
    """The learned score needs no more than to be there."""
    monkeypatch.setattr(score, "STEPS", 3)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_from_a_folder_to_a_routed_picture(folder, tmp_path):
    out = folder / "routed.safetensors"
    told = run("calibrate", "--model", folder / "heavy.pth", "--cheap", folder / "light.safetensors", "--cheap", "bicubic",
               "--images", folder / "images", "--out", out, "--fidelity", "30")  # fmt: skip
    assert "promised 30 dB" in told and "cells of 4 pictures" in told
    assert "held out take by score: edge " in told and ", learned " in told
    router = fastroute.load(out)
    # What is left out depends on what the networks take here.
    assert [name for name in ("bicubic", "light") if f"{name} is left out" not in told] == router.names[:-1]
    assert router.names[-1] == "heavy" and ", output " in told
    table = router.decision.table
    assert table is not None and table.fidelity == 30.0
    assert table.wide == (False,) * (router.num_classes - 1)
    assert table.sampling is not None and min(table.sampling.margins) >= 1 and f"or by {table.sampling.margins[-1]:.2f}" in told
    source, target = folder / "images" / "0.png", tmp_path / "result.png"
    told = run("upscale", source, target, "--model", out, "--fidelity", "35")
    assert "cells" in told
    assert torch.equal(io.read_image(target), router.upscale(io.read_image(source), fidelity=35).image)
    told = run("upscale", source, target, "--model", folder / "heavy.pth", "--cheap", "bicubic", "--budget", "0.4")
    assert "class 2" in told
    refused = CliRunner().invoke(
        main, ["upscale", str(source), str(target), "--model", str(folder / "heavy.pth"), "--cheap", "bicubic"]
    )
    assert refused.exit_code == 2 and "not calibrated" in refused.output


@pytest.mark.slow
def test_files_move_with_their_networks(folder, tmp_path):
    for name in ("heavy.pth", "light.safetensors"):
        shutil.copy(folder / name, tmp_path / name)
    out = tmp_path / "routed.safetensors"
    networks = ["--model", tmp_path / "heavy.pth", "--cheap", tmp_path / "light.safetensors"]
    run("calibrate", *networks, "--images", folder / "images", "--out", out, "--quiet")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("heavy.pth", "light.safetensors", "routed.safetensors"):
        shutil.move(tmp_path / name, moved / name)
    assert fastroute.load(moved / "routed.safetensors").names == ["light", "heavy"]
    (moved / "light.safetensors").rename(moved / "other.safetensors")
    with pytest.raises(fastroute.CheckpointError, match=r"light\.safetensors is not there"):
        fastroute.load(moved / "routed.safetensors")
    save_checkpoint(moved / "light.safetensors", Compact(4, 1, 2))
    with pytest.raises(fastroute.CheckpointError, match="another network than the one that it was calibrated with"):
        fastroute.load(moved / "routed.safetensors")


@pytest.mark.slow
def test_damaged_cascades_are_refused(folder, tmp_path):
    out = tmp_path / "routed.safetensors"
    networks = ["--model", folder / "heavy.pth", "--cheap", "bicubic"]
    run("calibrate", *networks, "--images", folder / "images", "--out", out, "--quiet")
    with safe_open(out, framework="pt") as file:
        about = json.loads(file.metadata()["cascade"])
    tensors = load_file(out)
    # Files of before pictures were measured themselves.
    save_file(tensors, out, {"cascade": json.dumps({name: value for name, value in about.items() if name != "sampling"})})
    assert fastroute.load(out).decision.table.sampling is None

    def attempt(change: dict[str, object], parts: dict[str, Tensor] | None = None, text: str | None = None) -> None:
        save_file({**tensors, **(parts or {})}, out, {"cascade": text or json.dumps({**about, **change})})
        with pytest.raises(fastroute.CheckpointError, match="cannot use"):
            fastroute.load(out)

    attempt({}, text="{")
    attempt({}, text="[" * 100_000)
    attempt({}, text="3")
    for change in (
        {"branches": []},
        {"branches": [3, 4]},
        {"branches": about["branches"] * 20},
        {"branches": [{"kind": "file", "path": "/dev/zero", "sha256": "0"}, about["branches"][1]]},
        {"branches": [{"kind": "file", "path": "x\0y", "sha256": "0"}, about["branches"][1]]},
        {"branches": [{"kind": "model", "name": "../secret"}, about["branches"][1]]},
        {"costs": [1.0]},
        {"costs": [2.0, 1.0]},
        {"costs": ["a", "b"]},
        {"margin": 10**400},
        {"inner": 10**400},
        {"costs": [10**400, 10**401]},
        {"branches": about["branches"][::-1]},
        {"branches": [about["branches"][1]] * 2},
        {"margin": float("nan")},
        {"margin": 0.1},
        {"inner": -1},
        {"fidelity": "40"},
        {"wide": 3},
        {"wide": [1]},
        {"wide": [True, False]},
        {"sampling": 3},
        {"sampling": {"margins": [2.0]}},
        {"sampling": {"margins": [0.5], "least": 0.3}},
        {"sampling": {"margins": [], "least": 0.3}},
        {"sampling": {"margins": 2.0, "least": 0.3}},
        {"sampling": {"margins": [2.0], "least": float("inf")}},
    ):
        attempt(change)
    for parts in (
        {"scores": tensors["scores"].flip(0).contiguous()},
        {"scores": torch.ones(1, dtype=torch.float64)},
        {"errors": -tensors["errors"]},
        {"errors": tensors["errors"].to(torch.complex64)},
        {"scores": tensors["scores"].to(torch.complex64)},
        {"errors": tensors["errors"][:1].clone()},
        {"contexts": torch.tensor([8, 16, 12, 1 << 40])},
        {"shares": torch.full((4,), float("inf"), dtype=torch.float64)},
    ):
        attempt({}, parts)
    save_file({"scores": tensors["scores"]}, out, {"cascade": json.dumps(about)})
    with pytest.raises(fastroute.CheckpointError, match="missing"):
        fastroute.load(out)


def test_crops_are_made_once_and_read_in_parts(folder, tmp_path):
    calls = []

    def teacher(x: Tensor) -> Tensor:
        calls.append(tuple(x.shape))
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    paths = sorted((folder / "images").glob("*.png"))
    crops = Crops(tmp_path / "crops", paths, teacher, "key", 2, side=64)
    path = crops.file(TRAIN, 1)
    assert crops_in(path) == len(calls) == 3 and calls[0] == (1, 3, 64, 64)
    lr, hr = read_part(path, 2, 8, 4, 16, 2)
    assert torch.equal(hr, lr.repeat_interleave(2, 1).repeat_interleave(2, 2)) and lr.shape == (3, 16, 16)
    assert crops.file(TRAIN, 1) == path and len(calls) == 3
    Crops(tmp_path / "crops", paths, teacher, "another", 2, side=64).file(TRAIN, 1)
    assert len(calls) == 6


@pytest.mark.slow
def test_a_student_learns_and_resumes(folder, tmp_path, monkeypatch):
    """It nears a teacher, and an interrupted run goes on with the same weights."""
    clock = itertools.count()
    # A second for each step and each visit: what is learnt does not depend on the machine.
    monkeypatch.setattr("fastroute.cascades.student.time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    teacher = Sharper().eval()
    paths = sorted((folder / "images").glob("*.png"))
    recipe = Recipe(6, 1, 2, batch=4, side=24, rate=4e-3, visits=3)

    def student(place: Path) -> Student:
        crops = Crops(tmp_path / "crops", paths[1:], teacher, "t", 2, side=64)
        return Student(crops, Crops(tmp_path / "crops", paths[:1], teacher, "t", 2, side=64), recipe, place / "state.pt")

    first = student(tmp_path)
    learnt = first.run(1.5, progress=False)
    assert learnt.steps == 90 - recipe.visits and learnt.psnr > first.history[0]["psnr"] + 3
    again = student(tmp_path)
    assert again.step == learnt.steps and again.files == first.files
    for name, value in learnt.student.state_dict().items():
        assert torch.equal(again.average[name], value)
    assert again.run(1.6, progress=False).steps == learnt.steps + 6
    other = Recipe(6, 2, 2, batch=4, side=24, visits=3)
    with pytest.raises(fastroute.CheckpointError, match="another depth"):
        Student(again.crops, again.held_out, other, tmp_path / "state.pt")


@pytest.mark.slow
def test_distill_on_the_command_line(folder, tmp_path):
    out = tmp_path / "student.safetensors"
    told = run("distill", "--teacher", folder / "heavy.pth", "--images", folder / "images", "--out", out, "--minutes", "0.02",
               "--width", "8", "--depth", "1", "--visits", "2", "--batch", "2")  # fmt: skip
    assert "dB to the teacher" in told
    router = fastroute.load(out)
    assert (router.scale, router.facts[0].architecture) == (2, "Compact")
    with safe_open(out, framework="pt") as file:
        assert file.get_tensor("body.0.weight").dtype == torch.float16 and file.metadata()["teacher"] == '"heavy"'
    known = ["--teacher", folder / "heavy.pth", "--images", folder / "images", "--visits", "1", "--batch", "2"]
    more = tmp_path / "more.safetensors"
    run("distill", *known, "--out", more, "--minutes", "0.02", "--init", out, "--cache", out.with_suffix(".crops"))
    assert fastroute.load(more).networks.members[0].width == 8
    refused = CliRunner().invoke(main, ["distill", "--teacher", str(folder / "heavy.pth"), "--images", str(folder / "images"),
                                        "--out", str(out), "--cost", "0.1", "--width", "8"])  # fmt: skip
    assert refused.exit_code == 2 and "decides the width alone" in refused.output


@pytest.mark.slow
def test_networks_of_other_channels_than_those_of_files_are_refused(folder, tmp_path):
    save_checkpoint(tmp_path / "gray.pth", Compact(8, 1, 2, 1))
    for command in (
        ["calibrate", "--model", tmp_path / "gray.pth", "--cheap", "bicubic", "--out", tmp_path / "out.safetensors"],
        ["distill", "--teacher", tmp_path / "gray.pth", "--out", tmp_path / "out.safetensors"],
    ):
        refused = CliRunner().invoke(main, [*map(str, command), "--images", str(folder / "images")])
        assert refused.exit_code == 2 and "must read 3 channels" in refused.output, refused.output


@pytest.mark.slow
def test_a_width_by_its_cost():
    recipe = Recipe(depth=2, scale=2)
    widths = [width_for(flops, recipe) for flops in (2e4, 2e5, 2e6)]
    assert widths == sorted(set(widths))
    with pytest.raises(ValueError, match="cost must allow"):
        width_for(10.0, recipe)


def test_plans_of_a_calibrated_cascade_run_dense_where_nothing_is_gained():
    cells = Cells(CELL * 3, CELL * 3)
    plan = make_plan(torch.ones(3, 3, dtype=torch.int64), cells, [0.01, 1.0], 8)
    assert plan.regions[1] == (cells.whole,)
