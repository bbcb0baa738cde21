"""PixelRouter: the numbers of the plain model, whatever the bands; the published fixtures; what it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastroute
from fastroute.models.carn import CARN
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR
from fastroute.models.srresnet import SRResNet
from fastroute.pixel import pixel_rows
from fastroute.pixel.pixel_router import PixelRouter
from fastroute.profiling import count_flops
from fastroute.rewrite import row_stages
from fastroute.rewrite.optimize import optimize


@pytest.fixture(params=["reference", "cpu"])
def backend_name(request):
    reasons = fastroute.backends.unsupported_reasons("pixel_mlp", request.param, torch.device("cpu"))
    if reasons:
        pytest.skip("; ".join(reasons))
    with fastroute.use_backend(request.param):
        yield request.param


def make_encoder(kind):
    torch.manual_seed(0)
    if kind == "carn":
        network = CARN(8, upsample=False)
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.uniform_(norm.running_mean, -0.1, 0.1)
                nn.init.uniform_(norm.running_var, 0.5, 2)
        return network.eval()
    if kind == "srresnet":
        return SRResNet(8, blocks=3, upsample=False).eval()
    return FSRCNN(8, shrink=4, depth=2, upsample=False).eval()


@torch.no_grad()
def make_model(kind="fsrcnn", hidden=([5], [7, 9])):
    torch.manual_seed(1)
    model = PCSR.build(make_encoder(kind), list(hidden), [6], mean=(0.4, 0.5, 0.3)).eval()
    # A classifier that favours no class on the whole.
    last = model.classifier.layers[2]
    nn.init.normal_(last.weight, std=3.0)
    last.bias.sub_(model.probability(model.features(torch.rand(1, 3, 9, 11)), (18, 22)).log().mean(dim=(0, 2, 3)))
    return model


@torch.no_grad()
def agree(result, model, lr, size, **options):
    """The plain model's image and classes, but where two classes were all but equal."""
    plain = model(lr, size=size, **options)
    differs = result.class_map.long() != plain.class_map
    assert differs.float().mean() <= 0.01
    touched = F.max_pool2d(differs[:, None].float(), 3, 1, 1)[:, 0] > 0
    assert (result.image - plain.image).abs().amax(dim=1)[~touched].max() <= 2e-5
    assert result.class_map.dtype == torch.uint8


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsrcnn", "carn"])
@pytest.mark.parametrize("hidden", [([5], [7, 9]), (None, [], [4, 4])], ids=str)
@pytest.mark.parametrize(
    ("size", "options"),
    [((36, 44), {}), ((20, 31), {"penalty": 0.4}), ((5, 8), {"refine": False}), ((5, 8), {}), ((1, 1), {"penalty": 0.4})],
    ids=str,
)
def test_equals_the_plain_model(backend_name, monkeypatch, kind, hidden, size, options):
    monkeypatch.setattr(pixel_rows, "OUTPUT_BAND", {"cpu": 200})
    monkeypatch.setattr(pixel_rows, "ENCODER_BAND", {"cpu": 33})
    model = make_model(kind, hidden)
    lr = torch.rand(2, 3, 9, 11, generator=torch.Generator().manual_seed(3))
    agree(PixelRouter(model).upscale(lr, size=size, **options), model, lr, size, **options)


def test_adaptive(backend_name):
    model = make_model()
    lr = torch.rand(2, 3, 9, 11)
    agree(PixelRouter(model).upscale(lr, size=(31, 40), adaptive=True), model, lr, (31, 40), adaptive=True)


@pytest.mark.parametrize("band", [1 << 20, 100])
def test_bands_change_no_bit(monkeypatch, band):
    router = PixelRouter(make_model())
    lr = torch.rand(1, 3, 13, 17)
    expected = router.upscale(lr, scale=3)
    monkeypatch.setattr(pixel_rows, "OUTPUT_BAND", {"cpu": band})
    result = router.upscale(lr, scale=3)
    assert torch.equal(result.class_map, expected.class_map)
    if not fastroute.backends.EXTENSION.reasons:
        assert torch.equal(result.image, expected.image)


@pytest.mark.parametrize("sample", [1 << 21, 500])
def test_budget(monkeypatch, sample):
    monkeypatch.setattr(pixel_rows, "BUDGET_SAMPLE", {"cpu": sample})
    model = make_model(hidden=(None, [5], [40, 40]))
    router = PixelRouter(model)
    lr = torch.rand(1, 3, 15, 20)
    cost = torch.tensor(model.class_cost(4.0))
    share = cost / cost.max()
    for budget in (float(share.min()), 0.5, 0.8, 1.0):
        result = router.upscale(lr, budget=budget)
        spent = share[result.class_map.long()].mean().item()
        exact = sample > 4000
        assert spent <= budget + (1e-6 if exact else 0.1)
        # Spent as far as one pixel allows, where single pixels change class.
        assert spent >= budget - (0.01 if exact else 0.15)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("refine", [False, True])
def test_dtypes(dtype, refine):
    router = PixelRouter(make_model())
    image = torch.rand(3, 9, 11)
    maximum = {torch.uint8: 255, torch.uint16: 65535}.get(dtype, 0)
    image = (image * maximum).round().int().to(dtype) if maximum else image.to(dtype)
    result = router.upscale(image, scale=2.5, refine=refine)
    assert result.image.dtype == dtype
    assert result.image.shape == (3, 22, 28)
    assert result.class_map.shape == (22, 28)
    floating = image.float() / maximum if maximum else image.float()
    expected = router.upscale(floating, scale=2.5, refine=refine).image
    actual = result.image.int().float() / maximum if maximum else result.image.float()
    expected = expected.clamp(0, 1) if maximum else expected
    step = 0.51 / maximum if maximum else torch.finfo(dtype).eps if dtype == torch.float16 else 0
    assert (actual - expected).abs().max() <= step + 1e-7


def test_stats():
    model = make_model()
    router = PixelRouter(model)
    result = router.upscale(torch.rand(2, 3, 9, 11), scale=2)
    stats = result.stats
    assert stats.counts_per_class == [int((result.class_map == c).sum()) for c in range(2)]
    assert set(stats.seconds) == {"encode", "classify", "solve", "assign", "upsample", "refine", "total"}
    assert stats.flops.fraction > 0
    # PCSR counts its classifier at every pixel, but not in what is dense.
    light, heavy, classifier = (2 * sum(w.numel() for w, _ in mlp) for mlp in (*router._layers()[0], router._layers()[1]))
    encoder, paper = count_flops(model.encoder, (2, 3, 9, 11), "pcsr"), stats.paper_flops
    counts = stats.counts_per_class
    assert paper.routed == encoder + light * counts[0] + heavy * counts[1] + classifier * sum(counts)
    assert (paper.dense, paper.paper) == (encoder + heavy * sum(counts), "PCSR")
    assert "pixels" in str(stats)


@pytest.mark.slow
def test_model_is_left_as_it_was():
    model = make_model("carn")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    PixelRouter(model).upscale(torch.rand(3, 5, 6))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("optimized", [True, False])
def test_to(optimized):
    router = PixelRouter(make_model(), optimized=optimized)
    lr = torch.rand(3, 5, 6)
    before = router.upscale(lr, scale=2)
    assert router.to("cpu") is router and router.device == torch.device("cpu")
    assert torch.equal(router.upscale(lr, scale=2).image, before.image)
    # A device that every machine has; nothing is computed there.
    router.to("meta")
    networks = router.networks
    layers = [tensor for mlp in (*networks.mlps, networks.classifier) for layer in mlp for tensor in layer]
    weights = [*router.parameters(), *router.buffers(), *layers]
    assert all(tensor.is_meta for tensor in weights) and router.device == torch.device("meta")


@pytest.fixture
def unwritten_is_nan():
    """Memory that was never written holds no numbers."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["fsrcnn", "carn", "srresnet"])
@pytest.mark.parametrize("rows", [1, 2, 5, 30])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 7), (30, 7), (9, 47)])
def test_encoder_in_bands(unwritten_is_nan, kind, rows, height, width):
    encoder = make_encoder(kind)
    image = torch.rand(2, 3, height, width)
    given = image.clone()
    with torch.inference_mode():
        # FSRCNN is known as the sequence that it is optimised to.
        for network in (optimize(encoder), *([encoder] if kind != "fsrcnn" else [])):
            assert not row_stages.unsupported_reasons(network)
            parts = row_stages.rows_in_bands(network, lambda y, x: image[:, :, y, x], height, width, width * rows, 1, 10)
            out = torch.cat([torch.cat(part, dim=3) for part in parts], dim=2)
            torch.testing.assert_close(out, encoder(image), rtol=1e-5, atol=1e-5)
    assert torch.equal(image, given)


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("layers", [(5,), (1, 7), (3, 5, 1), (1,)], ids=str)
def test_kernels_of_any_size_in_bands(unwritten_is_nan, rows, layers):
    """Layers with activations between them, in place and not."""
    activations = [nn.PReLU(4), nn.LeakyReLU(0.2, inplace=True), nn.BatchNorm2d(4), nn.ReLU()]
    modules = []
    for n, size in enumerate(layers):
        modules += [nn.Conv2d(4, 4, size, padding=size // 2, groups=1 + n % 2), activations[n]]
    network = nn.Sequential(*modules).eval().requires_grad_(False)
    image = torch.rand(2, 4, 11, 6)
    for module in (network, optimize(network)):
        parts = row_stages.rows_in_bands(module, lambda y, x: image[:, :, y, x], 11, 6, 6 * rows, 1, 4)
        out = torch.cat([torch.cat(part, dim=3) for part in parts], dim=2)
        torch.testing.assert_close(out, network(image), rtol=1e-5, atol=1e-5)


def test_encoder_that_cannot_run_in_bands():
    model = make_model()
    model.encoder.add_module("pool", nn.Identity())
    router = PixelRouter(model, optimized=False)
    assert row_stages.unsupported_reasons(router.encoder) == ["FSRCNN is unknown"]
    lr = torch.rand(1, 3, 9, 11)
    agree(router.upscale(lr, scale=2), model, lr, (18, 22))


IMAGE = torch.rand(3, 5, 6)


@pytest.mark.parametrize(
    ("kind", "args", "words"),
    [
        (TypeError, {"image": [1.0]}, "image Tensor list"),
        (ValueError, {"image": IMAGE[0]}, r"image \(B, C, h, w\) \(5, 6\)"),
        (TypeError, {"image": IMAGE.int()}, "image float32 int32"),
        (ValueError, {"image": IMAGE[:2]}, r"image 3 channels \(2, 5, 6\)"),
        (ValueError, {"image": IMAGE[:, :0]}, "image at least one pixel"),
        (ValueError, {"scale": 2.0, "size": (9, 9)}, "either scale or size"),
        (ValueError, {"scale": 0.0}, "scale positive 0"),
        (ValueError, {"scale": float("inf")}, "scale finite inf"),
        (ValueError, {"scale": 0.01}, "size at least 1 x 1"),
        (ValueError, {"size": (0, 4)}, "size at least 1 x 1"),
        (ValueError, {"penalty": float("nan")}, "penalty finite nan"),
        (ValueError, {"penalty": 1.0, "adaptive": True}, "one of penalty, adaptive and a budget"),
        (ValueError, {"adaptive": True, "budget": 0.9}, "one of penalty, adaptive and a budget"),
    ],
)
def test_errors(kind, args, words):
    with pytest.raises(kind, match="^upscale: .*" + ".*".join(words.split(" "))):
        PixelRouter(make_model()).upscale(**{"image": IMAGE} | args)


def test_impossible_requests():
    with pytest.raises(ValueError, match="budget must lie in"):
        PixelRouter(make_model()).upscale(IMAGE, budget=0.01)
    with pytest.raises(ValueError, match="exactly 2 classes; got 3"):
        PixelRouter(make_model(hidden=(None, [], [4]))).upscale(IMAGE, adaptive=True)


# What the published code computes.


@pytest.fixture(scope="module")
def data() -> Path:
    folder = os.environ.get("FASTROUTE_DATA")
    if not folder:
        pytest.skip("FASTROUTE_DATA is not set")
    return Path(folder)


@pytest.fixture(scope="module")
def fixture(data: Path) -> dict[str, Tensor]:
    with np.load(data / "fixtures" / "pcsr-fsrcnn-x4.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture(scope="module")
def router(data: Path) -> PixelRouter:
    path = data / "weights" / "pcsr-fsrcnn-x4.pth"
    return PixelRouter(PCSR.from_published(torch.load(path, map_location="cpu", weights_only=True)))


@pytest.mark.parametrize("scale", [4, 3, 2])
@pytest.mark.parametrize("mode", [0.0, 0.5, 1.0, "adaptive"])
def test_published_fixture(backend_name, router, fixture, scale, mode):
    name = f"x{scale}_adaptive" if mode == "adaptive" else f"x{scale}_k{mode}"
    options = {"adaptive": True} if mode == "adaptive" else {"penalty": mode}
    lr = fixture["lr_uint8"].permute(2, 0, 1) / 255
    raw = router.upscale(lr, scale=scale, refine=False, **options)
    differs = raw.class_map.long() != fixture[f"{name}_class_map"].long()
    if mode == "adaptive":
        assert differs.float().mean() <= 1e-3
    else:
        heavy, price = fixture[f"x{scale}_prob_heavy"], fixture[f"x{scale}_cost"] ** mode
        assert not (differs & (((1 - heavy) / price[0] - heavy / price[1]).abs() >= 1e-5)).any()
    assert (raw.image - fixture[f"{name}_raw"]).abs()[:, ~differs].max() <= 1e-5
    if f"{name}_refined" in fixture:
        refined = router.upscale(lr, scale=scale, **options)
        touched = F.max_pool2d(differs[None].float(), 3, 1, 1)[0] > 0
        assert (refined.image - fixture[f"{name}_refined"]).abs()[:, ~touched].max() <= 1e-5
