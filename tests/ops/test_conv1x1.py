"""Tests of `conv1x1`: a table, sweeps against PyTorch's convolution of joined channels, contexts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LAYOUTS, compiles_once, few, in_layout, inductor_equals_eager, repeats, same
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

from fastroute import conv1x1, use_backend
from fastroute.reference.conv1x1 import conv1x1_reference

OP = torch.ops.fastroute.conv1x1.default
# Channels of each image, outputs, (B, H, W): one pixel, one channel, channels that fill no vector, several blocks of registers
# and of pixels, many channels in and out.
CASES = [
    ((64,), 64, (1, 8, 8)),
    ((64, 64, 64), 64, (1, 7, 9)),
    ((1,), 1, (1, 1, 1)),
    ((3, 5, 1), 17, (2, 5, 7)),
    ((36, 36), 36, (2, 12, 11)),
    ((192,), 32, (1, 4, 5)),
    ((64,), 256, (1, 3, 13)),
    ((2, 0, 3), 5, (3, 1, 97)),
    ((12, 12, 12, 12), 12, (1, 30, 41)),
    ((1100,), 7, (1, 2, 2)),
    ((7,), 81, (4, 10, 10)),
]
EMPTY = [((3, 2), 4, (0, 5, 5)), ((3, 2), 4, (2, 0, 5)), ((3,), 4, (2, 5, 0))]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def arguments(case, seed=0, dtype=torch.float32):
    """Images, weight, bias, slopes of both signs, residual."""
    channels, outputs, (b, h, w) = case
    images = [normal(b, c, h, w, seed=seed + n, dtype=dtype) for n, c in enumerate(channels)]
    weight = normal(outputs, sum(channels), seed=seed, dtype=dtype) / sum(channels) ** 0.5
    rest = normal(outputs, seed=seed + 1, dtype=dtype), normal(outputs, seed=seed + 2, dtype=dtype)
    return images, weight, *rest, normal(b, outputs, h, w, seed=seed + 3, dtype=dtype)


def plain(images, weight, bias, slope, residual):
    """What PyTorch's layers compute, in the dtype of the images."""
    x = torch.cat(images, dim=1)
    weight, bias, slope, residual = (None if t is None else t.to(x.dtype) for t in (weight, bias, slope, residual))
    y = F.conv2d(x, weight[:, :, None, None], bias) if x.numel() else x.new_empty(len(x), len(weight), *x.shape[2:])
    y = y if residual is None else y + residual
    return y if slope is None else torch.where(y > 0, y, y * slope[:, None, None])


def close(actual, images, *rest):
    """Error against float64 at most twice that of PyTorch's layers, plus a few units in the last place of the largest.

    The more channels, the more: PyTorch sums them in parts, the kernel in one chain.
    """
    exact, usual = plain([x.double() for x in images], *rest), plain(images, *rest)
    assert actual.dtype == torch.float32
    assert actual.shape == exact.shape
    if actual.numel():
        floor = (4 + sum(x.shape[1] for x in images) / 100) * torch.finfo(torch.float32).eps * exact.abs().max()
        assert (actual - exact).abs().max() <= 2 * (usual - exact).abs().max() + floor


def test_table(backend):
    # Two images of one pixel and of two channels and one: 1, 2 and 3.
    images = [torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), torch.tensor([3.0]).view(1, 1, 1, 1)]
    weight = torch.tensor([[1.0, 10.0, 100.0], [-1.0, 0.0, 0.5]])
    assert conv1x1(images, weight).flatten().tolist() == [321, 0.5]
    assert conv1x1(images, weight[:, :, None, None], torch.tensor([-300.0, -2.5])).flatten().tolist() == [21, -2]
    # The residual comes before the rectifier, the rectifier last.
    found = conv1x1(images, weight, None, torch.tensor([2.0, 0.25]), torch.tensor([-400.0, -2.5]).view(1, 2, 1, 1))
    assert found.flatten().tolist() == [-158, -0.5]


def test_one_image_needs_no_list(backend):
    images, *rest = arguments(CASES[0])
    same(conv1x1(images[0], *rest), conv1x1(images, *rest))


@pytest.mark.parametrize("case", CASES + EMPTY, ids=str)
def test_sweep(backend, case):
    images, weight, bias, slope, residual = arguments(case)
    for number, layout in enumerate(few(LAYOUTS)):
        added = in_layout(residual, layout)
        # Images of several layouts in one call.
        laid = [in_layout(x, LAYOUTS[(number + n) % len(LAYOUTS)]) for n, x in enumerate(images)]
        for rest in ((None, None, None), (bias, slope, added), (bias, None, None), (None, slope, None)):
            found = conv1x1(laid, weight, *rest)
            close(found, laid, weight, *rest)
            assert found.is_contiguous(memory_format=torch.channels_last) or found.numel() == 0


def test_expanded_arguments(backend):
    """One number for all channels, a residual of one row, an image that is given twice and images that share their memory."""
    image, weight = normal(1, 5, 6, 7).expand(3, -1, -1, -1), normal(10, 20)[:, ::2].t().contiguous().t()
    bias, slope = torch.tensor([0.5]).expand(10), torch.tensor([-0.25]).expand(10)
    residual = normal(1, 10, 1, 7).expand(3, 10, 6, 7)
    close(conv1x1([image, image], weight, bias, slope, residual), [image, image], weight, bias, slope, residual)


def test_slices_of_one_tensor(backend):
    whole, weight = in_layout(normal(2, 24, 6, 7), "channels_last"), normal(5, 12)
    parts = [whole[:, 3:10], whole[:, 12:17]]
    close(conv1x1(parts, weight), parts, weight, None, None, None)


@given(
    size=st.tuples(st.integers(0, 3), st.integers(1, 30), st.integers(1, 30)),
    channels=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    outputs=st.integers(1, 90),
    layout=st.sampled_from(LAYOUTS),
    given=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_any_shape(backend, size, channels, outputs, layout, given, seed):
    images, weight, *others = arguments((channels, outputs, size), seed)
    rest = [x if wanted else None for x, wanted in zip(others, given, strict=True)]
    laid = [in_layout(x, layout) for x in images]
    close(conv1x1(laid, weight, *rest), laid, weight, *rest)


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[7], CASES[10], EMPTY[1]], ids=str)
def test_out(backend, case):
    """Into a whole tensor, into channels, rows and columns of a larger one, and nothing beside them."""
    images, *rest = arguments(case)
    expected = conv1x1(images, *rest)
    b, c, h, w = expected.shape
    larger = torch.full((b + 1, h + 3, w + 2, c + 5), 7.0).permute(0, 3, 1, 2)
    for out in (torch.empty_like(expected), larger[1:, 3 : c + 3, 2 : h + 2, 1 : w + 1]):
        assert conv1x1(images, *rest, out=out) is out
        same(out.contiguous(), expected.contiguous())
    larger[1:, 3 : c + 3, 2 : h + 2, 1 : w + 1] = 7.0
    assert (larger == 7).all()


@pytest.mark.parametrize("asked", ["cpu", "reference"])
def test_out_is_refused(asked):
    image, weight = normal(1, 4, 6, 6).contiguous(memory_format=torch.channels_last), normal(4, 4)
    given = image.clone()
    with use_backend(asked):
        for arguments_ in ({"images": image}, {"images": [given, given], "weight": weight.repeat(1, 2), "residual": image}):
            with pytest.raises(ValueError, match=r"^conv1x1: out must not share memory with an input"):
                conv1x1(**{"weight": weight} | arguments_, out=image)
        with pytest.raises(ValueError, match=r"^conv1x1: out must not share memory between its own elements"):
            conv1x1(image, weight, out=torch.zeros(1, 6, 1, 4).expand(1, 6, 6, 4).permute(0, 3, 1, 2))
        with pytest.raises(ValueError, match=r"^conv1x1: out must have its channels side by side"):
            conv1x1(image, weight, out=torch.zeros(1, 4, 6, 6))
        with pytest.raises(ValueError, match=r"^conv1x1: out must be \(1, 4, 6, 6\); got \(1, 4, 6, 5\)"):
            conv1x1(image, weight, out=torch.zeros(1, 6, 5, 4).permute(0, 3, 1, 2))
        with pytest.raises(TypeError, match=r"^conv1x1: out must be "):
            conv1x1(image, weight, out=image.double())
    assert torch.equal(image, given)


def test_out_has_no_gradient(backend):
    image, weight = normal(1, 2, 4, 4).requires_grad_(), normal(3, 2)
    out = torch.empty(1, 4, 4, 3).permute(0, 3, 1, 2)
    conv1x1(image, weight, out=out)
    assert not out.requires_grad
    close(out, [image.detach()], weight, None, None, None)


def test_bits_do_not_depend_on_other_pixels(backend):
    if backend.name != "cpu":
        pytest.skip("a product of matrices may sum otherwise when it has fewer rows")
    images, weight, bias, slope, residual = arguments(((20, 9), 35, (3, 23, 18)))
    whole = conv1x1(images, weight, bias, slope, residual)
    for n, rows, cols in ((0, slice(0, 23), slice(0, 18)), (1, slice(3, 4), slice(0, 18)), (2, slice(5, 23), slice(17, 18))):
        part = [x[n : n + 1, :, rows, cols] for x in (*images, residual)]
        found = conv1x1(part[:-1], weight, bias, slope, part[-1])
        same(found.contiguous(), whole[n : n + 1, :, rows, cols].contiguous())


def test_not_a_number(backend):
    """What is not finite reaches its own pixel alone."""
    images, weight, *_ = arguments(CASES[3])
    images[1][0, 2, 3, 4] = torch.inf
    images[2][1, 0, 0, 0] = torch.nan
    finite = conv1x1(images, weight).isfinite()
    assert not finite[0, :, 3, 4].any() and not finite[1, :, 0, 0].any()
    assert (~finite).sum() == 2 * 17


def test_rectifiers_as_pytorch_has_them(backend):
    images, weight, *_ = arguments(CASES[3])
    linear = conv1x1(images, weight)
    same(conv1x1(images, weight, slope=torch.zeros(17)), F.relu(linear))
    same(conv1x1(images, weight, slope=torch.full((17,), 0.1)), F.leaky_relu(linear, 0.1))
    slopes = normal(17)
    same(conv1x1(images, weight, slope=slopes), F.prelu(linear, slopes))


@pytest.mark.parametrize("case", [((2, 1), 3, (1, 3, 2)), ((4,), 2, (2, 1, 2))], ids=str)
def test_gradients(backend, case):
    """Those of PyTorch's layers, for every argument."""
    images, *rest = arguments(case)
    tensors = [x.requires_grad_() for x in (*images, *rest)]
    by_plain = plain(images, *rest)
    factors = normal(*by_plain.shape)
    expected = torch.autograd.grad((by_plain * factors).sum(), tensors)
    for run in (conv1x1, OP):
        grads = torch.autograd.grad((run(images, *rest) * factors).sum(), tensors)
        for grad, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-5)


def test_gradcheck_of_the_reference():
    images, *rest = arguments(((2, 1), 3, (1, 3, 2)), dtype=torch.float64)
    tensors = [x.requires_grad_() for x in (*images, *rest)]
    assert torch.autograd.gradcheck(lambda a, b, *rest: conv1x1_reference([a, b], *rest), tensors)


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(operator, grad):
    for case in (CASES[3], CASES[2]):
        images, *rest = arguments(case)
        for tensor in (*images, *rest):
            tensor.requires_grad_(grad)
        opcheck(OP, (images, *rest))
        opcheck(OP, (images, rest[0], None, None, None))


def test_poisoned(backend, poisoned):
    for case in CASES:
        images, *rest = arguments(case)
        close(conv1x1(images, *rest), images, *rest)


def examples():
    for size in ((2, 8, 9), (5, 13, 7), (4, 6, 21)):
        # No size is the sum of others.
        (first, second), *rest = arguments(((3, 7), 16, size))
        yield first, second, *rest


def run_example(first, second, *rest):
    return conv1x1([first, second], *rest)


@pytest.mark.slow
def test_compiles_once_for_all_sizes(operator):
    compiles_once(run_example, examples())


@pytest.mark.slow
def test_compiles_with_inductor(operator):
    inductor_equals_eager(run_example, *next(examples()))


def test_deterministic(backend):
    images, *rest = arguments(((20, 12), 40, (2, 60, 70)))
    if backend.is_reference:
        # Its product is that of torch, whose bits may depend on the number of threads.
        same(conv1x1(images, *rest), conv1x1(images, *rest))
    else:
        repeats(lambda: conv1x1(images, *rest), backend.device)


IMAGE, WEIGHT = torch.rand(2, 4, 6, 5), torch.rand(8, 4)


@pytest.mark.parametrize(
    ("kind", "args", "words"),
    [
        (TypeError, {"images": None}, "images Tensor sequence NoneType"),
        (TypeError, {"images": [1.0]}, "an image Tensor float"),
        (ValueError, {"images": []}, "images at least one"),
        (ValueError, {"images": IMAGE[0]}, r"image \(B, C, H, W\) 3 dimension"),
        (TypeError, {"images": IMAGE.double()}, "every tensor float32 float64"),
        (ValueError, {"images": [IMAGE, IMAGE]}, r"weight \(O, C\) 8 channels \(8, 4\)"),
        (ValueError, {"images": [IMAGE[:, :2], IMAGE[:, :2, 1:]]}, r"an image \(2, 2, 6, 5\) \(2, 2, 5, 5\)"),
        (ValueError, {"images": [IMAGE[:, :2], IMAGE[:1, :2]]}, r"an image \(2, 2, 6, 5\) \(1, 2, 6, 5\)"),
        (ValueError, {"images": IMAGE[:, :0], "weight": WEIGHT[:, :0]}, r"weight at least 1 \(8, 0\)"),
        (TypeError, {"weight": None}, "weight Tensor NoneType"),
        (ValueError, {"weight": WEIGHT[0]}, r"weight \(O, C\) 1 dimension"),
        (ValueError, {"weight": torch.rand(8, 4, 3, 3)}, r"weight \(O, C\) or \(O, C, 1, 1\) 4 dimension"),
        (ValueError, {"weight": WEIGHT[:0]}, r"weight at least 1 \(0, 4\)"),
        (TypeError, {"weight": WEIGHT.half()}, "every tensor float32 float16"),
        (ValueError, {"bias": torch.rand(7)}, r"bias \(8,\) \(7,\)"),
        (TypeError, {"slope": 0.1}, "slope Tensor float"),
        (ValueError, {"slope": torch.rand(1)}, r"slope \(8,\) \(1,\)"),
        (ValueError, {"residual": IMAGE}, r"residual \(2, 8, 6, 5\) \(2, 4, 6, 5\)"),
        (ValueError, {"bias": torch.rand(8, device="meta")}, "first image one device cpu meta"),
    ],
)
def test_errors(kind, args, words):
    with pytest.raises(kind, match="^conv1x1: .*" + ".*".join(words.split(" "))):
        conv1x1(**{"images": IMAGE, "weight": WEIGHT} | args)
