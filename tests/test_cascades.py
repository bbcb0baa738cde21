"""Cascades of networks: plans, regions with their context, blends, budgets, and what is refused."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from support import random
from torch import Tensor, nn

import fastroute
from fastroute.cascades import memory
from fastroute.cascades import router as router_module
from fastroute.cascades.cells import CELL, Cells, Rectangle, edge_scores
from fastroute.cascades.decision import Decision, Table, error_of
from fastroute.cascades.plan import PASS, Plan, cover, make_plan, spent
from fastroute.cascades.router import CascadeRouter
from fastroute.cascades.run import FADE, Limits, edges_of, layers_of, pieces_of
from fastroute.models.arm import edge_score
from fastroute.models.compact import Compact
from fastroute.models.network import Facts

SIZES = [(1, 1), (32, 32), (33, 31), (70, 100), (300, 20)]


class Local(nn.Module):
    """Sees `reach` pixels around each: a mean over them, enlarged by nearest neighbours, times `gain`."""

    def __init__(self, reach: int, gain: float, scale: int = 2) -> None:
        super().__init__()
        self.reach, self.gain, self.scale, self.channels = reach, nn.Parameter(torch.tensor(gain)), scale, 3

    def forward(self, x: Tensor) -> Tensor:
        side = 2 * self.reach + 1
        mean = nn.functional.avg_pool2d(x, side, stride=1, padding=self.reach)
        return self.gain * nn.functional.interpolate(mean, scale_factor=float(self.scale), mode="nearest")


class Sharper(nn.Module):
    """Interpolation and details, which are strongest where edges are."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 2
        self.conv = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False)
        kernel = torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]]) / 4
        self.conv.weight.data.copy_(kernel.expand(3, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(x + self.conv(x), scale_factor=2.0, mode="bicubic")


def random_map(cells: Cells, classes: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, classes, (cells.rows, cells.cols), generator=generator)


def covered(rectangles: list[Rectangle], cells: Cells) -> Tensor:
    count = torch.zeros(cells.rows, cells.cols, dtype=torch.int64)
    for r in rectangles:
        count[r.top : r.bottom, r.left : r.right] += 1
    return count


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("context", [0, 8, 16, 40])
def test_covers_hold_what_is_needed_and_cost_no_more_than_single_cells(seed, context):
    cells = Cells(32 * 7 + 5, 32 * 9 - 3)
    needed = random_map(cells, 4, seed) == 0
    found = cover(needed, cells, context)
    assert bool((covered(found, cells) > 0)[needed].all())
    singles = [Rectangle(y, x, y + 1, x + 1) for y, x in needed.nonzero().tolist()]
    ends = [(y, needed[y].nonzero().flatten().tolist()) for y in range(cells.rows)]
    lines = [Rectangle(y, min(xs), y + 1, max(xs) + 1) for y, xs in ends if xs]
    assert spent(found, cells, context) <= min(spent(singles, cells, context), spent(lines, cells, context))


def test_covers_are_the_cheapest_of_small_maps():
    """Beside every partition of the needed cells into the rectangles around its parts."""
    cells = Cells(3 * CELL, 4 * CELL)

    def partitions(items: list[Rectangle]):
        if not items:
            yield []
            return
        for rest in partitions(items[1:]):
            yield [items[0], *rest]
            for n in range(len(rest)):
                yield [*rest[:n], rest[n].joined(items[0]), *rest[n + 1 :]]

    worse = []
    for seed in range(12):
        needed = random_map(cells, 2, seed) == 0
        singles = [Rectangle(y, x, y + 1, x + 1) for y, x in needed.nonzero().tolist()]
        best = min((spent(list(dict.fromkeys(p)), cells, 8) for p in partitions(singles)), default=0.0)
        worse.append(spent(cover(needed, cells, 8), cells, 8) / max(best, 1) - 1)
    # The cheapest cut is one without overlaps, which is nearly always the best.
    assert min(worse) >= -1e-9 and max(worse) < 0.02 and sorted(worse)[len(worse) // 2] == 0


@pytest.mark.parametrize("size", SIZES)
def test_plans_raise_and_never_lower(size):
    cells = Cells(*size)
    for seed in range(4):
        wanted = random_map(cells, 3, seed)
        plan = make_plan(wanted, cells, [1.0, 5.0, 100.0], 8)
        assert bool((plan.class_ids >= wanted).all())
        held = torch.zeros_like(wanted) - 1
        for k, regions in enumerate(plan.regions):
            held = torch.where(covered(list(regions), cells) > 0, k, held)
        assert torch.equal(held, plan.class_ids)
        work = sum(w * share for w, share in zip(plan.work(), (0.01, 0.05, 1.0), strict=True))
        passes = PASS * sum(len(r) * share for r, share in zip(plan.regions, (0.01, 0.05, 1.0), strict=True))
        assert plan.cost == pytest.approx(work + passes) and plan.cost <= size[0] * size[1] + PASS


def test_a_map_that_saves_nothing_becomes_one_dense_run():
    cells = Cells(200, 200)
    wanted = torch.zeros(cells.rows, cells.cols, dtype=torch.int64)
    wanted[::2, ::2] = 1
    plan = make_plan(wanted, cells, [1.0, 100.0], 32)
    assert plan.regions == ((), (cells.whole,)) and bool((plan.class_ids == 1).all())


@pytest.mark.parametrize("size", SIZES)
def test_scores_are_those_of_patches(size):
    image = random((1, 3, *size), seed=3).clamp(0, 1)
    scores = edge_scores(image)
    assert scores.shape == (1, Cells(*size).rows, Cells(*size).cols)
    if size == (32, 32):
        torch.testing.assert_close(scores.flatten(), edge_score(image))
    assert bool((scores >= 0).all())


def drawn(plan: Plan, image: Tensor, networks: list[nn.Module], rows: int, limits: Limits | None = None) -> Tensor:
    """The result of a plan at a scale of 2, in bands of some rows."""
    pieces = [pieces_of(plan.cells, regions, plan.context, limits) for regions in plan.regions]
    layers = layers_of(plan, pieces, networks, lambda at: image[:, at.top : at.bottom, at.left : at.right], 2)
    output = torch.zeros(3, 2 * image.shape[1], 2 * image.shape[2])
    with torch.inference_mode():
        for top in range(0, image.shape[1], rows):
            band = output[:, 2 * top : 2 * (top + rows)]
            for layer in layers:
                layer.compute(min(top + rows, image.shape[1]))
                layer.draw(band, top)
    assert not any(layer.results or layer.active for layer in layers)
    return output


@pytest.mark.slow
def test_regions_within_the_reach_of_a_context_are_exact():
    """With as much context as a network sees, every pixel is that of the whole image, but for the blends."""
    image = random((3, 150, 200), seed=4).clamp(0, 1)
    networks = [Local(0, 0.5).eval(), Local(3, 1.0).eval()]
    whole = [network(image[None])[0] for network in networks]
    cells = Cells(150, 200)
    for seed in range(4):
        plan = make_plan(random_map(cells, 2, seed), cells, [1.0, 40.0], 3 + FADE)
        output = drawn(plan, image, networks, 150)
        ids = plan.class_ids.repeat_interleave(2 * CELL, 0).repeat_interleave(2 * CELL, 1)[:300, :400]
        high = ids == 1
        torch.testing.assert_close(output[:, high], whole[1][:, high], rtol=0, atol=1e-6)
        # A cheap pixel further from a region than its blend reaches is the cheap network's.
        near = nn.functional.max_pool2d(high[None, None].float(), 4 * FADE + 1, 1, 2 * FADE)[0, 0] > 0
        torch.testing.assert_close(output[:, ~near], whole[0][:, ~near], rtol=0, atol=1e-6)
        between = output[:, near & ~high]
        low, top = (torch.stack(whole).amin(0)[:, near & ~high], torch.stack(whole).amax(0)[:, near & ~high])
        assert bool(((between >= low - 1e-6) & (between <= top + 1e-6)).all())


def test_pieces_within_a_limit():
    cells = Cells(170, 90)
    pieces = pieces_of(cells, [cells.whole], 8, Limits(60 * 60))
    count = torch.zeros(170, 90)
    for piece in pieces:
        inner, outer = piece.inner, piece.outer
        count[inner.top : inner.bottom, inner.left : inner.right] += 1
        assert outer.area <= 60 * 60 and outer.holds(inner) and piece.fading.holds(inner) and outer.holds(piece.fading)
    assert bool((count == 1).all())
    low = pieces_of(cells, [cells.whole], 8, Limits(tallest=70))
    assert len(low) == 4 and all(piece.inner.right == 90 and piece.inner.bottom - piece.inner.top <= 64 for piece in low)


@pytest.mark.slow
@pytest.mark.parametrize("limits", [None, Limits(80 * 80, 64)])
def test_bands_of_any_height_give_the_same_bits(limits):
    image, cells = random((3, 150, 200), seed=4).clamp(0, 1), Cells(150, 200)
    networks = [Local(0, 0.5).eval(), Local(2, 0.8).eval(), Local(3, 1.0).eval()]
    for seed in range(3):
        plan = make_plan(random_map(cells, 3, seed), cells, [1.0, 40.0, 400.0], 9)
        whole = drawn(plan, image, networks, 150, limits)
        for rows in (1, 7, 32, 70):
            assert torch.equal(drawn(plan, image, networks, rows, limits), whole)


def test_bands_end_where_pieces_that_do_not_fade_do():
    cells = Cells(200, 90)
    strips = pieces_of(cells, [cells.whole], 8, Limits(tallest=128), fade=0)
    assert edges_of([strips], 200, 50) == [0, 50, 96, 146, 196, 200]
    assert edges_of([pieces_of(cells, [cells.whole], 8)], 200, 90) == [0, 90, 180, 200]
    assert edges_of([[]], 1, 50) == [0, 1]


def build(classes: int = 3) -> fastroute.CascadeRouter:
    torch.manual_seed(0)
    return fastroute.cascade(["bicubic", Compact(8, 1, 2), Compact(16, 6, 2)][3 - classes :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8, torch.uint16])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_and_type(dtype, size):
    router = build()
    image = random((2, 3, *size), dtype, seed=5)
    for budget in (0.05, 0.5, 1):
        result = router.upscale(image, budget=budget)
        assert result.image.shape == (2, 3, 2 * size[0], 2 * size[1]) and result.image.dtype == dtype
        assert result.class_map.shape == (2, Cells(*size).rows, Cells(*size).cols)
    single = router.upscale(image[1], budget=1)
    assert torch.equal(single.image, result.image[1]) and torch.equal(single.class_map, result.class_map[1])


def test_the_whole_budget_is_the_dense_result_bit_for_bit():
    router, image = build(), random((3, 90, 130), seed=6)
    dense = fastroute.load(router.networks.members[-1])
    assert torch.equal(router.upscale(image, budget=1).image, dense(image))


def test_budgets_are_kept_and_buy_quality():
    router = fastroute.cascade(["bicubic", Sharper()], costs=[1.0, 50.0])
    y, x = torch.meshgrid(torch.arange(224.0), torch.arange(288.0), indexing="ij")
    image = (0.5 + 0.4 * random((3, 224, 288), seed=7) * (x > y)).clamp(0, 1)
    dense, errors = router.upscale(image, budget=1), []
    for budget in (0.1, 0.3, 0.6, 0.9):
        result = router.upscale(image, budget=budget)
        own, every = result.stats.work_per_class, 224 * 288 / CELL**2
        assert own[0] / 50 + own[1] <= budget * every
        errors.append(float((result.image - dense.image).square().mean()))
    assert all(b <= a * 1.001 for a, b in itertools.pairwise(errors)) and errors[-1] < errors[0] / 2


def test_thresholds_choose_the_class():
    torch.manual_seed(1)
    networks = ["bicubic", Compact(8, 1, 2), Compact(16, 6, 2)]
    router = fastroute.cascade(networks, thresholds=[1.0, 30.0])
    image = torch.full((3, 96, 192), 0.5)
    image[:, :, 64:128] += 0.02 * random((3, 96, 64), seed=8)
    image[:, :, 128:] += 0.5 * (random((3, 96, 64), seed=9) - 0.5)
    wanted = (edge_scores(image[None])[0][..., None] > torch.tensor([1.0, 30.0])).sum(-1)
    assert set(wanted.flatten().tolist()) == {0, 1, 2}
    result = router.upscale(image)
    assert bool((result.class_map >= wanted).all())
    assert torch.equal(router(image), result.image)


def test_class_maps_are_kept_or_raised():
    router, image = build(), random((3, 96, 96), seed=10)
    wanted = torch.tensor([[0, 0, 0], [0, 2, 0], [1, 0, 0]])
    result = router.upscale(image, class_map=wanted, context=4)
    assert bool((result.class_map >= wanted).all()) and result.class_map[1, 1] == 2
    for wrong, error in ((wanted[:2], ValueError), (wanted + 1, ValueError), (wanted.float(), TypeError)):
        with pytest.raises(error, match="class_map"):
            router.upscale(image, class_map=wrong)


@pytest.mark.slow
def test_it_is_a_module():
    router, image = build(), random((3, 64, 64), seed=11)
    exact = router.upscale(image, budget=0.5).image
    half = copy.deepcopy(router).bfloat16()
    assert half.dtype == torch.bfloat16 and router.dtype == torch.float32
    near = half.upscale(image, budget=0.5).image
    assert near.dtype == torch.float32 and 0 < float((near - exact).abs().max()) < 0.05
    with fastroute.use_backend("reference"):
        rounded = copy.deepcopy(router).bfloat16().upscale(image, budget=0.5).image
    assert float((rounded - near).abs().max()) < 0.05
    assert torch.equal(router.upscale(image, budget=0.5).image, exact)
    again = build()
    again.load_state_dict(router.state_dict())
    assert torch.equal(again.upscale(image, budget=0.5).image, exact)
    assert router.double().upscale(image.double(), budget=0.5).image.dtype == torch.float64


class Counted(fastroute.ArrayReader):
    """Notes how much is read at a time."""

    most = 0

    def read(self, y0: int, y1: int, x0: int, x1: int) -> Tensor:
        self.most = max(self.most, (y1 - y0) * (x1 - x0))
        return super().read(y0, y1, x0, x1)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 8_000_000])
@pytest.mark.parametrize("step", [1, 48])
@pytest.mark.parametrize("choice", [{"budget": 0.5}, {"budget": 1}, {"budget": 0.05}])
def test_streams_are_the_same(limit, step, choice):
    router, image = build(), random((3, 200, 150), torch.uint8, seed=12)
    result = torch.zeros(3, 400, 300, dtype=torch.uint8)
    reader = Counted(image.numpy(), channels_first=True)
    writer = fastroute.ArrayWriter(result.numpy(), channels_first=True, row_step=step)
    streamed = router.stream(reader, writer, memory_limit=limit, **choice)
    expected = router.upscale(image, memory_limit=limit, **choice)
    assert torch.equal(result, expected.image) and torch.equal(streamed.class_map, expected.class_map)
    assert limit is None or streamed.stats.working_set <= limit
    assert (reader.most < 200 * 150) == (limit is not None) or choice == {"budget": 0.5}


@pytest.mark.slow
def test_a_limit_that_no_cell_fits_into_is_refused_with_one_that_does():
    router, image = build(), random((3, 200, 150), seed=12)
    with pytest.raises(ValueError, match=r"memory_limit must be at least \d+ bytes") as caught:
        router.upscale(image, budget=0.5, memory_limit=1000)
    least = int(str(caught.value).split("at least ")[1].split(" ")[0])
    assert router.upscale(image, budget=0.5, memory_limit=least).stats.working_set <= least
    with pytest.raises(ValueError, match="memory_limit"):
        router.upscale(image, budget=0.5, memory_limit=least - 1)


def test_strips_of_a_network_that_sees_no_further_are_its_whole_result(monkeypatch):
    monkeypatch.setattr(memory, "TWICE", 1.0)
    monkeypatch.setattr(router_module, "SMALL", 0)
    monkeypatch.setitem(memory.ACTIVATIONS, "cpu", 100_000)
    image = random((3, 200, 150), seed=3)
    network = Compact(16, 6, 2)
    facts = Facts("Compact", 2, 3, reach=8)
    router = CascadeRouter([network], [facts], Decision())
    with torch.inference_mode():
        expected = network(image[None])[0]
    result = router.upscale(image)
    assert result.stats.work_per_class[0] > 200 * 150 / CELL**2
    torch.testing.assert_close(result.image, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_what_is_refused():
    image = random((3, 40, 40), seed=13)
    with pytest.raises(ValueError, match="not calibrated"):
        build().upscale(image)
    with pytest.raises(ValueError, match="fidelity needs a calibrated"):
        build().upscale(image, fidelity=40)
    for budget in (0, -1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="budget"):
            build().upscale(image, budget=budget)
    with pytest.raises(ValueError, match="each decides alone"):
        build().upscale(image, budget=0.5, fidelity=40)
    with pytest.raises(ValueError, match=r"float16|half"):
        build().half()
    small, large = Compact(8, 1, 2), Compact(16, 6, 2)
    for branches, words in (
        ([], "at least one"),
        (["bicubic"], "beside interpolation"),
        ([large, small], "from the cheapest"),
        ([small, copy.deepcopy(small), large], "leave one of them out"),
        (["bicubic", "bicubic", large], "bicubic and bicubic cost"),
        ([small, Compact(16, 6, 4)], "one scale"),
        ([small, Compact(16, 6, 2, channels=1)], "number of channels"),
    ):
        with pytest.raises(ValueError, match=words):
            fastroute.cascade(branches)
    with pytest.raises(ValueError, match="no classifier, by which a budget could be shared"):
        list(fastroute.upscale_many(build(), [image], budget=0.5))
    for options, words in (
        ({"score": "none"}, "score"),
        ({"context": -1}, "context"),
        ({"thresholds": [1.0, 2.0]}, "thresholds must be 1"),
        ({"costs": [2.0, 1.0]}, "from the cheapest"),
    ):
        with pytest.raises(ValueError, match=words):
            fastroute.cascade([small, large], **options)


def test_what_sees_far_errs_in_regions():
    """A cheaper class that sees farther than the context errs as the last does there, but for the whole image."""
    cells = Cells(2 * CELL, 3 * CELL)
    errors = torch.tensor([[1e-3, 1e-3], [1e-4, 1e-4], [1e-5, 1e-5]], dtype=torch.float64)
    table = Table(torch.tensor([1.0, 2.0]), errors, margin=2.0, wide=(False, True))
    expected = errors[:, :1, None].expand(3, 2, 3)
    ids = torch.tensor([[0, 1, 1], [0, 1, 1]])
    plan = Plan(cells, ((Rectangle(0, 0, 2, 1),), (Rectangle(0, 1, 2, 3),), ()), 16, ids, 1.0)
    # The column along the border of its region errs by the whole of the last class's error, the other by a fourth.
    own = (1e-3 + (1e-4 + 1e-5) + (1e-4 + 0.25e-5)) / 3
    assert error_of(plan, expected, table, cells.areas()) == pytest.approx(2 * own, rel=1e-6)
    whole = Plan(cells, ((), (cells.whole,), ()), 16, torch.ones(2, 3, dtype=torch.int64), 1.0)
    assert error_of(whole, expected, table, cells.areas()) == pytest.approx(2e-4, rel=1e-6)
