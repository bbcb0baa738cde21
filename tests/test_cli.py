"""The command line: what it writes, and what it says when it cannot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from networks import picture, random_classsr
from PIL import Image

import fastroute
from fastroute import TileGrid, io
from fastroute.catalogue import DEFAULT_MODEL
from fastroute.cli import main
from fastroute.cli.train import RECIPE_NAMES
from fastroute.models.checkpoints import save_checkpoint
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR
from fastroute.visualize import class_overlay

pytestmark = pytest.mark.usefixtures("quick_tuning")
SCALE, PATCH, STRIDE = 2, 16, 12


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "random.safetensors"
    system = random_classsr((3, 5, 20), SCALE, PATCH)
    save_checkpoint(path, system, {"scale": SCALE, "patch": PATCH, "stride": STRIDE})
    return path


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in" / "photo.png"
    path.parent.mkdir()
    io.write_image(path, (picture(1, 3, 45, 61)[0] * 255).to(torch.uint8))
    return path


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def fails(result: Result, *words: str) -> None:
    """Non-zero exit by intention, with a message in place of a traceback."""
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Error: " in result.output and "Traceback" not in result.output
    assert all(word in result.output for word in words), result.output


def test_one_path_alone_lacks_the_output(source):
    fails(call("upscale", source, "--budget", "0.7"), "Missing argument 'OUT'", f"only {source} is given")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], ""),
        (["--precision", "bfloat16"], "  networks: float32 by torch"),
        (["--precision", "bfloat16", "--model", "pcsr-fsrcnn-x4"], "  networks: bfloat16 by torch"),
    ],
)
def test_precision_is_told_as_it_was(source, out, arguments, told):
    """Branches of FSRCNN stay in float32: they would lose too much."""
    result = call("upscale", source, out / "big.png", *arguments)
    assert result.exit_code == 0, result.output
    assert [line for line in result.output.splitlines() if line.startswith("  networks")] == ([told] if told else [])


@pytest.mark.slow
def test_upscale(model, source, out):
    target, class_map = out / "big.png", out / "classes.png"
    result = call("upscale", source, target, "--model", model, "--class-map", class_map)
    assert result.exit_code == 0, result.output
    image, router = io.read_image(source), fastroute.load(model)
    expected = router.upscale(image)
    assert min(expected.stats.counts_per_class) > 0
    assert (io.read_image(target).int() - expected.image.int()).abs().max() <= 1
    assert Image.open(target).size == (122, 90)
    grid = TileGrid(45, 61, PATCH, STRIDE, SCALE)
    overlay = class_overlay(expected.image, expected.class_map, grid, 3)
    assert (io.read_image(class_map).int() - overlay.int()).abs().max() <= 1
    assert sorted(path.name for path in out.iterdir()) == ["big.png", "classes.png"]
    for k, count in enumerate(expected.stats.counts_per_class):
        assert f"class {k + 1}: {count:9,d} patches" in result.output
    assert "(61 x 45)" in result.output and "(122 x 90)" in result.output and "FLOPs" in result.output


@pytest.mark.slow
def test_upscale_quietly_with_a_budget(model, source, out):
    result = call("upscale", source, out / "a.jpg", "--model", model, "--budget", 1, "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    most_expensive = fastroute.load(model).upscale(io.read_image(source), budget=1)
    assert set(most_expensive.class_map.flatten().tolist()) == {2}
    # JPEG keeps noise within some levels on average.
    assert (io.read_image(out / "a.jpg").int() - most_expensive.image.int()).abs().float().mean() < 12


@pytest.mark.slow
def test_in_place(model, source):
    fails(call("upscale", source, source, "--model", model), f"{source} is an input and would be overwritten", "--overwrite")
    assert Image.open(source).size == (61, 45)
    assert call("upscale", source, source, "--model", model, "--quiet", "--overwrite").exit_code == 0
    assert Image.open(source).size == (122, 90)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget", "0.01"], ["for --budget: budget must lie in ["]),
        (["--budget", "nan"], ["budget must lie in ["]),
        (["--budget", "much"], ["'--budget'", "not a valid float"]),
        (["--model", "absent"], ["no model or file 'absent'"]),
        (["--model", "absent.pth"], ["cannot read absent.pth: no such file"]),
        (["--device", "nowhere"], ["--device", "'nowhere' cannot be used"]),
        (["--device", "cuda:99"], ["--device", "'cuda:99' cannot be used"]),
        (["--class-map", "absent/map.png"], ["absent", "does not exist"]),
        (["--class-map", "map.txt"], ["its ending must be one of"]),
        (["--more"], ["No such option"]),
    ],
)
def test_bad_options(model, source, out, options, words):
    fails(call("upscale", source, out / "a.png", "--model", model, *options), *words)
    assert list(out.iterdir()) == []


def test_bad_input(model, source, out, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(source.read_bytes()[:2000])
    for path, word in (("text.png", "not an image"), ("cut.png", "cannot read"), ("absent.png", "No such file"), ("in", "")):
        fails(call("upscale", tmp_path / path, out / "a.png", "--model", model), f"cannot read {tmp_path / path}", word)
    (tmp_path / "text.pth").write_text("no weights")
    fails(call("upscale", source, out / "a.png", "--model", tmp_path / "text.pth"), "text.pth")
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("target", ["a.xyz", "a", "absent/a.png", "folder.png"])
def test_bad_output_is_refused_before_reading(model, source, out, monkeypatch, target):
    (out / "folder.png").mkdir()
    monkeypatch.setattr(io, "read_picture", lambda path: pytest.fail("the input was read"))
    fails(call("upscale", source, out / target, "--model", model), f"cannot write {out / target}")
    # Root may write anywhere, so that permissions are told, not set.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    fails(call("upscale", source, out / "a.png", "--model", model), "permission denied")
    assert [path.name for path in out.iterdir()] == ["folder.png"]


@pytest.mark.slow
def test_a_failing_encoder_keeps_the_old_output(model, source, out, monkeypatch):
    (out / "a.png").write_bytes(b"old")

    def encode(file, *arguments):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("fastroute.io.png.encode", encode)
    fails(call("upscale", source, out / "a.png", "--model", model), "disk full")
    assert (out / "a.png").read_bytes() == b"old" and len(list(out.iterdir())) == 1


def test_a_backend_that_cannot_run(model, source, out, monkeypatch):
    monkeypatch.setenv("FASTROUTE_BACKEND", "cuda")
    fails(call("info"), "'cuda'", "cannot run", "unset the environment variable FASTROUTE_BACKEND")
    fails(call("upscale", source, out / "a.png", "--model", model), "'cuda'", "cannot run")
    assert list(out.iterdir()) == []


def test_info():
    result = call("info")
    assert result.exit_code == 0
    for word in (f"fastroute {fastroute.__version__}", f"torch {torch.__version__.split('+')[0]}", "extension", "cpu"):
        assert word in result.output
    for op in ("extract_patches", "stitch_patches", "group_by_class", "assign_classes"):
        assert op in result.output


def test_models(tmp_path, monkeypatch):
    head, *rows = call("models").output.split("\n\n")[0].splitlines()
    assert [row.split()[0] for row in rows] == fastroute.list_models() and head.startswith("model")
    assert f"{DEFAULT_MODEL} is the default" in call("models").output
    # Every card tells task, FLOPs and PSNR.
    assert not any(" -" in row for row in rows) and all(" dB" in row for row in rows)
    for name in ("b", "a"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"0" * 1_500_000)
    (tmp_path / "b.md").write_text("# b\n\n| | |\n| --- | --- |\n| Task | faces x2 |\n| PSNR | 30 dB |\n\nMore | text.\n")
    monkeypatch.setattr("fastroute.catalogue.WEIGHTS", tmp_path)
    rows = [row.split() for row in call("models").output.splitlines()[1:3]]
    assert rows == [["a", "-", "1.5", "MB", "-", "-"], ["b", "faces", "x2", "1.5", "MB", "-", "30", "dB"]]


@pytest.mark.slow
def test_help_does_not_wait_for_torch():
    for arguments in ([], ["upscale"], ["train"], ["evaluate"]):
        process = python("-X", "importtime", "-m", "fastroute", *arguments, "--help")
        output, imports = process.communicate(timeout=60)
        modules = {line.split("|")[-1].strip() for line in imports.splitlines()}
        assert process.returncode == 0 and "Usage: fastroute" in output and "click" in modules
        assert not modules & {"torch", "numpy", "PIL", "fastroute.loading"}


@pytest.mark.slow
def test_names_are_there_whatever_the_program_is_called(tmp_path):
    """Nothing looks at the name of the program: a script called fastroute.py gets the whole package, and so does a command."""
    code = """
        import sys
        sys.argv = ["/bin/fastroute", "models"]
        import fastroute, fastroute.cli
        assert "torch" not in sys.modules and "load" not in vars(fastroute)
        fastroute.cli.main(standalone_mode=False)
        assert fastroute.list_models() and callable(fastroute.info) and fastroute.profiling.count_flops
        assert set(fastroute.__all__) <= set(dir(fastroute)) and all(getattr(fastroute, name) for name in fastroute.__all__)
        assert callable(fastroute.ray.Upscaler) and "ray" not in sys.modules
    """
    process = python("-c", textwrap.dedent(code))
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "classsr-fsrcnn-x4" in output, errors
    process = python("-m", "fastroute", "train", "arm-fsrcnn", "--images", str(tmp_path))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and errors.startswith("Error: ") and "Traceback" not in errors


def test_training_defaults_are_told():
    from fastroute.cli.train import command
    from fastroute.training.recipes import RECIPES

    told = {option.name: option.help for option in command.params if "[default: " in (getattr(option, "help", None) or "")}
    assert {"scale", "branch_steps", "classifier_steps", "joint_steps", "routing_steps", "batch", "seed"} <= set(told)
    for name, (recipe, _) in RECIPES.items():
        for setting, text in told.items():
            if hasattr(recipe, setting):
                value = getattr(recipe, setting)
                first, *others = text.partition("[default: ")[2].rstrip("]").split("; ")
                special = dict(other.split(" ") for other in others)
                expected = special.get(name.split("-")[0], first)
                assert expected == (",".join(map(str, value)) if isinstance(value, tuple) else str(value)), (name, setting)


@pytest.mark.slow
def test_what_the_summary_calls_its_percentages(model, source, out):
    output = call("upscale", source, out / "a.png", "--model", model, "--budget", 0.8, "--class-map", out / "map.png").output
    for words in (
        "classifier included",
        "as ClassSR counts, without the classifier: ",
        "the budget of 0.8 bounds only the branches",
        "green in the class map",
    ):
        assert words in output
    assert "budget" not in call("upscale", source, out / "a.png", "--model", model).output


@pytest.mark.slow
def test_a_limit_of_memory(model, source, out):
    assert call("upscale", source, out / "whole.png", "--model", model, "--quiet").exit_code == 0
    whole = io.read_image(out / "whole.png")
    for name in ("a.png", "a.tif", "a.bmp"):
        result = call("upscale", source, out / name, "--model", model, "--memory-limit", 200)
        assert result.exit_code == 0, result.output
        assert "working set" in result.output and "class 3" in result.output
        assert torch.equal(io.read_image(out / name), whole)
    arguments = ("upscale", source, out / "b.tif", "--model", model, "--memory-limit")
    fails(call(*arguments, 1), "memory_limit must be at least")
    fails(call(*arguments, 200, "--class-map", out / "map.png"), "--class-map shows the classes over the result")
    fails(call(*arguments, 0), "--memory-limit")
    fails(call("upscale", source, source.with_suffix(".txt"), "--memory-limit", 200), "its ending must be one of")
    assert sorted(path.name for path in out.iterdir()) == ["a.bmp", "a.png", "a.tif", "whole.png"]


@pytest.mark.slow
def test_zarr_arrays_are_single_pictures(model, source, out):
    pytest.importorskip("zarr")
    for given, made in ((source, "a.zarr"), (out / "a.zarr", "b.png"), (source, "a.zarr")):
        assert call("upscale", given, out / made, "--model", model, "--quiet").exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == ["a.zarr", "b.png"]
    assert Image.open(out / "b.png").size == (244, 180)


def test_options_that_exclude_each_other(source, out, tmp_path):
    model = PCSR.build(FSRCNN(4, upsample=False), [None, (4,)], ())
    save_checkpoint(tmp_path / "pcsr.safetensors", model, {})
    arguments = ("upscale", source, out / "a.png", "--model", tmp_path / "pcsr.safetensors")
    fails(call(*arguments, "--penalty", 1, "--adaptive"), "give one of --penalty and --adaptive")
    fails(call(*arguments, "--budget", 1, "--penalty", 1), "give one of --budget and --penalty")
    fails(call(*arguments, "--scale", 2, "--size", 3, 4), "give either --scale or --size")
    fails(call(*arguments, "--budget", 0), "for --budget: budget must lie in [")
    assert call(*arguments, "--size", 33, 44, "--no-refine", "--quiet").exit_code == 0
    assert Image.open(out / "a.png").size == (44, 33)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["upscale", "info", "models", "train", "--version"]),
        (["upscale"], ["IN OUT", "IN... FOLDER", "--model", DEFAULT_MODEL, "--budget", "--class-map", "--device", "--quiet"]),
        (["train"], [*RECIPE_NAMES, "--images", "--out", "--branch-steps", "--init", "resume"]),
        (["info"], ["backend"]),
        (["models"], ["shipped models"]),
    ],
)
def test_help(command, words):
    for flag in ("-h", "--help"):
        result = call(*command, flag)
        # Lines break at hyphens too.
        text = "".join(result.output.split())
        assert result.exit_code == 0 and all(word.replace(" ", "") in text for word in words)
    assert fastroute.__version__ in call("--version").output


def test_unknown_commands():
    fails(call("upscal"), "No such command 'upscal'")
    fails(call("train", "esrgan", "--images", "x"), "'classsr-fsrcnn'")


# A run whose encoder writes half of a file, says so, and waits to be interrupted.
SLOW = """
import sys, time
from fastroute.io import png
from fastroute.__main__ import main
def encode(file, *arguments):
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
png.encode = encode
main(sys.argv[1:], prog_name="fastroute")
"""


def python(*arguments: object) -> subprocess.Popen:
    path = os.pathsep.join([str(Path(fastroute.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_as_a_process(model, source, out):
    process = python("-m", "fastroute", "upscale", source, out / "a.png", "--model", model, "--class-map", out / "map.png")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "122 x 90" in output and Image.open(out / "a.png").size == Image.open(out / "map.png").size == (122, 90)


@pytest.mark.slow
def test_an_error_of_a_process(source, out):
    process = python("-m", "fastroute", "upscale", source.parent / "absent.png", out / "a.png")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and output == ""
    assert errors.startswith("Error: cannot read") and "Traceback" not in errors and len(errors.splitlines()) == 1
    assert list(out.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_process_keeps_the_old_output(model, source, out, number):
    (out / "a.png").write_bytes(b"old")
    process = python("-c", textwrap.dedent(SLOW), "upscale", source, out / "a.png", "--model", model, "--quiet")
    assert process.stdout.readline() == "writing\n", process.stderr.read()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "Traceback" not in errors
    assert (out / "a.png").read_bytes() == b"old"
    assert [path.name for path in out.iterdir()] == ["a.png"], "half a file was left behind"
