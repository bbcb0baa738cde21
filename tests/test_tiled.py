"""Tiled inference equals that of the whole image where tiles overlap by what the network sees."""

from __future__ import annotations

import pytest
import torch
from networks import as_image, picture, randomise
from torch import nn
from torch.nn import functional as F

import fastroute
from fastroute import PatchRouter, tiled
from fastroute.patch import patch_memory

pytestmark = pytest.mark.usefixtures("quick_tuning")


def network(reach: int, scale: int, channels: int = 3, seed: int = 0) -> nn.Module:
    """A random network that sees `reach` pixels around each."""
    layers: list[nn.Module] = [nn.Conv2d(channels, 4, 3, padding=1)]
    for _ in range(reach - 2):
        layers += [nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)]
    layers += [nn.ReLU(), nn.Conv2d(4, channels * scale**2, 3, padding=1), nn.PixelShuffle(scale)]
    return randomise(nn.Sequential(*layers), seed).eval()


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 50), (40, 33), (57, 29), (16, 91)])
@pytest.mark.parametrize(("reach", "patch", "scale"), [(3, 16, 2), (4, 16, 1), (5, 13, 3), (2, 16, 4)])
@torch.no_grad()
def test_crop_is_the_whole_image_when_the_overlap_covers_the_reach(height, width, reach, patch, scale, monkeypatch):
    monkeypatch.setattr(patch_memory, "PATCHES_PER_BAND", {"cpu": 7})
    model, image = network(reach, scale), picture(2, 3, height, width, seed=height)
    for overlap in (2 * reach, 2 * reach + 1):
        result = tiled(model, patch=patch, overlap=overlap)(image)
        # The same sums in another order: tiles of conv3x3 begin where the patch does.
        torch.testing.assert_close(result, model(image), rtol=0, atol=2e-6)


@torch.no_grad()
def test_large_tiles_are_held_in_small_number(monkeypatch):
    image, router = picture(1, 3, 200, 40), tiled(network(3, 4), patch=16, overlap=6, batch=8)
    whole = router.upscale(image)
    monkeypatch.setattr(patch_memory, "HELD_BYTES", {"cpu": 8 * router.networks.produced_bytes(image.device)})
    few = router.upscale(image)
    assert torch.equal(few.image, whole.image)
    # Of 80 tiles 8 are held, and a row that the next ones overlap.
    assert few.stats.working_set < 0.5 * whole.stats.working_set


@torch.no_grad()
def test_less_overlap_than_the_reach_shows():
    """Else the comparison above would prove little."""
    model, image = network(4, 1), picture(1, 3, 40, 33)
    for overlap in (6, 0):
        assert (tiled(model, patch=16, overlap=overlap, merge=1)(image) - model(image)).abs().max() > 1e-4


@torch.no_grad()
def test_tiles_run_as_larger_ones_where_memory_allows():
    model, image = network(4, 1), picture(1, 3, 40, 33)
    upscale = tiled(model, patch=16, overlap=6)
    assert upscale.merge == 4
    torch.testing.assert_close(upscale(image), model(image), rtol=0, atol=1e-5)
    assert upscale.upscale(image).stats.flops.of_one_pass == 1
    # Features of 64 channels at four times the size, of 512 x 512 tiles.
    wide = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.Upsample(scale_factor=4), nn.Conv2d(64, 3, 3, padding=1))
    assert [tiled(wide, patch=size, scale=4).merge for size in (32, 512)] == [4, 1]


@torch.no_grad()
def test_weighted_windows_come_closer_than_the_mean():
    model, image = network(3, 2), picture(1, 3, 61, 40)

    def error(window: object, size: int = 16, overlap: int = 8) -> float:
        return float((tiled(model, patch=size, overlap=overlap, window=window)(image) - model(image)).abs().mean())

    assert 1e-4 < error("hann") < error("linear") < error("uniform")
    assert error(torch.ones(32)) == error("uniform")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_ranks_dtypes_and_scale(dtype):
    model = network(2, 3, channels=1)
    upscale = tiled(model, patch=16, overlap=4, batch=3)
    image = as_image(picture(1, 1, 30, 20), dtype)
    assert upscale.scale == 3 and upscale.networks.batch_of(0, torch.device("cpu")) == 3
    result = upscale(image[0])
    assert result.shape == (1, 90, 60) and result.dtype == dtype
    assert torch.equal(upscale(image)[0], result)


def test_batch_is_what_runs_at_a_time(monkeypatch):
    seen = []

    def count(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return x

    fastroute.tiled(count, patch=8, overlap=0, scale=1, batch=3, merge=1)(torch.rand(3, 8, 64))
    # A pass of no memory counts the operations; then 8 tiles, in parts of nearly equal size.
    assert seen[-3:] == [3, 3, 2] and max(seen) == 3


@torch.no_grad()
def test_is_a_module():
    model = network(2, 2)
    upscale = tiled(model, patch=16)
    image = picture(1, 3, 30, 30)
    before = upscale(image)
    assert upscale.stride == 12
    assert not any(p.requires_grad for p in upscale.parameters())
    upscale.train()
    assert not any(layer.training for layer in upscale.branches[0].children()) and model[0].weight.requires_grad
    assert upscale.double().dtype == torch.float64
    torch.testing.assert_close(upscale(image.double()).float(), before, rtol=0, atol=1e-5)
    # In a pipeline of modules.
    both = nn.Sequential(upscale.float(), tiled(lambda x: 1 - x, patch=16, scale=1))
    torch.testing.assert_close(both(image), 1 - before, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "args", "words"),
    [
        (ValueError, {"stride": 4, "overlap": 4}, "stride or overlap"),
        (ValueError, {"overlap": 16}, r"less than patch \(16\); got 16"),
        (ValueError, {"overlap": -1}, "at least 0"),
        (ValueError, {"stride": 17}, "stride must be at most patch"),
        (ValueError, {"batch": 0}, "batch must be at least 1; got 0"),
        (ValueError, {"window": "boxcar"}, "window"),
        (ValueError, {"model": lambda x: x[:, :, ::2, ::2]}, r"whole multiple of 16 x 16; got \(1, 3, 8, 8\)"),
        (ValueError, {"model": lambda x: F.interpolate(x, scale_factor=1.5)}, r"got \(1, 3, 24, 24\)"),
        (ValueError, {"model": lambda x: x[:, :1]}, r"got \(1, 1, 16, 16\)"),
        (ValueError, {"model": lambda x: [x]}, "got list"),
        (TypeError, {"model": "net.pth"}, "tiled: model must be a torch.nn.Module, .*got str"),
    ],
)
def test_errors(kind, args, words):
    with pytest.raises(kind, match=words):
        tiled(**{"model": network(2, 1), "patch": 16} | args)


class Levels(nn.Module):
    """A network of values in 0 … 255, which adds 3 levels above 100 of them and none below."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        nn.init.dirac_(self.conv.weight)

    def forward(self, x):
        return self.conv(x) + 3 * (x > 100)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
@torch.no_grad()
def test_networks_of_another_range(dtype):
    """They and their classifier get levels, whatever the type of the image; images stay as they are."""
    values = torch.arange(3 * 40 * 45).reshape(1, 3, 40, 45) * 37 % 240
    values[..., :16] //= 4
    image = {torch.uint8: values.to(dtype), torch.uint16: (values * 257).to(dtype), torch.float32: values / 255}[dtype]
    unit = {torch.uint8: 1, torch.uint16: 257, torch.float32: 1 / 255}[dtype]

    def classifier(patches):
        bright = patches.mean(dim=(1, 2, 3)) > 115
        return torch.stack([~bright, bright], dim=1).float()

    plain = tiled(Levels(), patch=16, overlap=4, scale=1, value_range=255)
    routed = PatchRouter([nn.Identity(), Levels()], classifier, patch=16, stride=16, scale=1, value_range=255)
    expected = values + 3 * (values > 100)
    tolerance = 1e-6 if dtype == torch.float32 else 0
    assert (plain(image).double() - expected.double() * unit).abs().max() <= tolerance
    result = routed.upscale(image)
    assert set(result.class_map.flatten().tolist()) == {0, 1}
    chosen = result.class_map.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :32, :32].bool()
    own = torch.where(chosen[:, None], expected[..., :32, :32], values[..., :32, :32])
    assert (result.image[..., :24, :24].double() - own[..., :24, :24].double() * unit).abs().max() <= tolerance
    # Without the option the network sees nothing above 1.
    assert (tiled(Levels(), patch=16, overlap=4, scale=1)(image).double() - values.double() * unit).abs().max() <= tolerance


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan")])
def test_impossible_ranges(value):
    with pytest.raises(ValueError, match="PatchRouter: value_range must be positive and finite, or None; got"):
        tiled(nn.Conv2d(3, 3, 1), patch=16, value_range=value)
