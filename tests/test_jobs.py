"""Folders as people have them: every file is taken or named, nothing is lost, and a run that ended anyhow is completed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from mixed_files import absurd_png, ramp
from networks import random_classsr
from PIL import Image

import fastroute
from fastroute import io
from fastroute.cli import main
from fastroute.files import many_files
from fastroute.files.jobs import begin_run, make_plan
from fastroute.models.checkpoints import save_checkpoint
from fastroute.models.fsrcnn import FSRCNN

pytestmark = pytest.mark.usefixtures("quick_tuning")
LIMIT = ("--memory-limit", "400")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "random.safetensors"
    save_checkpoint(path, random_classsr((3, 5, 9), 2, 8), {"patch": 8, "stride": 6})
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def photo(path: Path, size: tuple[int, int] = (9, 13), **options: object) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(ramp(*size)).save(path, **options)
    return path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["upscale", *map(str, arguments)])


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def hundred(folder: Path) -> tuple[list[str], list[str]]:
    """100 files, of which 20 are damaged, 5 cannot be read and 3 are no images: the names of the good and of the bad."""
    good = [f"deep/{n:02}.jpg" if n % 3 == 0 else f"{n:02}.tif" if n % 3 == 1 else f"{n:02}.png" for n in range(72)]
    for name in good:
        photo(folder / name)
    whole = {ending: photo(folder / f"whole.{ending}", (40, 40)).read_bytes() for ending in ("png", "jpg", "tif", "webp")}
    bad = []
    for number in range(20):
        ending = ("png", "jpg", "tif", "webp")[number % 4]
        name = f"damaged-{number:02}.{ending}"
        # Cut short, at some place behind the head, or a header that claims too much.
        data = whole[ending][: len(whole[ending]) * (number + 5) // 40] if number else absurd_png(90000, 90000)
        (folder / name).write_bytes(data)
        bad.append(name)
    for ending in whole:
        (folder / f"whole.{ending}").unlink()
    for number in range(3):
        (folder / f"lost-{number}.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "round.png").symlink_to("round.png")
    for name in ("text.png", "page.jpg", "empty.tif"):
        (folder / name).write_text("" if name == "empty.tif" else "<html>")
    others = ["lost-0.png", "lost-1.png", "lost-2.png", "pipe.png", "round.png", "text.png", "page.jpg", "empty.tif"]
    assert len(names(folder)) == 100
    return sorted(good), sorted(bad + others)


def check_hundred(result: Result, folder: Path, out: Path, good: list[str], bad: list[str]) -> None:
    assert result.exit_code == 1 and "Traceback" not in result.output, result.output
    assert names(out) == good
    assert "28 of 100 images failed:" in result.output
    for name in bad:
        lines = [line for line in result.output.splitlines() if line.startswith(f"  cannot read {folder / name}: ")]
        # A reason of some words, and nobody has to know Python for it.
        assert len(lines) == 1 and len(lines[0].split(": ", 1)[1]) > 8 and "Error" not in lines[0], (name, lines)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), LIMIT])
def test_a_hundred_files(model, folder, tmp_path, options):
    good, bad = hundred(folder)
    out = tmp_path / "out"
    check_hundred(call(folder, out, "--model", model, *options), folder, out, good, bad)
    first = {name: (out / name).read_bytes() for name in good}
    for name in good[::2]:
        (out / name).unlink()
    result = call(folder, out, "--model", model, "--resume", *options)
    check_hundred(result, folder, out, good, bad)
    assert "36 written" in result.output and "36 there already" in result.output
    assert {name: (out / name).read_bytes() for name in good} == first


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), LIMIT])
def test_a_hundred_files_after_a_kill(model, folder, tmp_path, options):
    good, bad = hundred(folder)
    out, place = tmp_path / "out", random.Random(len(options))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(fastroute.__file__).parents[1]), *sys.path])}
    arguments = [sys.executable, "-m", "fastroute", "upscale", folder, out, "--model", model, "--quiet", *options]
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL)
    until, least = time.monotonic() + 60, place.randrange(1, 50)
    while len(names(out) if out.is_dir() else []) < least and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.001)
    time.sleep(place.random() / 100)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    for name in names(out):
        if name in good:
            assert Image.open(out / name).size == (26, 18)
    # What a killed process may leave where files cannot be nameless.
    (out / good[0]).unlink(missing_ok=True)
    (out / f".{good[0]}.0a1b.part").write_bytes(b"half")
    check_hundred(call(folder, out, "--model", model, "--resume", *options), folder, out, good, bad)


@pytest.mark.slow
def test_what_is_no_image_is_named(model, folder, tmp_path):
    photo(folder / "a.png")
    photo(folder / "noext", format="PNG")
    pages = [Image.fromarray(ramp()) for _ in range(3)]
    pages[0].save(folder / "pages.tif", save_all=True, append_images=pages[1:])
    pages[0].save(folder / "anim.gif", save_all=True, append_images=[Image.fromarray(255 - ramp())])
    (folder / "notes.txt").write_text("no image")
    (folder / "again").symlink_to(".")
    (tmp_path / "far").mkdir()
    photo(tmp_path / "far" / "b.jfif", format="JPEG")
    (folder / "far").symlink_to(tmp_path / "far")
    out = tmp_path / "out"
    result = call(folder, out, "--model", model)
    assert result.exit_code == 0 and names(out) == ["a.png", "anim.png", "far/b.jfif", "noext.png", "pages.tif"], result.output
    for words in (
        "5 images: 5 written",
        "left out: 2 files",
        f"no image, neither by its content nor by its ending: {folder}/notes.txt",
        f"a link to {folder}, which is looked at already: {folder}/again",
        f"{out}/pages.tif",
        f"{out}/anim.png",
    ):
        assert words in result.output, result.output
    assert call(folder, out, "--model", model, "--quiet").output == ""
    result = call(f"{folder}/*", tmp_path / "two", "--model", model)
    assert f"by its ending: {folder}/notes.txt" in result.output and len(names(tmp_path / "two")) >= 5


@pytest.mark.slow
def test_class_maps_never_take_the_place_of_a_result(model, folder, tmp_path):
    photo(folder / "x.jpg")
    photo(folder / "x.jpg.png")
    out = tmp_path / "out"
    result = call(folder, out, "--model", model, "--class-map", out)
    assert result.exit_code == 1 and f"the class map of {folder}/x.jpg would be written to {out}/x.jpg.png" in result.output
    assert not out.exists()
    assert call(folder, out, "--model", model, "--class-map", tmp_path / "maps", "--quiet").exit_code == 0
    assert names(tmp_path / "maps") == ["x.jpg.png", "x.jpg.png.png"]
    # One picture may have one map, as a file; many may not.
    result = call(folder, tmp_path / "two", "--model", model, "--class-map", tmp_path / "m.png")
    assert result.exit_code == 2 and "is one file; OUT is a folder" in result.output and not (tmp_path / "m.png").exists()
    arguments = (folder / "x.jpg", f"{tmp_path}/three/", "--model", model, "--quiet", "--class-map")
    assert call(*arguments, tmp_path / "m.png").exit_code == 0 and Image.open(tmp_path / "m.png").size == (26, 18)
    assert "where the result of" in call(*arguments, tmp_path / "three" / "x.jpg").output


@pytest.mark.slow
def test_folders_that_are_not_there_yet(model, folder, tmp_path):
    photo(folder / "a.png")
    assert call(folder / "a.png", f"{tmp_path}/new/er/", "--model", model, "--quiet").exit_code == 0
    assert names(tmp_path / "new") == ["er/a.png"]
    result = call(folder / "a.png", tmp_path / "other", "--model", model)
    assert (
        result.exit_code == 2 and "a folder that is to be made ends in /" in result.output and not (tmp_path / "other").exists()
    )


@pytest.mark.slow
def test_resuming_with_other_settings_is_refused(model, folder, tmp_path):
    for name in ("a.png", "b.png"):
        photo(folder / name)
    out, other = tmp_path / "out", tmp_path / "other.safetensors"
    save_checkpoint(other, random_classsr((3, 5, 9), 2, 8, seed=1), {"patch": 8, "stride": 6})
    assert call(folder, out, "--model", model, "--budget", 0.9, "--quiet").exit_code == 0
    before = {name: (out / name).read_bytes() for name in names(out)}
    (out / "b.png").unlink()
    for options, words in (
        ((), "budget was 0.9 and is not given"),
        (("--budget", 0.8), "budget was 0.9 and is 0.8"),
        (("--budget", 0.9, "--format", "webp"), "format was not given and is webp"),
        (("--budget", 0.9, "--window", "linear"), "window was not given and is linear"),
        (("--budget", 0.9, "--model", other), "model was random.safetensors ("),
    ):
        result = call(folder, out, "--model", model, "--resume", *options)
        assert result.exit_code == 1 and words in result.output and "other settings" in result.output, result.output
        assert names(out) == ["a.png"]
    # Neither memory nor passes decide what comes out.
    result = call(folder, out, "--model", model, "--budget", 0.9, "--resume", "--memory-limit", 400, "--batch", 3)
    assert result.exit_code == 0 and "1 there already;" in result.output
    assert (out / "a.png").read_bytes() == before["a.png"]
    # What an earlier run with other settings made is done again, also where a later one ended before its time.
    router = fastroute.load(model)
    since = begin_run(out, {"budget": 0.5}, resume=False)
    plan = make_plan([folder], out)
    assert since is not None and not any(many_files.is_done(job, since + 60) for job in plan.jobs)
    assert begin_run(out, {"budget": 0.5}, resume=True) == since
    assert begin_run(tmp_path / "unknown", {}, resume=True) is None
    assert [o.skipped for o in many_files.run_jobs(router, plan.jobs, resume=True, since=since + 60)] == [False, False]


@pytest.mark.slow
def test_what_cannot_be_written_is_told_before_computing(model, folder, tmp_path, monkeypatch):
    for name in ("a.png", "b.png", f"{'n' * 251}.png"):
        photo(folder / name)
    out = tmp_path / "out"
    (out / "a.png").mkdir(parents=True)
    read = []
    original = io.read_picture
    monkeypatch.setattr(io, "read_picture", lambda path, **o: (read.append(path.name), original(path, **o))[1])
    result = call(folder, out, "--model", model, "--class-map", tmp_path / "maps")
    assert result.exit_code == 1 and read == ["b.png"] and "2 of 3 images failed" in result.output
    assert f"cannot write {out}/a.png: it is a folder" in result.output and "File name too long" in result.output
    assert len(names(out)) == 1
    # Without a class map, whose name is longer, the longest names are written.
    assert call(folder, tmp_path / "two", "--model", model, "--quiet").exit_code == 0
    assert len(names(tmp_path / "two")) == 3


@pytest.mark.slow
def test_names_that_are_no_text(model, folder, tmp_path):
    name = os.fsdecode(b"x\xff.png")
    photo(folder / name)
    photo(folder / "a.png")
    out = tmp_path / "out"
    assert call(folder, out, "--model", model).exit_code == 0 and names(out) == ["a.png", name]
    result = call(folder / name, out / "single.png", "--model", model)
    assert result.exit_code == 0 and "x\\udcff.png" in result.output
    page = tmp_path / "page.html"
    result = CliRunner().invoke(
        main, ["compare", str(folder / name), "--models", str(model), "--out", str(page), "--runs", "1"]
    )
    assert result.exit_code == 0 and "x?.png" in page.read_text()


@pytest.mark.slow
def test_options_of_a_run(model, folder, tmp_path):
    photo(folder / "a.png", (60, 80))
    sizes = []
    for quality in (5, 95):
        out = tmp_path / str(quality)
        assert call(folder, out, "--model", model, "--format", "jpg", "--quality", quality, "--quiet").exit_code == 0
        sizes.append((out / "a.jpg").stat().st_size)
        assert call(folder / "a.png", tmp_path / "a.jpg", "--model", model, "--quality", quality, "--quiet").exit_code == 0
        assert (tmp_path / "a.jpg").read_bytes() == (out / "a.jpg").read_bytes()
    assert 2 * sizes[0] < sizes[1]
    router, image = fastroute.load(model, window="linear", batch=3), io.read_image(folder / "a.png")
    assert router.window == "linear" and router.networks.batch == 3
    out = tmp_path / "linear.png"
    assert call(folder / "a.png", out, "--model", model, "--window", "linear", "--batch", 3, "--quiet").exit_code == 0
    assert (io.read_image(out) == router.upscale(image).image).all()
    result = call(folder / "a.png", tmp_path / "b.png", "--model", model, "--max-pixels", 4799)
    assert result.exit_code == 1 and "60" in result.output and "raise --max-pixels" in result.output
    for most in (4800, "none"):
        assert call(folder / "a.png", tmp_path / "b.png", "--model", model, "--max-pixels", most, "--quiet").exit_code == 0
    for options, words in (
        (("--quality", 5), "--quality is for JPEG and WebP"),
        (("--quality", 0), "--quality"),
        (("--window", "round"), "'round' is not one of"),
        (("--white", 0), "must be positive and finite"),
        (("--max-pixels", 0), "positive number or none"),
    ):
        result = call(folder / "a.png", tmp_path / "c.png", "--model", model, *options)
        assert result.exit_code == 2 and words in result.output and not (tmp_path / "c.png").exists()


class Ended(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Ended, KeyboardInterrupt])
def test_a_callback_counts_and_ends_a_run(model, folder, tmp_path, kind):
    for number in range(8):
        photo(folder / f"{number}.png")
    router, out, seen = fastroute.load(model), tmp_path / "out", []
    jobs = make_plan([folder], out).jobs
    assert len(list(many_files.run_jobs(router, jobs, progress=lambda *of: seen.append(of)))) == 8
    assert seen == [(n, 8) for n in range(1, 9)]
    for path in out.iterdir():
        path.unlink()

    def end(done: int, total: int) -> None:
        if done == 3:
            raise kind

    with pytest.raises(kind):
        list(many_files.run_jobs(router, jobs, progress=end))
    left = names(out)
    assert 3 <= len(left) < 8 and all(Image.open(out / name).size == (26, 18) for name in left)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Ended, KeyboardInterrupt])
@pytest.mark.parametrize("pixels", [False, True])
def test_a_callback_ends_a_call(folder, tmp_path, kind, pixels):
    """Of one image: what was there stays, and nothing else is."""
    source = photo(folder / "a.tif", (400, 300))
    router = (
        fastroute.load("pcsr-fsrcnn-x4")
        if pixels
        else fastroute.PatchRouter([FSRCNN(3, 2)], None, patch=8, stride=8, scale=2, batch=8)
    )
    seen: list[tuple[int, int]] = []
    router.upscale(io.read_image(source), progress=lambda *of: seen.append(of))
    assert seen and seen[-1][0] == seen[-1][1] and [done for done, _ in seen] == sorted({done for done, _ in seen})

    def end(done: int, total: int) -> None:
        raise kind

    with pytest.raises(kind):
        router.upscale(io.read_image(source), progress=end)
    target = tmp_path / "out.tif"
    target.write_bytes(b"old")
    with pytest.raises(kind):
        fastroute.upscale_file(source, target, router, progress=end)
    assert target.read_bytes() == b"old" and names(tmp_path) == ["in/a.tif", "out.tif"]
