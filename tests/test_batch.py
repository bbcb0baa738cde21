"""Many files at once: what is written, what is told, and what an end at any moment leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from mixed_files import ramp, write_bad, write_kinds
from networks import random_classsr
from PIL import Image

import fastroute
from fastroute import io
from fastroute.cli import main
from fastroute.files import many_files
from fastroute.files.pictures import upscale_picture
from fastroute.models.checkpoints import save_checkpoint

pytestmark = pytest.mark.usefixtures("quick_tuning")
# Those that cannot be read: `write_bad` tells of them, and a link that leads nowhere.
BAD = ("bad-cut.png", "bad-cut.tif", "bad-empty.jpg", "bad-header.png", "bad-link.png", "bad-text.png")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "random.safetensors"
    save_checkpoint(path, random_classsr((3, 5, 9), 2, 8), {"scale": 2, "patch": 8, "stride": 6})
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in" / "deep" / "er").mkdir(parents=True)
    return tmp_path / "in"


def photo(path: Path, height: int = 9, width: int = 13) -> Path:
    Image.fromarray(ramp(height, width)).save(path)
    return path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["upscale", *map(str, arguments)])


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


@pytest.mark.slow
def test_forty_mixed_files(model, folder, tmp_path):
    good, bad = write_kinds(folder), write_bad(folder)
    (folder / "notes.txt").write_text("passed over")
    assert len(good) + len(BAD) == 40 and set(bad) < set(BAD)
    out = tmp_path / "out"
    result = call(folder, out, "--model", model)
    assert result.exit_code == 1 and names(out) == sorted(good), result.output
    assert "40 images: 34 written" in result.output and "6 of 40 images failed:" in result.output
    for name in BAD:
        reasons = [line for line in result.output.splitlines() if f"cannot read {folder / name}: " in line]
        assert len(reasons) == 1 and bad.get(name, "No such file") in reasons[0], name
    router = fastroute.load(model)
    for name, path in good.items():
        picture = io.read_picture(path)
        single, _ = upscale_picture(router, picture)
        io.write_picture(tmp_path / f"single-{name}", single)
        assert (out / name).read_bytes() == (tmp_path / f"single-{name}").read_bytes(), name
        written = io.read_picture(out / name)
        assert (written.width, written.height) == (2 * picture.width, 2 * picture.height)
        assert (written.bits, written.alpha is None) == (picture.bits, picture.alpha is None), name


@pytest.mark.slow
def test_resume_does_what_is_missing(model, folder, tmp_path, monkeypatch):
    for name in ("a.png", "b.png", "c.png", "deep/er/d.png"):
        photo(folder / name)
    out = tmp_path / "out"
    assert call(folder, out, "--model", model, "--quiet").exit_code == 0
    assert names(out) == ["a.png", "b.png", "c.png", "deep/er/d.png"]
    whole = {name: (out / name).read_bytes() for name in names(out)}
    (out / "b.png").unlink()
    (out / "a.png").write_bytes(b"kept: it is newer than its source")
    # A source that has changed since is done again.
    later = time.time() + 10
    os.utime(folder / "c.png", (later, later))
    (out / "c.png").write_bytes(b"old")
    (out / ".b.png.x1.part").write_bytes(b"of a killed process")
    read = []
    original = io.read_picture
    monkeypatch.setattr(io, "read_picture", lambda path: (read.append(path.name), original(path))[1])
    result = call(folder, out, "--model", model, "--resume")
    assert result.exit_code == 0 and "2 written" in result.output and "2 there already" in result.output
    assert sorted(read) == ["b.png", "c.png"] and names(out) == list(whole)
    assert (out / "a.png").read_bytes().startswith(b"kept")
    assert all((out / name).read_bytes() == whole[name] for name in ("b.png", "c.png"))


@pytest.mark.slow
def test_names_and_formats(model, folder, tmp_path):
    for name in ("a.png", "deep/b.JPG", "deep/er/c.tif"):
        photo(folder / name)
    assert call(folder, tmp_path / "one", "--model", model, "--quiet").output == ""
    assert names(tmp_path / "one") == ["a.png", "deep/b.JPG", "deep/er/c.tif"]
    call(folder, tmp_path / "two", "--model", model, "--format", "webp", "--class-map", tmp_path / "maps", "--quiet")
    assert names(tmp_path / "two") == ["a.webp", "deep/b.webp", "deep/er/c.webp"]
    assert names(tmp_path / "maps") == ["a.png.png", "deep/b.JPG.png", "deep/er/c.tif.png"]
    assert Image.open(tmp_path / "maps" / "a.png.png").size == Image.open(tmp_path / "two" / "a.webp").size == (26, 18)
    (tmp_path / "three").mkdir()
    assert call(folder / "a.png", tmp_path / "three", "--model", model, "--quiet").exit_code == 0
    assert names(tmp_path / "three") == ["a.png"]
    call(folder / "*.png", folder / "deep", tmp_path / "four", "--model", model, "--quiet")
    assert names(tmp_path / "four") == ["a.png", "deep/b.JPG", "deep/er/c.tif"]
    call(f"{folder}/**/*.[tJ]*", tmp_path / "five", "--model", model, "--quiet")
    assert names(tmp_path / "five") == ["b.JPG", "c.tif"]


@pytest.mark.slow
def test_an_output_folder_among_the_inputs_is_not_read(model, folder):
    photo(folder / "a.png")
    for _ in range(2):
        assert call(folder, folder / "x4", "--model", model, "--quiet").exit_code == 0
        assert names(folder) == ["a.png", "x4/a.png"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["in", "in"], ["is an input and would be overwritten", "--overwrite"]),
        (["in/a.png", "in/a.png"], ["is an input and would be overwritten", "--overwrite"]),
        (["in/a.png", "in/link.png"], ["is an input"]),
        (["in/a.png", "out.png", "--class-map", "in/a.png"], ["is an input"]),
        (["in", "out", "--format", "jpg"], ["would both be written to out/a.jpg"]),
        (["in", "out.png"], ["cannot read in", "OUT must be a folder"]),
        (["in/a.png", "in/a.bmp", "out.png"], ["there are several inputs, so OUT must be a folder"]),
        (["in/*.gif", "out"], ["no image matches in/*.gif"]),
        (["in/deep", "out"], ["no image file in in/deep, the output folder apart"]),
        (["in", "out", "--resume", "--overwrite"], ["--resume cannot tell"]),
        (["in/a.png", "out.png", "--resume"], ["--resume is for an OUT that is a folder"]),
        (["in/a.png", "out.png", "--format", "jpg"], ["--format is for an OUT that is a folder"]),
        (["in", "out", "--budget", "0.01"], ["for --budget: budget must lie in ["]),
        (["in", "out", "--scale", "3"], ["--scale", "upscales by 2 alone"]),
        (["in", "out", "--penalty", "1", "--budget", "1"], ["give one of --budget and --penalty"]),
        (["in", "file/out"], ["cannot make the folder file/out"]),
    ],
)
def test_refused_before_anything_is_written(model, folder, tmp_path, monkeypatch, arguments, words):
    for name in ("a.png", "a.bmp"):
        photo(folder / name)
    (folder / "link.png").symlink_to("a.png")
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = call(*arguments, "--model", model)
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit), result.output
    assert all(word in result.output for word in words), result.output
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_overwriting_on_request(model, folder):
    photo(folder / "a.png")
    assert call(folder, folder, "--model", model, "--overwrite", "--quiet").exit_code == 0
    assert Image.open(folder / "a.png").size == (26, 18)
    assert call(folder / "a.png", folder / "a.png", "--model", model, "--overwrite", "--quiet").exit_code == 0
    assert Image.open(folder / "a.png").size == (52, 36)


@pytest.mark.slow
def test_what_the_target_cannot_hold_is_told_before_computing(model, folder, tmp_path, monkeypatch):
    Image.fromarray(ramp(channels=4)).save(folder / "clear.png")
    photo(folder / "long.png", 1, 8200)
    photo(folder / "good.png")
    out = tmp_path / "out"
    result = call(folder, out, "--model", model, "--format", "webp")
    assert result.exit_code == 1 and names(out) == ["clear.webp", "good.webp"]
    assert "long.webp: WEBP holds at most 16,383 pixels a side; it has 16400 x 2" in result.output
    result = call(folder, out, "--model", model, "--format", "jpg")
    assert result.exit_code == 1 and "clear.jpg: JPEG holds no transparency" in result.output and (out / "good.jpg").exists()
    assert call(folder / "clear.png", out / "clear.jpg", "--model", model, "--drop-alpha").exit_code == 0
    assert Image.open(out / "clear.jpg").size == (26, 18)


@pytest.mark.slow
def test_failures_of_one_file_stop_no_other(folder, tmp_path, monkeypatch):
    for name in "abcd":
        photo(folder / f"{name}.png", width={"a": 13, "b": 14, "c": 15, "d": 16}[name])
    system = random_classsr((3, 5, 9), 2, 8)
    router = fastroute.PatchRouter(system.branches, system.classifier, patch=8, stride=6, scale=2)
    upscale, write = router.upscale, io.write_picture

    def failing(image, **options):
        if image.shape[2] == 14:
            raise MemoryError
        return upscale(image, **options)

    def full(path, picture):
        if path.name == "c.png":
            raise io.ImageError(f"cannot write {path}: no space left")
        write(path, picture)

    monkeypatch.setattr(router, "upscale", failing)
    monkeypatch.setattr(io, "write_picture", full)
    outcomes = {o.job.source.name: o for o in many_files.run_jobs(router, many_files.plan_jobs([folder], tmp_path / "out"))}
    assert outcomes["b.png"].error == f"cannot upscale {folder / 'b.png'}: out of memory; give a memory limit, or cut the image"
    assert outcomes["c.png"].error.endswith("c.png: no space left")
    assert sorted(outcomes) == ["a.png", "b.png", "c.png", "d.png"] and names(tmp_path / "out") == ["a.png", "d.png"]
    assert outcomes["a.png"].stats is not None and sum(outcomes["a.png"].stats.counts_per_class) > 0


@pytest.mark.slow
def test_little_is_read_ahead(folder, tmp_path, monkeypatch):
    for number in range(12):
        photo(folder / f"{number:02}.png")
    system = random_classsr((3, 5, 9), 2, 8)
    router = fastroute.PatchRouter(system.branches, system.classifier, patch=8, stride=6, scale=2)
    read, lead = [], []
    original, upscale = io.read_picture, router.upscale
    monkeypatch.setattr(io, "read_picture", lambda path: (read.append(path), original(path))[1])
    monkeypatch.setattr(router, "upscale", lambda image, **o: (lead.append(len(read) - len(lead)), upscale(image, **o))[1])
    assert not any(o.error for o in many_files.run_jobs(router, many_files.plan_jobs([folder], tmp_path / "out")))
    assert len(lead) == 12 and 1 < max(lead) <= many_files.AHEAD + 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killing_leaves_whole_files_and_resume_completes(model, folder, tmp_path, number):
    for index in range(30):
        photo(folder / f"{index:02}.png", 60, 80)
    out = tmp_path / "out"
    path = os.pathsep.join([str(Path(fastroute.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    arguments = [sys.executable, "-m", "fastroute", "upscale", folder, out, "--model", model, "--quiet"]
    process = subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while len(list(out.glob("*.png")) if out.is_dir() else []) < 3:
        assert time.monotonic() < until and process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "Traceback" not in errors
    left = names(out)
    assert 3 <= len(left) < 30 and all(name in {f"{index:02}.png" for index in range(30)} for name in left), left
    for name in left:
        assert io.read_image(out / name).shape == (3, 120, 160)
    times = {name: (out / name).stat().st_mtime_ns for name in left}
    assert call(folder, out, "--model", model, "--resume", "--quiet").exit_code == 0
    assert len(names(out)) == 30 and all((out / name).stat().st_mtime_ns == times[name] for name in left)
    assert torch.equal(io.read_image(out / "29.png"), io.read_image(out / "00.png"))
