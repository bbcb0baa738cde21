"""Tests of `pixel_mlp` with relative coordinates that the caller gives: what they are, and which feature they name."""

from __future__ import annotations

import pytest
import torch
from support import compiles_once, few, repeats, same
from test_pixel_mlp import FLOATING, OP, SIZES, close, inputs, leaves, make
from torch import Tensor
from torch.library import opcheck

from fastroute import pixel_mlp
from fastroute.models.pcsr import relative_coordinates
from fastroute.reference.pixel_mlp import nearest_axis, placed_axis

OPS = ("pixel_mlp",)


def exact(small, large, dtype=torch.float32, device="cpu") -> Tensor:
    """What the operator takes where nothing is given."""
    axes = [nearest_axis(n, m)[1].double() / m for n, m in zip(small, large, strict=True)]
    return torch.cat(axes).to(dtype).to(device)


def moved(small, large, dtype=torch.float32, device="cpu") -> Tensor:
    """Coordinates with errors of 1 %, every third of them seen from the feature before or behind."""
    relative = exact(small, large, torch.float64)
    relative += torch.empty_like(relative).uniform_(-0.01, 0.01, generator=torch.Generator().manual_seed(1))
    relative[::3] += 2 * (-1.0) ** torch.arange(len(relative[::3]))
    return relative.to(dtype).to(device)


def sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def test_table(backend):
    # Two features along x, and output pixel 1 half way between them: +1 from the first, -1 from the second.
    features = torch.tensor([[[[1.0, 2.0]]]], device=backend.device)
    weight = torch.tensor([[100.0, 1.0, 10.0, 0.0, 0.0]], device=backend.device)
    layer = [(weight, torch.zeros(1, device=backend.device))]

    def run(*relative: float) -> list[float]:
        given = torch.tensor(relative, device=backend.device)
        return pixel_mlp(features, [layer], (1, 3), relative=given)[0, 0, 0].tolist()

    assert run(0.0, -0.25, 1.0, 0.25) == [97.5, 110, 202.5]
    assert run(0.0, -0.25, -1.0, 0.25) == [97.5, 190, 202.5]
    # Another feature lies 2 further; there is none before the first and none behind the last.
    assert run(0.5, 1.75, -1.0, -1.75) == [100 + 18, 190.5, 183]
    assert run(0.5, -2.25, 0.75, 2.25) == [200.5 - 22.5, 108, 100.5 + 22.5]
    # NaN reads the nearest, and only its own pixel is NaN.
    nan = run(0.0, -0.25, float("nan"), 0.25)
    assert [nan[0], nan[2]] == [97.5, 202.5]
    assert nan[1] != nan[1]


@pytest.mark.parametrize(("small", "large"), SIZES)
def test_exact_coordinates_change_nothing(backend, small, large):
    mlps = make(5, [[7], [4, 6]], device=backend.device)
    features, residual, class_map = inputs(2, 5, small, large, 2, device=backend.device)
    relative = exact(small, large, device=backend.device)
    same(
        pixel_mlp(features, mlps, large, class_map, residual, relative=relative),
        pixel_mlp(features, mlps, large, class_map, residual),
    )


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(("small", "large"), [*SIZES, ((40, 50), (60, 75))])
def test_sweep(backend, dtype, small, large):
    mlps = make(6, [None, [], [6, 17, 5]], dtype=dtype, device=backend.device)
    features, residual, class_map = inputs(2, 6, small, large, 3, dtype=dtype, device=backend.device)
    relative = moved(small, large, sums(dtype), backend.device)
    output = pixel_mlp(features, mlps, large, class_map, residual, relative=relative)
    close(output, features, mlps, large, class_map, residual, relative)
    strided = torch.stack([relative, -relative], dim=1)[:, 0]
    band = (large[0] // 3, large[0])
    part = pixel_mlp(features, mlps, large, class_map, residual, band, strided)
    expected = output[:, :, band[0] :].contiguous()
    # Matrix products of PyTorch and numpy sum in an order that depends on their size.
    same(part, expected) if backend.name == "cpu" else torch.testing.assert_close(part, expected)


@pytest.mark.parametrize(
    ("small", "large"), [((8, 10), (12, 15)), ((52, 76), (78, 114)), ((7, 9), (28, 36)), ((64, 33), (96, 99))]
)
def test_published_coordinates(backend, small, large):
    """Rounded as published, they are near the exact ones, and at ties of the larger sizes some name the odd feature."""
    features, _, _ = inputs(1, 3, small, large, 1, device=backend.device)
    relative = relative_coordinates(features, large)
    axes = list(zip(small, large, relative.cpu().split(large), strict=True))
    for n, m, given in axes:
        index, doubled = nearest_axis(n, m)
        away = given.double() + 2 * placed_axis(n, m, given) - (doubled.double() / m + 2 * index)
        assert away.abs().max() <= 2e-7 * n
    if small == (52, 76):
        assert any((placed_axis(n, m, given) != nearest_axis(n, m)[0]).any() for n, m, given in axes)
    mlps = make(3, [[9, 8]], device=backend.device)
    close(pixel_mlp(features, mlps, large, relative=relative), features, mlps, large, relative=relative)


@pytest.mark.slow
def test_gradcheck(operator):
    mlps = make(2, [None, [4], []], dtype=torch.float64, device=operator.device)
    features, residual, class_map = inputs(1, 2, (2, 3), (5, 4), 3, dtype=torch.float64, device=operator.device)
    relative = moved((2, 3), (5, 4), torch.float64, operator.device).requires_grad_()

    def run(features, residual, *flat):
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        return pixel_mlp(features, [[], pairs[:2], pairs[2:]], (5, 4), class_map, residual, (1, 4), relative)

    given_leaves = [t.requires_grad_() for t in (features, residual, *leaves(mlps))]
    assert torch.autograd.gradcheck(run, given_leaves)
    # Coordinates are taken as they are.
    run(*given_leaves).sum().backward()
    assert relative.grad is None


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(operator, grad):
    mlps = make(2, [[4, 3], None], device=operator.device)
    features, residual, class_map = inputs(2, 2, (3, 4), (7, 5), 2, device=operator.device)
    weights, biases = [w for mlp in mlps for w, _ in mlp], [b for mlp in mlps for _, b in mlp]
    for x in (features, residual, *weights, *biases):
        x.requires_grad_(grad)
    relative = moved((3, 4), (7, 5), device=operator.device)
    opcheck(OP, (features, weights, biases, [len(mlp) for mlp in mlps], 7, 5, class_map, residual, relative, 2, 6))


def test_poisoned(backend, poisoned):
    mlps = make(7, [None, [5, 6], []], device=backend.device)
    for small, large in few(SIZES, 3):
        features, residual, class_map = inputs(2, 7, small, large, 3, device=backend.device)
        relative = moved(small, large, device=backend.device)
        output = pixel_mlp(features, mlps, large, class_map, residual, relative=relative)
        assert not output.isnan().any()
        close(output, features, mlps, large, class_map, residual, relative)


MLPS = make(5, [[6], []])


def route(features: Tensor, class_map: Tensor, relative: Tensor) -> Tensor:
    mlps = [[(w.to(features.device), b.to(features.device)) for w, b in mlp] for mlp in MLPS]
    return pixel_mlp(features, mlps, (class_map.shape[1], class_map.shape[2]), class_map, relative=relative)


@pytest.mark.slow
def test_compiles_once_for_all_sizes(operator):
    def examples():
        for batch, small, large in ((2, (4, 7), (11, 30)), (3, (6, 5), (24, 21)), (4, (9, 11), (13, 17))):
            features, _, class_map = inputs(batch, 5, small, large, 2, device=operator.device)
            yield features, class_map, moved(small, large, device=operator.device)

    compiles_once(route, examples())


def test_deterministic(backend):
    mlps = make(9, [[20], [7, 9]], device=backend.device)
    features, _, class_map = inputs(1, 9, (60, 70), (240, 280), 2, device=backend.device)
    relative = moved((60, 70), (240, 280), device=backend.device)
    repeats(lambda: pixel_mlp(features, mlps, (240, 280), class_map, relative=relative), backend.device)
