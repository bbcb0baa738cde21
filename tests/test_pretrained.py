"""Networks of others from their checkpoints: equal to spandrel's, at any size, in halves, and refused with reasons."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from pretrained import spandrel
from support import random
from torch import Tensor, nn

import fastroute
from fastroute import io
from fastroute.cli import main
from fastroute.models import rrdbnet
from fastroute.models.compact import Compact
from fastroute.models.rrdbnet import REACH, TILE, RRDBNet
from fastroute.runtime.memory_plan import pass_bytes

ROOT = Path(__file__).parents[1]
NAMES = ("realesr-animevideov3-x4", "realesrgan-x4plus-anime", "realesrgan-x4plus")
SMALL = {
    "compact": lambda: Compact(8, 3, 2),
    "rrdb-x4": lambda: RRDBNet(8, 2, 32, 4),
    "rrdb-x2": lambda: RRDBNet(8, 2, 32, 2),
    "rrdb-x1": lambda: RRDBNet(8, 1, 32, 1),
}


@pytest.fixture
def weights(data_folder: Path) -> Path:
    return data_folder / "weights" / "pretrained"


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * torch.log10((a.double().clamp(0, 1) - b.double().clamp(0, 1)).square().mean()))


def saved(path: Path, network: nn.Module, seed: int = 0) -> Path:
    """A checkpoint as the training code of these networks writes it, in half precision."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    torch.save({"params": {name: value.half() for name, value in network.state_dict().items()}}, path)
    return path


@cache
def picture(height: int, width: int) -> Tensor:
    """Smooth and rough parts, in [0, 1]."""
    y, x = torch.linspace(0, 3, height)[:, None], torch.linspace(0, 4, width)
    smooth = torch.stack([(y + k * x).sin() for k in (1, 2, 3)]) / 4 + 0.5
    return (smooth + 0.2 * random((3, height, width), seed=1) * (x > 2)).clamp(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_published_weights_equal_spandrel(weights, name):
    descriptor = spandrel().ModelLoader().load_from_file(weights / f"{name}.pth")
    router = fastroute.load(weights / f"{name}.pth")
    assert (router.scale, router.channels, router.num_classes) == (4, 3, 1)
    for height, width in ((24, 37), (1, 1), (2, 9)):
        image = picture(height, width)
        expected = descriptor(image[None])[0]
        result = router.upscale(image)
        assert result.image.shape == expected.shape
        torch.testing.assert_close(result.image.clamp(0, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_near(weights, name):
    image = io.read_image(ROOT / "assets" / "sample.png")[:, 100:140, 100:148].float() / 255
    exact = fastroute.load(weights / f"{name}.pth").upscale(image).image
    half = fastroute.load(weights / f"{name}.pth", dtype=torch.bfloat16).upscale(image).image
    assert half.dtype == torch.float32 and psnr(half, exact) > 50


@pytest.mark.slow
def test_a_long_image(weights):
    image = picture(3000, 20)
    router = fastroute.load(weights / "realesr-animevideov3-x4.pth")
    expected = spandrel().ModelLoader().load_from_file(weights / "realesr-animevideov3-x4.pth")(image[None])[0]
    torch.testing.assert_close(router.upscale(image).image.clamp(0, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SMALL)
def test_small_ones_equal_spandrel_at_any_size(tmp_path, kind):
    path = saved(tmp_path / "small.pth", SMALL[kind]())
    descriptor = spandrel().ModelLoader().load_from_file(path)
    router = fastroute.load(path)
    assert router.scale == descriptor.scale
    for height, width in ((1, 1), (1, 7), (3, 2), (5, 33), (60, 41)):
        image = picture(height, width)
        expected = descriptor(image[None])[0]
        result = router.upscale(image).image
        torch.testing.assert_close(result.clamp(0, 1), expected, rtol=0, atol=1e-5)


def test_last_layers_of_rrdbnet_over_tiles_equal_those_over_the_whole():
    network = RRDBNet(4, 1, 2).eval()
    features = random((2, 4, TILE + 5, 2 * TILE + 1), seed=2)
    with torch.inference_mode():
        torch.testing.assert_close(network._enlarged(features), network._last(features), rtol=0, atol=1e-6)
        # One pixel less of reach would show.
        network.conv_up1.weight.data.fill_(1.0)
        changed = features.clone()
        changed[..., REACH + 1 :] += 1.0
        same = network._last(features)[..., :4] == network._last(changed)[..., :4]
    assert bool(same.all())


@pytest.mark.slow
def test_architectures_that_spandrel_alone_knows(tmp_path):
    package = spandrel()
    from spandrel.architectures.SPAN import SPAN

    torch.manual_seed(0)
    path = tmp_path / "span.pth"
    network = SPAN(num_in_ch=3, num_out_ch=3, feature_channels=16, upscale=2)
    with torch.no_grad():
        # Random weights give values of 35, most of which would be clamped.
        network.upsampler[0].weight.mul_(0.02)
    torch.save(network.state_dict(), path)
    descriptor = package.ModelLoader().load_from_file(path)
    router = fastroute.load(path)
    assert router.facts[0].architecture == "SPAN" and router.facts[0].sources["scale"] == "spandrel"
    for height, width in ((33, 20), (1, 1)):
        image = picture(height, width)
        torch.testing.assert_close(router.upscale(image).image, descriptor(image[None])[0], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_first_layers_of_equal_names(tmp_path):
    """SwinIR and many more begin with a `conv_first` as SRResNet does, and are none."""
    package = spandrel()
    from spandrel.architectures.SwinIR import SwinIR

    torch.manual_seed(0)
    path = tmp_path / "swinir.pth"
    options = {"upsampler": "pixelshuffle", "depths": [1, 1], "embed_dim": 12, "num_heads": [2, 2], "mlp_ratio": 2}
    torch.save({"params": SwinIR(upscale=2, img_size=64, window_size=8, **options).state_dict()}, path)
    router, image = fastroute.load(path), picture(19, 30)
    assert router.facts[0].architecture == "SwinIR"
    expected = package.ModelLoader().load_from_file(path)(image[None])[0]
    torch.testing.assert_close(router.upscale(image).image.clamp(0, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["first", "second"])
def test_older_layouts_of_rrdbnet(tmp_path, layout):
    """Those of ESRGAN's own code, in which most networks of users are stored: the weights of the newer one, renamed."""
    path = saved(tmp_path / "new.pth", SMALL["rrdb-x4"]())
    layers = {"conv_first": "model.0", "conv_body": "model.1.sub.2", "conv_up1": "model.3", "conv_up2": "model.6",
              "conv_hr": "model.8", "conv_last": "model.10"}  # fmt: skip
    if layout == "second":
        layers = {"conv_body": "trunk_conv", "conv_up1": "upconv1", "conv_up2": "upconv2", "conv_hr": "HRconv"}

    def renamed(name: str) -> str:
        parts = name.split(".")
        if parts[0] != "body":
            return ".".join([layers.get(parts[0], parts[0]), parts[1]])
        block = f"{'model.1.sub' if layout == 'first' else 'RRDB_trunk'}.{parts[1]}.{parts[2].replace('rdb', 'RDB')}.{parts[3]}"
        return f"{block}{'.0' if layout == 'first' else ''}.{parts[4]}"

    old = tmp_path / "old.pth"
    torch.save({renamed(name): value for name, value in torch.load(path)["params"].items()}, old)
    image, router = picture(20, 31), fastroute.load(old)
    assert router.facts[0].sources["architecture"] == "shapes"
    assert torch.equal(router.upscale(image).image, fastroute.load(path).upscale(image).image)
    expected = spandrel().ModelLoader().load_from_file(old)(image[None])[0]
    torch.testing.assert_close(router.upscale(image).image.clamp(0, 1), expected, rtol=0, atol=1e-5)


def test_names_out_of_a_file_do_nothing_to_a_terminal(tmp_path):
    spandrel()
    path = tmp_path / "unknown.pth"
    torch.save({"\x1b[31mred\n": torch.ones(2), "x" * 100_000: torch.ones(2)}, path)
    with pytest.raises(fastroute.CheckpointError) as caught:
        fastroute.load(path)
    assert str(caught.value).isprintable() and "?[31mred?" in str(caught.value) and len(str(caught.value)) < 1000


def test_unknown_architectures_are_named(tmp_path):
    spandrel()
    path = tmp_path / "unknown.pth"
    torch.save({"some.weight": torch.ones(3, 3), "other.bias": torch.ones(3)}, path)
    with pytest.raises(fastroute.CheckpointError, match=r"no known architecture.*some\.weight.*spandrel .* does not know it"):
        fastroute.load(path)


@pytest.mark.parametrize("present", [False, True])
def test_without_spandrel_the_error_says_what_to_install(tmp_path, monkeypatch, present):
    class Broken:
        def find_spec(self, name: str, path: object, target: object = None) -> None:
            if name == "spandrel":
                raise RuntimeError("operator torchvision::nms does not exist")

    path = tmp_path / "unknown.pth"
    torch.save({"some.weight": torch.ones(3, 3)}, path)
    if present:
        monkeypatch.delitem(sys.modules, "spandrel", raising=False)
        monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    else:
        monkeypatch.setitem(sys.modules, "spandrel", None)
    wanted = r"cannot be imported: operator torchvision::nms" if present else r'run pip install "\.\[pretrained\]"'
    with pytest.raises(fastroute.CheckpointError, match=wanted):
        fastroute.load(path)


@pytest.mark.parametrize("kind", SMALL)
def test_damaged_checkpoints_are_refused(tmp_path, kind):
    path = saved(tmp_path / "small.pth", SMALL[kind]())
    state = torch.load(path)["params"]
    last = list(state)[-1]
    changed = {
        "missing": {name: value for name, value in state.items() if name != last},
        "more": {**state, "body.77.weight": torch.ones(2, 2, 3, 3)},
        "shape": {**state, last: torch.ones(5)},
        "flat": {**state, "body.0.weight": torch.ones(4), "conv_first.weight": torch.ones(4)},
        "nan": {**state, last: torch.full_like(state[last], float("nan"))},
    }
    for what, content in changed.items():
        torch.save({"params": content}, path)
        with pytest.raises(fastroute.CheckpointError, match="small"):
            fastroute.load(path)
            pytest.fail(what)


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "evil.pth"
    torch.save({"params": {"conv_first.weight": Evil()}}, path)
    with pytest.raises(fastroute.CheckpointError, match="never code"):
        fastroute.load(path)
    assert not (tmp_path / "ran").exists()


def test_networks_of_ones_own(tmp_path, monkeypatch):
    class Windowed(nn.Module):
        """Takes multiples of 8, as attention over windows does."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 12, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[2] % 8 or x.shape[3] % 8:
                raise RuntimeError("sides must be multiples of 8")
            return nn.functional.pixel_shuffle(self.conv(x), 2)

    network = Windowed().eval()
    router = fastroute.load(network)
    assert (router.scale, router.facts[0].multiple, router.facts[0].least) == (2, 8, 8)
    image = picture(24, 16)
    with torch.inference_mode():
        torch.testing.assert_close(router.upscale(image).image, network(image[None])[0])
    assert router.upscale(picture(21, 5)).image.shape == (3, 42, 10)
    (tmp_path / "mine.py").write_text("import torch\ndef upscaler():\n    return torch.nn.Upsample(scale_factor=3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert fastroute.load("mine:upscaler").upscale(image).image.shape == (3, 72, 48)
    for wrong in ("mine:nothing", "no_such_module:upscaler"):
        with pytest.raises(ValueError, match="names no function"):
            fastroute.load(wrong)
    with pytest.raises(ValueError, match=r"model must map \(1, 3, 64, 64\)"):
        fastroute.load(lambda x: x[:, :1])
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        fastroute.load(3)
    again = fastroute.load(router)
    assert again is router


def test_weights_of_five_dimensions():
    """They have no memory format of images."""

    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.full((1, 1, 3, 1, 1), 0.5))

        def forward(self, x: Tensor) -> Tensor:
            return (x[:, None] * self.gain)[:, 0]

    image = picture(9, 7)
    torch.testing.assert_close(fastroute.load(Gain()).upscale(image).image, image / 2)


def test_options_that_do_not_apply(tmp_path):
    path = saved(tmp_path / "small.pth", SMALL["compact"]())
    for option in ({"patch": 32}, {"stride": 28}, {"window": "hann"}, {"merge": 4}, {"batch": 2}):
        with pytest.raises(ValueError, match=f"has no {next(iter(option))}"):
            fastroute.load(path, **option)
    with pytest.raises(fastroute.CheckpointError, match="upscales by 2 alone"):
        fastroute.load(path, scale=4)
    assert fastroute.load(path, scale=2).scale == 2


@pytest.mark.slow
def test_on_the_command_line(tmp_path, monkeypatch):
    path, source = saved(tmp_path / "small.pth", SMALL["compact"]()), ROOT / "assets" / "sample.png"
    target = tmp_path / "result.png"
    runner = CliRunner()
    done = runner.invoke(main, ["upscale", str(source), str(target), "--model", str(path)])
    assert done.exit_code == 0, done.output
    assert torch.equal(io.read_image(target), fastroute.load(path)(io.read_image(source)))
    assert "cells" in done.output and "100 % of the dense" in done.output
    (tmp_path / "twofold.py").write_text("import torch\ndef upscaler():\n    return torch.nn.Upsample(scale_factor=2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "many"
    done = runner.invoke(main, ["upscale", str(source), f"{folder}/", "--model", "twofold:upscaler", "--quiet"])
    assert done.exit_code == 0, done.output
    assert io.read_image(folder / source.name).shape[1] == 2 * io.read_image(source).shape[1]
    for options, words in (
        (["--fidelity", "40", "--budget", "0.5"], "each decides alone"),
        (["--adaptive"], "this option is PCSR's"),
        (["--penalty", "1"], "give --budget"),
        (["--budget-ms", "5"], "give --budget"),
        (["--budget", "2"], "at most 1"),
    ):
        refused = runner.invoke(main, ["upscale", str(source), str(target), "--model", str(path), *options])
        assert refused.exit_code == 2 and words in refused.output, refused.output


@pytest.mark.slow
def test_rrdbnet_holds_less_than_half_of_what_its_plain_form_does(monkeypatch):
    network, size = RRDBNet(64, 1, 32), (1, 3, 540, 960)
    tiles = pass_bytes(network, size, torch.float32)
    monkeypatch.setattr(rrdbnet, "TILE", 1 << 20)
    assert tiles < pass_bytes(network, size, torch.float32) / 2
