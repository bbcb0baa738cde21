"""Tests of `cell_mlp`: a table, sweeps against convolutions over patches, rows one by one, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import (
    FLOATING,
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
from torch.library import opcheck
from torch.nn import functional as F

from fastroute import cell_mlp
from fastroute._levels import to_float
from fastroute.reference.cell_mlp import cell_mlp_reference

OP = torch.ops.fastroute.cell_mlp.default
# Image (B, C, H, W), cell, span, step, units of the layers: odd sizes, windows that end with the row and that do not, gaps
# between windows, one window, one cell, units that fill no vector and no group of units, several tiles and blocks of cells.
CASES = [
    ((1, 3, 32, 32), 4, 8, 7, (128, 128)),
    ((2, 3, 20, 36), 4, 3, 2, (16, 7, 5)),
    ((1, 1, 12, 21), 3, 2, 3, (1,)),
    ((2, 2, 5, 14), 1, 4, 5, (6, 13)),
    ((1, 4, 6, 10), 2, 5, 1, (19, 2)),
    ((1, 3, 4, 4), 4, 1, 1, (33,)),
    ((1, 3, 12, 4 * 130), 4, 9, 4, (12, 20)),
    ((3, 3, 4 * 90, 4 * 13), 4, 4, 3, (10, 17)),
    ((0, 3, 8, 8), 4, 2, 1, (4,)),
    ((2, 3, 0, 8), 4, 2, 1, (4,)),
]


def layers_of(case, dtype=torch.float32, device="cpu", seed=0):
    shape, cell, _, _, units = case
    generator = torch.Generator().manual_seed(seed)
    made, fan_in = [], shape[1] * cell * cell
    for fan_out in units:
        weight = torch.randn(fan_out, fan_in, generator=generator, dtype=torch.float64) / fan_in**0.5
        bias = torch.randn(fan_out, generator=generator, dtype=torch.float64) / 4
        made.append((weight.to(dtype).to(device), bias.to(dtype).to(device)))
        fan_in = fan_out
    return made


def by_convolutions(image, layers, cell, span, step, slope=0.1):
    """What a network of PyTorch layers computes: convolutions, then the mean of every window on its own."""
    x = to_float(image, layers[0][0].dtype)
    if x.numel() == 0:
        x = x[:, :1, ::cell, ::cell].expand(-1, len(layers[-1][1]), -1, -1)
        layers = []
    for number, (weight, bias) in enumerate(layers):
        size = cell if number == 0 else 1
        x = F.leaky_relu(F.conv2d(x, weight.view(len(bias), -1, size, size), bias, stride=size), slope)
    last = x.shape[3] - span
    starts = [*range(0, last, step), last]
    return torch.stack([x[..., s : s + span].mean(dim=3) for s in starts], dim=2).permute(0, 3, 2, 1)


def close(actual, image, layers, *rest):
    """Error against float64 at most twice that of PyTorch's layers, plus a few units in the last place of the largest."""
    exact = by_convolutions(
        image.double() if image.dtype in FLOATING else image, [(w.double(), b.double()) for w, b in layers], *rest
    )
    plain = by_convolutions(image, layers, *rest)
    assert actual.dtype == layers[0][0].dtype
    assert actual.shape == exact.shape
    assert actual.is_contiguous()
    if actual.numel():
        floor = 4 * torch.finfo(actual.dtype).eps * exact.abs().max()
        assert (actual.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + floor


def test_table(backend):
    # Two rows of three cells of one pixel, one unit that doubles and takes 3 off, windows of two cells.
    image = torch.tensor([[1.0, 2.0, 4.0], [0.0, 3.0, 1.5]], device=backend.device)[None, None]
    weight, bias = torch.tensor([[2.0]], device=backend.device), torch.tensor([-3.0], device=backend.device)
    # 2x - 3 is -1, 1, 5 and -3, 3, 0; negative ones are halved.
    expected = torch.tensor([[0.25, 3.0], [0.75, 1.5]], device=backend.device)[None, :, :, None]
    same(cell_mlp(image, [(weight, bias)], cell=1, span=2, step=1, slope=0.5), expected)
    # A window of all three, whatever the step.
    same(
        cell_mlp(image, [(weight, bias)], 1, 3, 5, slope=0.5),
        torch.tensor([5.5, 1.5], device=backend.device).div(3).view(1, 2, 1, 1),
    )


def test_order_of_pixels(backend):
    """A cell's numbers come channel by channel, then row by row."""
    image = torch.arange(2 * 4 * 6, device=backend.device, dtype=torch.float32).view(1, 2, 4, 6)
    identity = (torch.eye(8, device=backend.device), torch.zeros(8, device=backend.device))
    found = cell_mlp(image, [identity], cell=2, span=1, step=1)
    assert found.shape == (1, 2, 3, 8)
    assert found[0, 1, 2].tolist() == [16, 17, 22, 23, 40, 41, 46, 47]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sweep(backend, case, dtype):
    shape, *rest, _ = case
    layers = layers_of(case, dtype, backend.device)
    for turn, source in enumerate((dtype, *INTEGER_IMAGE, torch.float32), CASES.index(case)):
        image = random(shape, source, backend.device)
        for layout in few(LAYOUTS, turn):
            laid = in_layout(image, layout)
            close(cell_mlp(laid, layers, *rest), laid, layers, *rest)


@given(
    batch=st.integers(0, 2),
    rows=st.integers(1, 40),
    cols=st.integers(1, 80),
    span=st.integers(1, 9),
    step=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_rows_do_not_depend_on_others(backend, batch, rows, cols, span, step, seed):
    span = min(span, cols)
    case = ((batch, 2, 2 * rows, 2 * cols), 2, span, step, (9, 21))
    layers, image = layers_of(case, device=backend.device, seed=seed), random(case[0], device=backend.device, seed=seed)
    whole = cell_mlp(image, layers, 2, span, step)
    close(whole, image, layers, 2, span, step)
    if backend.name != "cpu":
        return  # a matrix product may sum otherwise when it has fewer rows
    begin = seed % rows
    same(cell_mlp(image[:, :, 2 * begin : 2 * begin + 2], layers, 2, span, step), whole[:, begin : begin + 1].contiguous())


@pytest.mark.parametrize("slope", [0.0, 0.1, 1.5, -1.0])
def test_slopes(backend, slope):
    case = CASES[1]
    layers, image = layers_of(case, device=backend.device), random(case[0], device=backend.device)
    close(cell_mlp(image, layers, *case[1:4], slope=slope), image, layers, *case[1:4], slope)


def test_not_a_number(backend):
    """A pixel that is not a number makes its cell's windows so, and no others."""
    case = ((1, 1, 8, 24), 4, 2, 2, (5, 4))
    image = random(case[0], device=backend.device)
    image[0, 0, 5, 9] = torch.nan
    found = cell_mlp(image, layers_of(case, device=backend.device), *case[1:4]).isnan()
    assert found[0, 1, 1].all()
    assert found.count_nonzero() == 4


def test_gradcheck(operator):
    for case in (((1, 2, 4, 10), 2, 2, 2, (3, 2)), ((2, 1, 3, 4), 1, 3, 2, (2,))):
        layers = [t.requires_grad_() for pair in layers_of(case, torch.float64, operator.device) for t in pair]
        image = random(case[0], torch.float64, operator.device).requires_grad_()

        def run(image, *layers, case=case):
            return cell_mlp(image, list(zip(layers[::2], layers[1::2], strict=True)), *case[1:4])

        assert torch.autograd.gradcheck(run, (image, *layers))
    # Integers have no gradient, the layers have.
    pixels = random(case[0], torch.uint8, operator.device)
    assert torch.autograd.gradcheck(lambda *layers: run(pixels, *layers), tuple(layers))


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(operator, grad):
    for case in CASES[1:4]:
        shape, cell, span, step, _ = case
        layers = layers_of(case, device=operator.device)
        weights, biases = [w.requires_grad_(grad) for w, _ in layers], [b.requires_grad_(grad) for _, b in layers]
        opcheck(OP, (random(shape, device=operator.device).requires_grad_(grad), weights, biases, 0.1, cell, span, step))
        opcheck(OP, (random(shape, torch.uint8, operator.device), weights, biases, 0.1, cell, span, step))


def test_poisoned(backend, poisoned):
    for case in CASES:
        image, layers = random(case[0], device=backend.device), layers_of(case, device=backend.device)
        close(cell_mlp(image, layers, *case[1:4]), image, layers, *case[1:4])


def examples(device):
    for shape, span, step in (((2, 3, 8, 36), 4, 3), ((5, 3, 16, 44), 6, 4), ((4, 3, 12, 64), 7, 2)):
        case = (shape, 4, span, step, (9, 6))
        yield random(shape, device=device), layers_of(case, device=device), span, step


def run_example(image, layers, span, step):
    return cell_mlp(image, layers, 4, span, step)


@pytest.mark.slow
def test_compiles_once_for_all_sizes(operator):
    compiles_once(run_example, examples(operator.device))


@pytest.mark.slow
def test_compiles_with_inductor(operator):
    inductor_equals_eager(run_example, *next(iter(examples(operator.device))))


def test_deterministic(backend):
    case = ((2, 3, 160, 240), 4, 8, 7, (40, 40))
    image, layers = random(case[0], device=backend.device), layers_of(case, device=backend.device)
    repeats(lambda: cell_mlp(image, layers, *case[1:4]), backend.device)


def test_chunks_of_the_reference(monkeypatch):
    case = CASES[7]
    image, layers = random(case[0]), layers_of(case)
    weights, biases = [w for w, _ in layers], [b for _, b in layers]
    whole = cell_mlp_reference(image, weights, biases, 0.1, *case[1:4])
    monkeypatch.setattr("fastroute.reference.cell_mlp.CHUNK", 50)
    torch.testing.assert_close(cell_mlp_reference(image, weights, biases, 0.1, *case[1:4]), whole, rtol=0, atol=1e-6)


IMAGE = torch.rand(1, 3, 8, 12)
LAYER = (torch.rand(5, 48), torch.rand(5))


@pytest.mark.parametrize(
    ("kind", "args", "words"),
    [
        (TypeError, {"image": [1.0]}, "image Tensor list"),
        (ValueError, {"image": IMAGE[0]}, r"image \(B, C, H, W\) 3 dimension"),
        (TypeError, {"image": IMAGE.int()}, "image float32 uint8 int32"),
        (ValueError, {"image": IMAGE[:, :, :7]}, r"image multiple cell \(4\) \(1, 3, 7, 12\)"),
        (ValueError, {"image": IMAGE[:, :, :, 1:]}, r"image multiple cell \(4\) \(1, 3, 8, 11\)"),
        (ValueError, {"cell": 0}, "cell at least 1 0"),
        (ValueError, {"span": 0}, "span at least 1 0"),
        (ValueError, {"step": -1}, "step at least 1 -1"),
        (ValueError, {"span": 4}, "span at most 3 4"),
        (ValueError, {"layers": []}, "layers at least one none"),
        (ValueError, {"layers": [(LAYER[0][0], LAYER[1])]}, r"weight of layer 0 \(F_out, F_in\) 1 dimension"),
        (ValueError, {"layers": [(LAYER[0], LAYER[0])]}, r"bias of layer 0 \(F_out,\) 2 dimension"),
        (ValueError, {"layers": [LAYER, LAYER]}, r"weight of layer 1 5 columns \(5, 48\)"),
        (ValueError, {"layers": [(LAYER[0], LAYER[1][1:])]}, "weight of layer 0 bias of 4"),
        (TypeError, {"layers": [(LAYER[0].int(), LAYER[1])]}, "weight of layer 0 float32 int32"),
        (TypeError, {"layers": [(LAYER[0], LAYER[1].double())]}, "layers one dtype float32 float64 layer 0"),
    ],
)
def test_errors(kind, args, words):
    with pytest.raises(kind, match="^cell_mlp: .*" + ".*".join(words.split(" "))):
        cell_mlp(**{"image": IMAGE, "layers": [LAYER], "cell": 4, "span": 2, "step": 1} | args)
