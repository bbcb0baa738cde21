"""Checkpoints of published code load as what they are, and give what that code gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import fastroute
from fastroute import CheckpointError, PatchRouter, PixelRouter
from fastroute.cli import main
from fastroute.models.arm_tables import read_table
from fastroute.models.checkpoints import read_checkpoint
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR

pytestmark = pytest.mark.usefixtures("quick_tuning", "one_thread")
ETAS = (1e9, 3.33333e8, 1e8, 3.33333e7)


@pytest.fixture(scope="module")
def srresnet(data_folder) -> tuple[PixelRouter, dict[str, Tensor]]:
    with np.load(data_folder / "fixtures" / "pcsr-srresnet-random.npz") as arrays:
        recorded = {name: torch.from_numpy(arrays[name]) for name in arrays}
    return fastroute.load(data_folder / "weights" / "pcsr-srresnet-random.pth"), recorded


@pytest.mark.slow
@torch.no_grad()
def test_features_and_probabilities_of_pcsr_over_srresnet(data_folder, srresnet):
    content = torch.load(data_folder / "weights" / "pcsr-srresnet-random.pth", map_location="cpu", weights_only=True)
    model, recorded = PCSR.from_published(content), srresnet[1]
    features = model.features(recorded["lr"] / 255)
    torch.testing.assert_close(features[:, ::7, ::3, ::3], recorded["features"], rtol=0, atol=1e-5)
    for scale in (4, 2.5):
        size = tuple(round(side * scale) for side in recorded["lr"].shape[2:])
        heavy = model.probability(features, size)[0, 1]
        torch.testing.assert_close(heavy, recorded[f"x{scale}_heavy_probability"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [4, 2.5])
@pytest.mark.parametrize("penalty", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["raw", "refined"])
def test_pcsr_over_srresnet(srresnet, scale, penalty, kind):
    router, recorded = srresnet
    assert router.memory.in_bands
    result = router.upscale(recorded["lr"] / 255, scale=scale, penalty=penalty, refine=kind == "refined")
    assert torch.equal(result.class_map[0], recorded[f"x{scale}_k{penalty}_classes"])
    torch.testing.assert_close(result.image, recorded[f"x{scale}_k{penalty}_{kind}"], rtol=0, atol=1e-5)


def published(encoder: PCSR, name: str, spec: dict) -> dict:
    """A checkpoint of PCSR's code."""
    renamed = {"upsamplers.0": "light_sampler.imnet", "upsamplers.1": "heavy_sampler.imnet", "classifier": "classifier.imnet"}
    state = {}
    for key, value in encoder.state_dict().items():
        for ours, theirs in renamed.items():
            key = key.replace(ours, theirs, 1) if key.startswith(ours) else key
        state[key] = value
    return {"model": {"name": name, "args": spec, "sd": state}}


def sampler(*hidden: int) -> dict:
    return {"name": "liif-sampler", "args": {"imnet_spec": {"name": "mlp", "args": {"hidden_list": list(hidden)}}}}


@pytest.mark.slow
def test_encoder_options_of_a_configuration_are_read(tmp_path):
    model = PCSR.build(FSRCNN(20, shrink=6, depth=2, upsample=False), [[5], [9]], [7]).eval()
    spec = {"encoder_spec": {"name": "fsrcnn", "args": {"d": 20, "s": 6, "m": 2}}}
    spec |= {"light_sampler_spec": sampler(5), "heavy_sampler_spec": sampler(9), "classifier_spec": sampler(7)}
    torch.save(published(model, "pcsr-phase1", spec), tmp_path / "a.pth")
    image = torch.rand(3, 12, 15)
    assert torch.equal(fastroute.load(tmp_path / "a.pth").upscale(image).image, PixelRouter(model).upscale(image).image)
    # The format that training here writes tells the same by its shapes.
    torch.save(model.state_dict(), tmp_path / "b.pth")
    assert torch.equal(fastroute.load(tmp_path / "b.pth").upscale(image).image, PixelRouter(model).upscale(image).image)


def test_a_checkpoint_of_the_first_phase_is_a_dense_model(tmp_path):
    model = PCSR.build(FSRCNN(20, upsample=False), [[5], [9]], [7]).eval()
    spec = {"encoder_spec": {"name": "fsrcnn", "args": {"d": 20}}, "heavy_sampler_spec": sampler(9)}
    content = published(model, "pcsr-phase0", spec)
    kept = {key: value for key, value in content["model"]["sd"].items() if key.startswith(("encoder", "heavy"))}
    content["model"]["sd"] = kept
    torch.save(content, tmp_path / "dense.pth")
    router, image = fastroute.load(tmp_path / "dense.pth"), torch.rand(3, 12, 15)
    result = router.upscale(image, scale=3)
    assert router.num_classes == 1 and result.stats.seconds["classify"] == 0
    everything = PixelRouter(model).upscale(image, scale=3, budget=1).image
    torch.testing.assert_close(result.image, everything, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_cdnsr_over_carn(data_folder, tmp_path):
    path = data_folder / "weights" / "cdnsr-carn-random.pth"
    router, state = fastroute.load(path), read_checkpoint(path)[0]
    assert isinstance(router, PatchRouter) and router.num_classes == 3
    image = torch.rand(3, 40, 44, generator=torch.Generator().manual_seed(0))
    for number in (1, 3):
        alone = {key.removeprefix(f"net{number}."): value for key, value in state.items() if key.startswith(f"net{number}.")}
        torch.save(alone, tmp_path / "branch.pth")
        branch = fastroute.load(tmp_path / "branch.pth")
        classes = torch.full((2, 2), number - 1)
        assert torch.equal(branch.upscale(image).image, router.upscale(image, class_map=classes).image)


@pytest.fixture(scope="module")
def arm(data_folder) -> dict[str, Tensor]:
    with np.load(data_folder / "fixtures" / "arm-fsrcnn-x4.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


@pytest.mark.slow
@pytest.mark.parametrize("eta", ETAS)
def test_arm_chooses_as_published(data_folder, arm, eta):
    files = data_folder / "weights"
    router = fastroute.load(files / "arm-fsrcnn.pth", scale=4, table=files / "arm-fsrcnn.state", eta=eta)
    classes = [int(router.upscale(patch).class_map) for patch in arm["patches"]]
    assert classes == arm[f"classes_eta{eta:g}"].tolist()


@pytest.mark.slow
def test_arm_with_its_table(data_folder, arm):
    files = data_folder / "weights"
    table = read_table(files / "arm-fsrcnn.state")
    assert torch.equal(table.score, arm["lut_score"][0]) and torch.equal(table.psnr, arm["lut_psnr"])
    router = fastroute.load(files / "arm-fsrcnn.pth", scale=4, table=files / "arm-fsrcnn.state")
    # By default what lies between the centres of two bins counts.
    expected = router.classifier(arm["patches"] / 255).argmax(dim=1)
    assert torch.equal(torch.stack([router.upscale(p).class_map.flatten()[0] for p in arm["patches"]]).long(), expected)
    carn = fastroute.load(files / "arm-carn.pth", table=files / "arm-carn.state")
    assert carn.num_classes == 4 and carn.upscale(arm["patches"][0]).image.shape == (3, 128, 128)
    with pytest.raises(CheckpointError, match="does not fit CARN"):
        fastroute.load(files / "carn-x4.pth", table=files / "arm-fsrcnn.state").upscale(arm["patches"][0])


class Code:
    """What unpickling would run."""

    def __reduce__(self):
        return print, ("run",)


def test_tables_that_are_none(tmp_path, capsys):
    def table(**changes) -> dict:
        centres = (np.arange(4) + 0.5) * 3
        good = {"hmap_x_list": [centres, centres], "hmap_y_mean_list": [centres, centres], "cost_list": np.array([0.0, 1.0])}
        return {"hmap": {**good, **changes}}

    path = tmp_path / "t.state"
    torch.save(table(), path)
    assert len(read_table(path).score) == 4
    rising = (np.arange(4) + 0.5) * 3
    for content in (
        {},
        {"hmap": 3},
        table(cost_list=np.array([1.0])),
        table(cost_list=[0.0, 1.0]),
        table(hmap_x_list=[rising, rising + 1]),
        table(hmap_x_list=[rising**2, rising**2]),
        table(hmap_y_mean_list=[rising, rising[:3]]),
        table(hmap_y_mean_list=[rising * np.nan, rising]),
        table(hmap_y_mean_list=[rising.astype(object), rising]),
        table(hmap_y_mean_list=[rising.astype("S3"), rising]),
        table(hmap_x_list=[Code(), rising]),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError):
            read_table(path)
    assert capsys.readouterr().out == ""


def test_what_is_for_arm_alone(tmp_path):
    torch.save(FSRCNN(12).state_dict(), tmp_path / "plain.pth")
    with pytest.raises(ValueError, match="eta is for ARM"):
        fastroute.load(tmp_path / "plain.pth", scale=4, eta=1e8)
    with pytest.raises(ValueError, match="load: eta must be positive"):
        fastroute.load(tmp_path / "plain.pth", scale=4, eta=0)
    with pytest.raises(ValueError, match="PCSR routes pixels and has no table"):
        fastroute.load("pcsr-fsrcnn-x4", table=tmp_path / "t.state")


@pytest.mark.slow
def test_table_and_eta_on_the_command_line(data_folder, tmp_path):
    files, sample = data_folder / "weights", Path(__file__).parents[1] / "assets" / "sample.png"
    arguments = [sample, tmp_path / "out.png", "--model", files / "arm-fsrcnn.pth", "--scale", 4, "--quiet"]
    table = ["--table", files / "arm-fsrcnn.state"]
    for options, words in (
        ([*table, "--eta", 1e8], None),
        (["--eta", 1e8], "eta is for ARM"),
        ([*table, "--eta", 0], "--eta"),
        (["--table", tmp_path / "absent"], "--table"),
    ):
        result = CliRunner().invoke(main, ["upscale", *map(str, [*arguments, *options])])
        assert (result.exit_code == 0) == (words is None), result.output
        assert words is None or words in result.output
