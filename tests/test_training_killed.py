"""A training killed at any moment ends bit for bit like one that was not."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from interrupted import equal
from networks import picture

from fastroute.models.checkpoints import read_checkpoint
from fastroute.training.classsr import Recipe, Trainer
from fastroute.training.data import Pool

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
RECIPE = Recipe(
    widths=(3, 4), scale=2, patch=8, branch_steps=(3, 3), classifier_steps=3, joint_steps=3, routing_steps=3, batch=2
)


# Of a process that has not computed gradients: what torch starts for them does not live on in a fork. It imports what takes
# this module seconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fastroute.training.classsr", "torch._dynamo.testing"])


def build(folder: Path) -> Pool:
    return Pool.build(folder, scale=2, patch=8, shrinks=(1.0,))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    from fastroute.io import write_image

    folder = tmp_path_factory.mktemp("images")
    write_image(folder / "0.png", (picture(1, 3, 60, 70)[0] * 255).to(torch.uint8))
    return folder


@pytest.fixture(scope="module")
def pool(images):
    return build(images)


def train(images: Path, path: Path, place: str | None, number: int) -> None:
    """What runs aside: a training that saves after each step, and dies at its `number`-th saving, in the midst of it."""
    torch.set_num_threads(1)
    count, save, replace = [0], torch.save, os.replace

    def dying(*args):
        count[0] += 1
        last = count[0] == number
        if place == "within the file":
            whole = io.BytesIO()
            save(args[0], whole)
            args[1].write(whole.getvalue()[: whole.tell() // 2 if last else None])
            args[1].flush()
        elif place == "after the renaming" or not last:
            replace(*args)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    if place == "within the file":
        torch.save = dying
    elif place is not None:
        os.replace = dying
    Trainer(build(images), RECIPE, path, save_every=1).run()


def train_aside(images: Path, path: Path, place: str | None = None, number: int = 0, after: float | None = None) -> bool:
    """See `train`; or killed `after` seconds from its first saving. Whether it was killed."""
    inode = path.stat().st_ino if path.exists() else None
    process = CONTEXT.Process(target=train, args=(images, path, place, number))
    process.start()
    while process.is_alive():
        if after is not None and path.exists() and path.stat().st_ino != inode:
            time.sleep(after)
            process.kill()
            break
        time.sleep(1e-3)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def ends_like(pool: Pool, path: Path, folder: Path) -> None:
    whole = Trainer(pool, RECIPE, folder / "whole.pt").run()
    assert equal(Trainer(pool, RECIPE, path, save_every=1).run().state_dict(), whole.state_dict())
    # Half-written files are gone.
    assert sorted(os.listdir(folder)) == ["state.pt", "whole.pt"]


def test_at_random_moments(images, pool, tmp_path):
    path, draw = tmp_path / "state.pt", random.Random(0)
    reached = set()
    for _ in range(4):
        if not train_aside(images, path, after=draw.uniform(0, 0.02)):
            break
        state, _ = read_checkpoint(path)
        reached.add((state["stage"], state["step"]))
    assert len(reached) > 1
    ends_like(pool, path, tmp_path)


@pytest.mark.parametrize(
    ("place", "number"),
    [("within the file", 1), ("within the file", 9), ("before the renaming", 6), ("after the renaming", 6)],
)
def test_while_saving(images, pool, tmp_path, place, number):
    path = tmp_path / "state.pt"
    assert train_aside(images, path, place, number)
    assert path.exists() == (number > 1 or place == "after the renaming")
    ends_like(pool, path, tmp_path)
