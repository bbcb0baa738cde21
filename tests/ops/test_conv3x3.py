"""Tests of `conv3x3`: a table, sweeps against PyTorch's convolution, tensors that are written into, contexts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LAYOUTS, compiles_once, few, in_layout, inductor_equals_eager, repeats, same
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

from fastroute import conv3x3, conv3x3_weight, use_backend
from fastroute.reference.conv3x3 import POINTS, TILE, conv3x3_reference, transforms

OP = torch.ops.fastroute.conv3x3
# Image (B, C, H, W), output channels, groups, shuffle: whole tiles and parts of them, one pixel, one row, one channel, channels
# that fill no vector, several blocks of tiles and of registers, many channels in and out, groups with and without a shuffle.
CASES = [
    ((1, 64, 8, 8), 64, 1, 1),
    ((2, 3, 5, 7), 17, 1, 1),
    ((1, 1, 1, 1), 1, 1, 1),
    ((3, 5, 1, 9), 2, 1, 1),
    ((1, 12, 9, 2), 12, 1, 1),
    ((1, 192, 6, 11), 32, 1, 1),
    ((1, 64, 7, 10), 256, 1, 2),
    ((2, 36, 6, 5), 36, 4, 1),
    ((1, 36, 5, 6), 144, 4, 2),
    ((1, 4, 4, 3), 27, 1, 3),
    ((2, 7, 40, 41), 33, 1, 1),
    ((1, 3, 30, 70), 48, 1, 4),
    ((1, 1100, 3, 4), 5, 1, 1),
]
EMPTY = [((0, 3, 8, 8), 4, 1, 1), ((2, 3, 0, 8), 4, 1, 2), ((2, 3, 8, 0), 4, 1, 1)]
# A kernel of 36 products may lose a few bits more than sums of 9: the factor beside PyTorch's own error.
FACTOR = 5


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def parameters(case, seed=0):
    """Weight, bias, slopes of both signs, residual."""
    (b, c, h, w), outputs, groups, shuffle = case
    weight = normal(outputs, c // groups, 3, 3, seed=seed) / (9 * c // groups) ** 0.5
    size = (b, outputs // shuffle**2, h * shuffle, w * shuffle)
    return weight, normal(outputs, seed=seed + 1), normal(outputs, seed=seed + 2), normal(*size, seed=seed + 3)


def plain(image, weight, bias, slope, residual, groups, shuffle):
    """What PyTorch's layers compute, in the dtype of the image."""
    bias, slope, residual = (None if x is None else x.to(image.dtype) for x in (bias, slope, residual))
    if 0 in image.shape:
        return F.pixel_shuffle(image.new_empty(image.shape[0], len(weight), *image.shape[2:]), shuffle)
    y = F.conv2d(image, weight.to(image.dtype), bias, padding=1, groups=groups)
    y = y if slope is None else torch.where(y > 0, y, y * slope[:, None, None])
    y = F.pixel_shuffle(y, shuffle)
    return y if residual is None else y + residual


def close(actual, image, weight, bias, slope, residual, groups, shuffle):
    """Error against float64 at most `FACTOR` times that of PyTorch's layers, plus a few units in the last place of the largest.

    The more channels, the more: PyTorch sums them in parts, the kernel in one chain.
    """
    rest = (weight, bias, slope, residual, groups, shuffle)
    exact, usual = plain(image.double(), *rest), plain(image, *rest)
    assert actual.dtype == torch.float32
    assert actual.shape == exact.shape
    if actual.numel():
        floor = (8 + weight.shape[1] / 12) * torch.finfo(torch.float32).eps * exact.abs().max()
        assert (actual - exact).abs().max() <= FACTOR * (usual - exact).abs().max() + floor


def test_table(backend):
    # A 2 x 2 image, a kernel of numbers 1 to 9: the four windows, which hold the zeros around the image.
    image = torch.tensor([[1.0, 2.0], [0.0, -1.0]], device=backend.device)[None, None]
    weight = torch.arange(1.0, 10.0, device=backend.device).view(1, 1, 3, 3)
    # 5·1 + 6·2 + 8·0 - 9 = 8; 4·1 + 5·2 - 8 = 6 (and 7·0); 2·1 + 3·2 + 5·0 - 6 = 2; 1·1 + 2·2 + 4·0 - 5 = 0.
    sums = torch.tensor([[8.0, 6.0], [2.0, 0.0]], device=backend.device)[None, None]
    found = conv3x3(image, weight)
    torch.testing.assert_close(found, sums, rtol=0, atol=1e-5)
    found = conv3x3(image, weight, torch.tensor([-4.0]), torch.tensor([0.5]), torch.full((1, 1, 2, 2), 10.0))
    torch.testing.assert_close(found, torch.tensor([[14.0, 12.0], [9.0, 8.0]])[None, None], rtol=0, atol=1e-5)


def test_order_of_a_shuffle(backend):
    """Output channels become pixels, rows before columns, as torch.nn.PixelShuffle places them."""
    weight = torch.zeros(8, 1, 3, 3)
    weight[:, 0, 1, 1] = torch.arange(8.0)
    found = conv3x3(torch.ones(1, 1, 1, 1), conv3x3_weight(weight, shuffle=2))
    torch.testing.assert_close(found, torch.arange(8.0).view(1, 2, 2, 2), rtol=0, atol=1e-5)


def test_transforms():
    """The three matrices give convolutions of four outputs along a line, exactly; points of opposite sign share their parts."""
    a, g, b = transforms()
    d, w = normal(6, dtype=torch.float64), normal(3, dtype=torch.float64)
    expected = torch.stack([d[i : i + 3] @ w for i in range(TILE)])
    torch.testing.assert_close(a @ ((g @ w) * (b @ d)), expected, rtol=0, atol=1e-13)
    assert POINTS[1] == -POINTS[2] and POINTS[3] == -POINTS[4]


@pytest.mark.parametrize("case", CASES + EMPTY, ids=str)
def test_sweep(backend, case):
    shape, _, groups, shuffle = case
    weight, bias, slope, residual = parameters(case)
    prepared = conv3x3_weight(weight, groups, shuffle)
    image = normal(*shape)
    for number, layout in enumerate(few(LAYOUTS)):
        laid, added = in_layout(image, layout), in_layout(residual, layout)
        for rest in ((None, None, None), (bias, slope, added), (bias, None, None), (None, slope, None))[
            : 4 if number < 2 else 2
        ]:
            found = conv3x3(laid, prepared, *rest)
            close(found, laid, weight, *rest, groups, shuffle)
            assert found.is_contiguous(memory_format=torch.channels_last) or 0 in shape


def test_a_plain_weight_is_transformed_in_the_call(backend):
    for case in (CASES[1], CASES[7]):
        weight, bias, slope, residual = parameters(case)
        image = normal(*case[0])
        same(
            conv3x3(image, weight, bias, slope, residual),
            conv3x3(image, conv3x3_weight(weight, case[2]), bias, slope, residual),
        )


@pytest.mark.parametrize("shuffle", [1, 2])
@pytest.mark.parametrize("height", [1, 2, 3, 4, 9, 30])
def test_context(backend, height, shuffle):
    """A band with its neighbours gives the rows of the whole image; all bits, where its tiles are those of the image."""
    weight, bias, slope, _ = parameters(((1, 5, 40, 9), 12, 1, shuffle))
    image, prepared = normal(2, 5, 40, 9), conv3x3_weight(weight, shuffle=shuffle)
    whole = conv3x3(image, prepared, bias, slope)
    for begin in (1, 4, 9):
        rows = slice(begin * shuffle, (begin + height) * shuffle)
        residual = normal(*whole[:, :, rows].shape)
        for laid in (image, image.contiguous(memory_format=torch.channels_last)):
            band = laid[:, :, begin - 1 : begin + height + 1]
            found = conv3x3(band, prepared, bias, slope, residual, context=1)
            torch.testing.assert_close(found, whole[:, :, rows] + residual, rtol=0, atol=1e-4)
            if begin == 4 and backend.name == "cpu":
                # Of the last tile other rows are read, unless it is whole.
                alike = height // TILE * TILE * shuffle
                same(found[:, :, :alike].contiguous(), (whole[:, :, rows] + residual)[:, :, :alike].contiguous())
    assert conv3x3(image[:, :, :2], prepared, bias, slope, context=1).shape == (2, whole.shape[1], 0, 9 * shuffle)


def test_expanded_arguments(backend):
    """One number for all channels, a residual of one row and images that share their memory."""
    image, weight = normal(1, 5, 6, 7).expand(3, -1, -1, -1), normal(20, 5, 3, 3)
    bias, slope = torch.tensor([0.5]).expand(20), torch.tensor([-0.25]).expand(20)
    residual = normal(1, 20, 1, 7).expand(3, 20, 6, 7)
    close(conv3x3(image, weight, bias, slope, residual), image, weight, bias, slope, residual, 1, 1)
    every_other = normal(40)[::2]
    close(conv3x3(image, weight, every_other, every_other), image, weight, every_other, every_other, None, 1, 1)


@pytest.mark.slow
@given(
    size=st.tuples(st.integers(0, 2), st.integers(1, 23), st.integers(1, 23)),
    groups=st.integers(1, 3),
    inputs=st.integers(1, 20),
    shown=st.integers(1, 20),
    shuffle=st.integers(1, 3),
    layout=st.sampled_from(LAYOUTS),
    given=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_any_shape(backend, size, groups, inputs, shown, shuffle, layout, given, seed):
    case = ((size[0], groups * inputs, *size[1:]), groups * shown * shuffle**2, groups, shuffle)
    weight, *others = parameters(case, seed)
    rest = [x if wanted else None for x, wanted in zip(others, given, strict=True)]
    image = in_layout(normal(*case[0], seed=seed), layout)
    close(conv3x3(image, conv3x3_weight(weight, groups, shuffle), *rest), image, weight, *rest, groups, shuffle)


@pytest.mark.parametrize("case", [CASES[1], CASES[6], CASES[8]], ids=str)
def test_out(backend, case):
    """Into a whole tensor, into channels, rows and columns of a larger one, and nothing beside them."""
    weight, bias, slope, residual = parameters(case)
    image, prepared = normal(*case[0]), conv3x3_weight(weight, *case[2:])
    expected = conv3x3(image, prepared, bias, slope, residual)
    b, c, h, w = expected.shape
    larger = torch.full((b + 1, h + 3, w + 2, c + 5), 7.0).permute(0, 3, 1, 2)
    for out in (torch.empty_like(expected), larger[1:, 3 : c + 3, 2 : h + 2, 1 : w + 1]):
        assert conv3x3(image, prepared, bias, slope, residual, out=out) is out
        same(out.contiguous(), expected.contiguous())
    larger[1:, 3 : c + 3, 2 : h + 2, 1 : w + 1] = 7.0
    assert (larger == 7).all()


def test_channels_of_one_tensor_are_read_and_written(backend):
    """As a dense block does: a layer writes behind the channels that it reads."""
    joined = torch.empty(2, 5, 6, 24).permute(0, 3, 1, 2)
    image, weight = normal(2, 8, 5, 6), normal(16, 8, 3, 3)
    joined[:, :8] = image
    conv3x3(joined[:, :8], weight, out=joined[:, 8:])
    same(joined[:, 8:].contiguous(), conv3x3(image, weight).contiguous())
    same(joined[:, :8].contiguous(), image)


@pytest.mark.parametrize("asked", ["cpu", "reference"])
def test_out_is_refused(asked):
    image, weight = normal(1, 4, 6, 6).contiguous(memory_format=torch.channels_last), normal(4, 4, 3, 3)
    channels_last = image.clone()
    with use_backend(asked):
        with pytest.raises(ValueError, match=r"^conv3x3: out must not share memory with an input"):
            conv3x3(image, weight, out=image)
        with pytest.raises(ValueError, match=r"^conv3x3: out must not share memory with an input"):
            conv3x3(image, weight, residual=channels_last, out=channels_last)
        with pytest.raises(ValueError, match=r"^conv3x3: out must not share memory between its own elements"):
            conv3x3(image, weight, out=torch.zeros(1, 6, 1, 4).expand(1, 6, 6, 4).permute(0, 3, 1, 2))
        with pytest.raises(ValueError, match=r"^conv3x3: out must have its channels side by side"):
            conv3x3(image, weight, out=torch.zeros(1, 4, 6, 6))
        with pytest.raises(ValueError, match=r"^conv3x3: out must be \(1, 4, 6, 6\); got \(1, 4, 6, 5\)"):
            conv3x3(image, weight, out=torch.zeros(1, 6, 5, 4).permute(0, 3, 1, 2))
    assert torch.equal(image, channels_last)


def test_out_has_no_gradient(backend):
    image, weight = normal(1, 2, 4, 4).requires_grad_(), normal(3, 2, 3, 3)
    out = torch.empty(1, 4, 4, 3).permute(0, 3, 1, 2)
    conv3x3(image, weight, out=out)
    assert not out.requires_grad
    close(out, image.detach(), weight, None, None, None, 1, 1)


def test_bits_do_not_depend_on_other_images(backend):
    if backend.name != "cpu":
        pytest.skip("a product of matrices may sum otherwise when it has fewer rows")
    case = ((5, 20, 23, 18), 35, 1, 1)
    weight, bias, slope, _ = parameters(case)
    image, prepared = normal(*case[0]), conv3x3_weight(weight)
    whole = conv3x3(image, prepared, bias, slope)
    for n in range(5):
        same(conv3x3(image[n : n + 1], prepared, bias, slope).contiguous(), whole[n : n + 1].contiguous())


def test_not_a_number(backend):
    """What is not finite reaches the tiles that read it, and no others."""
    image = normal(1, 3, 16, 16)
    image[0, 1, 5, 5] = torch.nan
    found = conv3x3(image, normal(4, 3, 3, 3)).isnan()
    assert found[:, :, 4:7, 4:7].all()
    assert not found[:, :, 8:].any() and not found[:, :, :, 8:].any()


def test_rectifiers_as_pytorch_has_them(backend):
    image, weight = normal(1, 3, 9, 9), normal(6, 3, 3, 3)
    linear = conv3x3(image, weight)
    same(conv3x3(image, weight, slope=torch.zeros(6)), F.relu(linear))
    same(conv3x3(image, weight, slope=torch.full((6,), 0.1)), F.leaky_relu(linear, 0.1))
    slopes = normal(6)
    same(conv3x3(image, weight, slope=slopes), F.prelu(linear, slopes))


@pytest.mark.parametrize("case", [((1, 2, 3, 5), 3, 1, 1), ((2, 4, 2, 3), 8, 2, 2)], ids=str)
def test_gradients(backend, case):
    """Those of PyTorch's layers, for every argument."""
    tensors = [x.requires_grad_() for x in (normal(*case[0]), *parameters(case))]
    image, weight, bias, slope, residual = tensors
    by_plain = plain(image, weight, bias, slope, residual, *case[2:])
    factors = normal(*by_plain.shape)
    expected = torch.autograd.grad((by_plain * factors).sum(), tensors)
    found = conv3x3(image, conv3x3_weight(weight, *case[2:]), bias, slope, residual)
    grads = torch.autograd.grad((found * factors).sum(), tensors)
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-5)


def test_gradcheck_of_the_operator(operator):
    """The registered operator, whose weight is transformed, is differentiated by its reference, in float64."""
    case = ((1, 2, 3, 5), 8, 1, 2)
    weight, *rest = (x.double() for x in parameters(case))
    arguments = [normal(*case[0], dtype=torch.float64), conv3x3_weight(weight.float(), 1, 2).transformed.double(), *rest]
    arguments = [x.requires_grad_() for x in arguments]
    assert torch.autograd.gradcheck(lambda *args: conv3x3_reference(*args, 8, 2), arguments, fast_mode=True)
    singles = [x.detach().float().requires_grad_() for x in arguments]
    found = OP.default(*singles, 8, 2)
    factors = normal(*found.shape)
    grads = torch.autograd.grad((found * factors).sum(), singles)
    expected = torch.autograd.grad((conv3x3_reference(*arguments, 8, 2) * factors).sum(), arguments)
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-4, atol=1e-4)


def raw(case, *given: bool):
    weight, *others = parameters(case)
    rest = [x if wanted else None for x, wanted in zip(others, given, strict=True)]
    return (normal(*case[0]), conv3x3_weight(weight, *case[2:]).transformed, *rest, case[1], case[3], 0)


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(operator, grad):
    # Half a minute of symbolic shapes for each with gradients.
    plain = ((CASES[1], (True, True, True)), (CASES[8], (True, False, True)), (CASES[3], (False, False, False)))
    for case, wanted in plain[:1] if grad else plain:
        arguments = raw(case, *wanted)
        opcheck(OP.default, tuple(x.requires_grad_(grad) if isinstance(x, Tensor) else x for x in arguments))
        if not grad:
            opcheck(OP.out, arguments, {"out": OP.default(*arguments).clone()})


def test_poisoned(backend, poisoned):
    for case in CASES[:10]:
        weight, bias, slope, residual = parameters(case)
        image = normal(*case[0])
        found = conv3x3(image, conv3x3_weight(weight, *case[2:]), bias, slope, residual)
        close(found, image, weight, bias, slope, residual, *case[2:])


def examples():
    for shape in ((2, 3, 8, 9), (5, 3, 13, 7), (4, 3, 6, 21)):
        weight, bias, slope, residual = parameters((shape, 20, 1, 2))
        yield normal(*shape), conv3x3_weight(weight, shuffle=2), bias, slope, residual


@pytest.mark.slow
def test_compiles_once_for_all_sizes(operator):
    compiles_once(conv3x3, examples())


@pytest.mark.slow
def test_compiles_with_inductor(operator):
    inductor_equals_eager(conv3x3, *next(examples()))


def test_deterministic(backend):
    case = ((2, 20, 60, 70), 40, 1, 1)
    weight, bias, slope, residual = parameters(case)
    image, prepared = normal(*case[0]), conv3x3_weight(weight)
    if backend.is_reference:
        # Its products are those of torch, whose bits may depend on the number of threads.
        same(conv3x3(image, prepared, bias, slope, residual), conv3x3(image, prepared, bias, slope, residual))
    else:
        repeats(lambda: conv3x3(image, prepared, bias, slope, residual), backend.device)


IMAGE, WEIGHT = torch.rand(2, 4, 6, 5), torch.rand(8, 4, 3, 3)


@pytest.mark.parametrize(
    ("kind", "args", "words"),
    [
        (TypeError, {"image": [1.0]}, "image Tensor list"),
        (TypeError, {"image": None}, "image Tensor NoneType"),
        (ValueError, {"image": IMAGE[0]}, r"image \(B, C, H, W\) 3 dimension"),
        (TypeError, {"image": IMAGE.double()}, "image float32 float64"),
        (TypeError, {"image": IMAGE.half()}, "image float32 float16"),
        (ValueError, {"image": IMAGE[:, :3]}, r"weight C = 3 channels \(8, 4, 3, 3\)"),
        (ValueError, {"image": IMAGE[:, :0]}, "weight C = 0 channels"),
        (TypeError, {"weight": None}, "weight Tensor NoneType"),
        (ValueError, {"weight": WEIGHT[0]}, r"weight \(O, C / G, 3, 3\) 3 dimension"),
        (ValueError, {"weight": WEIGHT[:, :, :, :1]}, r"weight \(8, 4, 3, 1\)"),
        (ValueError, {"weight": WEIGHT[:0]}, r"weight \(0, 4, 3, 3\)"),
        (ValueError, {"weight": WEIGHT[:7, :2]}, "7 output channels multiple 2 groups"),
        (TypeError, {"weight": WEIGHT.bfloat16()}, "weight float32 bfloat16"),
        (ValueError, {"bias": torch.rand(7)}, r"bias \(8,\) \(7,\)"),
        (TypeError, {"bias": 1.0}, "bias Tensor float"),
        (TypeError, {"slope": torch.rand(8).double()}, "slope float32 float64"),
        (ValueError, {"slope": torch.rand(1)}, r"slope \(8,\) \(1,\)"),
        (ValueError, {"residual": IMAGE}, r"residual \(2, 8, 6, 5\) \(2, 4, 6, 5\)"),
        (ValueError, {"weight": conv3x3_weight(WEIGHT, 1, 2), "residual": IMAGE}, r"residual \(2, 2, 12, 10\)"),
        (ValueError, {"context": 2}, "context 0, or 1 2"),
        (ValueError, {"context": -1}, "context 0, or 1 -1"),
        (ValueError, {"context": 1, "image": IMAGE[:, :, :1]}, "context at least 2 rows"),
        (ValueError, {"context": 1, "residual": torch.rand(2, 8, 6, 5)}, r"residual \(2, 8, 4, 5\)"),
        (ValueError, {"bias": torch.rand(8, device="meta")}, "image bias one device cpu meta"),
    ],
)
def test_errors(kind, args, words):
    with pytest.raises(kind, match="^conv3x3: .*" + ".*".join(words.split(" "))):
        conv3x3(**{"image": IMAGE, "weight": WEIGHT} | args)


@pytest.mark.parametrize(
    ("kind", "args", "words"),
    [
        (TypeError, (None,), "weight Tensor NoneType"),
        (ValueError, (WEIGHT[0],), r"weight \(O, C / groups, 3, 3\)"),
        (ValueError, (WEIGHT[:, :, 1:],), r"weight \(8, 4, 2, 3\)"),
        (ValueError, (WEIGHT[:, :0],), r"weight \(8, 0, 3, 3\)"),
        (TypeError, (WEIGHT.double(),), "weight float32 float64"),
        (ValueError, (WEIGHT, 3), "multiple groups 3"),
        (ValueError, (WEIGHT, 1, 3), "multiple 9"),
        (ValueError, (WEIGHT, 0), "groups at least 1 0"),
        (TypeError, (WEIGHT, 1, 2.0), "shuffle integer 2.0"),
    ],
)
def test_errors_of_weights(kind, args, words):
    with pytest.raises(kind, match="^conv3x3_weight: .*" + ".*".join(words.split(" "))):
        conv3x3_weight(*args)
