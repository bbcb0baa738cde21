"""`fastroute train`: the recipes by name, their settings from text, and what the command writes."""

from __future__ import annotations

import csv
import dataclasses
import math

import pytest
import torch
from click.testing import CliRunner
from networks import picture

import fastroute
from fastroute import cli, io
from fastroute.cli.train import RECIPE_NAMES
from fastroute.models.arm import ARM
from fastroute.models.checkpoints import read_checkpoint, save_checkpoint
from fastroute.training import arm
from fastroute.training.recipes import RECIPES, configure, write_config

pytestmark = pytest.mark.usefixtures("quick_tuning")

# Few enough steps for a test, in the words of the command.
SMOKES = {
    "cdnsr-fsrcnn": ["widths=3,4", "branch_steps=1,1", "classifier_steps=1", "joint_steps=1", "distill_steps=1", "batch=2"],
    "arm-fsrcnn": ["widths=3,5", "steps=2", "batch=2", "table_patches=20"],
    "pcsr-fsrcnn": ["width=4", "upsamplers=3;4,4", "heavy_steps=1", "light_steps=1", "batch=2", "scales=2,4"],
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(2):
        io.write_image(folder / f"{number}.png", (picture(1, 3, 140, 150 + number, seed=number)[0] * 255).to(torch.uint8))
    return folder


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("cdnsr-fsrcnn", {"backbone": "x"}, "backbone must be one of fsrcnn, carn, srresnet, rcan; got 'x'"),
        ("pcsr-fsrcnn", {"backbone": "edsr"}, "backbone must be one of fsrcnn, carn, srresnet, rcan; got 'edsr'"),
        ("cdnsr-fsrcnn", {"contrast": "l1"}, "contrast must be one of cdnsr, csd; got 'l1'"),
        ("classsr-fsrcnn", {"patch": "3"}, "patch must be at least 4, the side of a cell of the classifier; got 3"),
        ("cdnsr-fsrcnn", {"variant": "x"}, "variant must be one of r, m, s; got 'x'"),
        ("cdnsr-fsrcnn", {"alpha": "1.5"}, r"alpha must lie in \[0, 1\]"),
        ("cdnsr-fsrcnn", {"layers": "7"}, "layers must be 3 to 6; got 7"),
        ("cdnsr-fsrcnn", {"last_temperature": "0"}, "temperature must not be below last_temperature, above 0"),
        ("cdnsr-fsrcnn", {"lambda_reg": "-1"}, "lambda_reg must be at least 0; got -1"),
        ("cdnsr-fsrcnn", {"branch_steps": "5"}, "one positive number per width, 3 for widths 16, 36, 56; got 5$"),
        ("arm-fsrcnn", {"widths": "8,4"}, "widths must rise"),
        ("arm-fsrcnn", {"eta": "0"}, "eta must be above 0"),
        ("arm-fsrcnn", {"backbone": "edsr"}, "backbone must be one of fsrcnn, carn, srresnet, rcan; got 'edsr'"),
        ("arm-fsrcnn", {"steps": "-1"}, "steps must be at least 0"),
        ("arm-fsrcnn", {"joint_steps": "3"}, "arm-fsrcnn has no setting 'joint_steps'; it has backbone, balance, batch, bins"),
        ("arm-fsrcnn", {"steps": "many"}, "steps must be a whole number; got 'many'"),
        ("arm-fsrcnn", {"eta": "much"}, "eta must be a number; got 'much'"),
        ("pcsr-fsrcnn", {"upsamplers": "3,4"}, "upsamplers must be at least two"),
        ("pcsr-fsrcnn", {"upsamplers": "3;"}, "upsamplers must be at least two, the last not empty"),
        ("pcsr-fsrcnn", {"scales": "4,2"}, "scales must be positive and rise"),
        ("pcsr-fsrcnn", {"classifier": "0"}, "widths of an MLP must be at least 1"),
        ("pcsr-fsrcnn", {"scales": ""}, "scales must be whole numbers with commas between them; got ''"),
    ],
)
def test_refused_settings(name, settings, message):
    with pytest.raises(ValueError, match=f"train: .*{message}"):
        configure(name, settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 3\nsteqs: 4", r"a\.yaml: arm-fsrcnn has no setting 'steqs'; it has backbone, balance, batch"),
        ("steps: many", r"a\.yaml: steps must be a whole number; got 'many'"),
        ("steps: 2.5", r"a\.yaml: steps must be a whole number; got '2\.5'"),
        ("steps: [1, 2]", r"a\.yaml: steps must be a whole number; got '1,2'"),
        ("widths: [16, x]", r"a\.yaml: widths must be whole numbers with commas between them; got '16,x'"),
        ("steps:", r"a\.yaml: steps must be a number, a word or a list; got None"),
        ("steps: yes", r"a\.yaml: steps must be a number, a word or a list; got True"),
        ("widths: {a: 1}", r"a\.yaml: widths must be a number, a word or a list; got \{'a': 1\}"),
        ("eta: 0", r"eta must be above 0; got 0\.0; the settings of .*a\.yaml are in force"),
        ("- steps", r"a\.yaml must hold lines NAME: VALUE; it holds \['steps'\]"),
        ("", r"a\.yaml must hold lines NAME: VALUE; it holds None"),
        ("steps: [1", r"cannot read .*a\.yaml: while parsing a flow sequence .* line 1"),
        ("!!python/object/apply:os.getcwd []", r"cannot read .*a\.yaml: could not determine a constructor"),
        (b"\xff\xfe\x00", r"cannot read .*a\.yaml: "),
    ],
)
def test_refused_files(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"train: .*{message}"):
        configure("arm-fsrcnn", {}, path)
    with pytest.raises(ValueError, match=r"train: cannot read .*b\.yaml: No such file"):
        configure("arm-fsrcnn", {}, tmp_path / "b.yaml")


@pytest.mark.parametrize("name", list(RECIPES))
def test_files_give_back_what_was_written(tmp_path, name):
    recipe = dataclasses.replace(RECIPES[name][0], learning_rate=3e-5, seed=7)
    write_config(tmp_path / "a.yaml", recipe, "how")
    assert (tmp_path / "a.yaml").read_text().startswith("# how\nbackbone: ")
    assert configure(name, {}, tmp_path / "a.yaml") == recipe
    # What is said on the command line comes first.
    assert configure(name, {"seed": "2"}, tmp_path / "a.yaml") == dataclasses.replace(recipe, seed=2)


def test_settings_from_files(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("upsamplers: [[], [7], [9, 9]]\nclassifier: []\nscales: 2,3  # as text\nlight_rate: 1e-2\nbatch: 4\n")
    recipe = configure("pcsr-fsrcnn", {}, path)
    assert recipe.upsamplers == ((), (7,), (9, 9)) and recipe.classifier == () and recipe.scales == (2, 3)
    assert recipe.light_rate == 0.01 and recipe.batch == 4


def test_settings_from_text():
    recipe = configure("pcsr-fsrcnn", {"upsamplers": ";7;9,9", "classifier": "", "scales": "2,3,4", "light_rate": "1e-2"})
    assert recipe.upsamplers == ((), (7,), (9, 9)) and recipe.classifier == () and recipe.scale == 4
    assert recipe.light_rate == 0.01 and configure("arm-fsrcnn", {}) == arm.Recipe()
    assert tuple(RECIPES) == RECIPE_NAMES


def test_every_recipe_is_as_published():
    for name, (recipe, trainer) in RECIPES.items():
        system, backbone = name.split("-")
        assert recipe.backbone == backbone and trainer.__module__ == f"fastroute.training.{system}"
    assert RECIPES["cdnsr-carn"][0].widths == (36, 52, 56) and RECIPES["classsr-rcan"][0].widths == (36, 50, 64)


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def call(*arguments: object):
    return CliRunner().invoke(cli.main, ["train", *map(str, arguments)])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SMOKES))
def test_command(images, tmp_path, name):
    options = [part for setting in SMOKES[name] for part in ("--set", setting)]
    result = call(name, "--images", images, "--out", tmp_path, *options)
    assert result.exit_code == 0, result.output
    path = tmp_path / f"{name}-x4.safetensors"
    assert f"wrote {path}" in result.output
    image = io.read_image(images / "0.png")[:, :40, :50]
    router = fastroute.load(path)
    upscaled = router.upscale(image)
    assert upscaled.image.shape == (3, 160, 200) and router.num_classes >= 2
    assert router.upscale(image, budget=1).stats.flops.fraction > 0.9
    # Run again, nothing is trained and the same file is written; and so from its settings alone.
    first = read_checkpoint(path)[0]
    config = tmp_path / "config.yaml"
    assert f"train {name} --images DIR --config FILE --precision float32\n" in config.read_text()
    for settings in (options, ["--config", config]):
        path.unlink()
        assert call(name, "--images", images, "--out", tmp_path, *settings).exit_code == 0
        assert equal(read_checkpoint(path)[0], first)


def test_pcsr_for_one_other_factor(images, tmp_path):
    """--scale, as for the other recipes; what is written runs at that factor by itself."""
    options = [f"--set={setting}" for setting in SMOKES["pcsr-fsrcnn"] if "scales" not in setting]
    result = call("pcsr-fsrcnn", "--scale", 2, "--images", images, "--out", tmp_path, *options)
    assert result.exit_code == 0 and f"wrote {tmp_path / 'pcsr-fsrcnn-x2.safetensors'}" in result.output, result.output
    router = fastroute.load(tmp_path / "pcsr-fsrcnn-x2.safetensors")
    assert router.scale == 2 and router.upscale(torch.rand(3, 20, 31)).image.shape == (3, 40, 62)
    refused = call("pcsr-fsrcnn", "--scale", 2, "--set", "scales=2,4", "--images", images, "--out", tmp_path)
    assert refused.exit_code and "train: scale is one factor and scales are several; give one of them" in refused.output


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SMOKES))
def test_validation_logs_and_resuming(images, tmp_path, name):
    pytest.importorskip("skimage")
    command = [name, "--images", images, "--out", tmp_path, *(f"--set={setting}" for setting in SMOKES[name])]
    absent = call(*command, "--resume")
    assert absent.exit_code and f"there is nothing to resume: {tmp_path / 'state.pt'} does not exist" in absent.output
    watched = [*command, "--validate", images, "--validate-every", 1, "--log", "csv"]
    result = call(*watched)
    assert result.exit_code == 0 and ": validation " in result.output, result.output
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    found = [row for row in rows if row["validation_psnr"]]
    assert len(found) >= 2 and all(5 < float(row["validation_psnr"]) < 60 for row in found)
    assert all(0 < float(row["validation_ssim"]) <= 1 for row in found)
    image = torch.rand(3, 20, 24)
    for file in ("best", "last", f"{name}-x4"):
        assert fastroute.load(tmp_path / f"{file}.safetensors").upscale(image).image.shape == (3, 80, 96)
    assert equal(*(read_checkpoint(tmp_path / f"{file}.safetensors")[0] for file in ("last", f"{name}-x4")))
    # Nothing is left to train, or everything.
    assert ": validation " not in call(*watched, "--resume").output
    assert ": validation " in call(*watched, "--no-resume").output


@pytest.mark.slow
@pytest.mark.parametrize(("name", "patch", "stride"), [("cdnsr", 16, 12), ("cdnsr", 5, 4), ("arm", 7, 6), ("arm", 33, 29)])
def test_any_patch_size_is_loaded_again(images, tmp_path, name, patch, stride):
    settings = [f"--set={setting}" for setting in [*SMOKES[f"{name}-fsrcnn"], f"patch={patch}"]]
    assert call(f"{name}-fsrcnn", "--images", images, "--out", tmp_path, *settings).exit_code == 0
    router = fastroute.load(tmp_path / f"{name}-fsrcnn-x4.safetensors")
    assert (router.patch, router.stride) == (patch, stride)
    assert router.upscale(torch.rand(3, 40, 41)).image.shape == (3, 160, 164)


@pytest.mark.slow
def test_command_builds_the_table_of_a_published_supernet(images, tmp_path):
    save_checkpoint(tmp_path / "supernet.pth", ARM("fsrcnn", (3, 5)).network)
    options = ["--set", "widths=3,5", "--set", "steps=0", "--set", "table-patches=30", "--init", tmp_path / "supernet.pth"]
    assert call("arm-fsrcnn", "--images", images, "--out", tmp_path, *options).exit_code == 0
    trained, published = (read_checkpoint(tmp_path / name)[0] for name in ("arm-fsrcnn-x4.safetensors", "supernet.pth"))
    assert equal({k.removeprefix("network."): v for k, v in trained.items() if k.startswith("network.")}, published)
    assert math.isfinite(trained["classifier.table.psnr"].sum())


@pytest.mark.slow
def test_command_refuses(images, tmp_path):
    (tmp_path / "wrong.yaml").write_text("steps: -1")
    save_checkpoint(tmp_path / "other.pth", ARM("fsrcnn", (3, 5)))
    for options, word in (
        (["--config", tmp_path / "wrong.yaml"], "steps must be at least 0; got -1; the settings of"),
        (["--config", tmp_path], "Is a directory"),
        (["--precision", "float8"], "'float8' is not one of"),
        (["--init", tmp_path / "other.pth"], "other.pth does not fit ARM"),
        (["--images", tmp_path / "none"], "none is not a folder"),
        (["--images", tmp_path], "holds no image file"),
        (["--device", "nowhere"], "'nowhere' cannot be used"),
        (["--set", "steps"], "NAME=VALUE"),
        (["--routing-steps", 3], "has no setting 'routing_steps'"),
    ):
        result = call("arm-fsrcnn", "--images", images, "--out", tmp_path / "out", *options)
        assert result.exit_code != 0 and word in result.output, result.output
    assert not (tmp_path / "out").exists()
