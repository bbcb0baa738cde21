"""PCSR and CARN: published checkpoints load strictly and compute what the published code computed."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.io import read_image
from fastroute.models import pcsr
from fastroute.models.carn import CARN
from fastroute.models.classsr import ClassSR
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import MLP, PCSR

SCALES = (4, 3, 2)
PENALTIES = (0.0, 0.5, 1.0)


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
def model(data: Path) -> PCSR:
    return PCSR.from_published(checkpoint(data, "pcsr-fsrcnn-x4"))


@pytest.fixture(scope="module")
def lr(fixture: dict[str, Tensor]) -> Tensor:
    return fixture["lr_uint8"].permute(2, 0, 1)[None] / 255


@pytest.fixture(scope="module")
def published() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "baselines" / "pcsr_published.py"
    spec = importlib.util.spec_from_file_location("pcsr_published", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def checkpoint(data: Path, name: str) -> dict:  # type: ignore[type-arg]
    return torch.load(data / "weights" / f"{name}.pth", map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


def difference(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def shapes(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


# What the published code computes.


@torch.no_grad()
def test_features(model: PCSR, lr: Tensor, fixture: dict[str, Tensor]) -> None:
    assert difference(model.features(lr)[0], fixture["features"]) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("k", PENALTIES)
def test_penalised_classes(model: PCSR, lr: Tensor, fixture: dict[str, Tensor], scale: int, k: float) -> None:
    raw = model(lr, scale=scale, penalty=k, refine=False)
    refined = model(lr, scale=scale, penalty=k)
    assert difference(raw.probability[0, 1], fixture[f"x{scale}_prob_heavy"]) <= 1e-5

    price = torch.tensor(model.class_cost(scale)).pow(k)
    light, heavy = (raw.probability[0, c] / price[c] for c in range(2))
    differs = raw.class_map[0] != fixture[f"x{scale}_k{k}_class_map"].long()
    assert not (differs & ((light - heavy).abs() >= 1e-5)).any()

    # A refined pixel depends on its neighbours too.
    touched = F.max_pool2d(differs[None].float(), 3, 1, 1)[0] > 0
    for output, name, ignored in ((raw, "raw", differs), (refined, "refined", touched)):
        error = (output.image[0] - fixture[f"x{scale}_k{k}_{name}"]).abs()[:, ~ignored]
        assert error.max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("scale", SCALES)
def test_adaptive_classes(model: PCSR, lr: Tensor, fixture: dict[str, Tensor], scale: int) -> None:
    output = model(lr, scale=scale, adaptive=True, refine=False)
    same = output.class_map[0] == fixture[f"x{scale}_adaptive_class_map"].long()
    assert same.float().mean() >= 0.999
    error = (output.image[0] - fixture[f"x{scale}_adaptive_raw"]).abs()[:, same]
    assert error.max() <= 1e-5


@pytest.mark.parametrize("scale", SCALES)
def test_cost(model: PCSR, fixture: dict[str, Tensor], scale: int) -> None:
    assert difference(torch.tensor(model.class_cost(scale)), fixture[f"x{scale}_cost"]) <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("scale", SCALES)
def test_no_further_from_float64_than_published(
    data: Path, model: PCSR, lr: Tensor, fixture: dict[str, Tensor], scale: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network in float64, at the coordinates that the published code rounds to."""
    coordinates = pcsr.relative_coordinates
    monkeypatch.setattr(pcsr, "relative_coordinates", lambda features, size: coordinates(features.float(), size).double())
    exact = PCSR.from_published(checkpoint(data, "pcsr-fsrcnn-x4")).double()(lr.double(), scale=scale, refine=False)
    monkeypatch.undo()
    got = model(lr, scale=scale, refine=False)
    same = (exact.class_map == got.class_map)[0]
    want = exact.image[0][:, same]
    published_error = difference(fixture[f"x{scale}_k0.0_raw"][:, same], want)
    assert difference(got.image[0][:, same], want) <= published_error


@torch.no_grad()
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("mode", [*PENALTIES, "adaptive"])
def test_baseline(
    published: ModuleType, model: PCSR, lr: Tensor, fixture: dict[str, Tensor], scale: int, mode: float | str
) -> None:
    """The benchmark's baseline is the published computation: other sums of float32, no more."""
    name = f"x{scale}_adaptive" if mode == "adaptive" else f"x{scale}_k{mode}"
    options = {"adaptive": True} if mode == "adaptive" else {"k": mode}
    size = (lr.shape[2] * scale, lr.shape[3] * scale)
    image, class_map = published.pcsr_published(model, lr, size, refine=False, **options)
    same = class_map[0] == fixture[f"{name}_class_map"].long()
    assert same.float().mean() >= 0.9999
    assert (image[0] - fixture[f"{name}_raw"]).abs()[:, same].max() <= 3e-6
    if mode != "adaptive" and same.all():
        refined, _ = published.pcsr_published(model, lr, size, chunk=20_001, **options)
        assert difference(refined[0], fixture[f"{name}_refined"]) <= 3e-6


# Layouts of the checkpoints.


@pytest.mark.parametrize("name", ["pcsr-fsrcnn-x4", "pcsr-carn-x4"])
def test_pcsr_loads_strictly(data: Path, name: str) -> None:
    published_state = checkpoint(data, name)["model"]["sd"]
    model = PCSR.from_published(checkpoint(data, name))
    assert len(model.state_dict()) == len(published_state)
    heavy = model.upsamplers[1].state_dict()
    assert torch.equal(heavy["layers.8.weight"], published_state["heavy_sampler.imnet.layers.8.weight"])


@pytest.mark.parametrize("field", ["name", "encoder", "missing", "shape"])
def test_another_checkpoint_is_refused(data: Path, field: str) -> None:
    state = checkpoint(data, "pcsr-fsrcnn-x4")
    spec = state["model"]
    error: type[Exception] = RuntimeError
    if field == "name":
        spec["name"], error = "pcsr-phase2", ValueError
    elif field == "encoder":
        spec["args"]["encoder_spec"]["name"], error = "edsr", ValueError
    elif field == "missing":
        del spec["sd"]["classifier.imnet.layers.0.bias"]
    else:
        spec["sd"]["encoder.head_conv.0.weight"] = torch.zeros(47, 3, 5, 5)
    with pytest.raises(error):
        PCSR.from_published(state)


def test_carn_layouts(data: Path) -> None:
    CARN().load_state_dict(checkpoint(data, "carn-x4")["model"]["sd"])
    arm = torch.load(data / "weights" / "arm-carn.pth", map_location="cpu", weights_only=True)
    CARN(mean_layers=True, batch_norm=False).load_state_dict(arm)
    expected = json.loads((data / "fixtures" / "classsr-state-dict-shapes.json").read_text())
    classsr = ClassSR([CARN(width, mean_layers=True) for width in (36, 52, 64)])
    assert shapes(classsr) == expected["state_dict_shapes"]["classsr-carn"]


def psnr(image: Tensor, hr: Tensor) -> float:
    error = (image.clamp(0, 1) * 255).round() - hr * 255
    return 10 * math.log10(255**2 / error[..., 4:-4, 4:-4].double().square().mean().item())


@pytest.mark.slow
@torch.no_grad()
def test_trained_networks_beat_bicubic(data: Path) -> None:
    """Any slip in a forward pass costs far more than these margins; a shifted transposed convolution costs 5 dB."""
    hr = read_image(data / "images" / "test2k" / "EveningGlow.jpg")
    top, left = (hr.shape[1] - 384) // 2, (hr.shape[2] - 384) // 2
    hr = hr[None, :, top : top + 384, left : left + 384] / 255
    lr = F.interpolate(hr, scale_factor=0.25, mode="bicubic", antialias=True).mul(255).round().clamp(0, 255) / 255
    bicubic = psnr(F.interpolate(lr, scale_factor=4, mode="bicubic"), hr)

    fsrcnn, carn = FSRCNN(56, 4), CARN().eval()
    fsrcnn.load_state_dict(checkpoint(data, "fsrcnn-x4")["model"]["sd"])
    carn.load_state_dict(checkpoint(data, "carn-x4")["model"]["sd"])
    gains = [psnr(network(lr), hr) - bicubic for network in (fsrcnn.eval(), carn)]
    for name in ("pcsr-fsrcnn-x4", "pcsr-carn-x4"):
        gains.append(psnr(PCSR.from_published(checkpoint(data, name))(lr, scale=4).image, hr) - bicubic)
    plain_fsrcnn, plain_carn, routed_fsrcnn, routed_carn = gains
    assert plain_fsrcnn > 1
    assert plain_carn > plain_fsrcnn + 0.4
    assert abs(routed_fsrcnn - plain_fsrcnn) < 0.3
    assert abs(routed_carn - plain_carn) < 0.3


# Without published data.


def small_model(hidden: list[list[int] | None]) -> PCSR:
    torch.manual_seed(0)
    return PCSR.build(FSRCNN(8, shrink=4, depth=1, upsample=False), hidden, [6], mean=(0.4, 0.5, 0.3)).eval()


def balance(model: PCSR, lr: Tensor, size: tuple[int, int]) -> None:
    """Make the classifier favour no class on the whole, so that every class is used."""
    last = model.classifier.layers[2]
    assert isinstance(last, nn.Linear)
    nn.init.normal_(last.weight, std=3.0)
    last.bias.sub_(model.probability(model.features(lr), size).log().mean(dim=(0, 2, 3)))


@torch.no_grad()
@pytest.mark.parametrize("hidden", [[[5], [7, 9]], [None, [], [4, 4]]])
@pytest.mark.parametrize(
    ("small", "size"),
    [
        ((7, 9), (28, 36)),
        ((7, 9), (14, 18)),
        ((7, 9), (17, 23)),
        ((7, 9), (5, 8)),
        # Half way between two features, where the float32 coordinates decide.
        ((8, 10), (12, 15)),
        ((52, 76), (78, 114)),
        ((24, 62), (36, 155)),
    ],
)
def test_reference_is_the_baseline(
    published: ModuleType, hidden: list[list[int] | None], small: tuple[int, int], size: tuple[int, int]
) -> None:
    """Two formulations of one network, at integer and fractional scales."""
    model = small_model(hidden)
    lr = torch.rand(2, 3, *small)
    balance(model, lr, size)
    got = model(lr, size=size, penalty=0.3)
    image, class_map = published.pcsr_published(model, lr, size, k=0.3, chunk=5000)
    differs = class_map != got.class_map
    assert differs.float().mean() < 0.01
    touched = F.max_pool2d(differs[:, None].float(), 3, 1, 1)[:, 0] > 0
    error = (image - got.image).abs().amax(dim=1)[~touched]
    assert error.max() <= 2e-5
    assert len(got.class_map.unique()) == len(hidden)


def test_training_output_is_the_mixture() -> None:
    model = small_model([None, [5]]).train()
    lr = torch.rand(1, 3, 6, 5)
    output = model(lr, scale=2)
    features = model.features(lr)
    every = [model.upsample(features, lr, (12, 10), torch.full((1, 12, 10), c)) for c in range(2)]
    expected = sum(output.probability[:, c : c + 1] * every[c] for c in range(2))
    torch.testing.assert_close(output.image, expected)
    output.image.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_cost_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = PCSR.build(CARN(8, upsample=False), [[4], [8]], []).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cost = model.class_cost(4)
    assert model.encoder.training
    assert sum(cost) == pytest.approx(1)
    assert cost[0] < cost[1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_three_classes_cannot_be_adaptive() -> None:
    with pytest.raises(ValueError, match="exactly 2 classes; got 3"):
        small_model([None, [], [4]])(torch.rand(1, 3, 4, 4), scale=2, adaptive=True)


@pytest.mark.parametrize("arguments", [{}, {"scale": 2, "size": (8, 8)}])
def test_scale_or_size(arguments: dict) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match="give either scale or size"):
        small_model([[4]])(torch.rand(1, 3, 4, 4), **arguments)


def test_fractional_scale_rounds_the_size() -> None:
    assert small_model([[4]])(torch.rand(1, 3, 7, 5), scale=2.5).image.shape == (1, 3, 18, 12)


def test_empty_mlp_is_a_free_class() -> None:
    assert MLP([]).parameter_lists == ([], [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 10}, "width must be a multiple of groups"),
        ({"scale": 5}, "scale must be 3 or a power of 2"),
        ({"mean": (0.5,)}, "mean must have one number per channel"),
    ],
)
def test_carn_refuses(arguments: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        CARN(**arguments)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("mean_layers", [False, True])
def test_carn_size_and_mean(scale: int, mean_layers: bool) -> None:
    """The mean comes off before and goes back on after: the same weights, either way it is kept."""
    torch.manual_seed(0)
    network = CARN(8, scale, mean_layers=mean_layers).eval()
    bare = CARN(8, scale, mean=(0.0, 0.0, 0.0)).eval()
    bare.load_state_dict({k: v for k, v in network.state_dict().items() if "_mean" not in k or "running" in k})
    x = torch.rand(1, 3, 7, 6)
    mean = torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1)
    output = network(x)
    assert output.shape == (1, 3, 7 * scale, 6 * scale)
    torch.testing.assert_close(output, bare(x - mean) + mean)
