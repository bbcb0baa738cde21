"""Shares of a folder: together they are all of it, none twice, and about equally large."""

from __future__ import annotations

import importlib.util
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from mixed_files import ramp
from networks import random_classsr
from PIL import Image

from fastroute.cli import main
from fastroute.files.jobs import Job, plan_jobs
from fastroute.files.joining import join
from fastroute.files.shards import Shard, pixels_of
from fastroute.models.checkpoints import save_checkpoint

SCRIPT = Path(__file__).parents[1] / "examples" / "upscale_array.sbatch"
pytestmark = pytest.mark.usefixtures("quick_tuning")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "random.safetensors"
    save_checkpoint(path, random_classsr((3, 5), 2, 8), {"patch": 8, "stride": 6})
    return path


def photos(folder: Path, count: int, seed: int = 0) -> Path:
    """Pictures of 1 to 900 pixels, in folders of several depths."""
    draw = random.Random(seed)
    for n in range(count):
        path = folder / ("deeper" if n % 3 else ".") / f"{n:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ramp(draw.randint(1, 30), draw.randint(1, 30))).save(path)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_every_job_belongs_to_one_shard(tmp_path, count):
    jobs = plan_jobs([photos(tmp_path / "in", 200, seed=count)], tmp_path / "out")
    shares = [Shard(number, count).share(jobs) for number in range(1, count + 1)]
    assert sorted(job.source for share in shares for job in share) == sorted(job.source for job in jobs)
    assert all(share == [job for job in jobs if job in share] for share in shares)
    pixels = [sum(map(pixels_of, share)) for share in shares]
    mean = sum(pixels) / count
    assert max(pixels) <= max(1.1 * mean, max(map(pixels_of, jobs)))
    # What is there already, and the order of the files, make no difference.
    again = Shard(1, count).share(list(reversed(jobs)))
    assert sorted(job.source for job in again) == sorted(job.source for job in shares[0])


@pytest.mark.slow
def test_shares_are_balanced_within_a_tenth(tmp_path):
    jobs = plan_jobs([photos(tmp_path / "in", 1000)], tmp_path / "out")
    pixels = [sum(map(pixels_of, Shard(number, 4).share(jobs))) for number in range(1, 5)]
    assert max(pixels) < 1.1 * min(pixels)


def test_damaged_files_have_a_shard(tmp_path):
    (tmp_path / "damaged.png").write_bytes(b"no picture")
    jobs = [Job(tmp_path / "damaged.png", tmp_path / "a.png"), Job(tmp_path / "gone.png", tmp_path / "b.png")]
    assert [pixels_of(job) for job in jobs] == [10, 0]
    assert [Shard(1, 2).share(jobs), Shard(2, 2).share(jobs)] == [jobs[:1], jobs[1:]]


def test_shards_of_the_environment():
    array = {"SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_COUNT": "4"}
    assert Shard.of_environment(array) == Shard(3, 4)
    assert Shard.of_environment({"RANK": "0", "WORLD_SIZE": "2"}) == Shard(1, 2)
    assert Shard.of_environment({**array, "RANK": "0", "WORLD_SIZE": "2"}) == Shard(3, 4)
    for nothing in ({}, {"RANK": "0"}, {"RANK": "x", "WORLD_SIZE": "2"}):
        with pytest.raises(ValueError, match="shard: neither SLURM_ARRAY_TASK_ID"):
            Shard.of_environment(nothing)
    with pytest.raises(ValueError, match="from 1 to the number of shards; got 5/4"):
        Shard.of_environment({**array, "SLURM_ARRAY_TASK_ID": "14"})


@pytest.mark.slow
def test_shards_give_what_one_run_gives(model, tmp_path, monkeypatch):
    folder = photos(tmp_path / "in", 9)

    def call(out: str, *options: str) -> str:
        result = CliRunner().invoke(main, ["upscale", str(folder), f"{tmp_path / out}/", "--model", str(model), *options])
        assert result.exit_code == 0, result.output
        return result.output

    call("whole", "--quiet")
    for number in range(1, 4):
        told = call("shares", "--shard", f"{number}/3", "--resume")
        assert f"shard {number}/3: 3 of 9 images" in told and "3 written" in told
    assert contents(tmp_path / "shares") == contents(tmp_path / "whole")
    assert "3 there already" in call("shares", "--shard", "2/3", "--resume")
    monkeypatch.setenv("RANK", "11")
    monkeypatch.setenv("WORLD_SIZE", "12")
    assert "shard 12/12: 0 of 9 images" in call("none", "--shard", "auto")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shard", "0/3"], "from 1 to the number of shards; got 0/3"),
        (["--shard", "4/3"], "from 1 to the number of shards; got 4/3"),
        (["--shard", "3"], "such as 3/16; got '3'"),
        (["--shard", "-1/3"], "such as 3/16; got '-1/3'"),
        (["--shard", "1/2", "--shared-budget", "--budget-ms", "9"], "budget_ms must be left out with shards"),
        (["--shard", "1/2", "--shared-budget"], "--shared-budget needs --budget"),
        (["--shard", "1/2", "--overwrite"], "--shard must find the same inputs in every process"),
    ],
)
def test_what_is_refused(model, tmp_path, options, words):
    folder = photos(tmp_path / "in", 2)
    result = CliRunner().invoke(main, ["upscale", str(folder), f"{tmp_path / 'out'}/", "--model", str(model), *options])
    assert result.exit_code == 2 and words in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_processes_of_which_one_is_killed(model, tmp_path):
    """Four shards side by side; the one that is killed is run again and completes."""
    folder = photos(tmp_path / "in", 120)
    single = CliRunner().invoke(main, ["upscale", str(folder), f"{tmp_path / 'whole'}/", "--model", str(model), "--quiet"])
    assert single.exit_code == 0, single.output

    def start(number: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "fastroute", "upscale", str(folder), f"{tmp_path / 'shares'}/", "--model", str(model)]
        return subprocess.Popen([*command, "--shard", f"{number}/4", "--resume", "--quiet"])

    running = {number: start(number) for number in range(1, 5)}
    victim = random.Random(3).randint(1, 4)
    while not (tmp_path / "shares").is_dir() or len(contents(tmp_path / "shares")) < 10:
        assert running[victim].poll() is None
        time.sleep(0.02)
    running[victim].send_signal(signal.SIGKILL)
    assert running[victim].wait() == -signal.SIGKILL
    running[victim] = start(victim)
    assert [process.wait() for process in running.values()] == [0] * 4
    assert contents(tmp_path / "shares") == contents(tmp_path / "whole")
    assert not [path for path in (tmp_path / "shares").rglob("*") if path.is_file() and path.suffix != ".png"]


@pytest.mark.parametrize(
    ("source", "result"), [("photos", "out/"), ("photos/", "out/"), ("scan.png", "out"), ("a.zarr", "out"), ("a.zarr/", "out")]
)
def test_the_script_for_slurm_tells_folders_from_images(tmp_path, source, result):
    for folder in ("photos", "a.zarr"):
        (tmp_path / folder).mkdir()
    (tmp_path / "scan.png").touch()
    (tmp_path / "fastroute").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "fastroute").chmod(0o755)
    environment = {**os.environ, "PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]])}
    command = ["bash", str(SCRIPT), source, "out", "--budget", "0.7"]
    passed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert passed == ["upscale", source.rstrip("/"), result, "--shard", "auto", "--resume", "--quiet", "--budget", "0.7"]


@pytest.mark.slow
def test_the_script_for_slurm(model, tmp_path):
    """As Slurm runs it, for two tasks, with the command of this environment."""
    folder, commands = photos(tmp_path / "in", 4), tmp_path / "bin"
    commands.mkdir()
    (commands / "fastroute").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m fastroute "$@"\n')
    (commands / "fastroute").chmod(0o755)
    path = os.pathsep.join([str(commands), os.environ["PATH"]])
    for task in (7, 8):
        array = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_MIN": "7", "SLURM_ARRAY_TASK_COUNT": "2"}
        command = ["bash", str(SCRIPT), str(folder), str(tmp_path / "out"), "--model", str(model)]
        subprocess.run(command, env={**os.environ, **array, "PATH": path, "SLURM_CPUS_PER_TASK": "1"}, check=True)
        if importlib.util.find_spec("zarr"):
            command[2:4] = [str(folder / "0000.png"), str(tmp_path / "image.zarr")]
            subprocess.run(command, env={**os.environ, **array, "PATH": path, "SLURM_CPUS_PER_TASK": "1"}, check=True)
    assert len(contents(tmp_path / "out")) == 4
    if importlib.util.find_spec("zarr"):
        assert join(tmp_path / "image.zarr"), "one image"
    assert subprocess.run(["bash", str(SCRIPT), "in"], capture_output=True, check=False).returncode == 2
