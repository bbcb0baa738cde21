"""`pixel_mlp`: the reference against tables worked by hand and against `grid_sample` in float64."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastroute.reference import pixel_mlp as module
from fastroute.reference.pixel_mlp import bilinear_axis, bilinear_reference, nearest_axis, pixel_mlp_reference


@pytest.mark.parametrize(
    ("size", "out_size", "index", "relative"),
    [
        (2, 4, [0, 0, 1, 1], ["-1/2", "1/2", "-1/2", "1/2"]),
        (2, 6, [0, 0, 0, 1, 1, 1], ["-2/3", "0", "2/3", "-2/3", "0", "2/3"]),
        (1, 4, [0, 0, 0, 0], ["-3/4", "-1/4", "1/4", "3/4"]),
        (3, 3, [0, 1, 2], ["0", "0", "0"]),
        (3, 4, [0, 1, 1, 2], ["-1/4", "-3/4", "3/4", "1/4"]),
        (3, 5, [0, 0, 1, 2, 2], ["-2/5", "4/5", "0", "-4/5", "2/5"]),
        # Half way: the even feature, so the pixel lies on its upper edge, +1.
        (2, 3, [0, 0, 1], ["-1/3", "1", "1/3"]),
        # Half way twice: feature 0 over 1 and feature 2 over 3.
        (4, 6, [0, 0, 1, 2, 2, 3], ["-1/3", "1", "1/3", "-1/3", "1", "1/3"]),
        (6, 9, [0, 0, 1, 2, 2, 3, 4, 4, 5], ["-1/3", "1", "1/3"] * 3),
        (4, 2, [0, 2], ["1", "1"]),
        # Half way between 1 and 2 and between 5 and 6: the even feature again, on whose lower edge the pixel lies, -1.
        (8, 2, [2, 6], ["-1", "-1"]),
        (6, 2, [1, 4], ["0", "0"]),
    ],
)
def test_nearest_table(size: int, out_size: int, index: list[int], relative: list[str]) -> None:
    got_index, doubled = nearest_axis(size, out_size)
    assert got_index.tolist() == index
    assert [Fraction(n, out_size) for n in doubled.tolist()] == [Fraction(r) for r in relative]


@pytest.mark.parametrize(
    ("size", "out_size", "first", "second", "weight"),
    [
        (2, 4, [0, 0, 0, 1], [1, 1, 1, 1], [0, 0.25, 0.75, 0]),
        (2, 3, [0, 0, 1], [1, 1, 1], [0, 0.5, 0]),
        (1, 3, [0, 0, 0], [0, 0, 0], [0, 0, 0]),
        (3, 3, [0, 1, 2], [1, 2, 2], [0, 0, 0]),
        (4, 2, [0, 2], [1, 3], [0.5, 0.5]),
    ],
)
def test_bilinear_table(size: int, out_size: int, first: list[int], second: list[int], weight: list[float]) -> None:
    assert [t.tolist() for t in bilinear_axis(size, out_size)] == [first, second, weight]


@pytest.mark.parametrize("size", [(8, 8), (5, 9), (13, 7), (3, 2), (1, 1)])
def test_bilinear_is_interpolate(size: tuple[int, int]) -> None:
    image = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    expected = F.interpolate(image, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(bilinear_reference(image, *size), expected, rtol=0, atol=1e-15)


def test_query_table() -> None:
    """An identity layer shows the query: feature, then y before x of the position and of the cell."""
    features = torch.tensor([[[[10.0, 20.0]]]])
    output = pixel_mlp_reference(features, [torch.eye(5)], [torch.zeros(5)], [1], 2, 6)
    assert output.shape == (1, 5, 2, 6)
    assert output[0, 0].tolist() == [[10, 10, 10, 20, 20, 20]] * 2
    assert output[0, 1].tolist() == [[-0.5] * 6, [0.5] * 6]
    torch.testing.assert_close(output[0, 2], torch.tensor([[-2 / 3, 0, 2 / 3] * 2] * 2))
    assert output[0, 3].unique().tolist() == [1.0]  # 2 · 1 / 2
    torch.testing.assert_close(output[0, 4], torch.full((2, 6), 2 / 3))


def test_layer_table() -> None:
    """Class 0 is free, class 1 is linear and class 2 has a hidden ReLU; the residual is under all of them."""
    features = torch.tensor([[[[1.0, -2.0]]]])
    zero = torch.zeros(1, 4)
    weights = [
        torch.cat([torch.tensor([[3.0]]), zero], 1),
        torch.cat([torch.tensor([[-1.0]]), zero], 1),
        torch.ones(1, 1),
    ]
    biases = [torch.tensor([0.5]), torch.tensor([0.0]), torch.tensor([10.0])]
    class_map = torch.tensor([[[0, 1, 2, 2], [1, 0, 1, 1]]])
    residual = torch.full((1, 1, 1, 2), 100.0)
    output = pixel_mlp_reference(features, weights, biases, [0, 1, 2], 2, 4, class_map, residual)
    assert output.tolist() == [[[[100, 103.5, 112, 112], [103.5, 100, 94.5, 94.5]]]]
    bare = pixel_mlp_reference(features, weights, biases, [0, 1, 2], 2, 4, class_map)
    assert bare.tolist() == [[[[0, 3.5, 12, 12], [3.5, 0, -5.5, -5.5]]]]


def test_only_free_classes_give_the_residual() -> None:
    residual = torch.rand(2, 3, 4, 5)
    output = pixel_mlp_reference(torch.rand(2, 7, 4, 5), [], [], [0], 8, 10, None, residual)
    assert torch.equal(output, bilinear_reference(residual, 8, 10))


def make_mlps(depths: list[int], fan_in: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    weights, biases = [], []
    for depth in depths:
        widths = [fan_in] + [5 + k for k in range(depth - 1)] + [3]
        for a, b in pairwise(widths) if depth else ():
            weights.append(torch.randn(b, a, generator=generator, dtype=torch.float64).div(a**0.5).to(dtype))
            biases.append(torch.randn(b, generator=generator, dtype=torch.float64).to(dtype))
    return weights, biases


def coordinates(n: int) -> Tensor:
    return (2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1


def sampled(features: Tensor, weights: list[Tensor], biases: list[Tensor], depths: list[int], size: tuple[int, int],
            class_map: Tensor, residual: Tensor) -> Tensor:  # fmt: skip
    """LIIF by `grid_sample` at coordinates in [-1, 1], all in float64."""
    b, _, h, w = features.shape
    axes = torch.meshgrid(coordinates(size[0]), coordinates(size[1]), indexing="ij")
    grid = torch.stack(axes[::-1], dim=-1).expand(b, *size, 2)
    centres = torch.stack(torch.meshgrid(coordinates(h), coordinates(w), indexing="ij")).expand(b, 2, h, w)
    nearest = F.grid_sample(torch.cat([features, centres], 1), grid, mode="nearest", align_corners=False)
    lr_size = torch.tensor([h, w], dtype=torch.float64).view(1, 2, 1, 1)
    relative = (torch.stack(axes) - nearest[:, -2:]) * lr_size
    cell = (2 / torch.tensor(size, dtype=torch.float64).view(1, 2, 1, 1) * lr_size).expand_as(relative)
    query = torch.cat([nearest[:, :-2], relative, cell], dim=1)
    output = F.grid_sample(residual, grid, mode="bilinear", padding_mode="border", align_corners=False)
    first = 0
    for k, depth in enumerate(depths):
        x = query
        for n in range(first, first + depth):
            x = torch.einsum("oi,bihw->bohw", weights[n], x) + biases[n][:, None, None]
            x = x if n == first + depth - 1 else x.relu()
        first += depth
        if depth:
            output = output + x * (class_map == k)[:, None]
    return output


# Integer scales and fractional ones without a tie, one of them a downscaling.
SIZES = [
    ((4, 6), (16, 24)),
    ((5, 3), (15, 9)),
    ((7, 5), (14, 10)),
    ((5, 7), (8, 12)),
    ((9, 3), (31, 11)),
    ((9, 5), (7, 4)),
]


@pytest.mark.parametrize(("small", "large"), SIZES)
@pytest.mark.parametrize("depths", [[1], [2, 4], [0, 1, 3]])
def test_against_grid_sample(small: tuple[int, int], large: tuple[int, int], depths: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(2, 6, *small, generator=generator, dtype=torch.float64)
    residual = torch.rand(2, 3, *small, generator=generator, dtype=torch.float64)
    class_map = torch.randint(len(depths), (2, *large), generator=generator)
    weights, biases = make_mlps(depths, 10, torch.float64)
    expected = sampled(features, weights, biases, depths, large, class_map, residual)
    output = pixel_mlp_reference(features, weights, biases, depths, *large, class_map, residual)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-13)
    if len(depths) == 1:
        whole = pixel_mlp_reference(features, weights, biases, depths, *large, None, residual)
        torch.testing.assert_close(whole, expected, rtol=0, atol=1e-13)


def test_first_layer_splits() -> None:
    """What a kernel may hoist: one vector per feature, two multiples per pixel, one constant per call."""
    features = torch.rand(1, 6, 4, 5, dtype=torch.float64)
    (weight,), (bias,) = make_mlps([1], 10, torch.float64)
    per_feature = torch.einsum("od,bdhw->bohw", weight[:, :6], features)
    constant = weight[:, 8] * (2 * 4 / 9) + weight[:, 9] * (2 * 5 / 13) + bias
    (row, rel_y), (col, rel_x) = nearest_axis(4, 9), nearest_axis(5, 13)
    expected = per_feature[:, :, row][:, :, :, col] + constant[:, None, None]
    expected = expected + weight[:, 6, None, None] * (rel_y.double() / 9)[:, None]
    expected = expected + weight[:, 7, None, None] * (rel_x.double() / 13)
    output = pixel_mlp_reference(features, [weight], [bias], [1], 9, 13)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("chunk", [1, 30, 61])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    features, residual = torch.rand(2, 6, 4, 5), torch.rand(2, 3, 4, 5)
    class_map = torch.randint(2, (2, 12, 15))
    weights, biases = make_mlps([2, 3], 10, torch.float32)
    whole = pixel_mlp_reference(features, weights, biases, [2, 3], 12, 15, class_map, residual)
    monkeypatch.setattr(module, "CHUNK", chunk)
    parts = pixel_mlp_reference(features, weights, biases, [2, 3], 12, 15, class_map, residual)
    # A product of other shape may sum in another order.
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_rounds_once(dtype: torch.dtype) -> None:
    features, residual = torch.rand(1, 6, 4, 5, dtype=torch.float64).to(dtype), torch.rand(1, 3, 4, 5).to(dtype)
    class_map = torch.randint(2, (1, 9, 11), dtype=torch.uint8)
    weights, biases = make_mlps([2, 3], 10, dtype)
    output = pixel_mlp_reference(features, weights, biases, [2, 3], 9, 11, class_map, residual)
    assert output.dtype == dtype
    exact = pixel_mlp_reference(
        features.double(), [w.double() for w in weights], [b.double() for b in biases], [2, 3], 9, 11, class_map,
        residual.double(),
    )  # fmt: skip
    error = (output.double() - exact).abs()
    # Half a unit in the last place of the result, and the float32 sums' own error of a few 1e-7.
    assert (error <= torch.finfo(dtype).eps / 2 * exact.abs() + 2e-6).all()


def test_no_images() -> None:
    weights, biases = make_mlps([2], 10, torch.float32)
    features, residual = torch.rand(0, 6, 4, 5), torch.rand(0, 3, 4, 5)
    assert pixel_mlp_reference(features, weights, biases, [2], 8, 10, None, residual).shape == (0, 3, 8, 10)


@pytest.mark.slow
def test_gradients() -> None:
    generator = torch.Generator().manual_seed(3)
    features = torch.rand(1, 2, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    residual = torch.rand(1, 3, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weights, biases = make_mlps([0, 2, 1], 6, torch.float64)
    leaves = [t.requires_grad_() for t in weights + biases]
    class_map = torch.randint(3, (1, 3, 5), generator=generator)

    def run(features: Tensor, residual: Tensor, *leaves: Tensor) -> Tensor:
        return pixel_mlp_reference(features, list(leaves[:3]), list(leaves[3:]), [0, 2, 1], 3, 5, class_map, residual)

    assert torch.autograd.gradcheck(run, (features, residual, *leaves))
