"""Tests of `refine_boundaries`: a table, sweeps against the reference, bands, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import FLOATING, LAYOUTS, compiles_once, few, in_layout, inductor_equals_eager, random, repeats, same
from torch.library import opcheck

from fastroute import refine_boundaries
from fastroute.reference.refine_boundaries import refine_boundaries_reference

OP = torch.ops.fastroute.refine_boundaries.default
SHAPES = [(2, 3, 17, 22), (1, 1, 3, 3), (1, 2, 1, 9), (1, 2, 9, 2), (0, 3, 5, 5), (2, 0, 4, 4), (1, 3, 0, 4), (1, 3, 4, 300)]


def classes(shape, share=0.1, device="cpu", dtype=torch.uint8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = (shape[0], *shape[2:])
    expensive = torch.rand(size, generator=generator) < share
    return (expensive * torch.randint(1, 4, size, generator=generator)).to(dtype).to(device)


def close(actual, image, class_map):
    """Error against float64 at most twice plain PyTorch's, plus half a unit in the last place; the rest is copied."""
    exact = refine_boundaries_reference(image.double(), class_map)
    plain = refine_boundaries_reference(image, class_map)
    assert actual.dtype == image.dtype
    assert actual.shape == exact.shape
    assert actual.is_contiguous()
    untouched = exact == image.double()
    assert torch.equal(actual[untouched], image[untouched])
    if actual.numel():
        allowed = 2 * (plain.double() - exact).abs().max() + torch.finfo(image.dtype).eps / 2
        assert (actual.double() - exact).abs().max() <= allowed


def test_table(backend):
    image = torch.arange(20.0, device=backend.device).view(1, 1, 4, 5) ** 2
    class_map = torch.zeros(1, 4, 5, dtype=torch.int64, device=backend.device)
    class_map[0, 1, 1] = 1
    expected = image.clone()
    # 1 + 4 + 9 + 36 + 49 + 64 + 121 + 144 + 169, and so on.
    expected[0, 0, 1, 2], expected[0, 0, 2, 1], expected[0, 0, 2, 2] = 597 / 9, 1245 / 9, 1452 / 9
    torch.testing.assert_close(refine_boundaries(image, class_map), expected)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sweep(backend, shape, dtype):
    image = random(shape, dtype, backend.device)
    for turn, share in enumerate((0.0, 0.02, 0.5, 1.0), SHAPES.index(shape)):
        class_map = classes(shape, share, backend.device)
        for layout in few(LAYOUTS, turn):
            laid = in_layout(image, layout)
            output = refine_boundaries(laid, class_map)
            close(output, laid, class_map)
            same(refine_boundaries(laid, class_map.long().mT.contiguous().mT), output)


@given(
    shape=st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(0, 12), st.integers(0, 40)),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_bands(backend, shape, share, seed, data):
    image = random(shape, device=backend.device, seed=seed)
    class_map = classes(shape, share, backend.device, seed=seed)
    whole = refine_boundaries(image, class_map)
    close(whole, image, class_map)
    begin = data.draw(st.integers(0, shape[2]))
    end = data.draw(st.integers(begin, shape[2]))
    same(refine_boundaries(image, class_map, rows=(begin, end)), whole[:, :, begin:end].contiguous())
    # A band with one row more on either side knows all it needs.
    top, bottom = max(begin - 1, 0), min(end + 1, shape[2])
    out = torch.zeros_like(image)
    target = out[:, :, begin:end]
    refine_boundaries(image[:, :, top:bottom], class_map[:, top:bottom], (begin - top, end - top), out=target)
    same(target.contiguous(), whole[:, :, begin:end].contiguous())
    assert not out[:, :, :begin].any()
    assert not out[:, :, end:].any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16], ids=str)
@pytest.mark.parametrize("source", FLOATING, ids=str)
def test_integer_output(backend, dtype, source):
    shape = (1, 3, 9, 40)
    image, class_map = random(shape, source, backend.device), classes(shape, 0.1, backend.device)
    out = torch.zeros(shape, dtype=torch.int32, device=backend.device).to(dtype)
    refine_boundaries(image, class_map, out=out)
    maximum = 255 if dtype == torch.uint8 else 65535
    exact = refine_boundaries_reference(image.double(), class_map).clamp(0, 1) * maximum
    # Half a step of rounding, and the float32 mean's error on this scale.
    assert ((out.double() - exact).abs() <= 0.5 + maximum * 2e-7).all()


@pytest.mark.parametrize("rows", [None, (1, 4)])
def test_gradcheck(operator, rows):
    for shape in ((1, 2, 5, 6), (2, 1, 4, 2)):
        class_map = classes(shape, 0.2, operator.device)
        image = random(shape, torch.float64, operator.device).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, c=class_map: refine_boundaries(x, c, rows), image)


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(operator, grad):
    for shape in ((2, 3, 6, 7), (1, 1, 2, 2), (0, 1, 4, 4)):
        image = random(shape, device=operator.device).requires_grad_(grad)
        class_map = classes(shape, 0.2, operator.device)
        opcheck(OP, (image, class_map, 0, shape[2]))
        opcheck(OP, (image, class_map, 1, 2))
        out = torch.empty(shape, device=operator.device)
        # Functionalisation refuses any operator that returns its `out`.
        checks = ("test_schema", "test_faketensor")
        overload = torch.ops.fastroute.refine_boundaries.out
        opcheck(overload, (image.detach(), class_map, 0, shape[2]), {"out": out}, test_utils=checks)


def test_poisoned(backend, poisoned):
    for shape in SHAPES:
        image, class_map = random(shape, device=backend.device), classes(shape, 0.2, backend.device)
        close(refine_boundaries(image, class_map), image, class_map)


def examples(device):
    for shape in ((2, 3, 10, 7), (4, 2, 9, 12), (5, 6, 31, 8)):
        yield random(shape, device=device), classes(shape, 0.2, device)


@pytest.mark.slow
def test_compiles_once_for_all_sizes(operator):
    compiles_once(refine_boundaries, examples(operator.device))


@pytest.mark.slow
def test_compiles_with_inductor(operator):
    inductor_equals_eager(refine_boundaries, *next(iter(examples(operator.device))))


def test_deterministic(backend):
    shape = (1, 3, 200, 301)
    image, class_map = random(shape, device=backend.device), classes(shape, 0.2, backend.device)
    repeats(lambda: refine_boundaries(image, class_map), backend.device)


IMAGE = torch.rand(1, 3, 4, 5)
MAP = torch.zeros(1, 4, 5, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("kind", "args", "words"),
    [
        (TypeError, {"image": [1.0]}, "image Tensor list"),
        (ValueError, {"image": IMAGE[0]}, r"image \(B, C, H, W\) 3 dimension"),
        (TypeError, {"image": IMAGE.int()}, "image float32 int32"),
        (ValueError, {"class_map": MAP[0]}, r"class_map \(B, H, W\) 2 dimension"),
        (ValueError, {"class_map": MAP[:, 1:]}, r"class_map \(1, 4, 5\) \(1, 3, 5\)"),
        (TypeError, {"class_map": MAP.int()}, "class_map uint8 int32"),
        (ValueError, {"rows": (3, 2)}, r"rows \[0, 4\] \(3, 2\)"),
        (ValueError, {"rows": (0, 5)}, r"rows \[0, 4\] \(0, 5\)"),
        (ValueError, {"out": torch.empty(1, 3, 4, 6)}, r"out \(1, 3, 4, 5\) \(1, 3, 4, 6\)"),
        (ValueError, {"out": torch.empty(1, 3, 5, 4).mT}, "out contiguous rows"),
        (TypeError, {"out": torch.empty(1, 3, 4, 5).double()}, "out float32 float64"),
    ],
)
def test_errors(kind, args, words):
    with pytest.raises(kind, match="^refine_boundaries: .*" + ".*".join(words.split(" "))):
        refine_boundaries(**{"image": IMAGE, "class_map": MAP} | args)
