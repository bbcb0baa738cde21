"""A real Ray cluster of several nodes on this machine, of which one is killed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mixed_files import ramp
from PIL import Image
from sleeping import black

import fastroute.ray
from fastroute import io
from fastroute.files.jobs import plan_jobs
from fastroute.ray.runs import BEGUN_AT_MOST, IN_HAND

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_tuning")]
HERE = Path(__file__).parent
STORE = 80 << 20


class Cluster:
    """Machines of one CPU each, beside the one that runs the programs."""

    def __init__(self, nodes: int) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE})
        # A GPU that is counted, and that nothing uses.
        has = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": STORE}
        self.nodes = [self.cluster.add_node(wait=False, **has) for _ in range(nodes)]
        self.cluster.wait_for_nodes()
        self.address = self.cluster.address

    def kill(self) -> None:
        """Kill a machine, without a farewell."""
        self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)

    def stored(self) -> int:
        """The bytes of memory that the object stores of all machines have touched so far."""
        total = 0
        for node in [self.cluster.head_node, *self.nodes]:
            open_files = Path(f"/proc/{node.all_processes['raylet'][0].process.pid}/fd")
            stores = [file for file in open_files.iterdir() if "/plasma" in os.readlink(file)]
            assert len(stores) == 1
            total += stores[0].stat().st_blocks * 512
        return total


@pytest.fixture
def cluster(request, monkeypatch) -> Iterator[Cluster]:
    pytest.importorskip("ray.data", reason='Ray is missing: pip install ".[ray]"')
    # Sockets need a short path. Nodes and workers inherit the environment.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]))
        # A dead node is given up after some seconds, as others wait for it.
        monkeypatch.setenv("RAY_health_check_period_ms", "1000")
        monkeypatch.setenv("RAY_health_check_failure_threshold", "3")
        running = Cluster(request.param)
        try:
            yield running
        finally:
            fastroute.ray.cluster.imported().shutdown()
            running.cluster.shutdown()


def photos(folder: Path, count: int, side: int = 24) -> Path:
    folder.mkdir()
    for n in range(count):
        Image.fromarray(ramp(side + n % 3, side)).save(folder / f"{n:04d}.png")
    return folder


def command(*options: object) -> list[str]:
    return [sys.executable, "-m", "fastroute", "upscale", *map(str, options)]


class Watch(threading.Thread):
    """Notes how often each file of a folder was written; every time, it is another file of that name."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.found, self.ended = folder, dict[str, set[int]](), threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.01):
            for entry in os.scandir(self.folder):
                if entry.name.endswith(".png"):
                    self.found.setdefault(entry.name, set()).add(entry.inode())

    def again(self) -> list[str]:
        """The files that were written more than once."""
        self.ended.set()
        self.join()
        return [name for name, files in self.found.items() if len(files) > 1]


@pytest.mark.parametrize("cluster", [2], indirect=True)
def test_the_command_line_with_a_node_that_is_killed(cluster, tmp_path):
    folder, out = photos(tmp_path / "in", 40), tmp_path / "out"
    (folder / "broken.png").write_text("no picture")
    # Workers have a working directory of their own.
    options = ["in", "out/", "--model", "sleeping:network", "--resume"]
    first = subprocess.run(command(*options, "--shard", "1/8"), cwd=tmp_path, capture_output=True, text=True, check=False)
    there = len(list(out.iterdir()))
    assert 4 <= there <= 6, first.stderr
    watch = Watch(out)
    watch.start()
    process = subprocess.Popen(
        command(*options, "--ray", cluster.address), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    latest = time.monotonic() + 300
    while len(list(out.iterdir())) < there + 10:
        assert process.poll() is None and time.monotonic() < latest, process.communicate()
        time.sleep(0.02)
    cluster.kill()
    told, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert f"41 images: {40 - there} written to out, {there} there already, 1 failed" in told, errors
    assert f"1 of 41 images failed:\n  cannot read {folder}/broken.png: not an image" in errors
    # One bar, and no word of Ray's.
    bars, _, rest = errors.rpartition("\r")
    assert {bar.split(":")[0].strip() for bar in bars.split("\r")} <= {"upscale", ""}, errors
    assert re.search(r"upscale: 100%.* 41/41 .*1 failed\]", errors)
    assert rest.replace(f"{tmp_path}", "").lower().count("ray") == 0, rest
    assert sorted(path.name for path in out.iterdir()) == [f"{n:04d}.png" for n in range(40)]
    for path in out.iterdir():
        source = io.read_image(folder / path.name)
        assert torch.equal(io.read_image(path), source.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert len(watch.again()) <= IN_HAND[0]


@pytest.mark.soak
@pytest.mark.parametrize("cluster", [3], indirect=True)
def test_a_model_that_is_missing_and_images_that_kill_their_workers(cluster, tmp_path):
    import ray
    import sleeping

    folder = photos(tmp_path / "in", 30)
    jobs = plan_jobs([folder], tmp_path / "out")
    with fastroute.ray.connected(cluster.address):
        with pytest.raises(fastroute.ray.ClusterError, match=r"cannot run the workers: .*no such model on this machine"):
            list(fastroute.ray.run_jobs(jobs, sleeping.wrong))
        with pytest.raises(fastroute.ray.ClusterError, match="no machine of the cluster has 1 CPUs and 2 GPUs"):
            list(fastroute.ray.run_jobs(jobs, sleeping.router, num_gpus=2))
        for name in ("0007.png", "0020.png"):
            io.write_image(folder / name, black())
        done = {outcome.job.source.name: outcome for outcome in fastroute.ray.run_jobs(jobs, sleeping.router, num_gpus=1)}
        assert len(done) == 30 == len(ray.nodes()) * 10 - 10
        failed = {name: outcome.error for name, outcome in done.items() if outcome.error}
        assert failed == {
            name: f"cannot upscale {folder / name}: its worker died {BEGUN_AT_MOST} times, perhaps for want of memory"
            for name in ("0007.png", "0020.png")
        }
        assert len(list((tmp_path / "out").iterdir())) == 28


@pytest.mark.soak
@pytest.mark.parametrize("cluster", [3], indirect=True)
def test_five_hundred_images_with_a_node_that_is_killed_at_a_third(cluster, tmp_path):
    """Files, statistics, the object store, and the time beside that of the machines that lived."""
    folder, out = photos(tmp_path / "in", 500, 96), tmp_path / "out"
    jobs, done, times, stored = plan_jobs([folder], out), [], [], []
    third = len(jobs) // 3
    with fastroute.ray.connected(cluster.address):
        start = time.perf_counter()
        for outcome in fastroute.ray.run_jobs(jobs, budget=0.7):
            done.append(outcome)
            times.append(time.perf_counter() - start)
            if len(done) == third:
                stored.append(cluster.stored())
                cluster.kill()
        total = time.perf_counter() - start
        stored.append(cluster.stored())
    assert sorted(str(outcome.job.source) for outcome in done) == sorted(str(job.source) for job in jobs)
    assert not [outcome.error for outcome in done if outcome.error]
    assert all(outcome.stats is not None and sum(outcome.stats.counts_per_class) > 0 for outcome in done)
    router = fastroute.load()
    for outcome in done:
        image = io.read_image(outcome.job.source)
        assert torch.equal(io.read_image(outcome.job.target), router.upscale(image, budget=0.7).image)
    ideal = times[third - 1] + (len(jobs) - third) * 3 / 2 * (times[third - 1] - times[0]) / (third - 1)
    print(f"{total:.1f} s, {total / ideal:.2f} of the ideal {ideal:.1f} s, {max(stored) / 1e6:.2f} MB in the object stores")
    # The results are 223 MB.
    assert 0 < max(stored) < 20e6
