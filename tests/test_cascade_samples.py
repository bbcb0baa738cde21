"""Cells of the picture itself are measured before it is planned: where, how exactly, when it pays, and what it changes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support import random
from test_calibration import Sharper, made, picture
from torch import Tensor, nn

import fastroute
from fastroute.cascades.cells import CELL, Cells, Rectangle, cell_means, edge_scores
from fastroute.cascades.decision import Decision, Sampling, Table
from fastroute.cascades.measured import Measured
from fastroute.cascades.promise import learnt_from
from fastroute.cascades.router import CascadeRouter
from fastroute.cascades.samples import measure_samples, number_of_samples, places_of, ratios_of, samples_of
from fastroute.cascades.table_fit import bin_edges, fit

BUDGETED = Sampling((1.5, 1.4, 1.3), 0.05)


def cascade(factor: float, sampling: Sampling | None, image: Tensor, margin: float = 1.0) -> tuple[CascadeRouter, Tensor]:
    """A cascade whose table expects `factor` times the errors of the image, and the dense result."""
    torch.manual_seed(0)
    router = fastroute.cascade(["bicubic", Sharper()], costs=[1.0, 50.0])
    dense = router.upscale(image, budget=1).image
    cheap = nn.functional.interpolate(image[None], scale_factor=2.0, mode="bicubic")[0]
    errors = cell_means((cheap.clamp(0, 1) - dense.clamp(0, 1)).square().mean(0, keepdim=True)[None], 2 * CELL)[0, 0].double()
    scores = edge_scores(image[None])[0].flatten().double()
    edges, middles = bin_edges(scores)
    own = factor * fit(scores, errors.flatten()[None], edges)
    table = Table(middles, torch.cat([own, torch.zeros_like(own)]), contexts=(8,))
    router.decision = Decision(replace(table, margin=margin, sampling=sampling))
    return router, dense


def nearness(a: Tensor, b: Tensor) -> float:
    return -10 * math.log10(max(float((a.clamp(0, 1) - b.clamp(0, 1)).square().mean()), 1e-12))


def large() -> Tensor:  # [3, 576, 640]
    """Noise whose strength changes from cell to cell."""
    strength = torch.rand(18, 20, generator=torch.Generator().manual_seed(4)).square() * 0.4 + 0.005
    noise = random((3, 576, 640), seed=5).clamp(-1, 1)
    return (0.5 + strength.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1) * noise).clamp(0, 1)


def test_cells_lie_at_even_ranks():
    scores = torch.randperm(200, generator=torch.Generator().manual_seed(2)).reshape(10, 20).double()
    found = [int(scores[place.top, place.left]) for place in places_of(scores, 7)]
    assert sorted(found) == [50, 70, 90, 110, 130, 150, 170] and len(set(found)) == 7
    assert places_of(scores, 7) == sorted(places_of(scores, 7))
    # Equal scores and a single cell are no trouble.
    assert len(set(places_of(torch.ones(3, 4, dtype=torch.float64), 5))) == 5
    assert places_of(torch.ones(1, 1, dtype=torch.float64), 1) == [Rectangle(0, 0, 1, 1)]


def test_their_number_goes_by_the_image():
    costs = [0.001, 1.0]
    assert number_of_samples(Cells(400, 640), 8, costs) == 5 and number_of_samples(Cells(720, 1280), 8, costs) == 19
    assert number_of_samples(Cells(2160, 3840), 8, costs) == 24 and number_of_samples(Cells(340, 512), 8, costs) == 3
    assert number_of_samples(Cells(20, 40), 8, costs) == 2
    # All networks run on every one of them.
    assert number_of_samples(Cells(720, 1280), 8, [10.0, 30.0, 40.0]) == 10
    # Fewer are some of those that a calibration measures.
    scores = torch.randperm(200, generator=torch.Generator().manual_seed(3)).reshape(10, 20).double()
    five = sorted(places_of(scores, 5), key=lambda place: float(scores[place.top, place.left]))
    assert set(places_of(scores, 3)) == {five[0], five[2], five[4]}
    assert set(places_of(scores, 4)) == {five[0], five[1], five[3], five[4]}
    sampling = Sampling((3.0, 2.0, 1.5), 0.1)
    assert [sampling.margin(number) for number in (1, 3, 4, 5, 24)] == [3.0, 3.0, 2.0, 1.5, 1.5]


@pytest.mark.slow
def test_errors_are_those_of_the_cells():
    """Networks that see no further than the context: every cell has the error that it has in the whole image."""
    image = picture(2, 200, 170).float() / 255
    router, dense = cascade(1.0, None, image)
    cheap = router.networks.run(0, image[None])[0]
    squares = (cheap.clamp(0, 1) - dense.clamp(0, 1)).square()
    cells = Cells(200, 170)
    expected = cell_means(squares.mean(0)[None, None], 2 * CELL)[0, 0].double()
    places = [Rectangle(row, col, row + 1, col + 1) for row in range(cells.rows) for col in range(cells.cols)]
    pieces = samples_of(cells, places, 8)
    found = measure_samples(pieces, router.runs(), lambda w: image[:, w.top : w.bottom, w.left : w.right], 2)
    torch.testing.assert_close(found[0].reshape(expected.shape), expected, rtol=1e-4, atol=1e-9)
    ratio = ratios_of(found, places, torch.stack([expected / 3, expected]))
    torch.testing.assert_close(ratio, torch.tensor([3.0], dtype=torch.float64), rtol=1e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.1, 0.3, 1.0])
def test_a_picture_unlike_those_of_the_table_keeps_the_promise_and_wastes_nothing(factor):
    image, fidelity = large(), 34.0
    exact, dense = cascade(1.0, None, image)
    cautious, _ = cascade(factor, None, image, margin=6.0)
    measured, _ = cascade(factor, BUDGETED, image, margin=6.0)
    best, blind, seen = (router.upscale(image, fidelity=fidelity) for router in (exact, cautious, measured))
    assert nearness(seen.image, dense) >= fidelity
    spent = [result.stats.work_per_class[1] for result in (best, blind, seen)]
    if factor == 0.1:
        # Even six times what was expected is too little.
        assert nearness(blind.image, dense) < fidelity and spent[2] > spent[1]
    else:
        assert nearness(blind.image, dense) > nearness(seen.image, dense) and spent[2] < spent[1]
    # The cells that are measured, and the margin, are all that is spent beside what a perfect table would ask for.
    assert spent[0] < spent[2] < 1.4 * spent[0] + 8 * (CELL + 16) ** 2 / CELL**2


@pytest.mark.slow
def test_what_is_measured_is_counted():
    image = large()
    router, _ = cascade(1.0, BUDGETED, image, margin=6.0)
    seen = router.upscale(image, fidelity=38.0)
    table = router.decision.table
    assert table is not None
    # The plan is that of the corrected table; all networks ran on some cells more.
    ratios, given = [], router.networks.run
    router.networks.run = lambda k, x: ratios.append((k, x.shape[0] * x.shape[2] * x.shape[3])) or given(k, x)  # type: ignore[method-assign]
    router.upscale(image, fidelity=38.0)
    totals = [sum(pixels for k, pixels in ratios if k == own) / CELL**2 for own in (0, 1)]
    assert seen.stats.work_per_class == pytest.approx(totals)


@pytest.mark.slow
def test_nothing_is_measured_where_it_cannot_pay():
    image, calls = large(), []
    for table_factor, sampling, fidelity in (
        (1.0, Sampling((1.0,), 1.0), 38.0),  # pictures do not differ
        (1.0, BUDGETED, 15.0),  # interpolation will do
        (1.0, BUDGETED, 110.0),  # all must be dense, whatever is found
    ):
        router, _ = cascade(table_factor, sampling, image)
        plain, _ = cascade(table_factor, None, image)
        expected, found = (r.upscale(image, fidelity=fidelity) for r in (plain, router))
        calls.append(found.stats.work_per_class == expected.stats.work_per_class and torch.equal(found.image, expected.image))
    assert calls == [True, True, True]
    # Five cells of a small image are a large part of it: where it runs dense without, it does with them.
    small = picture(1, 96, 128).float() / 255
    router, dense = cascade(50.0, BUDGETED, small)
    result = router.upscale(small, fidelity=45.0)
    assert torch.equal(result.image, dense) and result.stats.work_per_class == [0.0, 12.0]


@pytest.mark.slow
def test_streams_measure_the_same_cells():
    image = (large() * 255).round().to(torch.uint8)
    router, _ = cascade(1.0, BUDGETED, image.float() / 255, margin=6.0)
    expected = router.upscale(image, fidelity=38.0, memory_limit=60_000_000)
    result = torch.zeros(3, 1152, 1280, dtype=torch.uint8)
    writer = fastroute.ArrayWriter(result.numpy(), channels_first=True)
    reader = fastroute.ArrayReader(image.numpy(), channels_first=True)
    streamed = router.stream(reader, writer, fidelity=38.0, memory_limit=60_000_000)
    assert torch.equal(result, expected.image) and streamed.stats.work_per_class == expected.stats.work_per_class


def sampled(cells: Measured) -> Measured:
    places = places_of(cells.scores, 5)
    errors = torch.stack([cells.errors[:, place.top, place.left] for place in places], dim=1)
    return replace(cells, places=tuple(places), samples=errors)


@pytest.mark.slow
def test_a_calibration_learns_what_measuring_is_worth():
    cells = made(spread=1.0)
    blind = learnt_from(cells, [0.01, 1.0], 40.0, (8, 16))
    seeing = learnt_from([sampled(c) for c in cells], [0.01, 1.0], 40.0, (8, 16))
    assert blind.table.sampling is None and seeing.table.margin == blind.table.margin
    sampling = seeing.table.sampling
    assert sampling is not None and len(sampling.margins) == 3
    assert all(1 <= margin < 0.6 * seeing.table.margin for margin in sampling.margins)
    # The errors of the nearest pictures are e^-1.5 of the median, a fifth of it, and less of the mean.
    assert 0.05 < sampling.least < 0.5
    assert seeing.spent < blind.spent - 0.05 and min(seeing.reached) > 40 - 1.5


def test_each_network_has_a_ratio_of_its_own():
    errors, expected = random((2, 5), torch.float64, seed=3).abs() + 0.1, torch.ones(3, 1, 5, dtype=torch.float64)
    places = [Rectangle(0, n, 1, n + 1) for n in range(5)]
    torch.testing.assert_close(ratios_of(errors, places, expected), errors.log().mean(1).exp())
