"""Every system over every backbone at every factor: built, trained five steps, saved, loaded again, and run."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from networks import picture
from torch import nn
from torch.nn import functional as F

import fastroute
from fastroute import PatchRouter, PixelRouter, io
from fastroute.models.arm import ARM
from fastroute.models.arm import BACKBONES as ARM_BACKBONES
from fastroute.models.carn import CARN
from fastroute.models.cdnsr import CDNSR
from fastroute.models.checkpoints import CheckpointError, load_weights, read_checkpoint
from fastroute.models.classsr import ClassSR, PatchClassifier
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR
from fastroute.models.rcan import RCAN
from fastroute.models.srresnet import SRResNet
from fastroute.training import arm, cdnsr, classsr, pcsr
from fastroute.training.data import Pool

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_tuning", "one_thread")]
SYSTEMS = {"classsr": classsr, "cdnsr": cdnsr, "arm": arm, "pcsr": pcsr}
BACKBONES = ("fsrcnn", "carn", "srresnet", "rcan", "own")
SCALES = (2, 3, 4)
WIDTHS = (4, 8)
PATCH = 8


class Own(nn.Module):
    """A network of one's own; the layers of a narrow one are the leading channels of a wide one's."""

    channels = 3

    def __init__(self, width: int, scale: int = 1, upsample: bool = True) -> None:
        super().__init__()
        self.width, self.scale, self.upsample = width, scale, upsample
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.last = nn.Conv2d(width, 3 * scale**2, 3, padding=1) if upsample else nn.Conv2d(width, width, 1)

    def forward(self, x):
        features = self.last(F.gelu(self.first(x)))
        if not self.upsample:
            return features
        return F.pixel_shuffle(features, self.scale) + F.interpolate(x, scale_factor=self.scale, mode="nearest")


def branch(backbone: str, width: int, scale: int, **options) -> nn.Module:
    if backbone == "rcan":
        return RCAN(width, scale, groups=1, blocks=1, **options)
    if backbone == "srresnet":
        return SRResNet(width, scale, blocks=2, **options)
    return {"fsrcnn": FSRCNN, "carn": CARN, "own": Own}[backbone](width, scale, **options)


def build(system: str, backbone: str, scale: int) -> nn.Module:
    """A tiny system, as anyone may build it."""
    torch.manual_seed(5)
    if system == "arm":
        shallow = {"rcan": {"groups": 1, "blocks": 1}, "srresnet": {"blocks": 2}}.get(backbone, {})
        make = Own if backbone == "own" else partial(ARM_BACKBONES[backbone], **shallow)
        return ARM(make, WIDTHS, scale, bins=3, patch=PATCH)
    if system == "pcsr":
        return PCSR.build(branch(backbone, 8, scale, upsample=False), [None, (3,)], (2,))
    if system == "classsr":
        mean = {"mean_layers": True} if backbone == "carn" else {}
        return ClassSR([branch(backbone, w, scale, **mean) for w in WIDTHS], PatchClassifier(2))
    mean = {"mean_layers": True, "batch_norm": False} if backbone == "carn" else {}
    return CDNSR([branch(backbone, w, scale, **mean) for w in WIDTHS], PatchClassifier(2, layers=3))


def recipe(system: str, scale: int):
    own = {"backbone": "own", "patch": PATCH, "batch": 2}
    if system == "arm":
        return arm.Recipe(**own, widths=WIDTHS, scale=scale, steps=5, bins=3, table_patches=6)
    if system == "pcsr":
        return pcsr.Recipe(**own, upsamplers=((), (3,)), classifier=(2,), scales=(scale,), heavy_steps=3, light_steps=2)
    steps = {"branch_steps": (1, 1), "classifier_steps": 1, "joint_steps": 1}
    last = {"routing_steps": 1} if system == "classsr" else {"distill_steps": 1, "negatives": 2}
    return SYSTEMS[system].Recipe(**own, **steps, **last, widths=WIDTHS, scale=scale)


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    io.write_image(folder / "a.png", (picture(1, 3, 100, 110, seed=1)[0] * 255).to(torch.uint8))
    return {scale: Pool.build(folder, scale=scale, patch=PATCH, shrinks=(1.0,)) for scale in SCALES}


def by_hand(system: str, model: nn.Module, scale: int):
    if system == "pcsr":
        return PixelRouter(model, scale=scale)
    more = {"costs": model.costs(PATCH)} if system == "arm" else {}
    return PatchRouter(model.branches, model.classifier, patch=PATCH, stride=PATCH - 1, scale=scale, window="hann", **more)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_over_every_backbone(pools, tmp_path, system, backbone, scale):
    model = build(system, backbone, scale)
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer = SYSTEMS[system].Trainer(pools[scale], recipe(system, scale), tmp_path / "state.pt", model=model)
    assert sum(stage.steps for stage in trainer.stages) == 5
    assert trainer.run() is model
    still = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    # A narrow width or an expensive upsampler that no step drew, and what has no gradient at its first value, may stand still.
    assert len(still) < len(before) / 2
    path = tmp_path / "model.safetensors"
    trainer.write(path)
    image = picture(1, 3, 13, 18)
    if backbone == "own":
        # A file of weights does not say what network they are of.
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            fastroute.load(path)
        again = build(system, backbone, scale).eval()
        load_weights(again, read_checkpoint(path)[0], path)
        loaded = by_hand(system, again, scale)
    else:
        loaded = fastroute.load(path)
    found = loaded.upscale(image)
    expected = by_hand(system, model, scale).upscale(image)
    assert found.image.shape == (1, 3, 13 * scale, 18 * scale) and torch.equal(found.class_map, expected.class_map)
    torch.testing.assert_close(found.image, expected.image, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_says_why(pools, tmp_path):
    with pytest.raises(ValueError, match="CARN: width must be a multiple of groups"):
        ClassSR([CARN(6, 2)])
    with pytest.raises(ValueError, match="RCAN: scale must be 3 or a power of 2"):
        RCAN(4, 5)
    with pytest.raises(ValueError, match="ARM: backbone must be one of fsrcnn, carn, srresnet, rcan; got 'edsr'"):
        ARM("edsr")
    with pytest.raises(ValueError, match="ARM: widths must be given for a backbone of one's own"):
        ARM(Own)
    with pytest.raises(ValueError, match="ARM: backbone must give networks whose weights at a width are parts of"):
        ARM(lambda w, s: Own(12 - w, s), WIDTHS, 2)
    model = build("classsr", "own", 2)
    for backbone, given in (("own", None), ("fsrcnn", model)):
        made = classsr.Recipe(backbone=backbone, patch=PATCH, scale=2, widths=WIDTHS, branch_steps=(1, 1), batch=2)
        with pytest.raises(ValueError, match="backbone=own needs a model, given in Python, and a model needs backbone=own"):
            classsr.Trainer(pools[2], made, tmp_path / "state.pt", model=given)
    three = classsr.Recipe(backbone="own", patch=PATCH, scale=2, batch=2)
    with pytest.raises(ValueError, match="branch_steps must be one number per branch of the model, 2; got 3"):
        classsr.Trainer(pools[2], three, tmp_path / "state.pt", model=model)
