"""Tests of `pixel_mlp`: a table, sweeps against float64, gradients, and what it refuses."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import (
    EMULATED,
    LAYOUTS,
    compiles_once,
    eager_pixel_mlp,
    few,
    half_activations,
    in_layout,
    inductor_equals_eager,
    repeats,
    same,
)
from torch import Tensor
from torch.library import opcheck

from fastroute import pixel_mlp
from fastroute.reference.pixel_mlp import pixel_mlp_reference

OP = torch.ops.fastroute.pixel_mlp.default
FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# ((h, w), (H, W)): integer scales, fractional ones with and without ties, a downscaling, one pixel, one row.
SIZES = [
    ((4, 6), (16, 24)),
    ((5, 3), (15, 9)),
    ((5, 7), (8, 12)),
    ((4, 6), (6, 9)),
    ((9, 5), (7, 4)),
    ((1, 1), (5, 3)),
    ((1, 8), (1, 32)),
    ((3, 2), (1, 1)),
]


def make(dim, hidden, channels=3, dtype=torch.float32, device="cpu", seed=0):
    """One MLP per entry of `hidden`: its hidden widths, or None for the free class."""
    generator = torch.Generator().manual_seed(seed)
    mlps = []
    for widths in hidden:
        chain = [] if widths is None else [dim + 4, *widths, channels]
        layers = []
        for a, b in pairwise(chain):
            weight = torch.randn(b, a, generator=generator, dtype=torch.float64).div(a**0.5)
            bias = torch.randn(b, generator=generator, dtype=torch.float64).mul(0.3)
            layers.append((weight.to(dtype).to(device), bias.to(dtype).to(device)))
        mlps.append(layers)
    return mlps


def inputs(batch, dim, small, large, classes, channels=3, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, dim, *small, generator=generator, dtype=torch.float64).to(dtype).to(device)
    residual = torch.rand(batch, channels, *small, generator=generator, dtype=torch.float64).to(dtype).to(device)
    class_map = torch.randint(classes, (batch, *large), generator=generator, dtype=torch.uint8).to(device)
    return features, residual, class_map


def reference(features, mlps, size, class_map=None, residual=None, relative=None, exact=False):
    wide = (lambda x: x.double()) if exact else (lambda x: x)
    weights, biases = [wide(w) for mlp in mlps for w, _ in mlp], [wide(b) for mlp in mlps for _, b in mlp]
    depths = [len(mlp) for mlp in mlps]
    last = None if residual is None else wide(residual)
    return pixel_mlp_reference(wide(features), weights, biases, depths, *size, class_map, last, relative=relative)


def close(actual: Tensor, features, mlps, size, class_map=None, residual=None, relative=None) -> None:
    """Error against float64 at most twice plain PyTorch's, plus 8 units in the last place of the largest value.

    Plain PyTorch is the reference, or layers of a half type where the backend holds its activations in that type.
    """
    exact = reference(features, mlps, size, class_map, residual, relative, exact=True)
    if half_activations("pixel_mlp", features):
        plain = eager_pixel_mlp(features, mlps, size, class_map, residual, relative)
    else:
        plain = reference(features, mlps, size, class_map, residual, relative)
    assert actual.dtype == features.dtype
    assert actual.shape == exact.shape
    assert actual.is_contiguous()
    if exact.numel() == 0:
        return
    floor = 8 * torch.finfo(torch.float64 if actual.dtype == torch.float64 else torch.float32).eps
    floor *= max(exact.abs().max().item(), 1.0)
    allowed = 2 * (plain.double() - exact).abs().max().item() + floor
    assert (actual.double() - exact).abs().max().item() <= allowed


def test_table(backend):
    # One feature per pixel, 1 and 2; scale 2: rel is ±1/2, cell is 1.
    features = torch.tensor([[[[1.0, 2.0]]]], device=backend.device)
    weight = torch.tensor([[1.0, 10.0, 100.0, 1000.0, 2000.0]], device=backend.device)
    bias = torch.tensor([0.25], device=backend.device)
    # feature + 10 · rel_y + 100 · rel_x + 1000 + 2000 + 1/4
    line = [3001.25 - 50, 3001.25 + 50, 3002.25 - 50, 3002.25 + 50]
    expected = torch.tensor([[[[v - 5 for v in line], [v + 5 for v in line]]]], device=backend.device)
    same(pixel_mlp(features, [[(weight, bias)]], (2, 4)), expected)
    # Behind a ReLU a second layer takes 1 off twice that; the other class is free.
    second = (torch.tensor([[2.0]], device=backend.device), torch.tensor([-1.0], device=backend.device))
    class_map = torch.tensor([[[0, 1, 1, 0], [0, 0, 0, 1]]], device=backend.device)
    residual = torch.tensor([[[[8.0, 16.0]]]], device=backend.device)
    bilinear = torch.tensor([8.0, 10.0, 14.0, 16.0], device=backend.device)
    output = pixel_mlp(features, [[], [(weight, bias), second]], (2, 4), class_map, residual)
    same(output, torch.where(class_map[:, None] == 1, 2 * expected - 1, torch.zeros(())) + bilinear)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(("small", "large"), SIZES)
@pytest.mark.parametrize("hidden", [[[]], [[7]], [None, [], [3, 4], [6, 17, 5]]], ids=str)
def test_sweep(backend, dtype, small, large, hidden):
    mlps = make(6, hidden, dtype=dtype, device=backend.device)
    features, residual, class_map = inputs(2, 6, small, large, len(hidden), dtype=dtype, device=backend.device)
    for layout in few(LAYOUTS, SIZES.index((small, large))):
        laid = in_layout(features, layout)
        other = in_layout(residual, layout)
        output = pixel_mlp(laid, mlps, large, class_map, other)
        close(output, laid, mlps, large, class_map, other)
        same(pixel_mlp(laid, mlps, large, class_map.long().mT.contiguous().mT, other), output)
    close(pixel_mlp(features, mlps, large, class_map), features, mlps, large, class_map)
    for number in range(len(hidden)):  # one class, all others empty
        flat = torch.full_like(class_map, number)
        close(pixel_mlp(features, mlps, large, flat, residual), features, mlps, large, flat, residual)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [[[58] * 4], [[74] * 4], [[10] * 3, [58] * 4], [[256], [1, 256, 1]], [[20] * 3, None]])
def test_published_widths(backend, hidden):
    mlps = make(48, hidden, device=backend.device)
    # More than one block in both directions, under the interpreter at a smaller size.
    width = 30 if EMULATED else few([60, 300])[-1]
    small, large = (9, width), (36, 4 * width)
    features, residual, class_map = inputs(1, 48, small, large, len(hidden), device=backend.device)
    features = in_layout(features, "channels_last")
    close(pixel_mlp(features, mlps, large, class_map, residual), features, mlps, large, class_map, residual)


@pytest.mark.slow
@given(data=st.data())
def test_any_shape(backend, data):
    draw = data.draw
    dim, channels, batch = draw(st.integers(1, 70)), draw(st.integers(1, 9)), draw(st.integers(0, 2))
    width = st.one_of(st.integers(1, 40), st.integers(1, 256))
    hidden = draw(st.lists(st.one_of(st.none(), st.lists(width, max_size=3)), min_size=1, max_size=4))
    side = st.integers(1, 12)
    small, large = draw(st.tuples(side, side)), draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    seed = draw(st.integers(0, 99))
    mlps = make(dim, hidden, channels, device=backend.device, seed=seed)
    features, residual, class_map = inputs(batch, dim, small, large, len(hidden), channels, torch.float32, backend.device, seed)
    output = pixel_mlp(features, mlps, large, class_map, residual)
    close(output, features, mlps, large, class_map, residual)
    begin = draw(st.integers(0, large[0]))
    end = draw(st.integers(begin, large[0]))
    band = pixel_mlp(features, mlps, large, class_map, residual, rows=(begin, end))
    close(band, features, mlps, large, class_map, residual) if (begin, end) == (0, large[0]) else None
    if backend.name == "cpu":
        same(band, output[:, :, begin:end].contiguous())


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0)], ids=str)
def test_nothing_to_write(backend, shape):
    mlps = make(5, [[4], []], device=backend.device)
    features = torch.rand(shape[0], 5, 2, 3, device=backend.device)
    class_map = torch.zeros(shape, dtype=torch.uint8, device=backend.device)
    assert pixel_mlp(features, mlps, shape[1:], class_map).shape == (shape[0], 3, *shape[1:])


def test_only_the_free_class(backend):
    residual = torch.rand(1, 2, 3, 4, device=backend.device)
    features = torch.rand(1, 5, 3, 4, device=backend.device)
    expected = torch.nn.functional.interpolate(residual, (7, 9), mode="bilinear")
    torch.testing.assert_close(pixel_mlp(features, [[]], (7, 9), None, residual), expected)
    assert pixel_mlp(features, [[]], (7, 9)).shape == (1, 0, 7, 9)


def test_nan_reaches_only_its_pixels(backend):
    mlps = make(4, [[5, 5]], device=backend.device)
    features = torch.rand(1, 4, 3, 3, device=backend.device)
    features[0, 2, 1, 1] = float("nan")
    bad = pixel_mlp(features, mlps, (6, 6)).isnan()
    assert bad[:, :, 2:4, 2:4].all()
    assert bad.sum() == 3 * 4


def leaves(mlps):
    return [t for mlp in mlps for pair in mlp for t in pair]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [None, (1, 4)])
def test_gradcheck(operator, rows):
    mlps = make(2, [None, [4], []], dtype=torch.float64, device=operator.device)
    features, residual, class_map = inputs(1, 2, (2, 3), (5, 4), 3, dtype=torch.float64, device=operator.device)

    def run(features, residual, *flat):
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        return pixel_mlp(features, [[], pairs[:2], pairs[2:]], (5, 4), class_map, residual, rows)

    given_leaves = [t.requires_grad_() for t in (features, residual, *leaves(mlps))]
    assert torch.autograd.gradcheck(run, given_leaves)


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_opcheck(operator, grad, mapped):
    hidden = [[4, 3], None, []] if mapped else [[4, 3]]
    mlps = make(2, hidden, device=operator.device)
    features, residual, class_map = inputs(2, 2, (3, 4), (7, 5), len(hidden), device=operator.device)
    weights, biases = [w for mlp in mlps for w, _ in mlp], [b for mlp in mlps for _, b in mlp]
    for x in (features, residual, *weights, *biases):
        x.requires_grad_(grad)
    depths = [len(mlp) for mlp in mlps]
    opcheck(OP, (features, weights, biases, depths, 7, 5, class_map if mapped else None, residual, None, 0, 7))
    opcheck(OP, (features, weights, biases, depths, 7, 5, class_map if mapped else None, None, None, 2, 6))


def test_poisoned(backend, poisoned):
    hidden = [None, [5, 6], []]
    mlps = make(7, hidden, device=backend.device)
    for small, large in SIZES:
        features, residual, class_map = inputs(2, 7, small, large, 3, device=backend.device)
        for last in (residual, None):
            output = pixel_mlp(features, mlps, large, class_map, last)
            assert not output.isnan().any()
            close(output, features, mlps, large, class_map, last)


MLPS = make(5, [[6], []])


def route(features: Tensor, class_map: Tensor, residual: Tensor) -> Tensor:
    mlps = [[(w.to(features.device), b.to(features.device)) for w, b in mlp] for mlp in MLPS]
    return pixel_mlp(features, mlps, (class_map.shape[1], class_map.shape[2]), class_map, residual)


def examples(device):
    for batch, small, large in ((2, (4, 7), (11, 30)), (3, (6, 5), (24, 21)), (4, (9, 11), (13, 17))):
        features, residual, class_map = inputs(batch, 5, small, large, 2, device=device)
        yield features, class_map, residual


@pytest.mark.slow
def test_compiles_once_for_all_sizes(operator):
    compiles_once(route, examples(operator.device))


@pytest.mark.slow
def test_compiles_with_inductor(operator):
    inductor_equals_eager(route, *next(iter(examples(operator.device))))


def test_deterministic(backend):
    mlps = make(9, [[20], [7, 9]], device=backend.device)
    features, residual, class_map = inputs(1, 9, (60, 70), (240, 280), 2, device=backend.device)
    repeats(lambda: pixel_mlp(features, mlps, (240, 280), class_map, residual), backend.device)


FEATURES = torch.rand(2, 5, 3, 4)
MAP = torch.zeros(2, 6, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("kind", "args", "words"),
    [
        (TypeError, {"features": [1.0]}, "features Tensor list"),
        (ValueError, {"features": FEATURES[0]}, r"features \(B, D, h, w\) 3 dimension"),
        (TypeError, {"features": FEATURES.int()}, "features float32 int32"),
        (ValueError, {"features": FEATURES[:, :, :0]}, "features at least one pixel"),
        (ValueError, {"features": FEATURES[:, :4]}, "weight of layer 0 of MLP 0 8 columns"),
        (ValueError, {"mlps": []}, "mlps 1 to 256 got 0"),
        (ValueError, {"mlps": make(5, [[257]])}, "layer 0 of MLP 0 1 to 256 got 257"),
        (ValueError, {"mlps": [*make(5, [[]]), *make(5, [[]], 2)]}, r"same number of channels \[2, 3\]"),
        (ValueError, {"mlps": [[(MLPS[0][0][0], MLPS[0][1][1])]]}, "as many rows as its bias bias of 3"),
        (ValueError, {"class_map": None}, "class_map 2 MLPs None"),
        (ValueError, {"class_map": MAP[:1]}, r"class_map \(2, 6, 8\) \(1, 6, 8\)"),
        (TypeError, {"class_map": MAP.float()}, "class_map uint8 float32"),
        (ValueError, {"residual": torch.rand(2, 1, 3, 4)}, r"residual \(2, 3, 3, 4\) \(2, 1, 3, 4\)"),
        (TypeError, {"residual": torch.rand(2, 3, 3, 4).double()}, "residual float32 float64"),
        (ValueError, {"size": (-1, 8)}, "height must be at least 0; got -1"),
        (ValueError, {"rows": (4, 3)}, r"rows \[0, 6\] \(4, 3\)"),
        (ValueError, {"rows": (0, 7)}, r"rows \[0, 6\] \(0, 7\)"),
        (ValueError, {"relative": torch.zeros(13)}, r"relative \(14,\) H \+ W \(13,\)"),
        (ValueError, {"relative": torch.zeros(1, 14)}, r"relative \(H \+ W,\) 2 dimension"),
        (TypeError, {"relative": torch.zeros(14).half()}, "relative float32 float16"),
        (TypeError, {"relative": [0.0] * 14}, "relative Tensor list"),
    ],
)
def test_errors(kind, args, words):
    with pytest.raises(kind, match="^pixel_mlp: .*" + ".*".join(words.split(" "))):
        pixel_mlp(**{"features": FEATURES, "mlps": MLPS, "size": (6, 8), "class_map": MAP} | args)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", [[[]], [[33, 17], None]], ids=str)
def test_float32_weights_beside_half_features(backend, dtype, hidden):
    """As under autocast: where a GPU multiplies, they are rounded to the type of the features."""
    halves = make(9, hidden, dtype=dtype, device=backend.device)
    exact = make(9, hidden, device=backend.device)
    given = [[(w, b.float()) for (w, _), (_, b) in zip(a, c, strict=True)] for a, c in zip(exact, halves, strict=True)]
    features, residual, class_map = inputs(1, 9, (4, 5), (9, 11), len(hidden), dtype=dtype, device=backend.device)
    output = pixel_mlp(features, given, (9, 11), class_map, residual)
    rounded = half_activations("pixel_mlp", features) and (EMULATED or backend.name != "cpu")
    close(output, features, halves if rounded else given, (9, 11), class_map, residual)


@pytest.mark.parametrize(("dtype", "value"), [(torch.uint8, 2), (torch.uint8, 255), (torch.int64, -1), (torch.int64, 1 << 32)])
@pytest.mark.parametrize("place", [0, -1])
def test_class_out_of_range(backend, dtype, value, place):
    class_map = MAP.to(dtype).to(backend.device).clone()
    class_map[place, place, place] = value
    mlps = [[(w.to(backend.device), b.to(backend.device)) for w, b in mlp] for mlp in MLPS]
    with pytest.raises(ValueError, match=r"^pixel_mlp: class_map must lie in \[0, 2\)"):
        pixel_mlp(FEATURES.to(backend.device), mlps, (6, 8), class_map)
