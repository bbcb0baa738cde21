"""Cells by what a network makes of them: the scores, the plans on top of its result, what runs, and how it is calibrated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import random
from test_calibration import made, picture
from torch import Tensor, nn

import fastroute
from fastroute.cascades.calibrate import best_of_classes, best_of_scores, measure
from fastroute.cascades.cells import CELL, Cells, Rectangle, edge_scores
from fastroute.cascades.decision import Decision, Sampling, Table
from fastroute.cascades.measured import Measured, Seen
from fastroute.cascades.output_score import scored_class, scored_result, strengths
from fastroute.cascades.plan import PASS, make_plan
from fastroute.cascades.promise import Calibration
from fastroute.cascades.run import pieces_of
from fastroute.cascades.samples import places_of
from fastroute.cascades.score import EDGE, OUTPUT
from fastroute.cascades.stored import save_cascade
from fastroute.models.checkpoints import save_checkpoint
from fastroute.models.compact import Compact

REACH = 6


class Counted(nn.Module):
    """A Compact of `REACH` pixels, which notes the pixels that it runs on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.network = Compact(width, REACH - 2, 2)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w]
        return self.network(x)


def cascade(**more: object) -> fastroute.CascadeRouter:
    router = fastroute.cascade([Counted(4), Counted(12)], score="output", costs=[1.0, 20.0], **more)
    router.facts = [replace(facts, reach=REACH) for facts in router.facts]
    return router


def counting(router: fastroute.CascadeRouter) -> list[tuple[int, int]]:
    """Class and pixels of every pass from now on."""
    passes, run = [], router.networks.run
    router.networks.run = lambda k, x: passes.append((k, x.shape[0] * x.shape[2] * x.shape[3])) or run(k, x)  # type: ignore[method-assign]
    return passes


def uneven(height: int = 150, width: int = 200, seed: int = 1) -> Tensor:  # [3, height, width]
    """Noise, stronger to the right."""
    strength = torch.linspace(0, 0.3, width) ** 2
    return (0.5 + strength * random((3, height, width), seed=seed).clamp(-1, 1)).clamp(0, 1)


@pytest.mark.parametrize("size", [(64, 96), (70, 50), (1, 1), (33, 1)])
def test_scores_are_differences_of_neighbours_within_a_cell(size):
    side, result = 32, random((2, 3, *size), seed=3) * 0.4 + 0.5
    values = 255 * result.clamp(0, 1)
    found = strengths(result, side)
    for row in range(found.shape[1]):
        for col in range(found.shape[2]):
            cell = values[:, :, row * side : (row + 1) * side, col * side : (col + 1) * side]
            total = cell.diff(dim=2).abs().sum(dim=(1, 2, 3)) + cell.diff(dim=3).abs().sum(dim=(1, 2, 3))
            expected = total / (3 * cell.shape[2] * cell.shape[3])
            torch.testing.assert_close(found[:, row, col], expected, rtol=1e-4, atol=1e-4)


def test_pieces_give_the_scores_and_the_result_of_the_whole():
    network, image, cells = Counted(4).eval(), uneven(), Cells(150, 200)
    with torch.inference_mode():
        whole = network(image[None])
        pieces = pieces_of(cells, [Rectangle(0, 0, 2, 7), Rectangle(2, 0, 5, 3), Rectangle(2, 3, 5, 7)], REACH, fade=0)
        cut = lambda at: image[:, at.top : at.bottom, at.left : at.right]  # noqa: E731
        scores, base = scored_result(0, pieces, network, cut, cells, 2, keep=True)
    torch.testing.assert_close(scores, strengths(whole, 2 * CELL)[0].double(), rtol=1e-5, atol=1e-5)
    assert base.results is not None and base.pixels == sum(piece.outer.area for piece in pieces)
    for piece, result in zip(pieces, base.results, strict=True):
        own = piece.inner
        expected = whole[0, :, 2 * own.top : 2 * own.bottom, 2 * own.left : 2 * own.right]
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def test_plans_lie_on_the_result_that_is_there():
    cells = Cells(5 * CELL, 6 * CELL)
    wanted = torch.zeros(5, 6, dtype=torch.int64)
    wanted[1, 1], wanted[3, 4:] = 2, 1
    costs = [1.0, 2.0, 20.0]
    plan = make_plan(wanted, cells, costs, 8, base=1)
    assert plan.regions == ((), (cells.whole,), (Rectangle(1, 1, 2, 2),)) and not plan.dense
    area = 30 * CELL**2
    assert plan.cost == pytest.approx(0.1 * area + (CELL + 16) ** 2 + PASS)
    expected = torch.ones_like(wanted)
    expected[1, 1] = 2
    assert torch.equal(plan.class_ids, expected)
    dense = make_plan(torch.full_like(wanted, 2), cells, costs, 8, base=1)
    assert dense.dense and dense.cost == pytest.approx(1.1 * area + PASS) and bool((dense.class_ids == 2).all())
    # All that the base would do as well.
    assert make_plan(wanted.clamp(max=1), cells, costs, 8, base=1).cost == pytest.approx(0.1 * area)


def test_the_best_of_the_cheap_ones_is_scored():
    assert scored_class([1, 5, 100]) == 1 and scored_class([1, 30, 100]) == 0 and scored_class([60, 100]) == 0
    router = fastroute.cascade(["bicubic", Counted(4)], score="output")
    assert router.decision.base == 0
    assert fastroute.cascade([Counted(4)], score="output").decision.base is None


@pytest.mark.parametrize("budget", [0.1, 0.6])
def test_the_result_that_was_scored_is_drawn_and_runs_once(budget):
    router, image = cascade(), uneven()
    cheap, passes = router.networks.run(0, image[None])[0], counting(router)
    result = router.upscale(image, budget=budget)
    low = (result.class_map == 0).repeat_interleave(2 * CELL, 0)[:300].repeat_interleave(2 * CELL, 1)[:, :400]
    # Around better cells these fade out over four pixels.
    far = nn.functional.max_pool2d(1.0 - low.float()[None], 17, 1, 8)[0] == 0
    assert far.float().mean() > 0.05 and (budget < 0.2 or not bool(low.all()))
    torch.testing.assert_close(result.image[:, far], cheap[:, far], rtol=0, atol=1e-6)
    totals = [sum(pixels for k, pixels in passes if k == own) for own in (0, 1)]
    assert totals[0] == 150 * 200 and result.stats.work_per_class == pytest.approx([t / CELL**2 for t in totals])
    assert result.stats.flops.of_one_pass is None or result.stats.flops.of_one_pass < 1.3


def test_a_limit_of_memory_changes_what_runs_but_not_the_choice():
    router, image = cascade(), uneven(400, 640)
    passes = counting(router)
    free = router.upscale(image, budget=0.5)
    passes.clear()
    bound = router.upscale(image, budget=0.5, memory_limit=16_000_000)
    assert torch.equal(bound.class_map, free.class_map) and bound.stats.working_set <= 16_000_000 < free.stats.working_set
    totals = [sum(pixels for k, pixels in passes if k == own) / CELL**2 for own in (0, 1)]
    # It runs for the scores, and again for the result.
    assert bound.stats.work_per_class == pytest.approx(totals) and totals[0] > 2 * 250
    result = torch.zeros(3, 800, 1280)
    writer = fastroute.ArrayWriter(result.numpy(), channels_first=True)
    reader = fastroute.ArrayReader(image.numpy(), channels_first=True)
    streamed = router.stream(reader, writer, budget=0.5, memory_limit=16_000_000)
    assert torch.equal(result, bound.image) and torch.equal(streamed.class_map, bound.class_map)


def test_what_was_scored_in_vain_is_counted():
    router, image = cascade(), uneven()
    table = Table(torch.tensor([0.1, 50.0], dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64))
    router.decision = Decision(table, base=0)
    dense, passes = router.upscale(image, budget=1), counting(router)
    assert len(passes) == 0
    result = router.upscale(image, fidelity=60)
    assert torch.equal(result.image, dense.image) and bool((result.class_map == 1).all())
    assert [sum(p for k, p in passes if k == own) for own in (0, 1)] == [150 * 200, 150 * 200]
    assert result.stats.work_per_class == pytest.approx([150 * 200 / CELL**2] * 2)


@pytest.mark.parametrize("change", [{"class_map": torch.ones(5, 7, dtype=torch.int64)}, {"budget": 1}])
def test_nothing_is_scored_where_nothing_is_chosen(change):
    router, image = cascade(), uneven()
    passes = counting(router)
    router.upscale(image, **change)
    assert {k for k, _ in passes} == {1}


def test_batches_thresholds_and_types():
    images = torch.stack([uneven(seed=1), uneven(seed=2).flip(2)])
    router = cascade(thresholds=[14.0])
    result = router.upscale(images)
    for n in range(2):
        alone = router.upscale(images[n])
        assert torch.equal(alone.image, result.image[n]) and torch.equal(alone.class_map, result.class_map[n])
    wanted = strengths(router.networks.run(0, images[:1]), 2 * CELL)[0] > 14.0
    assert bool((result.class_map[0] >= wanted).all()) and bool(wanted.any()) and not bool(wanted.all())
    levels = (images[0] * 255).round().to(torch.uint8)
    assert router.upscale(levels).image.dtype == torch.uint8
    for dtype in (torch.bfloat16, torch.float64):
        assert bool(router.to(dtype).upscale(images[0].to(dtype)).image.isfinite().all())


def test_a_calibration_measures_the_cells_that_a_call_would():
    router = fastroute.cascade(["bicubic", Counted(4), Counted(12)], costs=[0.1, 1.0, 20.0])
    crop = (uneven(256, 256) * 255).round().to(torch.uint8)
    cells = measure(router, crop, 3, (8, 12))
    assert len(cells.outputs) == 2 and cells.outputs[0] is None
    seen = cells.outputs[1]
    assert seen is not None and seen.places == tuple(places_of(seen.scores, 5)) and seen.samples.shape == (2, 5)
    image = crop[None].float() / 255
    torch.testing.assert_close(seen.scores, strengths(router.networks.run(1, image), 2 * CELL)[0].double())
    torch.testing.assert_close(cells.scores, edge_scores(image)[0].double())
    by = cells.by_output(1)
    assert torch.equal(by.scores, seen.scores) and by.places == seen.places and torch.equal(by.errors, cells.errors)
    assert torch.equal(
        torch.cat([by.border[0][1], by.inner[0][1]]).sort().values, seen.scores[2:6, 2:6].flatten().sort().values
    )
    # Of some classes alone.
    fewer = cells.of([1])
    assert len(fewer.outputs) == 1 and fewer.outputs[0] is not None and torch.equal(fewer.outputs[0].samples, seen.samples[1:])
    # What is kept of a picture is no larger than the crop.
    large = torch.zeros(3, 2000, 256, dtype=torch.uint8)
    kept = measure(router, large[:, :64, :64], 0, (8,)).image
    assert kept is not None and kept.untyped_storage().nbytes() == 3 * 64 * 64


def telling() -> list[Measured]:
    """Cells whose edges say little, and what a network makes of them all."""
    found = []
    for number, cells in enumerate(made(spread=1.0)):
        exact = 255 * cells.errors[0].sqrt()
        places = places_of(exact, 5)
        samples = torch.stack([cells.errors[:, place.top, place.left] for place in places], dim=1)
        generator = torch.Generator().manual_seed(number)
        blurred = cells.by(cells.scores * torch.exp(torch.randn(cells.scores.shape, generator=generator, dtype=torch.float64)))
        found.append(replace(blurred, outputs=(Seen(exact, tuple(places), samples),)))
    return found


@pytest.mark.slow
def test_that_which_takes_least_is_kept():
    found = best_of_scores(telling(), [0.01, 1.0], 40.0, (8, 16))
    assert found.base == 0 and found.score is None and set(found.tried) == {EDGE, OUTPUT}
    assert found.tried[OUTPUT] < found.tried[EDGE] - 0.05 and found.spent == found.tried[OUTPUT]
    # A network that costs much is not worth its scores.
    assert best_of_scores(telling(), [0.6, 1.0], 40.0, (8, 16)).base is None
    # One below that whose result is there is never chosen.
    cells = [
        replace(c, errors=torch.cat([4 * c.errors, c.errors]), outputs=(None, replace(seen, samples=seen.samples.repeat(2, 1))))
        for c in telling()
        for seen in c.outputs
        if seen is not None
    ]
    three = best_of_classes(cells, [0.005, 0.01, 1.0], 40.0, (8, 16))
    assert three.classes == (1, 2) and three.base == 0 and three.left_out.keys() == {0}


@pytest.mark.slow
def test_it_travels_with_a_cascade_and_damage_is_refused(tmp_path: Path):
    names = [tmp_path / "light.safetensors", tmp_path / "heavy.safetensors"]
    for name, width in zip(names, (4, 12), strict=True):
        torch.manual_seed(width)
        save_checkpoint(name, Compact(width, 2, 2))
    errors = torch.tensor([[1e-7, 1e-3], [1e-9, 1e-9]], dtype=torch.float64)
    table = Table(torch.tensor([0.1, 50.0], dtype=torch.float64), errors, sampling=Sampling((1.5,), 0.2))
    out = tmp_path / "routed.safetensors"
    save_cascade(out, names, Calibration(table, (0.05, 1.0), 2, 10, 30.0, (30.0,), base=0))
    router = fastroute.load(out)
    assert router.decision.base == 0 and router.decision.score is None
    image = picture(3, 200, 170)
    result, passes = router.upscale(image, budget=0.6), counting(router)
    assert 0 < int((result.class_map == 1).sum()) < result.class_map.numel()
    assert router.upscale(image, budget=0.6).class_map.equal(result.class_map) and passes[0] == (0, 200 * 170)
    about = json.loads(_metadata(out)["cascade"])
    assert about["score"] == "output" and about["base"] == 0
    tensors = load_file(out)
    for base in (1, -1, 0.0, True, None, "0", 10**30):
        save_file(tensors, out, {"cascade": json.dumps({**about, "base": base})})
        with pytest.raises(fastroute.CheckpointError, match="its base must be the number of a cheaper network"):
            fastroute.load(out)


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()
