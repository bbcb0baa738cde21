"""Tests of `conv3x3` and `conv1x1` in bfloat16: float32 sums of rounded numbers, rounded once at the end.

`conv3x3` multiplies at the points of its tiles or directly, as its weight was prepared: both are tried for all shapes.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import ISAS, only_the_cpu_kernels, run_on_each
from support import LAYOUTS, compiles_once, in_layout, repeats, same
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

from fastroute import conv1x1, conv3x3, conv3x3_weight
from fastroute.ops.conv3x3 import FEW_INPUTS, FEW_OUTPUTS, Conv3x3Weight
from fastroute.reference.conv3x3 import paired_weight, transformed_weight, unpaired_weight

HALF = torch.bfloat16
OPS = ("conv1x1", "conv3x3")
RAW = torch.ops.fastroute
# How a weight is prepared.
WAYS = {"tiles": transformed_weight, "direct": paired_weight}
EACH_WAY = pytest.mark.parametrize("way", WAYS)
# Image (B, C, H, W), output channels, groups, shuffle: one pixel, one row, one column, groups of one channel, odd and even
# groups, few outputs over one and several bands of rows, several vectors and blocks of outputs, with and without a shuffle.
CASES = [
    ((1, 64, 8, 61), 64, 4, 1),
    ((2, 3, 5, 7), 17, 1, 1),
    ((1, 1, 1, 1), 1, 1, 1),
    ((3, 5, 1, 9), 2, 1, 1),
    ((1, 12, 9, 1), 12, 1, 1),
    ((1, 64, 30, 21), 3, 1, 1),
    ((2, 7, 25, 2), 4, 1, 1),
    ((2, 9, 50, 5), 1, 1, 1),
    ((1, 64, 7, 10), 256, 4, 2),
    ((2, 36, 6, 54), 36, 4, 1),
    ((1, 36, 5, 6), 144, 4, 2),
    ((2, 6, 4, 3), 12, 6, 1),
    ((1, 4, 4, 3), 27, 1, 3),
    ((1, 26, 3, 100), 80, 2, 1),
]
EMPTY = [((0, 3, 8, 8), 4, 1, 1), ((2, 3, 0, 8), 4, 1, 2), ((2, 3, 8, 0), 3, 1, 1)]
# Channels of each image, outputs, (B, H, W).
PIXEL_CASES = [
    ((64,), 64, (1, 8, 8)),
    ((64, 64, 64), 64, (1, 7, 9)),
    ((1,), 1, (1, 1, 1)),
    ((3, 5, 1), 17, (2, 5, 7)),
    ((36, 36), 36, (2, 12, 11)),
    ((2, 0, 3), 5, (3, 1, 97)),
    ((7,), 81, (4, 10, 10)),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(HALF)


def prepared(way: str, weight: Tensor, groups: int = 1, shuffle: int = 1) -> Conv3x3Weight:
    return Conv3x3Weight(weight, WAYS[way](weight, groups, shuffle), shuffle)


def parameters(case, seed=0):
    """Weight, bias, slopes of both signs, residual."""
    (b, c, h, w), outputs, groups, shuffle = case
    weight = (normal(outputs, c // groups, 3, 3, seed=seed) / (9 * c // groups) ** 0.5).to(HALF)
    size = (b, outputs // shuffle**2, h * shuffle, w * shuffle)
    return weight, normal(outputs, seed=seed + 1), normal(outputs, seed=seed + 2), normal(*size, seed=seed + 3)


def exact3x3(image, weight, bias, slope, residual, groups, shuffle):
    """In float64, of the same rounded numbers."""
    image, weight, bias, slope, residual = (None if x is None else x.double() for x in (image, weight, bias, slope, residual))
    if 0 in image.shape:
        return F.pixel_shuffle(image.new_empty(image.shape[0], len(weight), *image.shape[2:]), shuffle)
    y = F.conv2d(image, weight, bias, padding=1, groups=groups)
    y = y if slope is None else torch.where(y > 0, y, y * slope[:, None, None])
    y = F.pixel_shuffle(y, shuffle)
    return y if residual is None else y + residual


def exact1x1(images, weight, bias, slope, residual):
    """In float64, of the same rounded numbers."""
    bias, slope, residual = (None if x is None else x.double() for x in (bias, slope, residual))
    y = F.conv2d(torch.cat(images, dim=1).double(), weight.double()[:, :, None, None], bias)
    y = y if residual is None else y + residual
    return y if slope is None else torch.where(y > 0, y, y * slope[:, None, None])


def close(actual, exact, channels):
    """Half a unit in the last place of bfloat16, 2^-8 of a number at most, and the error of float32 sums."""
    assert actual.dtype == HALF and actual.shape == exact.shape
    if actual.numel():
        floor = (8 + channels / 4) * torch.finfo(torch.float32).eps * max(float(exact.abs().max()), 1.0)
        assert ((actual.double() - exact).abs() <= exact.abs() * 2**-8 + floor).all()


def test_table(backend):
    """The numbers of the tables in float32, all of which bfloat16 holds."""
    image = torch.tensor([[1.0, 2.0], [0.0, -1.0]], dtype=HALF)[None, None]
    weight = torch.arange(1.0, 10.0).view(1, 1, 3, 3).to(HALF)
    assert conv3x3(image, weight).flatten().tolist() == [8, 6, 2, 0]
    rest = (torch.tensor([-4.0]).to(HALF), torch.tensor([0.5]).to(HALF), torch.full((1, 1, 2, 2), 10.0).to(HALF))
    assert conv3x3(image, weight, *rest).flatten().tolist() == [14, 12, 9, 8]
    images = [torch.tensor([1.0, 2.0]).view(1, 2, 1, 1).to(HALF), torch.tensor([3.0]).view(1, 1, 1, 1).to(HALF)]
    weight = torch.tensor([[1.0, 10.0, 50.0], [-1.0, 0.0, 0.5]]).to(HALF)
    assert conv1x1(images, weight).flatten().tolist() == [171, 0.5]
    found = conv1x1(
        images, weight, None, torch.tensor([2.0, 0.25]).to(HALF), torch.tensor([-200.0, -2.5]).view(1, 2, 1, 1).to(HALF)
    )
    assert found.flatten().tolist() == [-58, -0.5]


@EACH_WAY
def test_sums_are_rounded_once(backend, way):
    """256 and 255 times 1/2: rounded in between, the halves would be lost."""
    image = torch.full((1, 256, 1, 1), 0.5).to(HALF)
    image[0, 0] = 256
    weight = torch.ones(4, 256).to(HALF)
    rest = (None, None, torch.full((1, 4, 1, 1), -256.0).to(HALF))
    assert conv1x1(image, weight, *rest).flatten().tolist() == [127.5] * 4
    kernel = torch.zeros(5, 256, 3, 3).to(HALF)
    kernel[:, :, 1, 1] = 1
    # Few outputs, and more.
    for outputs in (4, 5):
        residual = torch.full((1, outputs, 1, 1), -256.0).to(HALF)
        assert conv3x3(image, prepared(way, kernel[:outputs]), residual=residual).flatten().tolist() == [127.5] * outputs


def test_ways_of_weights():
    """Few channels are summed directly where the processor can do so, and weights of float32 never."""
    direct = 5 if torch.cpu._is_avx512_bf16_supported() else 4
    for outputs, inputs, groups, ndim in (
        (FEW_OUTPUTS, 64, 1, direct),
        (FEW_OUTPUTS + 1, 64, 1, 4),
        (64, FEW_INPUTS, 1, direct),
        (64, FEW_INPUTS + 1, 1, 4),
        (4 * FEW_OUTPUTS, 64, 4, direct),
    ):
        weight = normal(outputs, inputs, 3, 3)
        assert conv3x3_weight(weight, groups).transformed.ndim == ndim
        assert conv3x3_weight(weight.float(), groups).transformed.ndim == 4


@pytest.mark.parametrize("inputs", [1, 2, 3, 6])
def test_paired_weights_hold_all_numbers(inputs):
    weight = normal(24, inputs, 3, 3)
    paired = paired_weight(weight, 2, 2)
    assert paired.shape == (9, 2, -(-inputs // 2), 64, 2)
    same(unpaired_weight(paired, inputs, 24, 2), weight)
    assert paired.ne(0).sum() == weight.ne(0).sum()


@EACH_WAY
@pytest.mark.parametrize("case", CASES + EMPTY, ids=str)
def test_sweep_3x3(backend, case, way):
    shape, _, groups, shuffle = case
    weight, bias, slope, residual = parameters(case)
    ready, image = prepared(way, weight, groups, shuffle), normal(*shape)
    for layout in LAYOUTS[:4]:
        laid, added = in_layout(image, layout), in_layout(residual, layout)
        for rest in ((None, None, None), (bias, slope, added)):
            found = conv3x3(laid, ready, *rest)
            close(found, exact3x3(laid, weight, *rest, groups, shuffle), 9 * weight.shape[1])
            assert found.is_contiguous(memory_format=torch.channels_last) or 0 in shape


@pytest.mark.parametrize("case", PIXEL_CASES, ids=str)
def test_sweep_1x1(backend, case):
    channels, outputs, (b, h, w) = case
    images = [normal(b, c, h, w, seed=n) for n, c in enumerate(channels)]
    weight = (normal(outputs, sum(channels)) / sum(channels) ** 0.5).to(HALF)
    rest = normal(outputs, seed=1), normal(outputs, seed=2), normal(b, outputs, h, w, seed=3)
    for number, layout in enumerate(LAYOUTS[:4]):
        laid = [in_layout(x, LAYOUTS[(number + n) % 4]) for n, x in enumerate(images)]
        for given_ in ((None, None, None), (*rest[:2], in_layout(rest[2], layout))):
            close(conv1x1(laid, weight, *given_), exact1x1(laid, weight, *given_), sum(channels))


@given(
    size=st.tuples(st.integers(0, 2), st.integers(1, 30), st.integers(1, 70)),
    groups=st.integers(1, 3),
    inputs=st.integers(1, 9),
    shown=st.integers(1, 20),
    shuffle=st.integers(1, 2),
    layout=st.sampled_from(LAYOUTS),
    given=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    way=st.sampled_from(list(WAYS)),
)
@settings(max_examples=120)
def test_any_shape(backend, size, groups, inputs, shown, shuffle, layout, given, way):
    case = ((size[0], groups * inputs, *size[1:]), groups * shown * shuffle**2, groups, shuffle)
    weight, *others = parameters(case)
    rest = [x if wanted else None for x, wanted in zip(others, given, strict=True)]
    image = in_layout(normal(*case[0]), layout)
    found = conv3x3(image, prepared(way, weight, groups, shuffle), *rest)
    close(found, exact3x3(image, weight, *rest, groups, shuffle), 9 * inputs)


@EACH_WAY
@pytest.mark.parametrize("outputs", [3, 12])
def test_bands_and_slices(backend, outputs, way):
    """A band with its neighbours, written into some channels of a larger tensor: all bits of the whole image."""
    weight, bias, slope, _ = parameters(((1, 5, 40, 9), outputs, 1, 1))
    weight = prepared(way, weight)
    image = normal(2, 5, 40, 9)
    whole = conv3x3(image, weight, bias, slope)
    # Tiles begin at every fourth row.
    for begin, height in ((1, 1), (4, 3), (9, 30)) if way == "direct" else ((4, 3), (8, 31)):
        larger = torch.full((2, height, 9, outputs + 4), 7.0).to(HALF).permute(0, 3, 1, 2)
        band = image[:, :, begin - 1 : begin + height + 1]
        conv3x3(band, weight, bias, slope, out=larger[:, 3 : outputs + 3], context=1)
        if backend.name == "cpu":
            same(larger[:, 3 : outputs + 3].contiguous(), whole[:, :, begin : begin + height].contiguous())
        assert (larger[:, :3] == 7).all() and (larger[:, outputs + 3 :] == 7).all()
    assert conv3x3(image[:, :, :2], weight, context=1).shape == (2, outputs, 0, 9)


@EACH_WAY
@pytest.mark.parametrize("channels", [1, 4, 5])
def test_not_a_number(backend, channels, way):
    """What is not finite reaches the pixels that read it, of its own group, and no others but those of their tiles."""
    image = normal(1, 2 * channels, 9, 9)
    image[0, channels - 1, 4, 5] = torch.inf
    found = conv3x3(image, prepared(way, normal(8, channels, 3, 3), 2)).isfinite()
    assert not found[:, :4, 3:6, 4:7].any() and found[:, 4:].all()
    assert found[:, :, 8].all() and found[:, :, :, :4].all() and found[..., 8].all()
    assert way == "tiles" or (~found).sum() == 4 * 9
    image = normal(1, channels, 9, 9)
    image[0, channels - 1, 0, 8] = torch.nan
    found = conv3x3(image, prepared(way, normal(3, channels, 3, 3))).isfinite()
    assert not found[:, :, :2, 7:].any() and found[:, :, 4:].all()
    assert way == "tiles" or (~found).sum() == 3 * 4


def test_gradients(backend):
    """Those of PyTorch's layers; the operators' own, of their references."""
    case = ((1, 4, 3, 5), 8, 2, 2)
    image, weight, bias, slope, residual = (x.requires_grad_() for x in (normal(*case[0]), *parameters(case)))
    y = conv3x3(image, conv3x3_weight(weight, 2, 2), bias, slope, residual)
    grads = torch.autograd.grad(y.float().sum(), (image, weight, bias, slope, residual))
    doubles = [x.detach().double().requires_grad_() for x in (image, weight, bias, slope, residual)]
    expected = torch.autograd.grad(exact3x3(*doubles, 2, 2).sum(), doubles)
    paired = paired_weight(weight.detach(), 2, 2).requires_grad_()
    own = torch.autograd.grad(
        RAW.conv3x3.default(image, paired, bias, slope, residual, 8, 2).float().sum(),
        (image, paired, bias, slope, residual),
    )
    own = (own[0], unpaired_weight(own[1], 2, 8, 2), *own[2:])
    for found in (grads, own):
        for grad, wanted in zip(found, expected, strict=True):
            assert grad.dtype == HALF
            torch.testing.assert_close(grad.double(), wanted, rtol=2e-2, atol=5e-2)


@pytest.mark.slow
@EACH_WAY
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(operator, grad, way):
    case = ((2, 3, 5, 7), 8, 1, 2)
    weight, *rest = (x.requires_grad_(grad) for x in parameters(case))
    image, ready = normal(*case[0]).requires_grad_(grad), WAYS[way](weight.detach(), 1, 2).requires_grad_(grad)
    opcheck(RAW.conv3x3.default, (image, ready, *rest, 8, 2, 0))
    opcheck(RAW.conv1x1.default, ([image, image], weight.detach().flatten(1)[:, :6].requires_grad_(grad), *rest[:2], None))
    if not grad:
        arguments = (image, ready, *rest, 8, 2, 0)
        opcheck(RAW.conv3x3.out, arguments, {"out": RAW.conv3x3.default(*arguments).clone()})


@EACH_WAY
def test_poisoned(backend, poisoned, way):
    for case in CASES[:8]:
        weight, *rest = parameters(case)
        image = normal(*case[0])
        found = conv3x3(image, prepared(way, weight, *case[2:]), *rest)
        close(found, exact3x3(image, weight, *rest, *case[2:]), 9 * weight.shape[1])


@pytest.mark.slow
def test_compiles_once_for_all_sizes(operator):
    def examples():
        # No size is one of those of the weight, which a compiler would take for the same number.
        for shape in ((6, 3, 8, 11), (5, 3, 13, 7), (4, 3, 6, 21)):
            weight, *rest = parameters((shape, 20, 1, 2))
            yield normal(*shape), conv3x3_weight(weight, shuffle=2), *rest

    compiles_once(conv3x3, examples())


@EACH_WAY
@pytest.mark.parametrize("outputs", [3, 40])
def test_deterministic(backend, outputs, way):
    kernel, *rest = parameters(((2, 20, 60, 70), outputs, 1, 1))
    weight = prepared(way, kernel)
    image = normal(2, 20, 60, 70)
    if backend.is_reference:
        same(conv3x3(image, weight, *rest), conv3x3(image, weight, *rest))
    else:
        repeats(lambda: (conv3x3(image, weight, *rest), conv1x1(image, kernel[:, :, 1, 1], *rest)), backend.device)


@pytest.mark.slow
@only_the_cpu_kernels("conv3x3")
def test_instruction_sets(tmp_path):
    """Without products of bfloat16 the direct sums are those of float32, in another order."""
    calls, expected = [], []
    for prepare in WAYS.values():
        for case in CASES:
            weight, *rest = parameters(case)
            image = normal(*case[0])
            calls.append(((image, prepare(weight, *case[2:]), *rest, case[1], case[3], 0), {}))
            expected.append((exact3x3(image, weight, *rest, *case[2:]), 9 * weight.shape[1]))
    found = run_on_each("conv3x3.default", calls, tmp_path)
    pixels = ([normal(2, 7, 9, 11), normal(2, 4, 9, 11)], normal(19, 11), normal(19), normal(19), normal(2, 19, 9, 11))
    others = run_on_each("conv1x1.default", [(pixels, {})], tmp_path)
    for isa in ISAS:
        for result, (exact, sums) in zip(found[isa], expected, strict=True):
            close(result, exact, sums)
        close(others[isa][0], exact1x1(*pixels), 11)
    tiles = range(len(CASES))
    assert all(torch.equal(found["avx2"][n], found["avx512"][n]) for n in tiles)


@pytest.mark.parametrize(
    ("kind", "args", "words"),
    [
        (TypeError, {"weight": torch.rand(8, 4, 3, 3)}, "weight bfloat16 float32"),
        (TypeError, {"slope": torch.rand(8).double()}, "slope bfloat16 float64"),
        (TypeError, {"residual": torch.rand(2, 8, 6, 5)}, "residual bfloat16 float32"),
        (TypeError, {"out": torch.rand(2, 6, 5, 8).permute(0, 3, 1, 2)}, "out bfloat16 float32"),
    ],
)
def test_errors(kind, args, words):
    with pytest.raises(kind, match="^conv3x3: .*" + ".*".join(words.split(" "))):
        conv3x3(**{"image": normal(2, 4, 6, 5), "weight": normal(8, 4, 3, 3)} | args)


@pytest.mark.parametrize("asked", ["cpu", "reference"])
def test_errors_past_python(asked):
    from fastroute import use_backend

    image, weight = normal(1, 4, 6, 6), normal(8, 4, 3, 3)
    with use_backend(asked):
        for wrong in (
            transformed_weight(weight.double(), 1, 1),
            transformed_weight(weight, 1, 1).to(HALF),
            transformed_weight(weight[:, :2], 1, 1),
            paired_weight(weight.float(), 1, 1),
            paired_weight(weight[:, :2], 1, 1),
            paired_weight(weight, 1, 2),
        ):
            with pytest.raises(Exception, match="conv3x3: "):
                RAW.conv3x3.default(image, wrong, None, None, None, 8, 1)
        with pytest.raises(Exception, match="conv1x1: "):
            RAW.conv1x1.default([image], weight[:, :, 0, 0].float(), None, None, None)


def test_exact_numbers_of_channels(backend):
    """Bias and slope in float32 are not rounded."""
    image, weight = torch.full((1, 2, 1, 1), 1.0).to(HALF), torch.zeros(3, 2, 3, 3).to(HALF)
    bias, slope = torch.tensor([1.001, -1.0, -2.0]), torch.tensor([0.5, 0.2505, 1.001])
    residual = torch.tensor([-1.0, 0.25, 2.0]).view(1, 3, 1, 1).to(HALF)
    expected = (torch.where(bias > 0, bias, bias * slope) + residual.flatten().float()).to(HALF)
    same(conv3x3(image, weight, bias, slope, residual).flatten(), expected)
    added = bias + residual.flatten().float()
    expected = torch.where(added > 0, added, added * slope).to(HALF)
    same(conv1x1(image, weight[:, :, 1, 1], bias, slope, residual).flatten(), expected)
