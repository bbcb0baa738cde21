"""One budget for a folder over several processes: the files of one process, whoever classifies, and whoever dies."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner
from networks import random_classsr
from PIL import Image
from test_shards import contents, photos

from fastroute import load
from fastroute.budget.limits import Budget
from fastroute.cli import main
from fastroute.files import folder_shards
from fastroute.files.folder_shards import SharedFolder
from fastroute.files.jobs import plan_jobs
from fastroute.files.joining import join
from fastroute.files.parts import Parts
from fastroute.files.shards import Shard
from fastroute.models.checkpoints import save_checkpoint

pytestmark = pytest.mark.usefixtures("quick_tuning")
BUDGET = "0.97"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "random.safetensors"
    save_checkpoint(path, random_classsr((3, 5), 2, 8), {"patch": 8, "stride": 6})
    return path


@pytest.fixture
def groups(monkeypatch):
    monkeypatch.setattr(folder_shards, "GROUP", 3)


def call(model: Path, folder: Path, out: Path, *options: str, code: int = 0) -> str:
    given = ["upscale", str(folder), f"{out}/", "--model", str(model), "--shared-budget", *options]
    result = CliRunner().invoke(main, given if "--budget-flops" in options else [*given, "--budget", BUDGET])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.mark.slow
def test_shards_give_the_files_of_one_process(groups, model, tmp_path):
    folder = photos(tmp_path / "in", 11)
    call(model, folder, tmp_path / "whole", "--quiet")
    for number in (3, 1, 2):
        assert f"shard {number}/3" in call(model, folder, tmp_path / "out", "--shard", f"{number}/3", "--resume")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    # A budget of its own for every image spends otherwise.
    own = ["upscale", str(folder), f"{tmp_path / 'own'}/", "--model", str(model), "--budget", BUDGET, "--quiet"]
    assert CliRunner().invoke(main, own).exit_code == 0
    assert contents(tmp_path / "own") != contents(tmp_path / "whole")
    parts = Parts(tmp_path / "out")
    assert parts.folder == tmp_path / "out.parts" and len(list(parts.path("scores").glob("*-sizes.npy"))) == 4
    assert join(tmp_path / "out") and not parts.folder.exists() and not join(tmp_path / "out")


@pytest.mark.slow
def test_folders_that_are_not_there_yet(groups, model, tmp_path):
    folder, out = photos(tmp_path / "in", 4), tmp_path / "not" / "there"
    for number in (1, 2):
        call(model, folder, out, "--shard", f"{number}/2", "--quiet")
    assert len(contents(out)) == 4 and join(out)
    assert [path.name for path in out.parent.iterdir()] == ["there"]


@pytest.mark.slow
def test_a_budget_of_flops(groups, model, tmp_path):
    folder = photos(tmp_path / "in", 5, seed=4)
    least = re.search(r"must be at least (\S+), with", call(model, folder, tmp_path / "a", "--budget-flops", "1", code=2))
    flops = str(1.03 * float(least[1]))
    told = call(model, folder, tmp_path / "out", "--budget-flops", "1", "--shard", "1/2", code=2)
    assert f"must be at least {least[1]}, with" in told
    Parts(tmp_path / "out").remove()
    call(model, folder, tmp_path / "whole", "--budget-flops", flops, "--quiet")
    for number in (1, 2):
        call(model, folder, tmp_path / "out", "--budget-flops", flops, "--quiet", "--shard", f"{number}/2")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_who_classifies_makes_no_difference(groups, model, tmp_path, monkeypatch):
    router, folder = load(model, tune=False), photos(tmp_path / "in", 10)
    jobs = tuple(plan_jobs([folder], tmp_path / "out"))
    shared = SharedFolder(tmp_path / "out", jobs, Budget(float(BUDGET)))
    folder_shards.begin(shared, router)
    done = []
    classified = folder_shards._classified
    monkeypatch.setattr(
        folder_shards, "_classified", lambda *args: done.append(jobs.index(args[2][0]) // 3) or classified(*args)
    )
    # The second of two begins in the middle, and does what the first has left.
    with ThreadPoolExecutor(1) as readers:
        sizes, scores = classified(shared, router, shared.group(3), readers)
    Parts(shared.target).put("scores/000003-sizes", sizes)
    Parts(shared.target).put("scores/000003", scores)
    folder_shards.classify_jobs(shared, router, Shard(2, 2))
    assert done == [2, 0, 1]
    folder_shards.classify_jobs(shared, router, Shard(1, 2))
    assert len(done) == 3
    maps = folder_shards.agree_on_classes(shared, router)
    for job in jobs:
        with Image.open(job.source) as image:
            grid = router.grid(image.height, image.width)
        assert maps(job).shape == (grid.rows, grid.cols)


@pytest.mark.slow
def test_a_damaged_file_has_no_part_and_other_images_are_refused(groups, model, tmp_path):
    folder = photos(tmp_path / "in", 5)
    (folder / "bad.png").write_bytes(b"\x89PNG no picture")
    told = call(model, folder, tmp_path / "out", "--shard", "1/1", code=1)
    assert "1 of 6 images failed" in told and "bad.png" in told
    with pytest.raises(ValueError, match=r"lacks 1 results, such as bad.png; run the shards again with --resume, or remove"):
        join(tmp_path / "out")
    Image.new("RGB", (9, 9)).save(folder / "new.png")
    told = call(model, folder, tmp_path / "out", "--shard", "1/1", "--resume", code=1)
    assert "begun with other settings (images was 6 images" in told and "is 7 images" in told


def test_pixels_and_times_are_refused(model, tmp_path):
    folder = photos(tmp_path / "in", 2)
    told = call(Path("pcsr-fsrcnn-x4"), folder, tmp_path / "out", "--shard", "1/2", code=1)
    assert "a model that routes pixels keeps a shared budget from image to image, in one process" in told
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.slow
def test_processes_of_which_one_is_killed(model, tmp_path):
    folder = photos(tmp_path / "in", 90)
    call(model, folder, tmp_path / "whole", "--quiet")

    def start(number: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "fastroute", "upscale", str(folder), f"{tmp_path / 'out'}/", "--model", str(model)]
        command += ["--shared-budget", "--budget", BUDGET, "--shard", f"{number}/3", "--resume", "--quiet"]
        return subprocess.Popen(command)

    running, draw = {number: start(number) for number in (1, 2, 3)}, random.Random(1)
    victim = draw.randint(1, 3)
    while not Parts(tmp_path / "out").path("scores").is_dir():
        assert running[victim].poll() is None
        time.sleep(0.01)
    running[victim].kill()
    assert running[victim].wait() == -signal.SIGKILL
    running[victim] = start(victim)
    assert [process.wait() for process in running.values()] == [0, 0, 0]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
