"""Tests of `extract_patches`."""

from __future__ import annotations

import re

import pytest
import torch
from support import (
    FLOATING,
    GEOMETRIES,
    INTEGER_IMAGE,
    LAYOUTS,
    bits,
    compiles_once,
    few,
    in_layout,
    inductor_equals_eager,
    random,
    repeats,
    same,
)
from torch import Tensor
from torch.library import opcheck

from fastroute import TileGrid, extract_patches
from fastroute.reference.extract_patches import extract_patches_reference

OP = torch.ops.fastroute.extract_patches.default
BACKWARD = torch.ops.fastroute._extract_patches_backward.default
STATISTICS = ([0.4488, 0.4371, 0.4040], [0.25, 0.3, 1.7])


def reference(
    image: Tensor, grid: TileGrid, order=None, mean=None, std=None, dtype=None, channels_last=False, size=()
) -> Tensor:
    return extract_patches_reference(
        image, order, mean, std, grid.patch, grid.stride, grid.crop, dtype or image.dtype, channels_last, *size
    )


def test_table(backend):
    image = torch.tensor([[[[1.0, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]]], device=backend.device)
    expected = [
        [[1, 2], [5, 6]],
        [[3, 4], [7, 8]],
        [[5, 6], [9, 10]],
        [[7, 8], [11, 12]],
    ]
    patches = extract_patches(image, TileGrid(3, 4, patch=2, stride=2))
    assert patches.tolist() == [[p] for p in expected]
    order = torch.tensor([3, 0, 3], device=backend.device)
    chosen = extract_patches(image, TileGrid(3, 4, patch=2, stride=2), order)
    assert chosen.tolist() == [[expected[3]], [expected[0]], [expected[3]]]
    cropped = extract_patches(image, TileGrid(3, 4, patch=2, stride=2, coverage="crop"))
    assert cropped.tolist() == [[expected[0]], [expected[1]]]
    # An image smaller than a patch repeats its edge.
    small = extract_patches(image[:, :, :2, :2], TileGrid(2, 2, patch=3, stride=1))
    assert small.tolist() == [[[[1, 2, 2], [5, 6, 6], [5, 6, 6]]]]


def test_table_of_conversions(backend):
    image = torch.tensor([0, 51, 255], dtype=torch.uint8, device=backend.device).view(1, 3, 1, 1)
    mean, std = torch.tensor([0.25, 0.2, 0.5]), torch.tensor([0.5, 1.0, 0.25])
    patches = extract_patches(
        image, TileGrid(1, 1, 1, 1), mean=mean.to(backend.device), std=std.to(backend.device), dtype=torch.float32
    )
    # (0 - 0.25) / 0.5, (51 / 255 - 0.2) / 1, (1 - 0.5) / 0.25
    assert patches.flatten().tolist() == [-0.5, 0.0, 2.0]
    wide = torch.tensor([0, 13107, 65535], dtype=torch.uint16, device=backend.device).view(1, 3, 1, 1)
    halves = extract_patches(wide, TileGrid(1, 1, 1, 1), dtype=torch.float16)
    assert halves.flatten().tolist() == [0.0, torch.tensor(0.2, dtype=torch.float16).item(), 1.0]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_sweep_of_geometries(kernel, geometry):
    height, width, patch, stride, coverage = geometry
    grid = TileGrid(height, width, patch, stride, coverage=coverage)
    for b, c in ((0, 3), (1, 1), (1, 3), (2, 3), (2, 5)):
        image = random((b, c, height, width), device=kernel.device)
        n = b * grid.num_patches
        patches = extract_patches(image, grid)
        assert patches.shape == (n, c, patch, patch)
        same(patches, reference(image, grid))
        order = torch.randperm(n, generator=torch.Generator().manual_seed(1)).to(kernel.device)
        for some in (order, order[: n // 2], order[n // 3 :: 2], order[:0], order.repeat(2), order[:1].repeat(b * 3)):
            same(extract_patches(image, grid, some), reference(image, grid, some))


@pytest.mark.parametrize("coverage", ["full", "crop"])
def test_reference_is_unfold(coverage):
    # Where no tile is shifted, Tensor.unfold says the same in one line.
    image, grid = random((2, 3, 17, 13)), TileGrid(17, 13, 5, 4, coverage=coverage)
    expected = image.unfold(2, 5, 4).unfold(3, 5, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 5, 5)
    same(reference(image, grid), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATING + INTEGER_IMAGE, ids=str)
def test_sweep_of_types_and_layouts(kernel, dtype, layout):
    grid = TileGrid(11, 9, 4, 3)
    mean, std = (torch.tensor(v, device=kernel.device) for v in STATISTICS)
    order = torch.tensor([5, 0, 23, 23, 7], device=kernel.device)
    image = in_layout(random((2, 3, 11, 9), dtype, kernel.device), layout)
    for target in (None, *FLOATING):
        for statistics in ((None, None), (mean, None), (None, std), (mean, std.double())):
            if target is None and not dtype.is_floating_point and statistics != (None, None):
                continue
            actual = extract_patches(image, grid, order, *statistics, dtype=target)
            same(actual, reference(image, grid, order, *statistics, target))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_format(backend, layout):
    image = in_layout(random((2, 3, 9, 9), device=backend.device), layout)
    grid = TileGrid(9, 9, 4, 3)
    for memory_format in (torch.contiguous_format, torch.channels_last, None):
        patches = extract_patches(image, grid, memory_format=memory_format)
        default = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        assert patches.is_contiguous(memory_format=memory_format or default)
        same(patches, reference(image, grid))


def test_bits_survive(backend):
    values = [float("nan"), float("inf"), -float("inf"), -0.0, 1e-42, 3.4e38]
    image = torch.tensor(values, device=backend.device).view(1, 1, 2, 3)
    patches = extract_patches(image, TileGrid(2, 3, 2, 1))
    same(bits(patches), bits(torch.cat([image[..., :2], image[..., 1:]])))


@pytest.mark.slow
@pytest.mark.parametrize("geometry", [(7, 6, 3, 2, "full"), (7, 6, 3, 2, "crop"), (2, 5, 3, 3, "full")], ids=str)
def test_gradient(backend, geometry):
    height, width, patch, stride, coverage = geometry
    grid = TileGrid(height, width, patch, stride, coverage=coverage)
    image = random((2, 2, height, width), torch.float64, backend.device).requires_grad_()
    last = 2 * grid.num_patches - 1
    std = torch.tensor([0.5, 3.0], dtype=torch.float64, device=backend.device)
    mean = std + 1
    for order in (None, torch.tensor([last, 0, last, 1], device=backend.device)):
        for statistics in few(((None, None), (mean, std)), height + (order is None)):
            assert torch.autograd.gradcheck(lambda x: extract_patches(x, grid, order, *statistics), image)  # noqa: B023
            patches = extract_patches(image, grid, order, *statistics)
            upstream = random(patches.shape, torch.float64, backend.device, seed=1)
            (actual,) = torch.autograd.grad(patches, image, upstream)
            (expected,) = torch.autograd.grad(reference(image, grid, order, *statistics), image, upstream)
            # Sums of a few numbers below 2 in another order.
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)


def test_second_gradient(backend):
    # A gradient penalty differentiates the gradient: it must be right or refused, not dropped.
    grid = TileGrid(5, 4, 3, 2)
    image = random((1, 1, 5, 4), torch.float64, backend.device).requires_grad_()
    order = torch.tensor([3, 0, 3], device=backend.device)
    assert torch.autograd.gradgradcheck(lambda x: extract_patches(x, grid, order), image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradient_keeps_type(backend, dtype):
    image = random((1, 2, 7, 6), dtype, backend.device).requires_grad_()
    patches = extract_patches(image, TileGrid(7, 6, 3, 2), dtype=torch.float32)
    upstream = random(patches.shape, device=backend.device, seed=1)
    (gradient,) = torch.autograd.grad(patches, image, upstream)
    double = image.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(reference(double, TileGrid(7, 6, 3, 2)), double, upstream.double())
    assert gradient.dtype == dtype
    # At most 9 addends below 1.3; a sum in the type of the image may round once per addend.
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=12 * 9 * torch.finfo(dtype).eps)


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(operator, grad):
    image = random((2, 3, 7, 6), device=operator.device)
    mean, std = (torch.tensor(v, device=operator.device) for v in STATISTICS)
    order = torch.tensor([1, 0, 1], device=operator.device)
    cases = (
        (None, None, None, 3, 2, False, None, False, 3, 3),
        (order, mean, std, 3, 2, True, torch.float64, True, 3, 3),
        (order, None, std, 8, 5, False, torch.float16, False, 8, 8),
    )
    for args in few(cases, int(grad)):
        opcheck(OP, (image.clone().requires_grad_(grad), *args))
    if not grad:
        for dtype in INTEGER_IMAGE:
            image = random((1, 3, 7, 6), dtype, operator.device)
            opcheck(OP, (image, order, mean, std, 3, 2, False, torch.float32, False, 5, 7))


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_backward(operator, grad):
    upstream = random((3, 2, 3, 3), device=operator.device).requires_grad_(grad)
    order = torch.tensor([3, 0, 3], device=operator.device)
    opcheck(BACKWARD, (upstream, order, 2, 7, 6, 3, 2, False))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_poisoned(backend, poisoned, dtype):
    for height, width, patch, stride, coverage in few([GEOMETRIES[::4], GEOMETRIES])[-1]:
        grid = TileGrid(height, width, patch, stride, coverage=coverage)
        image = random((2, 3, height, width), dtype, backend.device)
        for channels_last in few((False, True), height):
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            patches = extract_patches(image, grid, memory_format=memory_format)
            assert not patches.isnan().any()
            same(patches, reference(image, grid))
        if torch.finfo(dtype).bits >= 32:
            image.requires_grad_()
            # Patch 0 alone: every other pixel must be written as 0.
            order = torch.zeros(1, dtype=torch.int64, device=backend.device)
            (gradient,) = torch.autograd.grad(extract_patches(image, grid, order).sum(), image)
            (expected,) = torch.autograd.grad(reference(image, grid, order).sum(), image)
            same(gradient, expected)


def build_and_extract(image: Tensor, order: Tensor | None = None) -> Tensor:
    grid = TileGrid(image.shape[2], image.shape[3], 8, 5)
    return extract_patches(image, grid, order, dtype=torch.float16)


@pytest.mark.slow
def test_compiles_once_for_all_sizes(operator):
    sizes = ((2, 20, 30), (3, 21, 17), (4, 40, 9), (2, 33, 33))
    order = torch.arange(10, -1, -1, device=operator.device)
    images = [random((b, 3, h, w), device=operator.device) for b, h, w in sizes]
    compiles_once(build_and_extract, [(x,) for x in images])
    compiles_once(build_and_extract, [(x, order[: i + 7]) for i, x in enumerate(images)])
    compiles_once(build_and_extract, [(x.requires_grad_(),) for x in images])


@pytest.mark.slow
def test_compiles_with_inductor(operator):
    inductor_equals_eager(build_and_extract, random((2, 3, 20, 17), device=operator.device))


def test_deterministic(backend):
    image = random((2, 3, 70, 67), device=backend.device).requires_grad_()
    grid = TileGrid(70, 67, 16, 5)
    upstream = random((2 * grid.num_patches, 3, 16, 16), device=backend.device)
    repeats(lambda: extract_patches(image, grid).detach(), backend.device)
    repeats(lambda: torch.autograd.grad(extract_patches(image, grid), image, upstream), backend.device)


IMAGE = torch.zeros(2, 3, 8, 9)
GRID = TileGrid(8, 9, 4, 3)


@pytest.mark.parametrize(
    ("kind", "args", "words"),
    [
        (TypeError, {"image": [1.0]}, "image Tensor list"),
        (ValueError, {"image": IMAGE[0]}, r"image \(B, C, H, W\) \(3, 8, 9\) unsqueeze"),
        (ValueError, {"image": IMAGE[:, :, :7]}, "image 8 x 9 7 x 9"),
        (ValueError, {"image": IMAGE[:, :0]}, r"image channel \(2, 0, 8, 9\)"),
        (TypeError, {"image": IMAGE.int()}, "image float32 int32"),
        (ValueError, {"order": torch.zeros(2, 2, dtype=torch.int64)}, r"order 1-D \(2, 2\)"),
        (TypeError, {"order": torch.zeros(2)}, "order int64 float32"),
        (TypeError, {"order": [0, 1]}, "order Tensor list"),
        (ValueError, {"order": torch.zeros(2, dtype=torch.int64, device="meta")}, "order cpu meta"),
        (ValueError, {"mean": torch.zeros(2)}, "mean 3 2"),
        (ValueError, {"std": torch.ones(1, 3)}, r"std \(C,\) \(1, 3\)"),
        (TypeError, {"mean": torch.zeros(3, dtype=torch.int64)}, "mean float32 int64"),
        (ValueError, {"std": torch.zeros(3, device="meta")}, "std cpu meta"),
        (ValueError, {"std": torch.ones(3, requires_grad=True)}, "std gradient"),
        (TypeError, {"dtype": torch.uint8}, "dtype floating uint8"),
        (TypeError, {"dtype": torch.complex64}, "dtype floating complex64"),
        (TypeError, {"image": IMAGE.byte(), "mean": torch.zeros(3)}, "dtype floating uint8"),
        (ValueError, {"memory_format": torch.preserve_format}, "memory_format channels_last preserve"),
        (ValueError, {"size": (4, 3)}, "size at least 4 x 4 4 x 3"),
        (ValueError, {"size": (0, 9)}, "size at least 4 x 4 0 x 9"),
        (ValueError, {"size": (7, 4), "image": IMAGE.clone().requires_grad_()}, "regions gradient detach"),
    ],
)
def test_errors(kind, args, words):
    with pytest.raises(kind, match="^extract_patches: .*" + ".*".join(words.split(" "))):
        extract_patches(**{"image": IMAGE, "grid": GRID} | args)


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("pixels", [torch.uint8, torch.uint16, torch.float32], ids=str)
def test_planes_to_pixels_of_large_patches(pixels, statistics):
    """Rows of a patch longer than what is converted at a time, whole or not."""
    grid = TileGrid(80, 210, patch=70, stride=64)
    image = random((1, 3, 80, 210), pixels, "cpu")
    mean, std = map(torch.tensor, STATISTICS) if statistics else (None, None)
    for dtype in (torch.float32, torch.float16, torch.float64):
        patches = extract_patches(image, grid, None, mean, std, dtype, torch.channels_last)
        same(patches, reference(image, grid, None, mean, std, dtype, channels_last=True))


# Rows of 128 bytes, as those of 32 float32, and rows that end within 16 bytes.
@pytest.mark.parametrize("patch", [16, 32, 64, 128, 21])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rows_are_copied(kernel, dtype, patch):
    # A part of a larger image, read to its last pixel; 18 patches of two images, some of them twice and some not at all.
    image = random((2, 3, 2 * patch + 9, 2 * patch + 4), dtype, kernel.device)[..., 3:, :-1]
    grid = TileGrid(*image.shape[2:], patch, patch - 2)
    order = torch.tensor([17, 0, 0, 8, 9, 10, 3, 17], device=kernel.device)
    for chosen in few([order, None, order[:1], order[:0]]):
        same(extract_patches(image, grid, chosen), reference(image, grid, chosen))


@pytest.mark.parametrize("number", [-1, 18, 2**31, -(2**40)])
def test_number_out_of_range(backend, number):
    order = torch.tensor([0, number], device=backend.device)
    with pytest.raises(backend.index_errors) as error:
        extract_patches(IMAGE.to(backend.device), GRID, order)
    if error.type is ValueError:
        assert re.match(rf"extract_patches: order must lie in \[0, 18\); got {number}$", str(error.value))


def test_table_of_regions(backend):
    image = torch.arange(1.0, 13, device=backend.device).view(1, 1, 3, 4)
    order = torch.tensor([0, 3], device=backend.device)
    # Patches begin at (0, 0), (0, 2), (1, 0) and (1, 2); what lies outside repeats the edge.
    regions = extract_patches(image, TileGrid(3, 4, patch=2, stride=2), order, size=(2, 3))
    assert regions.tolist() == [[[[1, 2, 3], [5, 6, 7]]], [[[7, 8, 8], [11, 12, 12]]]]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_sweep_of_regions(kernel, geometry):
    """Every shape of region that there is, from any patch on: within the image and beyond it."""
    height, width, patch, stride, coverage = geometry
    grid = TileGrid(height, width, patch, stride, coverage=coverage)
    image = random((2, 3, height, width), device=kernel.device)
    shapes = sorted({size for size in grid.region_shapes(8) if size != (0, 0)})
    order = torch.randperm(2 * grid.num_patches, generator=torch.Generator().manual_seed(1))[:40].to(kernel.device)
    for size in few([shapes[:: len(shapes) // 3 + 1], shapes])[-1]:
        for some in few((order, order[:1], order[:0]), size[0]):
            same(extract_patches(image, grid, some, size=size), reference(image, grid, some, size=size))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", FLOATING + INTEGER_IMAGE, ids=str)
def test_types_of_regions(backend, dtype, layout):
    grid = TileGrid(23, 30, 8, 6)
    mean, std = (torch.tensor(v, device=backend.device) for v in STATISTICS)
    image = in_layout(random((2, 3, 23, 30), dtype, backend.device), layout)
    order = torch.tensor([3, 0, 29, 12], device=backend.device)
    for turn, (target, size) in enumerate(
        few([(None, (14, 20)), (torch.float16, (8, 20)), (torch.float32, (21, 9))], dtype.itemsize)
    ):
        for last in few((False, True), turn + len(layout)):
            memory_format = torch.channels_last if last else torch.contiguous_format
            statistics = (None, None) if target is None else (mean, std)
            actual = extract_patches(image, grid, order, *statistics, target, memory_format, size)
            assert actual.is_contiguous(memory_format=memory_format)
            same(actual, reference(image, grid, order, *statistics, target, size=size))


def test_region_of_a_patch_is_the_patch(backend):
    image, grid = random((1, 3, 20, 17), device=backend.device).requires_grad_(), TileGrid(20, 17, 8, 5)
    patches = extract_patches(image, grid, size=(8, 8))
    same(patches, extract_patches(image, grid))
    (gradient,) = torch.autograd.grad(patches.sum(), image)
    assert (gradient >= 1).all()
