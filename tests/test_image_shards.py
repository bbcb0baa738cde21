"""One image by several processes: the pixels of one process, whatever dies, and nothing twice."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from networks import as_image, picture, random_classsr

from fastroute import PatchRouter, io, load
from fastroute.budget.limits import Budget
from fastroute.cli import main
from fastroute.files import image_shards
from fastroute.files.file_to_file import upscale_file
from fastroute.files.image_shards import LargeImage, upscale_share
from fastroute.files.joining import join
from fastroute.files.parts import Parts, spans
from fastroute.files.shards import Shard
from fastroute.models.checkpoints import save_checkpoint
from fastroute.patch import classify, patch_memory

zarr = pytest.importorskip("zarr", minversion="3")
tifffile = pytest.importorskip("tifffile")
pytestmark = pytest.mark.usefixtures("quick_tuning")
SIZE = (150, 131)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "random.safetensors"
    save_checkpoint(path, random_classsr((3, 5, 8), 4, 8), {"patch": 8, "stride": 6})
    return path


@pytest.fixture(scope="module")
def router(model):
    return load(model, tune=False)


@pytest.fixture
def small(monkeypatch):
    """Bands of few patches and rows, so that a small picture has several of each."""
    monkeypatch.setattr(patch_memory, "PATCHES_PER_BAND", {"cpu": 200})
    monkeypatch.setattr(classify, "BLOCK_PATCHES", 100)
    monkeypatch.setattr("fastroute.files.arrays.CHUNK", 96)


@pytest.fixture
def narrow(small, monkeypatch):
    """Blocks of a shard, of which three lie side by side in a band."""
    monkeypatch.setattr("fastroute.files.arrays.PER_SHARD", 2)
    monkeypatch.setattr("fastroute.files.arrays.BLOCK_BYTES", 1)


@pytest.fixture
def source(tmp_path) -> Path:
    io.write_image(tmp_path / "in.png", as_image(picture(1, 3, *SIZE, seed=1), torch.uint8)[0])
    return tmp_path / "in.png"


def pixels_of(path: Path) -> np.ndarray:  # [H, W, C]
    if path.name.endswith(".ome.zarr"):
        return np.moveaxis(np.asarray(zarr.open_group(str(path), mode="r")["0"][:]), 0, 2)
    if path.suffix == ".zarr":
        return np.asarray(zarr.open_array(str(path), mode="r")[:])
    return io.read_picture(path).color.permute(1, 2, 0).numpy()


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code != 0
    return " ".join(result.output.split())


@pytest.mark.slow
@pytest.mark.parametrize("out", ["out.zarr", "out.ome.zarr", "out.tif", "out.png"])
@pytest.mark.parametrize("options", [{"budget": 0.9}, {"penalty": 0.3}, {"budget": 1.0}], ids=str)
def test_shards_give_the_pixels_of_one_process(small, model, router, source, tmp_path, out, options):
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", value)]
    expected = router.upscale(io.read_image(source), **options).image
    for number in (2, 3, 1):
        told = run("upscale", source, tmp_path / out, "--model", model, "--shard", f"{number}/3", *flags)
        assert not (tmp_path / out).exists()
    assert f"all 7 are done: run fastroute join {tmp_path / out}" in " ".join(told.split())
    assert run("join", tmp_path / out, "--quiet") == ""
    assert np.array_equal(pixels_of(tmp_path / out), expected.permute(1, 2, 0).numpy())
    assert "complete already" in run("join", tmp_path / out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.png", out]


@pytest.mark.slow
def test_a_budget_of_flops_is_one_over_the_image(small, source, tmp_path):
    system = random_classsr((3, 5, 40), 4, 8)
    router = PatchRouter(system.branches, system.classifier, patch=8, stride=6, scale=4, tune=False)
    image = io.read_image(source)
    least, most = (router.upscale(image, penalty=penalty).stats.flops.routed for penalty in (50.0, 0.0))
    dense, flops = router.upscale(image, budget=1).stats.flops.dense, (least + most) / 2
    assert least < flops < min(most, dense)
    large = LargeImage(source, tmp_path / "a.zarr", Budget(flops=flops))
    for number in (1, 2):
        upscale_share(large, router, Shard(number, 2))
    join(large.target)
    expected = router.upscale(image, budget_flops=flops)
    assert len(expected.class_map.unique()) > 1
    assert np.array_equal(pixels_of(large.target), expected.image.permute(1, 2, 0).numpy())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("out", ["out.zarr", "out.tif"])
@pytest.mark.parametrize("blocks", ["small", "narrow"])
def test_gray_alpha_and_depth(request, router, tmp_path, dtype, channels, out, blocks):
    request.getfixturevalue(blocks)
    image = as_image(picture(1, channels, *SIZE, seed=2)[0], getattr(torch, dtype))
    pixels = image.permute(1, 2, 0).numpy()
    extra = {"extrasamples": ["unassalpha"]} if channels in (2, 4) else {}
    kind = "minisblack" if channels < 3 else "rgb"
    tifffile.imwrite(
        tmp_path / "in.tif", pixels if channels > 1 else pixels[:, :, 0], photometric=kind, rowsperstrip=9, **extra
    )
    upscale_file(tmp_path / "in.tif", tmp_path / f"one-{out}", router, budget=0.9)
    large = LargeImage(tmp_path / "in.tif", tmp_path / out, Budget(0.9))
    for number in (1, 2):
        upscale_share(large, router, Shard(number, 2))
    assert join(tmp_path / out, progress=False) and not join(tmp_path / out)
    if out == "out.zarr":
        assert np.array_equal(pixels_of(tmp_path / out), pixels_of(tmp_path / "one-out.zarr"))
        return
    one, other = (tifffile.TiffFile(path).pages[0] for path in (tmp_path / "one-out.tif", tmp_path / out))
    assert np.array_equal(one.asarray(), other.asarray())
    assert (one.photometric, one.extrasamples) == (other.photometric, other.extrasamples)


@pytest.mark.slow
@pytest.mark.parametrize("out", ["out.zarr", "out.ome.zarr", "out.png"])
def test_blocks_of_a_band_give_the_pixels_of_one_process(narrow, router, source, tmp_path, out):
    large, whole = LargeImage(source, tmp_path / out, Budget(0.9)), router.upscale(io.read_image(source), budget=0.9)
    layout, parts = image_shards.begin(large, router), Parts(large.target)
    assert layout.columns == [(0, 192), (192, 384), (384, 524)] and layout.bands == 7
    for number, left in ((1, 4), (2, 0)):
        assert upscale_share(large, router, Shard(number, 2)).left == left and len(parts.done()) == 3 * (7 - left)
    # As if it had been killed between two blocks, and while it wrote one.
    parts.forget([4, 10, 11])
    # Of a shard 1/1 under a name of zarr's own.
    half = ("0", "c", "0", "1", "1.half.partial") if layout.ome else ("c", "1", "1", "0.half.partial")
    parts.path("image", *half).write_bytes(b"half")
    with pytest.raises(ValueError, match=r"lacks 2 of 7 bands \(1, 3\)"):
        join(large.target)
    before = {path: path.stat().st_mtime_ns for path in parts.path("image").rglob("*") if path.is_file()}
    assert upscale_share(large, router, Shard(1, 1), resume=True).written == 2
    after = {path: path.stat().st_mtime_ns for path in parts.path("image").rglob("*") if path.is_file()}
    assert sum(after.get(path) != time for path, time in before.items()) == 4, "three shards anew, and half of one gone"
    assert join(large.target)
    assert np.array_equal(pixels_of(large.target), whole.image.permute(1, 2, 0).numpy())


@pytest.mark.slow
def test_the_array_is_sharded_and_the_pyramid_of_ome(small, router, source, tmp_path):
    large = LargeImage(source, tmp_path / "a.ome.zarr", Budget(0.9))
    upscale_share(large, router, Shard(1, 1))
    folder = Parts(large.target).path("image", "0", "c", "0")
    assert sorted(int(path.name) for path in folder.iterdir()) == list(range(7)), "one row of shards for a band"
    join(large.target)
    group = zarr.open_group(str(large.target), mode="r")
    about = group.attrs["ome"]
    (scales,) = about["multiscales"]
    assert about["version"] == "0.5" and [axis["name"] for axis in scales["axes"]] == ["c", "y", "x"]
    assert [level["path"] for level in scales["datasets"]] == ["0"]
    array = group["0"]
    assert array.shape == (3, 600, 524) and array.chunks == (1, 96, 96) and array.shards == (3, 96, 576)
    assert array.metadata.zarr_format == 3 and array.metadata.dimension_names == ("c", "y", "x")


@pytest.mark.slow
def test_what_is_there_is_not_done_again(small, model, source, tmp_path, monkeypatch):
    command = ["upscale", source, tmp_path / "a.zarr", "--model", model, "--budget", "0.85", "--shard", "1/1"]
    run(*command)
    parts = Parts(tmp_path / "a.zarr")
    assert parts.done() == set(range(7))
    parts.forget([2, 3, 6])
    runs = []
    work = image_shards.upscale_bands
    monkeypatch.setattr(image_shards, "upscale_bands", lambda *args: runs.append(args[4]) or work(*args))
    assert "3 bands written, 4 there already; all 7" in run(*command, "--resume")
    assert runs == [(2, 4), (6, 7)]
    assert "0 bands written, 7 there already" in run(*command, "--resume")
    run(*command)
    assert runs[2:] == [(0, 7)], "without --resume a share is done again"
    parts.forget([4])
    assert "a.zarr lacks 1 of 7 bands (4); run the shards again with --resume" in refused("join", tmp_path / "a.zarr")
    run(*command, "--resume")
    run("join", tmp_path / "a.zarr")
    assert "is there already" in run(*command, "--resume")
    assert not parts.folder.exists()


def test_join_after_it_was_killed(small, router, source, tmp_path):
    large = LargeImage(source, tmp_path / "a.zarr", Budget(0.9))
    upscale_share(large, router, Shard(1, 1))
    # It had given the array its name, and not yet removed the rest.
    Parts(large.target).path("image").rename(large.target)
    assert join(large.target) and not join(large.target)
    assert pixels_of(large.target).shape == (600, 524, 3) and not Parts(large.target).folder.exists()
    with pytest.raises(ValueError, match=r"join: there is neither .*b.zarr nor .*b.zarr.parts; run the shards first"):
        join(tmp_path / "b.zarr")


@pytest.mark.slow
def test_nothing_of_a_killed_process_stays(small, router, source, tmp_path, monkeypatch):
    large = LargeImage(source, tmp_path / "a.ome.zarr", Budget(0.9))
    image_shards.begin(large, router)
    parts = Parts(large.target)
    # Killed while it wrote a shard, while it began, and while it replaced an older result.
    left = [tmp_path / ".a.ome.zarr.parts.12ab.part" / "x", tmp_path / ".a.ome.zarr.34cd.part" / "x"]
    for path in (parts.path("image", "0", "c", "0", "3", "0.0123456789abcdef.partial"), *left):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"half")
    upscale_share(large, router, Shard(1, 1))
    removed = shutil.rmtree

    def half(path, **options):
        if not (Path(path) / "facts.json").exists():
            return removed(path, **options)
        (Path(path) / "facts.json").unlink()
        raise KeyboardInterrupt

    # join is killed while it removes the parts.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", half)
        join(large.target)
    assert not join(large.target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ome.zarr", "in.png"]
    assert not list(large.target.rglob("*.partial"))
    assert np.array_equal(pixels_of(large.target), router.upscale(io.read_image(source), budget=0.9).image.permute(1, 2, 0))
    # It can be begun anew.
    upscale_share(large, router, Shard(1, 2))
    assert parts.done() == {0, 1, 2}


@pytest.mark.parametrize("limit", [{}, {"memory_limit": None}, {"memory_limit": 400_000_000}])
def test_a_share_has_the_limit_of_one_process(small, router, source, tmp_path, monkeypatch, limit):
    stream, asked = PatchRouter.stream, []

    def noting(self, *arguments, **options):
        asked.append(options["memory_limit"])
        return stream(self, *arguments, **options)

    monkeypatch.setattr(PatchRouter, "stream", noting)
    upscale_share(LargeImage(source, tmp_path / "out.zarr", Budget(0.9)), router, Shard(1, 1), **limit)
    whole = limit.get("memory_limit", 512 << 20)
    assert asked and (asked == [None] if whole is None else 0.9 * whole < asked[0] < whole)


def test_classes_are_those_of_the_first_that_has_them(small, router, source, tmp_path):
    large = LargeImage(source, tmp_path / "a.zarr", Budget(0.9))
    upscale_share(large, router, Shard(2, 3))
    parts = Parts(large.target)
    first = image_shards.agree_on_classes(large, router)
    assert first.dtype == np.uint8 and first.shape == (25, 22)
    assert np.array_equal(first, parts.agreed("classes", lambda: pytest.fail("made again")))
    # Another process that was slower throws its own away.
    with image_shards.Parts.agreed.__globals__["published_folder"](parts.path("classes")) as late:
        np.save(late / "array.npy", first + 1)
    assert np.array_equal(image_shards.agree_on_classes(large, router), first)
    assert not [path for path in parts.folder.iterdir() if path.name.endswith(".part")]


@pytest.mark.slow
def test_no_two_processes_write_one_band(small, router, source, tmp_path):
    large = LargeImage(source, tmp_path / "a.zarr", Budget(0.9))
    image_shards.begin(large, router)
    folder = Parts(large.target).folder
    hold = "import sys; from fastroute.files.parts import Parts\nwith Parts(sys.argv[1]).claimed(2, 4, 'bands'): "
    hold += "print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold, large.target], stdin=-1, stdout=-1) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(ValueError, match=r"another process is working on bands 0 to 6; is the same shard running twice\?"):
            upscale_share(large, router, Shard(1, 1))
        assert Parts(large.target).done() == set()
        upscale_share(large, router, Shard(3, 3))
        other.send_signal(signal.SIGKILL)
    upscale_share(large, router, Shard(1, 1), resume=True)
    assert Parts(large.target).done() == set(range(7)) and folder.is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("out", "options", "words"),
    [
        ("out.jpg", [], "its format is encoded whole; shards of one image go to .zarr, .ome.zarr, .tif or .png"),
        ("out.zarr", ["--budget-ms", "100"], "budget_ms must be left out with shards, whose machines differ"),
        ("out.zarr", ["--budget", "0.001"], "must lie in"),
        ("out.zarr", ["--class-map", "map.png"], "--class-map is for an image in one process"),
        ("out.zarr", ["--border", "edge"], "border"),
        ("out.zarr", ["--model", "pcsr-fsrcnn-x4"], "shards of one image need a model that routes patches"),
        ("in.png", [], "is an input and would be overwritten"),
        ("no/out.zarr", [], "does not exist"),
        ("out.zarr", ["--shard", "8/3"], "from 1 to the number of shards"),
    ],
)
def test_what_is_refused_before_anything_is_written(model, source, tmp_path, out, options, words):
    before = source.read_bytes()
    assert words in refused("upscale", source, tmp_path / out, "--model", model, "--shard", "1/2", *options)
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"] and source.read_bytes() == before


@pytest.mark.slow
def test_other_settings_and_limits_are_refused(small, model, source, tmp_path):
    command = ["upscale", source, tmp_path / "a.zarr", "--model", model, "--shard", "1/3"]
    run(*command, "--budget", "0.9")
    told = refused(*command, "--budget", "0.85", "--resume")
    assert "begun with other settings (budget was 0.9 and is 0.85)" in told and "a.zarr.parts to begin anew" in told
    told = refused(*command, "--budget", "0.9", "--memory-limit", "1")
    assert "memory-limit" in told and "must be at least" in told
    assert "there is no" not in run(*command, "--budget", "0.9", "--memory-limit", "200")
    (tmp_path / "b.txt").write_text("")
    assert "--resume is for an OUT that is a folder" in refused("upscale", source, tmp_path / "b.zarr", "--resume")


@pytest.mark.slow
def test_what_a_slurm_array_sets(small, model, source, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "8")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    told = run("upscale", source, tmp_path / "a.zarr", "--model", model, "--shard", "auto")
    assert "shard 2/2: 4 bands written; 3 of all 7 are missing" in told


def test_numbers_as_text():
    assert spans([0, 1, 2, 5, 7, 8]) == "0 to 2, 5, 7 to 8" and spans([]) == ""


@pytest.mark.slow
def test_processes_of_which_one_is_killed(model, tmp_path):
    """Three processes share a picture; one dies at random places and is run again until it ends."""
    image = as_image(picture(1, 3, 1200, 400, seed=3), torch.uint8)[0]
    io.write_image(tmp_path / "in.tif", image)
    expected = load(model, tune=False).upscale(image, budget=0.9).image

    def start(number: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "fastroute", "upscale", str(tmp_path / "in.tif"), str(tmp_path / "out.zarr")]
        command += ["--model", str(model), "--budget", "0.9", "--shard", f"{number}/3", "--resume", "--quiet"]
        return subprocess.Popen(command)

    running, draw, kills = {number: start(number) for number in (1, 2, 3)}, random.Random(5), 0
    parts = Parts(tmp_path / "out.zarr")
    for share in (1, 2, 3):
        # At the beginning, in the middle, and near the end of the work.
        while running[share].poll() is None and len(parts.done()) < share:
            time.sleep(0.02)
        time.sleep(draw.random() / 5)
        running[share].kill()
        kills += running[share].wait() == -signal.SIGKILL
        running[share] = start(share)
    assert kills >= 2
    assert [process.wait() for process in running.values()] == [0, 0, 0]
    assert json.loads((parts.folder / "facts.json").read_text())["budget"] == 0.9
    join(tmp_path / "out.zarr")
    assert np.array_equal(pixels_of(tmp_path / "out.zarr"), expected.permute(1, 2, 0).numpy())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.tif", "out.zarr"]
