"""Two processes under torchrun train what one process trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_processes
from interrupted import equal
from networks import picture
from torch import Tensor

from fastroute import io
from fastroute.models.checkpoints import read_checkpoint
from fastroute.training import classsr, distributed
from fastroute.training.data import Pool

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
NAMES = tuple(training_processes.RECIPES)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(2):
        io.write_image(folder / f"{number}.png", (picture(1, 3, 130, 140 + number, seed=number)[0] * 255).to(torch.uint8))
    return folder


@pytest.fixture(scope="module")
def pool(images):
    return Pool.build(images, scale=2, patch=8, shrinks=(1.0,))


@pytest.fixture(scope="module")
def two(images, tmp_path_factory):
    """What two processes left behind."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, training_processes.__file__, str(images), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    return folder, run


def states(folder: Path, name: str) -> list[dict[str, Tensor]]:
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_like_one_process(two, pool, tmp_path, name):
    first, second = states(two[0], name)
    assert equal(first, second)
    one = training_processes.trainer(name, pool, tmp_path / "state.pt")
    before = {key: value.clone() for key, value in one.model.state_dict().items()}
    after = one.run().state_dict()
    assert any((after[key] - value).abs().max() > 1e-3 for key, value in before.items() if value.is_floating_point())
    for key, value in after.items():
        assert torch.equal(first[key].isnan(), value.isnan())
        got, wanted, start = (x.double().nan_to_num() for x in (first[key], value, before[key]))
        # Gradients are sums of other order. Adam divides by their size: of weights whose gradients nearly vanish, a part of a
        # step depends on that order, of all weights together little does.
        assert (got - wanted).norm() <= 1e-4 * (wanted - start).norm() + 1e-6 * wanted.norm()


def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(two):
    first, second = states(two[0], "resumed")
    assert equal(first, second) and equal(first, states(two[0], "cdnsr")[0])


def test_command(two):
    folder, run = two
    # Only the first process writes and speaks.
    assert run.stdout.count("patches from 2 images") == run.stdout.count("wrote ") == 1
    assert read_checkpoint(folder / "arm-fsrcnn-x4.safetensors")[0]["classifier.table.psnr"].isfinite().all()
    assert (folder / "config.yaml").exists()


def test_refusals(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 3)
    with pytest.raises(ValueError, match="train: batch must be a multiple of the processes, 3; got 4"):
        training_processes.trainer("classsr", pool, tmp_path / "state.pt")
    recipe = classsr.Recipe("carn", (4, 8), 2, 8, (1, 1), batch=3)
    with pytest.raises(ValueError, match="batch norms need the whole batch: train this backbone in one process, or on GPUs"):
        classsr.Trainer(pool, recipe, tmp_path / "state.pt")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("RANK", "2"), ("LOCAL_RANK", "2"), ("WORLD_SIZE", "3"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "size", lambda: 1)
    with pytest.raises(ValueError, match="must be at most the number of GPUs, 2"), distributed.processes("cuda"):
        pass


def test_an_error_of_the_first_process(monkeypatch):
    """It reaches the others, which would wait for ever."""
    sent = []
    monkeypatch.setattr(distributed, "size", lambda: 2)

    def fail() -> None:
        raise ValueError("no")

    def broadcast(box: list, src: int) -> None:
        if sent:
            box[:] = sent
        else:
            sent.extend(box)

    monkeypatch.setattr(distributed.dist, "broadcast_object_list", broadcast)
    for number in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        with pytest.raises(ValueError, match="no"):
            distributed.from_first(fail)
