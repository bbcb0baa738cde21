"""Scale, patch, stride and whatever else weights do not tell: stored, read back, asked for, and never guessed in silence."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from click.testing import CliRunner
from networks import picture, random_classsr, randomise

import fastroute
from fastroute import CheckpointError, PatchRouter, PixelRouter, io
from fastroute.catalogue import ANY_SCALE, DEFAULT_MODEL, default_model
from fastroute.cli import main
from fastroute.grid import usual_stride
from fastroute.models.carn import CARN
from fastroute.models.checkpoints import read_checkpoint, save_checkpoint
from fastroute.models.classsr import ClassSR, PatchClassifier
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR
from fastroute.models.rcan import RCAN
from fastroute.models.srresnet import SRResNet

pytestmark = pytest.mark.usefixtures("quick_tuning")
SCALES = (2, 3, 4)
NETWORKS = {
    "fsrcnn": lambda scale: FSRCNN(5, scale),
    "carn": lambda scale: CARN(8, scale),
    "srresnet": lambda scale: SRResNet(4, scale, 1),
    "rcan": lambda scale: RCAN(4, scale, 1, 1, 2),
}


def quiet(path, **options) -> fastroute.PatchRouter:
    """What `load` gives for `path`; nothing is warned about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fastroute.load(path, **options)


def same(path, network, **options) -> None:
    """What `load` gives for `path` computes what `network` does."""
    router, image = quiet(path, **options), picture(1, 3, 8, 8)
    assert router.scale == network.scale
    with torch.no_grad():
        result = router.branches[-1](image)
        result = result if router.shuffle == 1 else torch.nn.functional.pixel_shuffle(result, router.shuffle)
        torch.testing.assert_close(result, network.eval()(image), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "ending"), [(2, ".pth"), (3, ".safetensors")])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_says_its_own_scale(tmp_path, name, scale, ending):
    network = randomise(NETWORKS[name](scale))
    save_checkpoint(tmp_path / f"x{ending}", network)
    assert quiet(tmp_path / f"x{ending}").scale == scale


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scale"), [("carn", 2), ("carn", 4), ("srresnet", 3), ("srresnet", 4), ("rcan", 2), ("rcan", 3), ("rcan", 8)]
)
def test_shapes_say_the_scale(tmp_path, name, scale):
    """A bare state dict, as published files are."""
    network = randomise(NETWORKS[name](scale))
    torch.save(network.state_dict(), tmp_path / "x.pth")
    same(tmp_path / "x.pth", network)
    with pytest.raises(CheckpointError, match=f"upscales by {scale} alone; got scale=5"):
        fastroute.load(tmp_path / "x.pth", scale=5)


@pytest.mark.slow
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("scale", SCALES)
def test_weights_of_equal_shapes(tmp_path, scale, system):
    network = ClassSR.fsrcnn((4, 5), scale) if system else FSRCNN(5, scale)
    path = tmp_path / "x.pth"
    torch.save(network.state_dict(), path)
    # These begin as an interpolation, which keeps flat images flat.
    if scale == 4:
        assert fastroute.load(path).scale == 4
    else:
        with pytest.warns(UserWarning, match=rf"factor of {scale} alone, so that is taken; say .* scale=N, .* --scale N"):
            assert fastroute.load(path).scale == scale
    # Random weights tell nothing.
    torch.save(randomise(network).state_dict(), path)
    with pytest.warns(UserWarning, match=r"so 4 is assumed; say which it is by scale=N"):
        assert fastroute.load(path).scale == 4
    same(path, network.branches[-1] if system else network, scale=scale)
    save_checkpoint(path, network)
    with pytest.raises(CheckpointError, match=f"upscales by {scale} alone; got scale=5"):
        fastroute.load(path, scale=5)


@pytest.mark.slow
def test_published_weights_are_of_4(data_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("fsrcnn-x4.pth", "arm-fsrcnn.pth", "carn-x4.pth", "arm-carn.pth"):
            assert fastroute.load(data_folder / "weights" / name).scale == 4


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_other_options(tmp_path, ending):
    path = tmp_path / f"x{ending}"
    network = randomise(RCAN(4, 2, 1, 1, 2, input_range=1.0))
    save_checkpoint(path, network)
    same(path, network)
    network = randomise(CARN(9, 3, groups=3, mean=(0.1, 0.2, 0.3)))
    save_checkpoint(path, network)
    same(path, network)
    network = randomise(FSRCNN(6, 3, shrink=5, depth=2))
    save_checkpoint(path, network)
    same(path, network)
    system = randomise(ClassSR([FSRCNN(5, 2)], PatchClassifier(1, width=7, layers=3)))
    save_checkpoint(path, system, {"patch": 20})
    same(path, system.branches[0])
    assert fastroute.load(path).stride == 16
    model = randomise(PCSR.build(CARN(8, upsample=False), [(4,), (5,)], (), mean=(0.1, 0.2, 0.3))).eval()
    save_checkpoint(path, model, {"scale": 2})
    router, image = fastroute.load(path), picture(1, 3, 9, 11)
    assert router.scale == 2 and router.output_size(9, 11) == (18, 22)
    torch.testing.assert_close(
        router.upscale(image, refine=False).image, model(image, 2, refine=False).image, rtol=0, atol=1e-4
    )
    assert fastroute.load(path, scale=2.5).upscale(image).image.shape == (1, 3, round(9 * 2.5), round(11 * 2.5))
    assert router.upscale(image, scale=3).image.shape == (1, 3, 27, 33)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_patch_and_stride(tmp_path, ending):
    path = tmp_path / f"x{ending}"
    save_checkpoint(path, random_classsr((3, 5), 2, 16), {"scale": 2, "patch": 16})
    for options, expected in (
        ({}, (16, 12)), ({"stride": 5}, (16, 5)), ({"patch": 24}, (24, 20)), ({"patch": 24, "stride": 24}, (24, 24)),
    ):  # fmt: skip
        router = fastroute.load(path, **options)
        assert (router.patch, router.stride) == expected
    save_checkpoint(path, random_classsr((3, 5), 2, 16), {"scale": 2, "patch": 16, "stride": 28})
    with pytest.raises(CheckpointError, match=r"stride of 28 is above its patch of 16.*say stride=12, .* --stride 12"):
        fastroute.load(path)
    assert fastroute.load(path, stride=12).stride == 12
    # A stride belongs to its patch.
    assert fastroute.load(path, patch=48).stride == 44


def test_usual_strides():
    assert [usual_stride(patch) for patch in (1, 3, 4, 8, 16, 32, 48, 64)] == [1, 3, 3, 6, 12, 28, 44, 60]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": 0}, "scale must be positive and finite; got 0"),
        ({"scale": 2.5}, "whole factors alone; got scale=2.5"),
        ({"patch": 16.0}, "patch must be a positive whole number"),
        ({"stride": -1}, "stride must be a positive whole number"),
        ({"patch": 8, "stride": 9}, r"stride must be at most patch \(8\)"),
        ({"stride": 99}, "stride of 99 is above its patch of 32"),
    ],
)
def test_impossible_options(tmp_path, options, words):
    torch.save(FSRCNN(3, 2).state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=words):
        fastroute.load(tmp_path / "x.pth", **options)
    save_checkpoint(tmp_path / "pcsr.pth", PCSR.build(FSRCNN(4, upsample=False), [None, (4,)], ()))
    with pytest.raises(ValueError, match="PCSR routes pixels and has no patch"):
        fastroute.load(tmp_path / "pcsr.pth", patch=16)


@pytest.mark.slow
def test_regions_are_an_option():
    image = torch.rand(3, 80, 90, generator=torch.Generator().manual_seed(0))
    merged, single = fastroute.load(), fastroute.load(merge=1)
    assert (merged.merge, single.merge) == (4, 1)
    work = [router.upscale(image, budget=1).stats.work_per_class for router in (merged, single)]
    assert work[1] == [0, 0, 12] and work[0] == [0, 0, 80 * 90 / 32**2]
    for merge in (3, True):
        with pytest.raises(ValueError, match=f"merge must be one of .1, 2, 4, 8., or None; got {merge}"):
            fastroute.load(merge=merge)
    with pytest.raises(ValueError, match="PCSR routes pixels and has no merge"):
        fastroute.load("pcsr-fsrcnn-x4", merge=1)


@pytest.mark.slow
def test_metadata_of_others(tmp_path):
    """Plain values beside the weights, under the same name."""
    for content in ({"params": FSRCNN(3, 2).state_dict()}, FSRCNN(3, 2).state_dict()):
        torch.save({**content, "metadata": {"scale": 2, "patch": 16, "other": [1, None]}}, tmp_path / "x.pth")
        router = fastroute.load(tmp_path / "x.pth")
        assert (router.scale, router.patch, router.stride) == (2, 16, 12)
    assert read_checkpoint(tmp_path / "x.pth")[1] == {"scale": "2", "patch": "16"}
    torch.save({"params": FSRCNN(3, 2).state_dict(), "metadata": {"scale": "much"}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="its scale is 'much', not a number"):
        fastroute.load(tmp_path / "x.pth")


@pytest.mark.parametrize("scale", [None, 2, 3, 4, 4.0, 2.5, 8])
def test_the_default_model_goes_by_the_scale(scale, tmp_path):
    """Those of ClassSR where there is one for the factor, PCSR for any other."""
    name = default_model(scale)
    assert name == (f"classsr-fsrcnn-x{scale or 4:g}" if scale in (None, 2, 3, 4) else "pcsr-fsrcnn-x4")
    router = fastroute.load(scale=scale)
    assert type(router) is (PixelRouter if name.startswith("pcsr") else PatchRouter)
    image = torch.rand(1, 3, 9, 11)
    size = tuple(round(n * (scale or 4)) for n in (9, 11))
    assert router(image).shape == (1, 3, *size)
    io.write_image(tmp_path / "in.png", (image[0] * 255).to(torch.uint8))
    given = [] if scale is None else ["--scale", str(scale)]
    result = CliRunner().invoke(main, ["upscale", str(tmp_path / "in.png"), str(tmp_path / "out.png"), *given])
    assert result.exit_code == 0, result.output
    assert io.read_image(tmp_path / "out.png").shape[1:] == size


@pytest.mark.parametrize("scale", [0, -2, math.nan, math.inf, "2"])
def test_the_default_model_has_a_scale(scale):
    with pytest.raises((ValueError, TypeError), match=r"^load: scale must be"):
        fastroute.load(scale=scale)


def test_a_factor_nearly_whole_is_none():
    assert default_model(4.0000001) == default_model(2.9999999) == ANY_SCALE and default_model(4.0) == DEFAULT_MODEL
    with pytest.raises(ValueError, match=r"whole factors alone; got scale=4\.0000001"):
        fastroute.load(DEFAULT_MODEL, scale=4.0000001)
