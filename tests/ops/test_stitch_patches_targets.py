"""Tests of `stitch_patches` beyond whole floating images: shuffled patches, bands, integers, given outputs."""

from __future__ import annotations

import pytest
import torch
from support import FLOATING, compiles_once, few, in_layout, random, same
from test_stitch_patches import patches_for, reference, shuffled
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

from fastroute import TileGrid, make_window, stitch_patches

OPS = ("stitch_patches",)


def test_table_of_inverse_shuffle_rows(backend):
    device = backend.device
    grid = TileGrid(1, 2, patch=1, stride=1)
    patches = torch.tensor([10.0, 20.0, 30.0], device=device).view(3, 1, 1, 1)
    assert stitch_patches(patches, grid, inverse=torch.tensor([2, 0], device=device)).tolist() == [[[[30, 10]]]]
    assert stitch_patches(patches, grid, inverse=torch.tensor([1, 1, 0, 2], device=device)).tolist() == [
        [[[20, 20]]],
        [[[10, 30]]],
    ]
    patches = torch.arange(1.0, 9.0, device=device).view(1, 8, 1, 1)
    image = stitch_patches(patches, TileGrid(1, 1, 1, 1, scale=2), shuffle=2)
    assert image.tolist() == [[[[1, 2], [3, 4]], [[5, 6], [7, 8]]]]
    band = stitch_patches(patches, TileGrid(1, 1, 1, 1, scale=2), shuffle=2, rows=(1, 2))
    assert band.tolist() == [[[[3, 4]], [[7, 8]]]]


def test_patches_of_one_pixel_have_either_memory_format(backend):
    grid = TileGrid(1, 3, patch=1, stride=1)
    planes = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=backend.device).view(2, 2, 1, 1)
    pixels = torch.tensor([[5.0, 6.0]], device=backend.device).view(1, 2, 1, 1).contiguous(memory_format=torch.channels_last)
    pixels = pixels.as_strided((1, 2, 1, 1), (2, 1, 2, 2))
    for batches in ([planes, pixels], [planes[:1], pixels, planes[1:]]):
        out = torch.empty(1, 2, 1, 3, device=backend.device)
        stitch_patches(batches, grid, out=out)
        assert torch.equal(out[0, :, 0].t(), torch.cat(batches).flatten(1))


@pytest.mark.parametrize(
    ("dtype", "maximum", "ties"),
    [(torch.uint8, 255, {0.5: 0, 1.5: 2, 2.5: 2, 127.5: 128}), (torch.uint16, 65535, {0.5: 0, 2.5: 2, 32767.5: 32768})],
    ids=str,
)
def test_table_of_integers(backend, dtype, maximum, ties):
    values = torch.tensor(list(ties)) / maximum
    assert (values * maximum).tolist() == list(ties), "the inputs are no ties"
    special = {-0.5: 0, 1.5: maximum, float("inf"): maximum, -float("inf"): 0, 1.0: maximum, 0.2: maximum // 5}
    values = torch.cat([values, torch.tensor(list(special))]).to(backend.device)
    image = stitch_patches(values.view(-1, 1, 1, 1), TileGrid(1, len(values), 1, 1), dtype=dtype)
    assert image.dtype == dtype
    assert image.flatten().to(torch.int32).tolist() == [*ties.values(), *special.values()]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shuffle(backend, dtype, layout):
    for height, width, stride in ((9, 7, 3), (3, 10, 4)):
        grid = TileGrid(height, width, 4, stride, 4)
        for factor in (1, 2, 4):
            small = 16 // factor
            patches = random((grid.num_patches, 3 * factor**2, small, small), dtype, backend.device)
            patches = in_layout(patches, layout)
            inverse = shuffled(len(patches), backend.device)
            expected = reference(F.pixel_shuffle(patches, factor), grid, "linear", inverse)
            same(stitch_patches(patches, grid, "linear", inverse, shuffle=factor), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("scale", "factor"), [(2, 2), (3, 3), (4, 4), (6, 3), (6, 4), (4, 2), (5, 5)])
def test_shuffle_in_rows(backend, dtype, scale, factor):
    """All phases of a pixel side by side: whole rows of pixels, parts of them, weights that need both sums."""
    for size, stride in few((((9, 7), 6), ((23, 30), 9), ((5, 5), 4)), scale + factor):
        grid = TileGrid(*size, 12, stride, scale)
        span = 12 * scale // factor
        patches = random((grid.num_patches, 2 * factor**2, span, span), dtype, backend.device)
        patches = in_layout(patches, "channels_last")
        inverse = shuffled(len(patches), backend.device)
        whole = reference(F.pixel_shuffle(patches, factor), grid, "uniform", inverse)
        same(stitch_patches(patches, grid, "uniform", inverse, shuffle=factor), whole)
        rows = (1, grid.output_size[0] - 2)
        same(stitch_patches(patches, grid, "uniform", inverse, shuffle=factor, rows=rows), whole[:, :, rows[0] : rows[1]])
        bytes_ = reference(F.pixel_shuffle(patches, factor), grid, "uniform", inverse, torch.uint8)
        same(stitch_patches(patches, grid, "uniform", inverse, torch.uint8, shuffle=factor), bytes_)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_large_patches_with_a_shuffle(factor):
    """Windows too large to be summed for all channels at once."""
    grid = TileGrid(130, 140, 128, 112, factor)
    patches = in_layout(random((grid.num_patches, 3 * factor**2, 128, 128), torch.float32, "cpu"), "channels_last")
    whole = reference(F.pixel_shuffle(patches, factor), grid, "uniform", None)
    same(stitch_patches(patches, grid, "uniform", shuffle=factor), whole)


@pytest.mark.parametrize("window", ["uniform", "hann"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8], ids=str)
def test_tall_image(dtype, window):
    """Rows enough for the largest items of work, which begin and end inside patches."""
    grid = TileGrid(901, 9, 8, 5, 4)
    patches = patches_for(grid, 1, 3, torch.float16 if dtype == torch.float16 else torch.float32)
    inverse = shuffled(len(patches), "cpu")
    same(stitch_patches(patches, grid, window, inverse, dtype=dtype), reference(patches, grid, window, inverse, dtype))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_several_tensors_stand_for_one(backend, layout):
    grid = TileGrid(9, 17, 4, 3, 4)
    patches = in_layout(random((grid.num_patches, 12, 8, 8), device=backend.device), layout)
    inverse = shuffled(len(patches), backend.device)
    expected = stitch_patches(patches, grid, "hann", inverse, shuffle=2)
    for sizes in ([len(patches)], [1, 0, len(patches) - 1], [3, 5, len(patches) - 8]):
        out = torch.full_like(expected, float("nan"))
        assert stitch_patches(list(patches.split(sizes)), grid, "hann", inverse, shuffle=2, out=out) is out
        same(out, expected)


def test_errors_of_several_tensors():
    grid, out = TileGrid(4, 4, 4, 4), torch.zeros(1, 1, 4, 4)
    one = torch.zeros(1, 1, 4, 4)
    for batches, error, words in (
        ([], ValueError, "at least one"),
        ([one, one.double()], TypeError, "one dtype"),
        ([one, one[:, :, :2]], ValueError, "one shape"),
        ([one, torch.zeros(1, 1, 4, 8)[:, :, :, ::2]], ValueError, "one memory format"),
        ([one, "two"], TypeError, "list"),
    ):
        with pytest.raises(error, match=f"^stitch_patches: patches .*{words}"):
            stitch_patches(batches, grid, out=out)
    with pytest.raises(ValueError, match="out"):
        stitch_patches([one], grid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("geometry", [(11, 8, 5, 3, "full"), (11, 8, 5, 3, "crop"), (3, 8, 5, 2, "full")], ids=str)
def test_rows(backend, geometry, dtype):
    height, width, patch, stride, coverage = geometry
    grid = TileGrid(height, width, patch, stride, 2, coverage)
    patches = patches_for(grid, 2, 2, device=backend.device)
    inverse = shuffled(len(patches), backend.device)
    whole = stitch_patches(patches, grid, "hann", inverse, dtype)
    end = grid.output_size[0]
    for a in range(0, end, few([3, 1])[-1]):
        assert stitch_patches(patches, grid, "hann", inverse, dtype, rows=(a, a)).shape == (2, 2, 0, whole.shape[3])
        for b in few({a + 1, min(a + 5, end), end}, a):
            # What the band does not need may lie anywhere, even outside.
            needed = [a < (y + patch) * 2 and y * 2 < b for y in grid.row_origins]
            mask = torch.tensor(needed, device=backend.device).repeat_interleave(grid.cols).repeat(2)
            partial = torch.where(mask, inverse, -(10**9))
            same(stitch_patches(patches, grid, "hann", partial, dtype, rows=(a, b)), whole[:, :, a:b].contiguous())


def test_unused_rows_are_not_read(backend):
    grid = TileGrid(7, 9, 4, 3)
    patches = patches_for(grid, 1, 2, device=backend.device)
    inverse = torch.arange(grid.num_patches, device=backend.device) * 2 + 1
    spread = torch.full((2 * grid.num_patches + 3, 2, 4, 4), float("nan"), device=backend.device)
    spread[inverse] = patches
    same(stitch_patches(spread, grid, "linear", inverse), reference(patches, grid, "linear"))


def test_no_gradient_of_bands_and_integers(backend):
    grid = TileGrid(7, 9, 4, 3)
    patches = patches_for(grid, 1, 2, device=backend.device).requires_grad_()
    assert stitch_patches(patches, grid).requires_grad
    assert not stitch_patches(patches, grid, rows=(1, 3)).requires_grad
    assert not stitch_patches(patches, grid, dtype=torch.uint8).requires_grad
    assert not stitch_patches(patches, grid, out=torch.empty(1, 2, 7, 9, device=backend.device)).requires_grad


@pytest.mark.parametrize("dtype", [*FLOATING, torch.uint8, torch.uint16], ids=str)
def test_out(backend, dtype):
    grid = TileGrid(11, 8, 5, 3, 2)
    patches = patches_for(grid, 2, 2, device=backend.device)
    inverse = shuffled(len(patches), backend.device)
    expected = reference(patches, grid, "hann", inverse, dtype)
    whole = torch.empty(expected.shape, dtype=dtype, device=backend.device)
    assert stitch_patches(patches, grid, "hann", inverse, out=whole) is whole
    same(whole, expected)
    # Bands of a larger image, whose other pixels stay as they are.
    larger = torch.zeros(3, 4, 30, 20, dtype=torch.uint8, device=backend.device).to(dtype)
    target = larger[1:, 1:3, 5:27, 2:18]
    for band in ((0, 5), (5, 6), (6, 22)):
        stitch_patches(patches, grid, "hann", inverse, dtype, rows=band, out=target[:, :, band[0] : band[1]])
    same(target.contiguous(), expected)
    rest = larger.to(torch.float64)
    rest[1:, 1:3, 5:27, 2:18] = 0
    assert not rest.any()


def test_out_without_images(backend):
    grid = TileGrid(5, 6, 4, 2)
    empty = torch.empty(0, 3, 5, 6, device=backend.device)
    assert stitch_patches(patches_for(grid, 0, 3, device=backend.device), grid, out=empty) is empty
    band = torch.empty(1, 3, 0, 6, device=backend.device)
    assert stitch_patches(patches_for(grid, 1, 3, device=backend.device), grid, rows=(2, 2), out=band) is band


@pytest.mark.slow
def test_opcheck_of_out(operator):
    patches = random((4, 2, 4, 4), device=operator.device)
    window = make_window("hann", 4).to(operator.device)
    for inverse in (None, torch.tensor([2, 0, 1, 3], device=operator.device)):
        out = torch.empty(1, 2, 3, 6, dtype=torch.float16, device=operator.device)
        args = (patches, inverse, window, 5, 6, 4, 2, 1, False, 1, 1, 4)
        opcheck(torch.ops.fastroute.stitch_patches.out, args, {"out": out})


def stitch_into(image: Tensor, patches: Tensor) -> Tensor:
    grid = TileGrid(image.shape[2], image.shape[3], 8, 5)
    return stitch_patches(patches, grid, "linear", out=torch.empty_like(image))


@pytest.mark.slow
def test_out_compiles_once_for_all_sizes(operator):
    arguments = []
    for b, h, w in ((2, 20, 30), (3, 21, 17), (4, 40, 9)):
        patches = patches_for(TileGrid(h, w, 8, 5), b, 3, device=operator.device)
        arguments.append((random((b, 3, h, w), device=operator.device), patches))
    compiles_once(stitch_into, arguments)


GRID = TileGrid(5, 6, 4, 2, scale=2)  # 4 patches of 8 x 8, an image of 10 x 12
OUT = torch.empty(1, 3, 10, 12)


@pytest.mark.parametrize(
    ("kind", "args", "words"),
    [
        (TypeError, {"out": [1.0]}, "out Tensor list"),
        (ValueError, {"out": OUT[0]}, r"out \(B, C, rows, W\) \(3, 10, 12\)"),
        (ValueError, {"out": OUT[:, :2]}, r"out \(1, 3, 10, 12\) \(1, 2, 10, 12\)"),
        (ValueError, {"out": OUT, "rows": (2, 5)}, r"out \(1, 3, 3, 12\) \(1, 3, 10, 12\)"),
        (ValueError, {"out": OUT.contiguous(memory_format=torch.channels_last)}, r"out contiguous \(360, 1, 36, 3\)"),
        (ValueError, {"out": OUT.to("meta")}, "out one device cpu meta"),
        (TypeError, {"out": OUT, "dtype": torch.uint8}, "dtype out float32 uint8"),
        (TypeError, {"out": OUT.int()}, "dtype uint16 int32"),
    ],
)
def test_errors(kind, args, words):
    with pytest.raises(kind, match="^stitch_patches: .*" + ".*".join(words.split(" "))):
        stitch_patches(torch.zeros(4, 3, 8, 8), GRID, **args)
