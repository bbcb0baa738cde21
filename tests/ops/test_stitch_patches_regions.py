"""Tests of `stitch_patches` where patches lie in regions."""

from __future__ import annotations

import pytest
import torch
from support import FLOATING, GEOMETRIES, INTEGER_IMAGE, bits, compiles_once, few, in_layout, random, repeats, same
from torch import Tensor
from torch.library import opcheck

from fastroute import TileGrid, make_window, stitch_patches
from fastroute.reference.extract_patches import extract_patches_reference
from fastroute.reference.group_by_class import group_by_class_reference
from fastroute.reference.merge_regions import merge_regions_reference
from fastroute.reference.stitch_patches import patches_of_regions, stitch_patches_reference
from fastroute.windows import WINDOWS

OPS = ("stitch_patches",)
OP = torch.ops.fastroute.stitch_patches.batches_out


class Held:
    """Regions of a random class map of `images` images: their numbers by class and shape, and where each patch is held."""

    def __init__(self, grid: TileGrid, images: int = 1, merge: int = 4, device: torch.device | str = "cpu", seed: int = 0):
        self.grid, self.device = grid, device
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 2, (images * grid.num_patches,), generator=generator)
        # Mostly of one class, so that there are regions of all sizes.
        ids[torch.rand(len(ids), generator=generator) < 0.7] = 1
        shapes = grid.region_shapes(merge)
        costs = torch.tensor([[float(h * w) for h, w in shapes]] * 2) * torch.tensor([[1.0], [1.5]])
        place = (grid.height, grid.width, grid.patch, grid.stride, grid.crop)
        _, region, group = merge_regions_reference(ids, costs, *place, merge, False)
        order, inverse, offsets = group_by_class_reference(group, 2 * len(shapes) + 1)
        self.region, self.inverse = region.to(device), inverse[region].to(device)
        parts = order.tensor_split(offsets[1:-1])[:-1]
        self.parts = [(shapes[code % len(shapes)], part) for code, part in enumerate(parts) if len(part)]

    def random(self, channels: int, dtype: torch.dtype = torch.float32, shuffle: int = 1, last: bool = False) -> list[Tensor]:
        """Batches of what branches might make of the regions."""
        made, factor = [], self.grid.scale // shuffle
        for seed, ((height, width), part) in enumerate(self.parts):
            size = (len(part), channels * shuffle**2, height * factor, width * factor)
            made.append(in_layout(random(size, dtype, self.device, seed), "channels_last" if last else "contiguous"))
        return made

    def cut(self, image: Tensor) -> list[Tensor]:  # [B, C, H, W]
        """Batches of the regions themselves, each pixel `scale` times in a row."""
        grid, made = self.grid, []
        for (height, width), part in self.parts:
            some = extract_patches_reference(
                image, part.to(self.device), None, None, grid.patch, grid.stride, grid.crop, None, False, height, width
            )
            made.append(some.repeat_interleave(grid.scale, 2).repeat_interleave(grid.scale, 3))
        return made

    def reference(self, batches: list[Tensor], window="uniform", dtype=None, shuffle=1, rows=None) -> Tensor:
        grid = self.grid
        place = (grid.height, grid.width, grid.patch, grid.stride, grid.scale, grid.crop)
        patches = patches_of_regions(batches, self.inverse, self.region, *place, shuffle)
        weights = make_window(window, grid.patch * grid.scale).to(
            patches.device, torch.float64 if patches.dtype == torch.float64 else torch.float32
        )
        return stitch_patches_reference(patches, None, weights, *place, shuffle, dtype, *(rows or (0, grid.output_size[0])))

    def stitch(self, batches: list[Tensor] | Tensor, window="uniform", **options) -> Tensor:
        return stitch_patches(batches, self.grid, window, self.inverse, region=self.region, **options)


def lopsided(span: int) -> Tensor:
    """A window that no mirroring or swap of axes leaves as it is."""
    return torch.linspace(0.1, 2.0, span, dtype=torch.float64)


def test_table(backend):
    # Patches of 2 x 2 begin at columns 0, 1 and 2 of a 2 x 4 image; the first two are one region.
    grid = TileGrid(2, 4, patch=2, stride=1)
    first = torch.tensor([[[[1.0, 2, 3], [4, 5, 6]]]], device=backend.device)
    second = torch.tensor([[[[11.0, 12], [13, 14]]]], device=backend.device)
    inverse, region = (torch.tensor(x, device=backend.device) for x in ([0, 0, 1], [0, 0, 2]))
    image = stitch_patches([first, second], grid, inverse=inverse, region=region)
    # Column 1 is the mean of 2 and 2, column 2 that of 3 and 11.
    assert image.tolist() == [[[[1, 2, 7, 12], [4, 5, 9.5, 14]]]]
    # The other way round; weights 3 and 1: (1 · 3 + 3 · 11) / 4.
    inverse = torch.tensor([1, 1, 0], device=backend.device)
    window = torch.tensor([3.0, 1.0], device=backend.device)
    image = stitch_patches([second, first], grid, window, inverse, region=region)
    assert image.tolist() == [[[[1, 2, 9, 12], [4, 5, 11.25, 14]]]]
    # One tensor: both rows of patches in one region, 3 x 2, the second of which is shifted inward by nothing.
    tall = torch.arange(6.0, device=backend.device).view(1, 1, 3, 2)
    zeros = torch.zeros(2, dtype=torch.int64, device=backend.device)
    assert stitch_patches(tall, TileGrid(3, 2, 2, 1), inverse=zeros, region=zeros).tolist() == tall.tolist()
    # Regions may be larger than they must be.
    assert stitch_patches(tall, TileGrid(2, 2, 2, 1), inverse=zeros[:1], region=zeros[:1]).tolist() == [[[[0, 1], [2, 3]]]]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_sweep_of_geometries(kernel, geometry):
    height, width, patch, stride, coverage = geometry
    cases = [(0, 2, 1, 4), (1, 1, 2, 8), (2, 3, 1, 4), (1, 5, 3, 2), (2, 1, 4, 4)]
    pairs = zip(cases, (*WINDOWS, None), strict=True)
    for (b, c, scale, merge), window in few(pairs, GEOMETRIES.index(geometry)):
        grid = TileGrid(height, width, patch, stride, scale, coverage)
        window = lopsided(patch * scale) if window is None else window
        held = Held(grid, b, merge, kernel.device)
        batches = held.random(c) or [random((0, c, patch * scale, patch * scale), device=kernel.device)]
        image = held.stitch(batches, window)
        assert image.shape == (b, c, *grid.output_size)
        assert image.is_contiguous()
        same(image, held.reference(batches, window))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_sweep_of_types_and_layouts(kernel, dtype, layout):
    held = Held(TileGrid(19, 23, 6, 4, 2), 2, device=kernel.device)
    batches = [in_layout(batch, layout) for batch in held.random(3, dtype)]
    for target in few((None, *FLOATING, *INTEGER_IMAGE), dtype.itemsize):
        same(held.stitch(batches, "hann", dtype=target), held.reference(batches, "hann", target))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("scale", "shuffle"), [(4, 4), (4, 2), (2, 2), (3, 3), (6, 2)])
def test_shuffle(kernel, scale, shuffle, last):
    held = Held(TileGrid(21, 30, 8, 6, scale), device=kernel.device)
    for dtype in few((torch.float32, torch.float16), scale + last):
        batches = held.random(3, dtype, shuffle, last)
        same(held.stitch(batches, "linear", shuffle=shuffle), held.reference(batches, "linear", shuffle=shuffle))


@pytest.mark.parametrize("coverage", ["full", "crop"])
def test_rows(backend, coverage):
    """Bands into a larger image; rows of patches that a band does not read may be missing."""
    grid = TileGrid(38, 26, 8, 6, 2, coverage)
    held = Held(grid, 2, device=backend.device)
    batches = held.random(2)
    whole, (height, width) = held.stitch(batches, "hann"), grid.output_size
    canvas = torch.full((2, 2, height + 3, width), -1.0, device=backend.device)
    bands = [(0, 5), (5, 6), (6, 40), (40, 40), (40, height)]
    for begin, end in few([bands[1:3], bands])[-1]:
        read = [begin < (y + 8) * 2 and y * 2 < end for y in grid.row_origins]
        missing = ~torch.tensor(read, device=backend.device)[:, None].expand(-1, grid.cols).flatten().repeat(2)
        inverse, region = held.inverse.clone(), held.region.clone()
        inverse[missing], region[missing] = -5, 2**40
        out = canvas[:, :, begin:end]
        stitch_patches(batches, grid, "hann", inverse, rows=(begin, end), out=out, region=region)
        same(out, whole[:, :, begin:end])
    assert (canvas[:, :, height:] == -1).all()


@pytest.mark.parametrize("merge", [2, 4, 8])
def test_identity(backend, merge):
    """Regions of an image, stitched, are the image."""
    grids = [
        (TileGrid(41, 37, 8, 6, 2), "hann"),
        (TileGrid(30, 70, 16, 9), "linear"),
        (TileGrid(5, 40, 8, 7), "uniform"),
        (TileGrid(40, 33, 8, 6, 1, "crop"), "gaussian"),
        (TileGrid(33, 40, 8, 6, 3), "crop"),
    ]
    for grid, window in few(grids, merge // 2):
        image = random((2, 3, grid.height, grid.width), device=backend.device)
        held = Held(grid, 2, merge, backend.device)
        height, width = grid.output_size
        expected = image.repeat_interleave(grid.scale, 2).repeat_interleave(grid.scale, 3)[:, :, :height, :width]
        torch.testing.assert_close(held.stitch(held.cut(image), window), expected, rtol=0, atol=1e-6)


def test_single_patches_are_regions(backend):
    """With blocks of one patch the result is that without regions, bit for bit."""
    grid = TileGrid(19, 23, 6, 4, 2)
    held = Held(grid, 2, 1, backend.device)
    batches = held.random(3)
    plain = torch.empty(2, 3, *grid.output_size, device=backend.device)
    stitch_patches(batches, grid, "gaussian", held.inverse, out=plain)
    same(bits(held.stitch(batches, "gaussian")), bits(plain))


def test_many_tensors(kernel):
    """One region a tensor, more of them than one launch of a kernel is told of, and empty ones between."""
    grid = TileGrid(76, 82, 4, 3)
    held = Held(grid, 1, 2, kernel.device)
    batches = held.random(1)
    single = [part for batch in batches for part in (*batch.split(1), batch[:0])]
    assert len(single) > 130
    same(held.stitch(single), held.reference(batches))


def test_bits_survive(backend):
    """What lies in a region beside its patches is not read, and what a patch has outside the image is dropped."""
    grid = TileGrid(3, 5, 4, 2)
    region = torch.zeros(grid.num_patches, dtype=torch.int64, device=backend.device)
    held = torch.full((1, 1, 8, 9), float("nan"), device=backend.device)
    held[..., :3, :5] = random((3, 5), device=backend.device)
    image = stitch_patches(held, grid, inverse=region, region=region)
    torch.testing.assert_close(image[0, 0], held[0, 0, :3, :5], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_opcheck(operator):
    grid = TileGrid(11, 13, 5, 3, 2)
    place = (grid.height, grid.width, grid.patch, grid.stride, grid.scale, grid.crop)
    for shuffle in (1, 2):
        held = Held(grid, device=operator.device)
        batches, out = held.random(2, shuffle=shuffle), torch.zeros(1, 2, 22, 26, device=operator.device)
        window = torch.ones(10, device=operator.device)
        opcheck(OP, (batches, held.inverse, held.region, window, *place, shuffle, 0, 22), {"out": out})


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_poisoned(backend, poisoned, dtype):
    for height, width, patch, stride, coverage in few([GEOMETRIES[::5], GEOMETRIES])[-1]:
        held = Held(TileGrid(height, width, patch, stride, coverage=coverage), device=backend.device)
        batches = held.random(2, dtype)
        image = held.stitch(batches)
        assert not image.isnan().any()
        same(image, held.reference(batches))


def stitch_both(first: Tensor, second: Tensor, inverse: Tensor, region: Tensor, image: Tensor) -> Tensor:
    grid = TileGrid(image.shape[2], image.shape[3], 8, 5)
    return stitch_patches([first, second], grid, "hann", inverse, region=region)


@pytest.mark.slow
def test_compiles_once_for_all_sizes(operator):
    calls = []
    for images, height, width in few([((2, 20, 30), (3, 21, 17)), ((2, 20, 30), (3, 21, 17), (4, 40, 9))])[-1]:
        held = Held(TileGrid(height, width, 8, 5), images, 1, operator.device)
        patches = random((len(held.region), 1, 8, 8), device=operator.device)
        image = torch.zeros(images, 3, height, width, device=operator.device)
        calls.append((patches[:5], patches[5:], held.inverse, held.region, image))
    compiles_once(stitch_both, calls)


def test_deterministic(backend):
    held = Held(TileGrid(70, 67, 16, 5), 2, device=backend.device)
    batches = held.random(3)
    repeats(lambda: held.stitch(batches, "hann"), backend.device)


GRID = TileGrid(7, 9, 4, 3, 2)
REGION = torch.zeros(6, dtype=torch.int64)
ROW = torch.zeros(1, 3, 14, 20)


@pytest.mark.parametrize(
    ("kind", "args", "words"),
    [
        (TypeError, {"patches": [1.0]}, "patches Tensor list list"),
        (ValueError, {"patches": []}, "patches at least one none"),
        (ValueError, {"patches": ROW[0]}, r"patches \(M, C, h, w\) 3"),
        (ValueError, {"inverse": None}, "region inverse"),
        (ValueError, {"region": REGION[:5]}, "region 6 5"),
        (TypeError, {"region": REGION.int()}, "region int64 int32"),
        (TypeError, {"region": [0] * 6}, "region Tensor list"),
        (ValueError, {"region": REGION.to("meta")}, "region cpu meta"),
        (ValueError, {"shuffle": 3}, "shuffle divide 2 3"),
        (TypeError, {"patches": [ROW, ROW.half()]}, "patches one dtype float32 float16"),
        (ValueError, {"patches": [ROW, ROW[:, :2]]}, r"regions 3 8 x 8 \(1, 2, 14, 20\)"),
        (ValueError, {"patches": [ROW, ROW[:, :, :, :7]]}, r"regions 3 8 x 8 \(1, 3, 14, 7\)"),
    ],
)
def test_errors(kind, args, words):
    with pytest.raises(kind, match="^stitch_patches: .*" + ".*".join(words.split(" "))):
        stitch_patches(**{"patches": [ROW], "grid": GRID, "inverse": REGION, "region": REGION} | args)


@pytest.mark.parametrize(
    ("name", "entry", "value", "words"),
    [
        ("inverse", 5, 1, r"inverse must lie in \[0, 1\); got 1"),
        ("inverse", 0, -1, r"inverse must lie in \[0, 1\); got -1"),
        ("region", 4, 5, "region must name a patch above or left of its patches, in their image; got 5 for patch 4"),
        ("region", 0, -1, "region must name a patch above or left of its patches, in their image; got -1 for patch 0"),
        # To the right of patch 3, though before it.
        ("region", 3, 1, "region 1 does not hold patch 3; got 14 x 20"),
    ],
)
def test_place_out_of_range(backend, name, entry, value, words):
    places = {"inverse": REGION.clone(), "region": REGION.clone()}
    places[name][entry] = value
    held = {key: place.to(backend.device) for key, place in places.items()}
    with pytest.raises(ValueError, match=f"^stitch_patches: {words}$"):
        stitch_patches([ROW.to(backend.device)], GRID, **held)


def test_region_out_of_range_by_its_size(backend):
    # Two rows of patches span 14 pixels, three columns 18.
    for size, words in (((14, 17), "14 x 17"), ((13, 18), "13 x 18")):
        held = torch.zeros(1, 3, *size, device=backend.device)
        place = REGION.to(backend.device)
        with pytest.raises(ValueError, match=f"^stitch_patches: region 0 does not hold patch .; got {words}$"):
            stitch_patches(held, GRID, inverse=place, region=place)
