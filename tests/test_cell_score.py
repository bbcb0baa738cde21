"""The learned score of cells: it sees what edges do not, is kept where it saves time, and travels with a cascade."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import random
from torch import Tensor

import fastroute
from fastroute.cascades import promise
from fastroute.cascades import score as module
from fastroute.cascades.calibrate import best_of_scores
from fastroute.cascades.cells import CELL, Cells, Rectangle, edge_scores, scores_by_rows
from fastroute.cascades.measured import Measured, region_of, rescored
from fastroute.cascades.promise import Calibration
from fastroute.cascades.score import EDGE, LEARNED, NAMES, CellScore, fit_score, stored_score
from fastroute.cascades.stored import save_cascade
from fastroute.models.checkpoints import CheckpointError, save_checkpoint
from fastroute.models.compact import Compact

SIDE = 8


def pictures(count: int = 4, coloured: bool = True) -> list[Measured]:
    """Cells of all strengths of noise, whose error is the square of their score; in red ones more, if `coloured`."""
    found = []
    for number in range(count):
        # Rows of cells from smooth to rough; the left half is red, or the right one.
        strength = torch.linspace(0.01, 0.2, SIDE)[:, None].expand(SIDE, SIDE)[None, None]
        red = (torch.arange(SIDE) < SIDE // 2).float().expand(1, 1, SIDE, SIDE)
        red = red if number % 2 else 1 - red
        noise, tint = (x.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3) for x in (strength, red))
        colour = torch.tensor([0.8, 0.2, 0.2])[:, None, None] * tint + 0.4 * (1 - tint)
        pixels = (colour + noise * random((1, 3, SIDE * CELL, SIDE * CELL), seed=200 + number).clamp(-1, 1)).clamp(0, 1)
        image = (pixels[0] * 255).round().to(torch.uint8)
        scores = edge_scores(image[None].float() / 255)[0].double()
        errors = (scores / 255).square() * torch.where(red[0, 0] > 0, 20.0 if coloured else 1.0, 1.0) / 40
        cells = Cells(SIDE * CELL, SIDE * CELL)
        region = region_of(cells)
        assert region is not None
        parts = scores[region.top : region.bottom, region.left : region.right].flatten()
        border, inner = ((8, parts[:12], 1e-7 * torch.ones(12)),), ((8, parts[12:], 1e-8 * torch.ones(4)),)
        found.append(Measured(number, cells, scores, errors[None], border, inner, image))
    return found


def best(cells: list[Measured]) -> Calibration:
    """What is learnt of them, in less time than is usual."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STEPS", 80)
        patch.setattr(promise, "FOLDS", 2)
        return best_of_scores(cells, [0.01, 1.0], 30.0, (8,))


@pytest.fixture(scope="module")
def found() -> Calibration:
    return best(pictures())


@pytest.mark.slow
def test_what_edges_do_not_tell_is_learnt_and_saves_time(found):
    assert found.tried[LEARNED] < 0.9 * found.tried[EDGE] and found.spent == found.tried[LEARNED]
    assert isinstance(found.score, CellScore)


@pytest.mark.slow
def test_edges_are_kept_where_they_tell_all():
    found = best(pictures(coloured=False))
    assert found.tried[EDGE] == pytest.approx(found.tried[LEARNED], rel=0.1)
    assert (found.score is None) == (found.tried[EDGE] <= found.tried[LEARNED])


def test_folds_without_pixels_learn_from_edges_alone():
    own = [replace(c, image=None) for c in pictures()]
    assert best(own).tried.keys() == {EDGE}


@pytest.fixture(scope="module")
def score() -> CellScore:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STEPS", 5)
        return fit_score(pictures(2))


@pytest.mark.parametrize("size", [(1, 1), (33, 31), (70, 100), (200, 40)])
def test_scores_by_rows_are_those_of_the_whole(score, size):
    image = random((3, *size), seed=5).clamp(0, 1)
    found = scores_by_rows(lambda at: image[:, at.top : at.bottom, at.left : at.right], Cells(*size), score)
    expected = score(image[None], edge_scores(image[None])[0])
    assert found.shape == expected.shape and bool((found > 0).all())
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-6)


def test_cells_keep_their_errors_by_another_score(score):
    own = pictures(1)[0]
    new = rescored(own, score)
    expected = score(own.image[None].float() / 255, own.scores.float()).double()
    assert torch.equal(new.scores, expected) and torch.equal(new.errors, own.errors)
    top, left, bottom, right = region_of(own.cells) or Rectangle(0, 0, 0, 0)
    region = expected[top:bottom, left:right]
    assert torch.equal(new.inner[0][1], region[1:-1, 1:-1].flatten()) and new.border[0][1].shape == (12,)
    assert torch.equal(new.border[0][2], own.border[0][2])


@pytest.mark.slow
def test_it_travels_with_a_cascade(found, tmp_path: Path):
    names = []
    for name, network in (("light", Compact(8, 1, 2)), ("heavy", Compact(16, 6, 2))):
        names.append(tmp_path / f"{name}.safetensors")
        save_checkpoint(names[-1], network)
    save_cascade(tmp_path / "routed.safetensors", names, found)
    router = fastroute.load(tmp_path / "routed.safetensors")
    kept = router.decision.score
    assert kept is not None and found.score is not None
    assert all(torch.equal(a, b) for a, b in zip(kept.weights, found.score.weights, strict=True))
    image = pictures(1)[0].image
    assert router.upscale(image, fidelity=30).class_map.shape == (SIDE, SIDE)


def changed(score: CellScore, name: str, value: Tensor | None) -> dict[str, Tensor]:
    tensors = {**score.tensors(), name: value}
    return {key: x for key, x in tensors.items() if x is not None}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (NAMES[0], None),
        (NAMES[0], torch.ones(3)),
        (NAMES[0], torch.tensor(1.0)),
        (NAMES[1], torch.full((24,), float("nan"))),
        (NAMES[2], torch.ones(16, 23)),
        (NAMES[4], torch.ones(2, 17)),
        (NAMES[0], torch.ones(1 << 10, 1 << 10)),
    ],
)
def test_damaged_scores_are_refused(score, name, value):
    with pytest.raises(ValueError, match="its score"):
        stored_score(changed(score, name, value), 3)


def test_a_file_with_a_damaged_score_is_refused(found, tmp_path: Path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    names = []
    for name, network in (("light", Compact(8, 1, 2)), ("heavy", Compact(16, 6, 2))):
        names.append(tmp_path / f"{name}.safetensors")
        save_checkpoint(names[-1], network)
    path = tmp_path / "routed.safetensors"
    save_cascade(path, names, found)
    with safe_open(path, framework="pt") as file:
        about = dict(file.metadata())
    save_file({**load_file(path), NAMES[5]: torch.ones(2)}, path, about)
    with pytest.raises(CheckpointError, match="weights of its score do not fit"):
        fastroute.load(path)
