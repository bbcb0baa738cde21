"""How far the networks of a cascade are apart on the picture itself, measured on some of its cells before it is planned.

Pictures differ more from each other than the cells of one do. What a few cells need, with all networks run on them, tells most
of what no table of other pictures can know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastroute.cascades.cells import CELL, Cells, Rectangle
from fastroute.cascades.decision import FEWEST, Table
from fastroute.cascades.plan import PASS, Plan
from fastroute.cascades.run import Network, Piece, Read, batches, cut, pieces_of, within
from fastroute.cascades.table_fit import FLOOR

# Cells that a calibration measures of a crop, and a call at most, and what share of the dense cost these may take.
TAUGHT, MOST, SHARE = 5, 24, 0.05
# Of the cells of a calibration by their ranks, those that fewer are.
FEWER = {3: (0, 2, 4), 4: (0, 1, 3, 4)}
# They lie at even ranks among the scores, but for the lowest and the highest: what is decided is decided between.
RANKS = (0.2, 0.9)


def number_of_samples(cells: Cells, context: int, costs: Sequence[float]) -> int:
    """How many cells of an image are measured, with `context` pixels around each, by networks of these costs of a pixel."""
    share = SHARE * cells.height * cells.width / (CELL + 2 * context) ** 2 * costs[-1] / sum(costs)
    return min(max(int(share), FEWEST), MOST, cells.rows * cells.cols)


def places_of(scores: Tensor, number: int) -> list[Rectangle]:  # [rows, cols]
    """`number` cells at even ranks of their scores, by rows."""
    order = scores.flatten().argsort(stable=True)
    low, high = RANKS
    steps = TAUGHT if number in FEWER else number
    shares = [low + (high - low) * (n + 0.5) / steps for n in FEWER.get(number, range(number))]
    ranks = [int(len(order) * share) for share in shares]
    found = (divmod(int(order[rank]), scores.shape[1]) for rank in ranks)
    return sorted(Rectangle(row, col, row + 1, col + 1) for row, col in found)


def samples_of(cells: Cells, places: Sequence[Rectangle], context: int) -> list[Piece]:
    """The pieces that are computed for cells at `places`, given by rows."""
    return pieces_of(cells, places, context, fade=0)


def measure_samples(pieces: Sequence[Piece], networks: Sequence[Network], read: Read, scale: int) -> Tensor:  # [K - 1, N]
    """Mean squared error of each cheaper network against the most expensive one on every piece, float64 on the CPU."""
    errors = torch.zeros(len(networks) - 1, len(pieces), dtype=torch.float64)
    for numbers in batches(pieces):
        images = torch.stack([read(pieces[n].outer) for n in numbers])
        *cheaper, target = (network(images).float().clamp(0, 1) for network in networks)
        for k, result in enumerate(cheaper):
            squares = (result - target).square()
            for n, own in zip(numbers, squares, strict=True):
                errors[k, n] = float(cut(own, within(pieces[n].inner, pieces[n].outer, scale)).mean())
    return errors


def ratios_of(errors: Tensor, places: Sequence[Rectangle], expected: Tensor) -> Tensor:
    # [K - 1, N], [K, rows, cols] -> [K - 1]
    """By what each cheaper class's expected errors are multiplied on this picture: the geometric mean over its samples."""
    at = torch.stack([expected[:-1, place.top, place.left] for place in places], dim=1)
    return (errors.clamp(min=FLOOR).log() - at.clamp(min=FLOOR).log()).mean(dim=1).exp()


def sampled_plan(
    cells: Cells,
    table: Table,
    scores: Tensor,  # [rows, cols]
    context: int,
    costs: Sequence[float],
    base: int | None,
    planned: Callable[[Table, bool], Plan],
    measure: Callable[[Sequence[Piece]], Tensor],
) -> Plan:
    """A plan by a table that was corrected on the picture itself, or by the table as it is where measuring cannot pay.

    Args:
        cells: of the picture.
        table: of the cascade.
        scores: of the cells.
        context: pixels around a cell that is measured.
        costs: of a pixel in each class.
        base: see :class:`fastroute.cascades.plan.Plan`.
        planned: makes a plan by a table, a coarse one if that is asked for.
        measure: see :func:`measure_samples`.
    """
    sampling = table.sampling
    if sampling is None:
        return planned(table, False)
    places = places_of(scores, number_of_samples(cells, context, costs))
    pieces = samples_of(cells, places, context)
    pixels = sum(piece.outer.area for piece in pieces)
    spent = pixels * sum(costs) / costs[-1]
    # A picture that turns out to need the dense run pays for having been measured. That it was scored changes nothing.
    scored = 0.0 if base is None else costs[base] / costs[-1]
    most = (1 + SHARE + scored) * cells.height * cells.width + PASS
    margin = sampling.margin(len(places))
    hoped = table.corrected(torch.full((len(table.errors) - 1,), sampling.least, dtype=torch.float64), margin)
    # Where coarse plans say no, better ones decide.
    for coarse in (True, False):
        plan = planned(table, coarse)
        if plan.cost + spent <= most and planned(hoped, coarse).cost + spent < plan.cost:
            break
    else:
        return plan
    ratios = ratios_of(measure(pieces), places, table.expected(scores))
    return replace(planned(table.corrected(ratios, margin), False), sampled=pixels)
