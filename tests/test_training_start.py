"""Weights to start from: each recipe's own layout, ClassSR's branches and single networks."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from interrupted import equal
from networks import picture, randomise

from fastroute import io
from fastroute.catalogue import DEFAULT_MODEL, WEIGHTS
from fastroute.degradation import make_pair
from fastroute.models.arm import ARM
from fastroute.models.carn import CARN
from fastroute.models.cdnsr import CDNSR
from fastroute.models.checkpoints import CheckpointError, save_checkpoint
from fastroute.models.classsr import ClassSR
from fastroute.models.fsrcnn import FSRCNN, resampled_tail
from fastroute.models.rcan import RCAN
from fastroute.models.srresnet import SRResNet
from fastroute.training import arm, cdnsr, pcsr
from fastroute.training.classsr import Recipe as classsr_recipe
from fastroute.training.classsr import Trainer as classsr_trainer
from fastroute.training.data import Pool
from fastroute.training.recipes import RECIPES
from fastroute.training.start import Start

WIDTHS = (4, 8)
SAMPLE = Path(__file__).parents[1] / "assets" / "sample.png"
SETTINGS = {
    "cdnsr": cdnsr.Recipe(widths=WIDTHS, branch_steps=(1, 1), scale=2),
    "arm": arm.Recipe(widths=WIDTHS, scale=2),
    "pcsr": pcsr.Recipe(width=8, scales=(2,)),
}


@pytest.fixture(scope="module")
def pool():
    """Nothing is trained here."""
    return Pool([], [], np.zeros((0, 3), np.int32), np.zeros(0, np.float32), 32, 2)


def begin(name: str, pool: Pool, path, start: Start, **settings: object):
    recipe = {**vars(SETTINGS[name]), **settings}
    trainer = RECIPES[f"{name}-fsrcnn"][1]
    return trainer(pool, type(SETTINGS[name])(**recipe), path / "state.pt", start).model


def classsr(backbone: str = "fsrcnn", widths: tuple[int, ...] = WIDTHS) -> ClassSR:
    return randomise(ClassSR.build(backbone, widths, 2), seed=5).eval()


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["fsrcnn", "carn", "srresnet"])
@torch.no_grad()
def test_cdnsr_takes_the_branches_of_classsr(pool, tmp_path, backbone):
    other = classsr(backbone)
    model = begin("cdnsr", pool, tmp_path, Start(other.state_dict()), backbone=backbone).eval()
    x = picture(2, 3, 16, 16)
    for mine, branch in zip(model.branches, other.branches, strict=True):
        # Folded batch norms change the order of sums.
        torch.testing.assert_close(mine(x), branch(x), rtol=1e-4, atol=1e-4)
    fresh = begin("cdnsr", pool, tmp_path, Start(model.state_dict()), backbone=backbone)
    assert equal(fresh.classifier.state_dict(), model.classifier.state_dict())
    assert not equal(other.classifier.state_dict(), model.classifier.state_dict())


def test_cdnsr_goes_on_from_cdnsr(pool, tmp_path):
    other = randomise(CDNSR.build("fsrcnn", WIDTHS, 2, layers=3))
    save_checkpoint(tmp_path / "a.safetensors", other, {"system": "cdnsr-fsrcnn"})
    model = begin("cdnsr", pool, tmp_path, Start.read(tmp_path / "a.safetensors"), layers=3)
    assert equal(model.state_dict(), other.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["fsrcnn", "carn", "srresnet"])
@torch.no_grad()
def test_arm_takes_the_most_expensive_branch(pool, tmp_path, backbone):
    other = classsr(backbone)
    x = picture(2, 3, 16, 16)
    for state in (other.state_dict(), other.branches[-1].state_dict()):
        model = begin("arm", pool, tmp_path, Start(state), backbone=backbone).eval()
        torch.testing.assert_close(model.run(2, x), other.branches[-1](x), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model.run(1, x), other.branches[0](x), atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["fsrcnn", "carn", "srresnet", "rcan"])
@torch.no_grad()
def test_pcsr_takes_the_layers_up_to_the_features(pool, tmp_path, backbone):
    # A constant mean, as PCSR removes it, so that features can be compared.
    make = {"fsrcnn": FSRCNN, "carn": CARN, "srresnet": SRResNet, "rcan": partial(RCAN, blocks=2)}[backbone]
    network = randomise(make(8, 2), seed=6).eval()
    features = []
    after = {"fsrcnn": "tail_conv", "carn": "upsample", "srresnet": "upconv1", "rcan": "tail"}[backbone]
    network.get_submodule(after).register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    x = picture(2, 3, 16, 16)
    network(x)
    system = ClassSR([classsr(backbone, (4,)).branches[0], network])
    more = {"backbone": backbone} | ({"blocks": 2} if backbone == "rcan" else {})
    # RCAN computes in 0 … 255, and its encoder gives features in units of white.
    unit = network.input_range if backbone == "rcan" else 1
    for state in (network.state_dict(), system.state_dict()):
        model = begin("pcsr", pool, tmp_path, Start(state), **more).eval()
        expected = features[0] / unit
        # The trainer's memory format changes the order of sums, which add up over the layers of RCAN.
        torch.testing.assert_close(model.features(x), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    other = begin("pcsr", pool, tmp_path, Start(model.state_dict()), **more, seed=9)
    assert equal(other.state_dict(), model.state_dict())


def test_a_supernet_is_a_network_too(pool, tmp_path):
    supernet = randomise(ARM("fsrcnn", WIDTHS, 2))
    encoder = begin("pcsr", pool, tmp_path, Start(supernet.state_dict())).encoder.state_dict()
    assert equal(encoder, {name: supernet.network.state_dict()[name] for name in encoder})


@pytest.mark.parametrize(
    ("name", "state", "message"),
    [
        ("cdnsr", FSRCNN(8, 2), "init does not fit: it has 0 branches net1, net2, …, not 2"),
        ("cdnsr", classsr("fsrcnn", (4, 6, 8)), "it has 3 branches net1, net2, …, not 2"),
        ("cdnsr", classsr("fsrcnn", (4, 6)), r"init \(net2\) does not fit FSRCNN: .* \(6, 3, 5, 5\) instead of \(8, 3, 5, 5\)"),
        ("arm", classsr("fsrcnn", (4, 6)), r"init \(net2\) does not fit FSRCNN: .* instead of \(8, 3, 5, 5\)"),
        ("arm", classsr("carn"), r"init \(net2\) does not fit FSRCNN: .* missing: head_conv\.0\.weight"),
        ("pcsr", FSRCNN(6, 2), r"init does not fit FSRCNN: .* of another shape: head_conv\.0\.weight"),
        ("pcsr", FSRCNN(8, 2, depth=5), r"init does not fit FSRCNN: .* body_conv\.6\.0\.weight"),
        ("pcsr", classsr("srresnet"), r"init \(net2\) does not fit FSRCNN: .* missing"),
    ],
)
def test_refusals(pool, tmp_path, name, state, message):
    with pytest.raises(CheckpointError, match=message):
        begin(name, pool, tmp_path, Start(state.state_dict()))


def test_published_networks(pool, tmp_path, data_folder):
    start = Start.read(data_folder / "weights" / "fsrcnn-x4.pth")
    model = begin("pcsr", pool, tmp_path, start, width=56)
    assert torch.equal(model.encoder.head_conv[0].weight, start.state["head_conv.0.weight"])
    whole = Start.read(data_folder / "weights" / "pcsr-fsrcnn-x4.pth")
    assert equal(dict(whole.state), begin("pcsr", pool, tmp_path, whole, width=48).state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("scale", [2, 3])
def test_another_factor_begins_with_resampled_last_layers(tmp_path, scale):
    """The shipped weights for 4, as they are, and beside them with the last layer of their own factor."""
    lr, hr = make_pair(io.read_image(SAMPLE), scale)
    empty = Pool([], [], np.zeros((0, 3), np.int32), np.zeros(0, np.float32), 32, scale)
    recipe = classsr_recipe(scale=scale)
    start = Start.read(WEIGHTS / f"{DEFAULT_MODEL}.safetensors")
    assert start.scale == 4 and start.at_scale(4) is start
    found = {}
    for name, given in (("resampled", start), ("as it is", start._replace(scale=scale))):
        model = classsr_trainer(empty, recipe, tmp_path / f"{name}.pt", given).model.eval()
        with torch.no_grad():
            image = model.branches[2](lr[None].float() / 255)[0]
        found[name] = -10 * (image - hr.float() / 255).square().mean().log10().item()
    assert found["resampled"] > 24 > 15 > found["as it is"]
    # Published files do not say their factor: flat images stay flat at one alone.
    unknown = start._replace(scale=0).at_scale(scale)
    assert equal(dict(unknown.state), dict(start.at_scale(scale).state))


def test_weights_whose_factor_nothing_tells_stay_as_they_are():
    start = Start(randomise(FSRCNN(8, 2)).state_dict())
    with pytest.warns(UserWarning, match="init does not say its upscaling factor"):
        found = start.at_scale(2)
    assert found is start


def test_resampled_last_layers_of_one_factor_are_the_same():
    kernel = torch.rand(3, 2, 9, 9)
    assert resampled_tail(kernel, 3, 3).allclose(kernel, atol=1e-5)
    # Of twice the factor every other tap lies between two.
    assert resampled_tail(torch.ones(1, 1, 9, 9), 2, 4).allclose(torch.ones(1, 1, 9, 9))
