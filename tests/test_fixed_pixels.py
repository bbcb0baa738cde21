"""The pixel path at a fixed size gives what PixelRouter gives."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from networks import as_image, picture, randomise
from support import in_layout

from fastroute import FixedPixelRouter, PixelRouter
from fastroute.models.carn import CARN
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR

# What an encoder rounds differently on a whole image than on bands of it.
TOLERANCE = {"rtol": 0, "atol": 2e-6}


@cache
def make_router(kind="fsrcnn", hidden=((4,), (24, 24)), seed=0):
    encoder = FSRCNN(8, shrink=4, depth=2, upsample=False) if kind == "fsrcnn" else CARN(8, upsample=False)
    model = randomise(PCSR.build(encoder, list(hidden), [4], (0.4, 0.5, 0.3)), seed).eval()
    # A classifier that favours no class on the whole.
    last = model.classifier.layers[2]
    with torch.no_grad():
        last.weight.mul_(3)
        score = model.probability(model.features(picture(1, 3, 20, 20)), (40, 40)).log()
        last.bias.sub_(score.mean(dim=(0, 2, 3)))
    return PixelRouter(model)


def agree(result, expected):
    """But where two classes were all but equal, and beside such pixels."""
    differs = (result.class_map != expected.class_map).view(-1, *expected.class_map.shape[-2:])
    assert differs.float().mean() <= 0.005
    beside = torch.nn.functional.max_pool2d(differs[:, None].float(), 3, 1, 1)[:, 0] > 0
    error = (result.image.double() - expected.image.double()).abs().amax(dim=-3).view_as(beside)[~beside]
    assert error.max() <= (2e-6 if expected.image.is_floating_point() else 1)
    assert (error > 2e-6).float().mean() <= (0.02 if expected.image.dtype == torch.uint16 else 0.002)
    assert result.image.dtype == expected.image.dtype and result.class_map.dtype == torch.uint8


def within(router, scale):
    cost = router.class_cost(scale)
    return (min(cost) / max(cost) + 1) / 2


@pytest.mark.parametrize("kind", ["fsrcnn", "carn"])
@pytest.mark.parametrize("hidden", [((4,), (24, 24)), (None, (), (4, 4))], ids=str)
@pytest.mark.parametrize("name", ["plain", "penalty", "budget", "everything", "adaptive", "unrefined"])
def test_equals_the_router(kind, hidden, name):
    router = make_router(kind, hidden)
    if name == "adaptive" and len(hidden) != 2:
        pytest.skip("2-means has two classes")
    every = {
        "plain": {},
        "penalty": {"penalty": 0.05},
        "budget": {"budget": within(router, 4.0)},
        "everything": {"budget": 1},
        "adaptive": {"adaptive": True},
        "unrefined": {"refine": False},
    }
    image = picture(2, 3, 12, 17, seed=1)
    result = FixedPixelRouter(router, image.shape, **every[name]).upscale(image)
    expected = router.upscale(image, **every[name])
    agree(result, expected)
    if name != "everything":
        assert len(expected.class_map.unique()) > 1
    assert result.overflow.tolist() == [0] * len(hidden)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [{"scale": 3}, {"scale": 2.5}, {"size": (1, 1)}, {"size": (20, 45)}], ids=str)
def test_dtypes_and_sizes(dtype, size):
    router = make_router()
    image = as_image(picture(1, 3, 9, 11, seed=2)[0], dtype)
    result, expected = FixedPixelRouter(router, image.shape, dtype=dtype, **size).upscale(image), router.upscale(image, **size)
    assert result.image.shape == expected.image.shape and result.class_map.shape == expected.class_map.shape
    if dtype == torch.float16:
        torch.testing.assert_close(result.image, expected.image, rtol=2**-10, atol=1e-6)
    else:
        agree(result, expected)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed"])
def test_layouts(layout):
    router, image = make_router(), in_layout(picture(2, 3, 9, 11), layout)
    torch.testing.assert_close(
        FixedPixelRouter(router, image.shape).upscale(image).image, router.upscale(image).image, **TOLERANCE
    )


@pytest.mark.slow
def test_one_graph():
    image, other = picture(1, 3, 9, 11, seed=1), picture(1, 3, 9, 11, seed=2)
    router = make_router()
    fixed = FixedPixelRouter(router, image.shape, dtype=torch.float32, scale=2, budget=within(router, 2.0))
    exported = torch.export.export(fixed, (image,)).module()
    assert torch.equal(exported(other), fixed.upscale(other).image)
    torch.compiler.reset()
    compiled = torch.compile(fixed, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(image)
        assert torch.equal(compiled(other), fixed.upscale(other).image)


def test_results_are_ordinary_tensors():
    fixed = FixedPixelRouter(make_router(), (3, 9, 11))
    result = fixed.upscale(torch.rand(3, 9, 11, requires_grad=True))
    assert not result.image.requires_grad and not result.image.is_inference()
    result.image.clamp_(0, 1)


def test_what_is_refused():
    router, shape = make_router(), (3, 9, 11)
    for other, options, text in [
        ((9, 11), {}, r"shape must be \(B, 3, H, W\)"),
        (shape, {"scale": 2, "size": (9, 9)}, "either scale or size"),
        (shape, {"scale": 0}, "scale must be positive"),
        (shape, {"penalty": float("inf")}, "penalty must be finite"),
        (shape, {"penalty": 1.0, "adaptive": True}, "one of penalty, adaptive and budget"),
        (shape, {"budget": 0.001}, "budget must lie in"),
    ]:
        with pytest.raises(ValueError, match=text):
            FixedPixelRouter(router, other, **options)
    with pytest.raises(ValueError, match="exactly 2 classes; got 3"):
        FixedPixelRouter(make_router(hidden=((4,), (5,), (6,))), shape, adaptive=True)
    with pytest.raises(TypeError, match="router must be a PixelRouter; got PCSR"):
        FixedPixelRouter(PCSR.build(FSRCNN(8, upsample=False), [[4], [16]], [8]), shape)
    with pytest.raises(TypeError, match="dtype must be one of"):
        FixedPixelRouter(router, shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"image must be float32 \(3, 9, 11\) on cpu, .*; got float32 \(1, 3, 9, 11\) on cpu"):
        FixedPixelRouter(router, shape)(torch.rand(1, 3, 9, 11))
    with pytest.raises(TypeError, match=r"image must be uint8 \(3, 9, 11\) on cpu, .*; got float32 \(3, 9, 11\) on cpu"):
        FixedPixelRouter(router, shape, dtype=torch.uint8)(torch.rand(shape))
