"""Tests of `stitch_patches`."""

from __future__ import annotations

import re

import pytest
import torch
from support import (
    FLOATING,
    GEOMETRIES,
    INTEGER_IMAGE,
    LAYOUTS,
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
from torch.nn import functional as F

from fastroute import TileGrid, make_window, stitch_patches
from fastroute.reference.stitch_patches import stitch_patches_reference
from fastroute.windows import WINDOWS

OP = torch.ops.fastroute.stitch_patches.default
BACKWARD = torch.ops.fastroute._stitch_patches_backward.default


def reference(patches: Tensor, grid: TileGrid, window="uniform", inverse=None, dtype=None, shuffle=1, rows=None) -> Tensor:
    work = torch.float64 if patches.dtype == torch.float64 else torch.float32
    weights = make_window(window, grid.patch * grid.scale).to(patches.device, work)
    place = (grid.height, grid.width, grid.patch, grid.stride, grid.scale, grid.crop)
    return stitch_patches_reference(patches, inverse, weights, *place, shuffle, dtype, *(rows or (0, grid.output_size[0])))


def patches_for(grid: TileGrid, b: int, c: int, dtype=torch.float32, device="cpu") -> Tensor:
    span = grid.patch * grid.scale
    return random((b * grid.num_patches, c, span, span), dtype, device)


def shuffled(n: int, device: torch.device, seed: int = 1) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(device)


def lopsided(span: int) -> Tensor:
    """A window that no mirroring or swap of axes leaves as it is."""
    return torch.linspace(0.1, 2.0, span, dtype=torch.float64)


def rows_of(values: list[list[float]], height: int, device: torch.device) -> Tensor:
    """Patches (N, 1, height, width) whose rows are all alike."""
    return torch.tensor(values, device=device)[:, None, None, :].expand(-1, 1, height, -1)


def test_table(backend):
    device = backend.device
    patches = rows_of([[1.0, 3.0], [5.0, 7.0]], 2, device)
    narrow = TileGrid(2, 3, patch=2, stride=1)
    assert stitch_patches(patches, narrow).tolist() == [[[[1, 4, 7]] * 2]]
    # Weights 3 and 1: the middle pixel is (1 · 3 + 3 · 5) / 4.
    window = torch.tensor([3.0, 1.0], device=device)
    assert stitch_patches(patches, narrow, window).tolist() == [[[[1, 4.5, 7]] * 2]]
    # A triangle over 4 pixels is 1/4, 3/4, 3/4, 1/4: 3/4 · 8 + 1/4 · 16, then 1/4 · 8 + 3/4 · 16.
    patches = rows_of([[8.0] * 4, [16.0] * 4], 4, device)
    assert stitch_patches(patches, TileGrid(4, 6, 4, 2), "linear").tolist() == [[[[8, 8, 10, 14, 16, 16]] * 4]]
    # The image is one row high: the second row of the patches is dropped, whatever it holds.
    patches = torch.tensor([[[[1.0, 3.0], [float("nan")] * 2]], [[[5.0, 7.0], [float("inf")] * 2]]], device=device)
    assert stitch_patches(patches, TileGrid(1, 3, 2, 1)).tolist() == [[[[1, 4, 7]]]]
    # Crop drops the third row and the fifth column of a 3 x 5 image.
    patches = torch.arange(1.0, 9.0, device=device).view(2, 1, 2, 2)
    cropped = stitch_patches(patches, TileGrid(3, 5, 2, 2, coverage="crop"))
    assert cropped.tolist() == [[[[1, 2, 5, 6], [3, 4, 7, 8]]]]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_sweep_of_geometries(kernel, geometry):
    height, width, patch, stride, coverage = geometry
    cases = [(0, 2, 1), (1, 1, 2), (2, 3, 1), (1, 5, 3), (2, 1, 4)]
    pairs = zip(cases, (*WINDOWS, None), strict=True)
    for (b, c, scale), window in few(pairs, GEOMETRIES.index(geometry)):
        grid = TileGrid(height, width, patch, stride, scale, coverage)
        window = lopsided(patch * scale) if window is None else window
        patches = patches_for(grid, b, c, device=kernel.device)
        image = stitch_patches(patches, grid, window)
        assert image.shape == (b, c, *grid.output_size)
        assert image.is_contiguous()
        same(image, reference(patches, grid, window))
        inverse = shuffled(len(patches), kernel.device)
        same(stitch_patches(patches, grid, window, inverse), reference(patches, grid, window, inverse))
        same(stitch_patches(patches, grid, window, inverse), stitch_patches(patches[inverse], grid, window))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_numbers_of_channels(backend, channels):
    grid = TileGrid(7, 9, 4, 3, 2)
    patches = random((2 * grid.num_patches, 4 * channels, 4, 4), device=backend.device)
    image = stitch_patches(patches, grid, "hann", shuffle=2)
    assert image.shape == (2, channels, 14, 18)
    same(image, reference(patches, grid, "hann", shuffle=2))


@pytest.mark.parametrize("window", [*WINDOWS, "lopsided"])
def test_reference_is_fold(window):
    # Where no tile is shifted, fold of the weighted patches over fold of the weights says the same.
    grid = TileGrid(17, 13, 5, 4)
    weights = lopsided(5) if window == "lopsided" else make_window(window, 5).double()
    patches = patches_for(grid, 2, 3, torch.float64)

    def fold(x: Tensor) -> Tensor:
        return F.fold(x.view(2, grid.num_patches, -1).transpose(1, 2), (17, 13), 5, stride=4)

    flat = weights[:, None] * weights
    expected = fold(patches * flat) / fold(torch.ones_like(patches) * flat)
    torch.testing.assert_close(reference(patches, grid, weights), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_sweep_of_types_and_layouts(kernel, dtype, layout):
    grid = TileGrid(7, 9, 4, 3, 2)
    patches = in_layout(patches_for(grid, 2, 3, dtype, kernel.device), layout)
    inverse = shuffled(len(patches), kernel.device)
    for turn, target in enumerate((None, *FLOATING, *INTEGER_IMAGE)):
        for order in few((None, inverse), turn):
            same(stitch_patches(patches, grid, "hann", order, target), reference(patches, grid, "hann", order, target))


@pytest.mark.slow
@pytest.mark.parametrize("geometry", [(4, 5, 3, 2, "full"), (5, 6, 3, 2, "crop"), (2, 5, 3, 1, "full")], ids=str)
def test_gradient(backend, geometry):
    height, width, patch, stride, coverage = geometry
    grid = TileGrid(height, width, patch, stride, 1, coverage)
    n = 2 * grid.num_patches
    # A row that nobody reads, and in the last case one that several places read.
    patches = random((n + 1, 1, patch, patch), torch.float64, backend.device).requires_grad_()
    permutation = shuffled(n, backend.device)
    for inverse in few((None, permutation, permutation // 2), height + width):
        rows = patches[:n].detach().requires_grad_() if inverse is None else patches
        assert torch.autograd.gradcheck(lambda x: stitch_patches(x, grid, lopsided(patch), inverse), rows)  # noqa: B023
        image = stitch_patches(rows, grid, lopsided(patch), inverse)
        upstream = random(image.shape, torch.float64, backend.device, seed=1)
        (actual,) = torch.autograd.grad(image, rows, upstream)
        (expected,) = torch.autograd.grad(reference(rows, grid, lopsided(patch), inverse), rows, upstream)
        # Sums of a few numbers below 2 in another order.
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)


def test_second_gradient(backend):
    # A gradient penalty differentiates the gradient: it must be right or refused, not dropped.
    grid = TileGrid(4, 5, 3, 2)
    patches = random((5, 1, 3, 3), torch.float64, backend.device).requires_grad_()
    inverse = torch.tensor([4, 0, 0, 2], device=backend.device)
    assert torch.autograd.gradgradcheck(lambda x: stitch_patches(x, grid, lopsided(3), inverse), patches)


@pytest.mark.parametrize("target", FLOATING, ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_gradient_through_shuffle_and_types(backend, dtype, target):
    grid = TileGrid(5, 7, 4, 3, 2)
    patches = random((grid.num_patches, 12, 4, 4), dtype, backend.device).requires_grad_()
    image = stitch_patches(patches, grid, "hann", dtype=target, shuffle=2)
    upstream = random(image.shape, target, backend.device, seed=1)
    (actual,) = torch.autograd.grad(image, patches, upstream)
    double = patches.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(reference(double, grid, "hann", shuffle=2), double, upstream.double())
    assert actual.dtype == dtype
    # One product of numbers below 1.3 with two weights: each step rounds to one of the two types, or to float32.
    eps = max(torch.finfo(dtype).eps, torch.finfo(target).eps)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=4 * eps)


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(operator, grad):
    patches = random((4, 4, 4, 4), device=operator.device)
    window, inverse = make_window("hann", 4).to(operator.device), torch.tensor([2, 0, 1, 3], device=operator.device)
    cases = (
        (None, window, 5, 6, 4, 2, 1, False, 1, None, 0, 5),
        (inverse, window, 7, 7, 4, 3, 1, True, 1, torch.float16, 0, 7),
        (inverse, window, 3, 4, 2, 2, 2, False, 1, torch.float64, 0, 6),
    )
    for args in few(cases, int(grad)):
        opcheck(OP, (patches.clone().requires_grad_(grad), *args))
    if not grad:
        opcheck(OP, (patches, inverse, window.repeat(2), 5, 6, 4, 2, 2, False, 2, torch.uint8, 3, 8))


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_backward(operator, grad):
    upstream = random((1, 2, 5, 6), device=operator.device).requires_grad_(grad)
    window, inverse = make_window("hann", 4).to(operator.device), torch.tensor([2, 0, 1, 3], device=operator.device)
    opcheck(BACKWARD, (upstream, inverse, window, 5, 6, 4, 2, 1, False, 5))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_poisoned(backend, poisoned, dtype):
    for height, width, patch, stride, coverage in few([GEOMETRIES[::4], GEOMETRIES])[-1]:
        grid = TileGrid(height, width, patch, stride, 2, coverage)
        patches = patches_for(grid, 2, 3, dtype, backend.device).requires_grad_()
        image = stitch_patches(patches, grid, "gaussian")
        assert not image.isnan().any()
        same(image.detach(), reference(patches.detach(), grid, "gaussian"))
        # All patches read row 0: the others must be written as 0.
        inverse = torch.zeros(len(patches), dtype=torch.int64, device=backend.device)
        image = stitch_patches(patches, grid, "uniform", inverse)
        (gradient,) = torch.autograd.grad(image.sum(), patches)
        assert not gradient.isnan().any()
        assert not gradient[1:].any()


def build_and_stitch(image: Tensor, patches: Tensor, inverse: Tensor | None = None) -> Tensor:
    grid = TileGrid(image.shape[2], image.shape[3], 8, 5, 2)
    return stitch_patches(patches, grid, "hann", inverse)


@pytest.mark.slow
def test_compiles_once_for_all_sizes(operator):
    arguments = []
    sizes = ((2, 20, 30), (3, 21, 17), (4, 40, 9), (2, 33, 34))
    for b, h, w in few([sizes[:2], sizes])[-1]:
        image = random((b, 5, h, w), device=operator.device)
        patches = patches_for(TileGrid(h, w, 8, 5, 2), b, 3, device=operator.device)
        # Some rows are spare, so that the numbers of rows and of patches are two sizes.
        spare = torch.cat([patches, patches[:7]])
        arguments.append((image, patches, spare, shuffled(len(patches), operator.device)))
    compiles_once(build_and_stitch, [(i, p) for i, p, _, _ in arguments])
    compiles_once(build_and_stitch, [(i, s, n) for i, _, s, n in arguments])
    compiles_once(build_and_stitch, [(i, p.requires_grad_()) for i, p, _, _ in arguments])


@pytest.mark.slow
def test_compiles_with_inductor(operator):
    image = random((2, 5, 20, 17), device=operator.device)
    patches = patches_for(TileGrid(20, 17, 8, 5, 2), 2, 3, device=operator.device)
    inductor_equals_eager(build_and_stitch, image, patches, shuffled(len(patches), operator.device))


def test_deterministic(backend):
    grid = TileGrid(40, 37, 16, 5, 2)
    patches = patches_for(grid, 2, 3, device=backend.device).requires_grad_()
    inverse = shuffled(len(patches), backend.device)
    upstream = random((2, 3, 80, 74), device=backend.device)
    repeats(lambda: stitch_patches(patches, grid, "hann", inverse).detach(), backend.device)
    repeats(lambda: torch.autograd.grad(stitch_patches(patches, grid, "hann", inverse), patches, upstream), backend.device)


GRID = TileGrid(5, 6, 4, 2, scale=2)  # 4 patches of 8 x 8
PATCHES = torch.zeros(4, 4, 8, 8)


@pytest.mark.parametrize(
    ("kind", "args", "words"),
    [
        (TypeError, {"patches": [1.0]}, "stitch_patches: patches Tensor list"),
        (ValueError, {"patches": PATCHES[0]}, r"stitch_patches: patches \(M, C, P, P\) \(4, 8, 8\) unsqueeze"),
        (TypeError, {"patches": PATCHES.byte()}, "stitch_patches: patches float32 uint8"),
        (ValueError, {"patches": PATCHES[..., :7]}, r"stitch_patches: patches 8 \(4, 4, 8, 7\)"),
        (ValueError, {"patches": PATCHES[:, :0]}, r"stitch_patches: patches channels \(4, 0, 8, 8\)"),
        (ValueError, {"patches": PATCHES[:3]}, "stitch_patches: patches multiple of 4 3"),
        (ValueError, {"shuffle": 0}, "stitch_patches: shuffle at least 1 0"),
        (ValueError, {"shuffle": 3}, "stitch_patches: patches 8"),
        (ValueError, {"shuffle": 2}, r"stitch_patches: patches 4 \(4, 4, 8, 8\)"),
        (ValueError, {"shuffle": 2, "patches": PATCHES[:, :3, :4, :4]}, r"stitch_patches: patches 4 channels 3, 4, 4"),
        (TypeError, {"dtype": torch.int64}, "stitch_patches: dtype uint16 int64"),
        (TypeError, {"inverse": [0, 1, 2, 3]}, "stitch_patches: inverse Tensor list"),
        (TypeError, {"inverse": torch.arange(4).int()}, "stitch_patches: inverse int64 int32"),
        (ValueError, {"inverse": torch.arange(4).view(2, 2)}, r"stitch_patches: inverse 1-D \(2, 2\)"),
        (ValueError, {"inverse": torch.arange(3)}, "stitch_patches: inverse multiple of 4 3"),
        (ValueError, {"inverse": torch.arange(4, device="meta")}, "stitch_patches: inverse one device cpu meta"),
        (ValueError, {"rows": (3, 2)}, r"stitch_patches: rows \[0, 10\] \(3, 2\)"),
        (ValueError, {"rows": (0, 11)}, r"stitch_patches: rows \[0, 10\] \(0, 11\)"),
        (ValueError, {"rows": (-1, 2)}, r"stitch_patches: rows \[0, 10\] \(-1, 2\)"),
        (ValueError, {"window": "boxcar"}, "window: uniform boxcar"),
        (ValueError, {"window": torch.ones(4)}, r"window: \(8,\) \(4,\)"),
        (TypeError, {"window": 3}, "window: uniform int"),
    ],
)
def test_errors(kind, args, words):
    with pytest.raises(kind, match="^" + ".*".join(words.split(" "))):
        stitch_patches(**{"patches": PATCHES, "grid": GRID} | args)


@pytest.mark.parametrize("number", [-1, 4, 2**31, -(2**40)])
def test_number_out_of_range(backend, number):
    inverse = torch.tensor([0, 1, number, 2], device=backend.device)
    with pytest.raises(backend.index_errors) as error:
        stitch_patches(PATCHES.to(backend.device), GRID, inverse=inverse)
    if error.type is ValueError:
        assert re.match(rf"stitch_patches: inverse must lie in \[0, 4\); got {number}$", str(error.value))
