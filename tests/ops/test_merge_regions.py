"""Tests of `merge_regions`."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import GEOMETRIES, compiles_once, few, inductor_equals_eager, repeats, same
from torch import Tensor
from torch.library import opcheck

from fastroute import Regions, TileGrid, group_by_class, merge_regions
from fastroute.reference.merge_regions import merge_regions_reference

OP = torch.ops.fastroute.merge_regions.default
INDEX = (torch.int64, torch.int32, torch.int16, torch.uint8)
MERGES = (1, 2, 4, 8)
COSTS = [1.0, 2.0, 3.5]


def random_ids(n: int, classes: int, device="cpu", seed: int = 0) -> Tensor:
    """Ids in runs, as those of images are."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, classes, (n,), generator=generator)
    return torch.where(torch.rand(n, generator=generator) < 0.6, ids[torch.arange(n) // 3], ids).to(device)


def table_of(costs, grid: TileGrid, merge: int) -> Tensor:  # [K, S]
    pixels = torch.tensor([float(h * w) for h, w in grid.region_shapes(merge)], dtype=torch.float64)
    return (torch.tensor(costs, dtype=torch.float64)[:, None] * pixels).float()


def arguments(ids: Tensor, grid: TileGrid, costs: Tensor, merge: int, promote: bool) -> tuple:
    return (ids, costs, grid.height, grid.width, grid.patch, grid.stride, grid.crop, merge, promote)


def check(ids: Tensor, grid: TileGrid, costs, merge: int, promote: bool = True) -> Regions:
    """Merge, compare with the reference bit for bit, and return the regions."""
    found = merge_regions(ids, grid, costs, merge, promote)
    assert isinstance(found, Regions)
    table = costs.float() if isinstance(costs, Tensor) else table_of(costs, grid, merge)
    expected = merge_regions_reference(*arguments(ids.cpu(), grid, table.cpu(), merge, promote))
    for actual, wanted in zip(found, expected, strict=True):
        same(actual.cpu(), wanted)
        assert actual.is_contiguous()
        assert actual.device == ids.device
    return found


def test_table(backend):
    # 2 x 2 patches of 4 pixels, 3 apart: one region of 7 x 7, or halves of 4 x 7, or patches of 4 x 4.
    grid = TileGrid(7, 7, patch=4, stride=3)
    assert grid.region_shapes(2)[0] == (4, 4)
    codes = {size: code for code, size in enumerate(grid.region_shapes(2)) if size != (0, 0)}
    assert codes == {(4, 4): 0, (4, 7): 2, (7, 4): 8, (7, 7): 10}

    def merged(ids, costs, promote=True):
        found = merge_regions(torch.tensor(ids, device=backend.device), grid, costs, 2, promote)
        return [x.tolist() for x in found]

    none = 3 * 16
    # All alike: 49 pixels instead of 64.
    assert merged([1, 1, 1, 1], COSTS) == [[1, 1, 1, 1], [0, 0, 0, 0], [16 + 10, none, none, none]]
    # The rows differ: 28 · 1 + 28 · 3.5 = 126, less than 49 · 3.5 = 171.5.
    assert merged([0, 0, 2, 2], COSTS) == [[0, 0, 2, 2], [0, 0, 2, 2], [2, none, 32 + 2, none]]
    # The columns differ.
    assert merged([2, 0, 2, 0], COSTS) == [[2, 0, 2, 0], [0, 1, 0, 1], [32 + 8, 8, none, none]]
    # One patch is better than the others: 3.0 · 49 = 147, less than 28 · 2.9 + 16 · (2.9 + 3.0) = 175.6.
    assert merged([1, 1, 1, 2], [1.0, 2.9, 3.0]) == [[2, 2, 2, 2], [0, 0, 0, 0], [32 + 10, none, none, none]]
    # Nothing is raised, so there are three regions, cut between rows first.
    kept = [[1, 1, 1, 2], [0, 0, 2, 3], [16 + 2, none, 16, 32]]
    assert merged([1, 1, 1, 2], [1.0, 2.9, 3.0], promote=False) == kept
    # Where shapes have costs of their own: halves at 3 each for less than a whole at 7, columns for less than rows.
    costs = torch.full((3, 16), 100.0)
    costs[0, [0, 2, 8, 10]] = torch.tensor([9.0, 4.0, 3.0, 7.0])
    assert merged([0, 0, 0, 0], costs) == [[0, 0, 0, 0], [0, 1, 0, 1], [8, 8, none, none]]
    # At equal costs no cut is made.
    costs[0, 10] = 6.0
    assert merged([0, 0, 0, 0], costs) == [[0, 0, 0, 0], [0, 0, 0, 0], [10, none, none, none]]


def test_table_of_a_last_row(backend):
    # 3 rows of one column; the last patch is shifted inward by 1, so that it spans 6 pixels with the one before.
    grid = TileGrid(9, 4, patch=4, stride=3)
    assert [size for size in grid.region_shapes(2) if size != (0, 0)] == [(4, 4), (7, 4)]
    assert grid.region_shapes(4)[5 * 6] == (9, 4)
    found = merge_regions(torch.zeros(3, dtype=torch.int64, device=backend.device), grid, [1.0], 4)
    assert [x.tolist() for x in found] == [[0, 0, 0], [0, 0, 0], [5 * 6, 36, 36]]


@pytest.mark.parametrize("merge", MERGES)
def test_sweep_of_geometries(kernel, merge):
    for turn, (height, width, patch, stride, coverage) in enumerate(few([GEOMETRIES[::4], GEOMETRIES])[-1]):
        grid = TileGrid(height, width, patch, stride, coverage=coverage)
        for batch in few((0, 1, 3), turn + merge):
            ids = random_ids(batch * grid.num_patches, 3, kernel.device, seed=turn)
            for promote in few((True, False), turn):
                check(ids, grid, COSTS, merge, promote)


@pytest.mark.parametrize("merge", MERGES)
def test_sweep_of_costs(backend, merge):
    """Costs of each shape, as a device has them: any cut may pay."""
    grid = TileGrid(70, 61, 8, 6)
    for seed in few(range(6), merge):
        generator = torch.Generator().manual_seed(seed)
        ids = random_ids(2 * grid.num_patches, 4, backend.device, seed)
        pixels = table_of([1.0, 1.5, 2.0, 3.0], grid, merge)
        # Sums of few bits, so that many cuts cost the same.
        costs = torch.randint(1, 4, pixels.shape, generator=generator) * torch.ones(pixels.shape)
        check(ids, grid, costs.to(backend.device), merge, seed % 2 == 0)
        check(ids, grid, pixels * (0.7 + 0.6 * torch.rand(pixels.shape, generator=generator)), merge, seed % 2 == 1)


@pytest.mark.parametrize("dtype", INDEX, ids=str)
def test_types_and_strides(backend, dtype):
    grid = TileGrid(20, 31, 8, 5)
    ids = random_ids(3 * grid.num_patches, 3, backend.device).to(dtype)
    many = ids.repeat(3)[1:]
    for some in few((ids, many[: len(ids) * 2 : 2][: grid.num_patches], ids[:1].expand(grid.num_patches)), 1):
        check(some, grid, COSTS, 4)


def test_classes_of_one_kind(backend):
    grid = TileGrid(40, 47, 8, 6)
    for only in (0, 2):
        found = check(torch.full((grid.num_patches,), only, device=backend.device), grid, COSTS, 4)
        assert (found.class_ids == only).all()
        # Blocks of four at least, whatever is left at the ends.
        assert len(found.region.unique()) == math.ceil(grid.rows / 4) * math.ceil(grid.cols / 4)


def test_no_block_is_an_identity(backend):
    grid = TileGrid(40, 47, 8, 6)
    ids = random_ids(2 * grid.num_patches, 3, backend.device)
    found = check(ids, grid, COSTS, 1)
    same(found.class_ids, ids)
    assert found.region.tolist() == list(range(len(ids)))
    shifted = [code for code, size in enumerate(grid.region_shapes(1)) if size == (8, 8)]
    assert shifted == [0]
    same(found.group, 4 * ids)


@cache
def cheapest(ids: tuple, top: int, left: int, rows: int, cols: int, sizes: tuple, costs: tuple, promote: bool) -> float:
    """Least cost of a rectangle of tiles over all ways to halve it, written as the definition says."""
    inside = [ids[i][j] for i in range(top, top + rows) for j in range(left, left + cols) if i < len(ids) and j < len(ids[0])]
    if not inside:
        return 0.0
    height, width = span(sizes[0], top, rows), span(sizes[1], left, cols)
    found = costs[max(inside)] * height * width if promote or len(set(inside)) == 1 else math.inf
    rest = (sizes, costs, promote)
    if rows > 1:
        half = rows // 2
        found = min(found, cheapest(ids, top, left, half, cols, *rest) + cheapest(ids, top + half, left, half, cols, *rest))
    if cols > 1:
        half = cols // 2
        found = min(found, cheapest(ids, top, left, rows, half, *rest) + cheapest(ids, top, left + half, rows, half, *rest))
    return found


def span(axis: tuple, first: int, tiles: int) -> int:
    """Pixels from the first tile to the last of those that there are."""
    origins, patch = axis
    return origins[min(first + tiles, len(origins)) - 1] + patch - origins[first]


# (height, width, patch, stride, coverage, images): several blocks, few tiles, one tile, a shifted end, crop.
GRIDS = st.one_of(
    st.sampled_from(GEOMETRIES),
    st.tuples(st.integers(1, 60), st.integers(1, 60), st.just(8), st.integers(3, 8), st.just("full")),
)


@given(GRIDS, st.sampled_from(MERGES), st.integers(1, 4), st.integers(0, 99), st.booleans())
def test_properties(backend, geometry, merge, classes, seed, promote):
    height, width, patch, stride, coverage = geometry
    grid = TileGrid(height, width, patch, stride, coverage=coverage)
    if grid.num_patches > 100:
        return
    rows, cols, tiles = grid.rows, grid.cols, grid.num_patches
    given_ids = random_ids(2 * tiles, classes, seed=seed)
    # Sums of these are exact in float32.
    costs = [1.0, 1.25, 3.5, 4.0][:classes]
    found = merge_regions(given_ids.to(backend.device), grid, costs, merge, promote)
    ids, region, group = (x.cpu() for x in found)
    # No patch runs below its class; without raising, none above.
    assert (ids >= given_ids).all()
    assert promote or torch.equal(ids, given_ids)
    assert ids.max() < classes
    # Regions partition the patches: each holds all patches of a rectangle, of one class.
    shapes, none = grid.region_shapes(merge), classes * 4 * merge.bit_length() ** 2
    origins = grid.origins()
    area = 0.0
    assert torch.equal((group < none).nonzero().flatten(), region.unique())
    for first in region.unique().tolist():
        members = (region == first).nonzero().flatten()
        assert int(members[0]) == first
        where, image = members % tiles, first // tiles
        assert (members // tiles == image).all()
        top, left = int(where[0]) // cols, int(where[0]) % cols
        down, across = int((where // cols).max()) - top + 1, int((where % cols).max()) - left + 1
        assert len(members) == down * across
        assert top // merge == (top + down - 1) // merge
        assert left // merge == (left + across - 1) // merge
        assert len(ids[members].unique()) == 1
        code = int(group[first]) % len(shapes)
        assert int(group[first]) // len(shapes) == ids[first]
        end = origins[where[-1]] + patch - origins[where[0]]
        assert shapes[code] == tuple(end.tolist())
        area += costs[ids[first]] * shapes[code][0] * shapes[code][1]
    # The least cost of all halvings, so never above that of single patches.
    axes = ((tuple(grid.row_origins), patch), (tuple(grid.col_origins), patch))
    least = 0.0
    for image in given_ids.view(2, rows, cols).tolist():
        table = tuple(map(tuple, image))
        for top in range(0, rows, merge):
            for left in range(0, cols, merge):
                least += cheapest(table, top, left, merge, merge, axes, tuple(costs), promote)
    assert area == least
    assert least <= patch**2 * sum(costs[c] for c in given_ids.tolist())


def test_groups_of_class_and_shape(backend):
    """What `group` is for: one sort gives the regions of each class and shape, in their order."""
    grid = TileGrid(70, 61, 8, 6)
    ids = random_ids(grid.num_patches, 3, backend.device)
    found = merge_regions(ids, grid, COSTS, 4)
    shapes = grid.region_shapes(4)
    groups = group_by_class(found.group.cpu(), 3 * len(shapes) + 1)
    begins = groups.order[: groups.offsets[-2]]
    assert torch.equal(begins.sort().values, found.region.unique().cpu())
    for number, some in enumerate(groups.order.tensor_split(groups.offsets[1:-1].cpu())[:-1]):
        if len(some):
            assert (found.class_ids.cpu()[some] == number // len(shapes)).all()
            assert shapes[number % len(shapes)] != (0, 0)
            assert (some.diff() > 0).all()


@pytest.mark.parametrize("dtype", INDEX, ids=str)
def test_opcheck(operator, dtype):
    grid = TileGrid(11, 13, 5, 3)
    for images in few((0, 1, 2), dtype.itemsize):
        ids = random_ids(images * grid.num_patches, 3, operator.device).to(dtype)
        opcheck(OP, arguments(ids, grid, table_of(COSTS, grid, 2).to(operator.device), 2, True))


def test_no_gradient(operator):
    grid = TileGrid(11, 13, 5, 3)
    score = torch.rand(grid.num_patches, 3, device=operator.device, requires_grad=True)
    costs = torch.ones(3, device=operator.device, requires_grad=True)
    found = merge_regions(score.argmax(dim=1), grid, costs)
    assert not any(x.requires_grad for x in found)


def test_poisoned(backend, poisoned):
    for merge in MERGES:
        for geometry in few(GEOMETRIES[::3], merge):
            grid = TileGrid(*geometry[:4], coverage=geometry[4])
            check(random_ids(2 * grid.num_patches, 3, backend.device), grid, COSTS, merge)


def merge_of(ids: Tensor, costs: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(merge_regions(ids, TileGrid(image.shape[2], image.shape[3], 8, 5), costs))


@pytest.mark.slow
def test_compiles_once_for_all_sizes(operator):
    sizes = ((2, 20, 30), (3, 21, 17), (4, 40, 9), (2, 33, 33))
    images = [torch.zeros(b, 3, h, w, device=operator.device) for b, h, w in sizes]
    costs = torch.tensor(COSTS, device=operator.device)
    numbers = [b * TileGrid(h, w, 8, 5).num_patches for b, h, w in sizes]
    compiles_once(merge_of, [(random_ids(n, 3, operator.device), costs, x) for n, x in zip(numbers, images, strict=True)])


@pytest.mark.slow
def test_compiles_with_inductor(operator):
    grid = TileGrid(20, 30, 8, 5)
    ids = random_ids(2 * grid.num_patches, 3, operator.device)
    costs = table_of(COSTS, grid, 4).to(operator.device)
    inductor_equals_eager(merge_of, ids, costs, torch.zeros(2, 3, 20, 30, device=operator.device))


def test_deterministic(backend):
    grid = TileGrid(300, 280, 16, 12)
    ids = random_ids(4 * grid.num_patches, 3, backend.device)
    repeats(lambda: tuple(merge_regions(ids, grid, COSTS, 4)), backend.device)


GRID = TileGrid(11, 13, 5, 3)
IDS = torch.zeros(GRID.num_patches, dtype=torch.int64)


@pytest.mark.parametrize(
    ("kind", "args", "words"),
    [
        (TypeError, {"class_ids": [0, 1]}, "class_ids Tensor list"),
        (ValueError, {"class_ids": IDS[None]}, r"class_ids \(N,\) \(1, 12\)"),
        (TypeError, {"class_ids": IDS.float()}, "class_ids int64 float32"),
        (ValueError, {"class_ids": IDS[:-1]}, "class_ids multiple 12 11"),
        (ValueError, {"merge": 3}, r"merge \(1, 2, 4, 8\) 3"),
        (ValueError, {"merge": True}, r"merge \(1, 2, 4, 8\) True"),
        (ValueError, {"merge": 0}, r"merge \(1, 2, 4, 8\) 0"),
        (ValueError, {"costs": []}, r"costs \(K,\) \(0,\)"),
        (ValueError, {"costs": torch.ones(3, 5)}, r"costs \(K, 36\) \(3, 5\)"),
        (ValueError, {"costs": torch.ones(2, 3, 36)}, r"costs \(K, 36\) \(2, 3, 36\)"),
        (TypeError, {"costs": torch.ones(3, dtype=torch.int64)}, "costs float32 int64"),
        (ValueError, {"costs": torch.ones(3, device="meta")}, "costs CPU cpu meta"),
    ],
)
def test_errors(kind, args, words):
    with pytest.raises(kind, match="^merge_regions: .*" + ".*".join(words.split(" "))):
        merge_regions(**{"class_ids": IDS, "grid": GRID, "costs": COSTS} | args)


@pytest.mark.parametrize("cost", [-1.0, math.nan, math.inf])
def test_cost_out_of_range(backend, cost):
    with pytest.raises(ValueError, match=r"^merge_regions: costs must be finite and at least 0; got "):
        merge_regions(IDS.to(backend.device), GRID, [1.0, cost])


@pytest.mark.parametrize("number", [-1, 3, 2**32, -(2**63)])
@pytest.mark.parametrize("place", [0, 5, 11])
def test_class_out_of_range(backend, number, place):
    ids = IDS.to(backend.device, copy=True)
    ids[place] = number
    with pytest.raises(ValueError, match=rf"^merge_regions: class_ids must lie in \[0, 3\); got {number}$"):
        merge_regions(ids, GRID, COSTS)
