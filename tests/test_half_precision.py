"""Networks compute in half precision; images, means, residuals and last additions do not."""

from __future__ import annotations

import pytest
import torch
from networks import picture, randomise
from torch import nn

import fastroute
from fastroute import FixedPatchRouter, PatchRouter, PixelRouter
from fastroute.models import precision
from fastroute.models.carn import CARN
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR
from fastroute.models.precision import check_precision, round_weights
from fastroute.models.rcan import RCAN
from fastroute.models.srresnet import SRResNet

pytestmark = pytest.mark.usefixtures("quick_tuning")

BACKBONES = {
    "fsrcnn": lambda: FSRCNN(12, 4),
    "carn": lambda: CARN(8, 4, mean_layers=True),
    "carn, fixed mean": lambda: CARN(8, 4),
    "srresnet": lambda: SRResNet(8, 4, blocks=2),
    "rcan": lambda: RCAN(8, 4, 1, 1, 2),
    "own": lambda: nn.Sequential(nn.Conv2d(3, 48, 3, padding=1), nn.PixelShuffle(4)),
}


def router_of(name: str) -> PatchRouter:
    return PatchRouter([randomise(BACKBONES[name](), 1)], None, patch=16, stride=12, scale=4, merge=1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BACKBONES)
def test_half_networks_come_close(name, dtype, monkeypatch):
    monkeypatch.setattr(precision, "has_float16", lambda: True)
    image = picture(1, 3, 40, 31)
    expected, router = router_of(name).upscale(image).image, router_of(name)
    assert router.to(dtype) is router and router.dtype == dtype
    result = router.upscale(image).image
    assert result.dtype == image.dtype
    # Of the size of one rounding of what the layers find, which is not of the size of the image.
    assert (result - expected).abs().max() < 32 * torch.finfo(dtype).eps * expected.abs().max()
    # In bfloat16 FSRCNN would lose too much.
    assert torch.equal(result, expected) == (name == "fsrcnn" and dtype == torch.bfloat16)
    for kind in (torch.uint8, torch.uint16, torch.float16):
        converted = picture(1, 3, 20, 16).to(kind) if kind.is_floating_point else torch.ones(1, 3, 20, 16, dtype=kind)
        assert router.upscale(converted).image.dtype == kind


@pytest.mark.slow
@pytest.mark.parametrize("name", ["carn", "carn, fixed mean", "srresnet", "rcan"])
def test_what_is_added_last_is_not_rounded(name):
    # Nothing but the image, or the mean, comes out of a network whose last layer is 0.
    def silent(network):
        last = {"srresnet": "conv_last", "rcan": "tail"}.get(name, "exit")
        layer = getattr(network, last)
        layer = layer[-1] if isinstance(layer, nn.Sequential) else layer
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return network

    network = silent(randomise(BACKBONES[name](), 1))
    image = picture(1, 3, 16, 16)
    full, half = (PatchRouter([network], None, patch=16, stride=16, scale=4, merge=1) for _ in range(2))
    torch.testing.assert_close(half.bfloat16().upscale(image).image, full.upscale(image).image, rtol=0, atol=1e-6)


def test_pixel_router_adds_to_an_image_of_float32():
    model = PCSR.build(randomise(FSRCNN(12, upsample=False), 1), [None, [16]], [16]).eval()
    image, ids = picture(1, 3, 20, 24), dict(scale=4, budget=1)
    expected = PixelRouter(model).upscale(image, **ids).image
    router = PixelRouter(model).bfloat16()
    assert router.dtype == torch.bfloat16 and model.get_buffer("mean").dtype == torch.float32
    result = router.upscale(image, **ids)
    assert result.image.dtype == torch.float32 and (result.image - expected).abs().max() < 0.1
    # The free class is the bilinear image, to the last bits.
    free = PCSR.build(FSRCNN(12, upsample=False), [None], [16]).eval()
    bilinear = PixelRouter(free).upscale(image, scale=4).image
    torch.testing.assert_close(PixelRouter(free).bfloat16().upscale(image, scale=4).image, bilinear, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsrcnn", "carn", "own"])
def test_fixed_routers_do_the_same(name):
    router, image = router_of(name).bfloat16(), picture(1, 3, 40, 31)
    expected = router.upscale(image)
    fixed = FixedPatchRouter(router, image.shape)
    torch.testing.assert_close(fixed.upscale(image, expected.class_map).image, expected.image, rtol=0, atol=0.02)


@pytest.mark.slow
def test_types_are_changed_as_modules_change_theirs():
    router = router_of("carn")
    image = picture(1, 3, 20, 16)
    before = router.upscale(image).image
    assert router.to("cpu", torch.bfloat16).dtype == torch.bfloat16 == router.to(device="cpu").dtype
    assert router.to(dtype=torch.float32).dtype == torch.float32
    # What rounding took is gone, but no more than that.
    assert 0 < (router.upscale(image).image - before).abs().max() < 0.1 * before.abs().max()
    assert router.bfloat16().float().dtype == torch.float32
    upscale = fastroute.tiled(BACKBONES["own"](), patch=16)
    assert upscale.bfloat16()(image).dtype == torch.float32 and upscale.dtype == torch.bfloat16


@pytest.mark.parametrize("change", [lambda r: r.half(), lambda r: r.to(torch.float16), lambda r: r.to("cpu", torch.float16)])
def test_float16_is_refused_where_there_are_no_kernels(monkeypatch, change):
    monkeypatch.setattr(precision, "has_float16", lambda: False)
    model = PCSR.build(FSRCNN(12, upsample=False), [None], [16])
    routers = [router_of("fsrcnn"), PixelRouter(model), fastroute.tiled(BACKBONES["own"](), patch=16)]
    for router in routers:
        with pytest.raises(ValueError, match=r"float16 cannot be used on this CPU.*AVX-512 FP16.*bfloat16"):
            change(router)
        assert router.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in [*model.parameters(), *routers[2].parameters()])
    with pytest.raises(ValueError, match="load: float16 cannot be used"):
        fastroute.load(dtype=torch.float16)


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="only accepts floating point"):
        router_of("fsrcnn").to(torch.int8)
    with pytest.raises(TypeError, match=r"load: dtype must be float32, bfloat16, float16 or float64; got torch\.uint8"):
        check_precision("load", torch.uint8, torch.device("cpu"))


@pytest.mark.slow
def test_load_takes_a_type():
    router = fastroute.load("arm-fsrcnn-x4", dtype=torch.bfloat16)
    assert router.dtype == torch.bfloat16
    # Tables and thresholds are no weights.
    assert all(x.dtype != torch.bfloat16 for x in router.classifier.buffers())
    assert "bfloat16" in repr(router)


def test_rounding_keeps_the_sum_of_each_kernel():
    layer, plain = randomise(nn.Conv2d(8, 16, 3), 1), nn.Conv2d(8, 16, 3)
    plain.load_state_dict(layer.state_dict())
    before = layer.weight.detach().clone()
    round_weights(layer, torch.bfloat16)
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    drift = (layer.weight.float() - before).sum(dim=(2, 3)).abs().mean()
    assert drift < 0.5 * (plain.bfloat16().weight.float() - before).sum(dim=(2, 3)).abs().mean()
    # No tap is further from what it was than two steps of its type.
    assert ((layer.weight.float() - before).abs() <= 2**-7 * before.abs().amax()).all()


@pytest.mark.slow
def test_fsrcnn_stays_float32_beside_other_networks_in_bfloat16(monkeypatch):
    monkeypatch.setattr(precision, "has_float16", lambda: True)
    networks = [randomise(BACKBONES[name](), 1) for name in ("fsrcnn", "carn")]
    router = PatchRouter(networks, None, patch=16, stride=12, scale=4, merge=1)
    image = picture(1, 3, 40, 31)
    first = torch.zeros(1, *router.upscale(image, budget=1).class_map.shape[1:], dtype=torch.uint8)
    exact, rounded = (router.upscale(image, class_map=first + c).image for c in range(2))
    router.bfloat16()
    fsrcnn, carn = ({p.dtype for p in branch.parameters()} for branch in router.branches)
    assert fsrcnn == {torch.float32} and torch.bfloat16 in carn
    assert torch.equal(router.upscale(image, class_map=first).image, exact)
    assert not torch.equal(router.upscale(image, class_map=first + 1).image, rounded)
    router.half()
    assert {p.dtype for p in router.branches[0].parameters()} == {torch.float16}
    assert all(p.dtype == torch.float32 for p in router.float().parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classsr-fsrcnn-x4", "arm-fsrcnn-x4", "cdnsr-fsrcnn-x4", "pcsr-fsrcnn-x4"])
def test_shipped_models_lose_little(name):
    """Beside a photograph 30 dB from its upscaling, noise of 55 dB costs 0.014 dB."""
    image = fastroute.load(name).upscale(picture(1, 3, 40, 48)).image.clamp(0, 1)
    half = fastroute.load(name, dtype=torch.bfloat16).upscale(picture(1, 3, 40, 48)).image.clamp(0, 1)
    assert ((image - half) ** 2).mean() < 10**-5.5
