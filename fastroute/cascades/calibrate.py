"""Calibration of a cascade on images of one's own: no reference is needed but the most expensive network's results."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastroute import io
from fastroute.cascades.cells import CELL, Cells, Rectangle, cell_means, edge_scores
from fastroute.cascades.decision import Decision, Table, Target, choose, error_of
from fastroute.cascades.plan import Plan
from fastroute.cascades.router import CascadeRouter
from fastroute.cascades.score import CellScore, fit_score
from fastroute.cascades.table_fit import Learnt, Measured, learn
from fastroute.degradation import downscale, to_uint8
from fastroute.runtime.progress import Progress, shown

CONTEXTS = (8, 12, 16, 24)
# Each picture is used as it is and reduced: what people enlarge is the one or the other.
SHRINKS = (1, 4)
# Side of what is cut out of a picture, in cells, and of the region in its middle whose errors are measured.
SIDE, REGION = 8, 4
# Parts of the pictures each of which is tested by what the others taught.
FOLDS = 4
# Of the pictures tested, this share must keep its promise; and none may miss it by more than `WORST` dB.
KEPT, WORST = 0.95, 1.5
# The scores that are tried.
EDGE, LEARNT = "edge", "learned"
# Side and number of the runs by which times are taken.
TIMED, RUNS = 96, 3


@dataclass(frozen=True)
class Calibration:
    """What was learnt, and how well it foretells pictures from which it was not.

    Attributes:
        table: what a router decides by.
        costs: measured seconds of a pixel in each class, relative to the last.
        pictures, cells: from how many it was learnt.
        promised, reached: dB of the mean expected and found, by picture tested.
        spent: share of the dense cost that pictures take which are planned by what others taught, in the mean.
        score: by which cells are told apart; None for the strength of their edges.
        tried: `spent` of each score that was tried, by its name.
    """

    table: Table
    costs: tuple[float, ...]
    pictures: int
    cells: int
    promised: float
    reached: tuple[float, ...]
    spent: float = 1.0
    score: CellScore | None = None
    tried: dict[str, float] = field(default_factory=dict)


def calibrate(
    router: CascadeRouter,
    paths: Sequence[Path],
    fidelity: float = 40.0,
    contexts: Sequence[int] = CONTEXTS,
    crops: int = 1,
    seed: int = 0,
    progress: Progress = False,
) -> Calibration:
    """Run all networks on crops of `paths` and learn what errors to expect.

    Args:
        router: a cascade, calibrated or not.
        paths: of images, at least two.
        fidelity: in dB, for which the margin is learnt; the default of the calibrated router.
        contexts: from which calls choose, rising.
        crops: of each image at each of its sizes.
        seed: of the places.
        progress: see :meth:`fastroute.CascadeRouter.upscale`; in crops.

    Raises:
        ValueError: fewer than two images, a cascade of one network, or networks of other images than those of three channels.
    """
    if router.num_classes < 2:
        raise ValueError("calibrate: a cascade has at least two networks; give a cheaper one, such as bicubic")
    if router.channels != 3:
        raise ValueError(f"calibrate: networks must read 3 channels, those of image files; these read {router.channels}")
    if len(paths) < 2:
        raise ValueError(f"calibrate: at least two images are needed, one of which tests the other; got {len(paths)}")
    cells: list[Measured] = []
    with shown(progress, len(paths) * len(SHRINKS) * crops, "crop", "calibrate") as bar:
        for number, path in enumerate(paths):
            rng = np.random.default_rng([seed, number])
            for crop in crops_of(io.read_image(path), crops, rng):
                cells.append(measure(router, crop, number, contexts))
                bar.update()
    return best_of_scores(cells, measured_costs(router), fidelity, contexts)


def best_of_scores(
    cells: Sequence[Measured], costs: Sequence[float], fidelity: float, contexts: Sequence[int] = CONTEXTS
) -> Calibration:
    """The better of two scores on pictures held out: the strength of edges, and one that is learnt."""
    learners = {EDGE: None} if any(c.image is None for c in cells) else {EDGE: None, LEARNT: fit_score}
    tried = {name: learnt_from(cells, costs, fidelity, contexts, learner) for name, learner in learners.items()}
    # That which needs no learning, where it is as good.
    best = min(tried, key=lambda name: tried[name].spent)
    return replace(tried[best], tried={name: found.spent for name, found in tried.items()})


def crops_of(image: Tensor, count: int, rng: np.random.Generator) -> list[Tensor]:  # uint8 [C, H, W]
    """Squares of the image as it is and reduced, at random places."""
    found = []
    for shrink in SHRINKS:
        smaller = image if shrink == 1 else to_uint8(downscale(image[None].float() / 255, shrink)[0])
        for _ in range(count):
            y, x = (int(rng.integers(0, max(length - SIDE * CELL, 0) + 1)) for length in smaller.shape[-2:])
            found.append(smaller[:, y : y + SIDE * CELL, x : x + SIDE * CELL])
    return found


@torch.inference_mode()
def measure(router: CascadeRouter, crop: Tensor, picture: int, contexts: Sequence[int]) -> Measured:  # uint8 [C, h, w]
    """Scores and errors of the cells of a crop, whose own dense result is the target."""
    image = crop[None].to(router.device).float() / 255
    cells = Cells(*image.shape[2:])
    side, last = CELL * router.scale, router.num_classes - 1
    dense = router.networks.run(last, image).clamp(0, 1)

    def error(result: Tensor, target: Tensor) -> Tensor:  # [1, C, H, W], [1, C, H, W] -> [rows, cols]
        squares = (result.clamp(0, 1) - target).square().mean(dim=1, keepdim=True)
        return cell_means(squares, side)[0, 0].double().cpu()

    scores = edge_scores(image)[0].double().cpu()
    errors = torch.stack([error(router.networks.run(k, image), dense) for k in range(last)])
    border, inner = [], []
    region = region_of(cells)
    if region is not None:
        own = cells.pixels(region)
        target = _cut(dense, own, router.scale)
        at_border, within = parted(scores, region)
        for context in contexts:
            outer = cells.pixels(region, context)
            result = router.networks.run(last, _cut(image, outer, 1))
            place = Rectangle(own.top - outer.top, own.left - outer.left, own.bottom - outer.top, own.right - outer.left)
            found = error(_cut(result, place, router.scale), target)
            found_border, found_within = parted(found, Rectangle(0, 0, REGION, REGION))
            border.append((context, at_border, found_border))
            inner.append((context, within, found_within))
    return Measured(picture, cells, scores, errors, tuple(border), tuple(inner), crop.cpu())


def region_of(cells: Cells) -> Rectangle | None:
    """The region whose errors are measured, in the middle; None of a crop that is too small."""
    if min(cells.rows, cells.cols) < REGION + 2:
        return None
    top, left = (cells.rows - REGION) // 2, (cells.cols - REGION) // 2
    return Rectangle(top, left, top + REGION, left + REGION)


def parted(values: Tensor, region: Rectangle) -> tuple[Tensor, Tensor]:  # [rows, cols] -> [M] twice
    """Those of the cells of a region along its border, and within it."""
    own = values[region.top : region.bottom, region.left : region.right]
    within = torch.zeros_like(own, dtype=torch.bool)
    within[1:-1, 1:-1] = True
    return own[~within], own[within]


def rescored(cells: Measured, score: CellScore) -> Measured:
    """The same cells by another score; those without pixels as they are."""
    if cells.image is None:
        return cells
    scores = score(cells.image[None].float() / 255, cells.scores.float()).double()
    region = region_of(cells.cells)
    if region is None:
        return replace(cells, scores=scores)
    border, within = parted(scores, region)
    return replace(
        cells, scores=scores, border=tuple((context, border, found) for context, _, found in cells.border),
        inner=tuple((context, within, found) for context, _, found in cells.inner),
    )  # fmt: skip


def _cut(image: Tensor, where: Rectangle, scale: int) -> Tensor:  # [1, C, H, W]
    return image[:, :, scale * where.top : scale * where.bottom, scale * where.left : scale * where.right]


def measured_costs(router: CascadeRouter) -> tuple[float, ...]:
    """Seconds of a pixel in each network, relative to the last: the least of some runs, taken in turn.

    Those of a cheaper network are never above those of a more expensive one.
    """
    image = torch.rand(1, router.channels, TIMED, TIMED, device=router.device)
    seconds = [math.inf] * router.num_classes
    with torch.inference_mode():
        for turn in range(RUNS + 1):
            for k in range(router.num_classes):
                begin = time.perf_counter()
                router.networks.run(k, image)
                if router.device.type == "cuda":
                    torch.cuda.synchronize(router.device)
                if turn:
                    seconds[k] = min(seconds[k], time.perf_counter() - begin)
    costs = [taken / seconds[-1] for taken in seconds]
    for k in reversed(range(len(costs) - 1)):
        costs[k] = min(costs[k], 0.95 * costs[k + 1])
    return tuple(costs)


def learnt_from(
    cells: Sequence[Measured],
    costs: Sequence[float],
    fidelity: float,
    contexts: Sequence[int] = CONTEXTS,
    learn_score: Callable[[Sequence[Measured]], CellScore] | None = None,
) -> Calibration:
    """The table of all cells, with a margin that most of the pictures would have needed when the others taught.

    Args:
        cells: as measured.
        costs: of the networks.
        fidelity: in dB.
        contexts: from which calls choose.
        learn_score: from cells to a score by which they are told apart; default that which they have.
    """

    def scored(taught: Sequence[Measured]) -> Callable[[Measured], Measured]:
        score = None if learn_score is None else learn_score(taught)
        return lambda own: own if score is None else rescored(own, score)

    pictures = sorted({c.picture for c in cells})
    tests: list[tuple[Measured, Table]] = []
    for fold in range(min(FOLDS, len(pictures))):
        tested = set(pictures[fold::FOLDS])
        others = [c for c in cells if c.picture not in tested]
        of = scored(others)
        taught = _table(learn([of(c) for c in others], contexts), contexts, fidelity)
        tests += [(of(c), taught) for c in cells if c.picture in tested]
    # At least that of which `KEPT` would have been enough, and what the worst needed but for `WORST` dB.
    order = torch.tensor(sorted(needed_margin(c, taught, costs) for c, taught in tests), dtype=torch.float64)
    margin = max(1.0, float(torch.quantile(order, KEPT)), float(order[-1]) / 10 ** (WORST / 10))
    plans = [_planned(c, replace(taught, margin=margin), costs)[0] for c, taught in tests]
    spent = sum(plan.cost for plan in plans) / sum(plan.cells.height * plan.cells.width for plan in plans)
    score = None if learn_score is None else learn_score(cells)
    own = [c if score is None else rescored(c, score) for c in cells]
    table = replace(_table(learn(own, contexts), contexts, fidelity), margin=margin)
    reached = tuple(foretold(c, table, costs) for c in own)
    number = sum(c.scores.numel() for c in cells)
    return Calibration(table, tuple(costs), len(pictures), number, fidelity, reached, spent, score)


def _table(found: Learnt, contexts: Sequence[int], fidelity: float) -> Table:
    return Table(found.scores, found.errors, tuple(contexts), found.shares, found.inner, 1.0, fidelity)


def needed_margin(cell: Measured, table: Table, costs: Sequence[float]) -> float:
    """By what the errors expected of a picture would have to be multiplied to be those found."""
    plan, expected, areas = _planned(cell, table, costs)
    predicted = error_of(plan, expected, table, areas)
    return _found(cell, plan, expected, table, areas) / predicted if predicted > 0 else 1.0


def foretold(cell: Measured, table: Table, costs: Sequence[float]) -> float:
    """The fidelity in dB that a picture would reach."""
    plan, expected, areas = _planned(cell, table, costs)
    return -10 * math.log10(max(_found(cell, plan, expected, table, areas), 1e-10))


def _planned(cell: Measured, table: Table, costs: Sequence[float]) -> tuple[Plan, Tensor, Tensor]:
    plan = choose(Decision(table), Target(fidelity=table.fidelity), cell.cells, costs, cell.scores, None)
    return plan, table.expected(cell.scores), cell.cells.areas()


def _found(
    cell: Measured,
    plan: Plan,
    expected: Tensor,  # [K, rows, cols]
    table: Table,
    areas: Tensor,  # [rows, cols]
) -> float:
    """The error of a plan: that measured of the cheaper classes, that expected of regions."""
    return error_of(plan, torch.cat([cell.errors, expected[-1:]]), replace(table, margin=1.0), areas)
