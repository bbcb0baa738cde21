"""A training killed at any moment ends bit for bit like one that was not."""

from __future__ import annotations

import io
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from interrupted import equal
from networks import picture

from fastroute.models.checkpoints import read_checkpoint
from fastroute.training.classsr import Recipe, Trainer
from fastroute.training.data import Pool

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]
RECIPE = Recipe(
    widths=(3, 4), scale=2, patch=8, branch_steps=(3, 3), classifier_steps=3, joint_steps=3, routing_steps=3, batch=2
)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    from fastroute.io import write_image

    folder = tmp_path_factory.mktemp("images")
    write_image(folder / "0.png", (picture(1, 3, 60, 70)[0] * 255).to(torch.uint8))
    return Pool.build(folder, scale=2, patch=8, shrinks=(1.0,))


def train_aside(pool: Pool, path: Path, before: Callable[[], None] = lambda: None, after: float | None = None) -> bool:
    """Train in a process that saves after each step, killed `after` seconds from its first saving; whether it was killed."""
    inode = path.stat().st_ino if path.exists() else None
    child = os.fork()
    if child == 0:
        try:
            before()
            Trainer(pool, RECIPE, path, save_every=1).run()
            os._exit(0)
        finally:
            # The tests go on in the parent alone.
            os._exit(1)
    status = None
    while after is not None and status is None:
        ended, code = os.waitpid(child, os.WNOHANG)
        if ended:
            status = code
        elif path.exists() and path.stat().st_ino != inode:
            time.sleep(after)
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(1e-3)
    status = os.waitpid(child, 0)[1] if status is None else status
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def ends_like(pool: Pool, path: Path, folder: Path) -> None:
    whole = Trainer(pool, RECIPE, folder / "whole.pt").run()
    assert equal(Trainer(pool, RECIPE, path, save_every=1).run().state_dict(), whole.state_dict())
    # Half-written files are gone.
    assert sorted(os.listdir(folder)) == ["state.pt", "whole.pt"]


def test_at_random_moments(pool, tmp_path):
    path, draw = tmp_path / "state.pt", random.Random(0)
    reached = set()
    for _ in range(4):
        if not train_aside(pool, path, after=draw.uniform(0, 0.02)):
            break
        state, _ = read_checkpoint(path)
        reached.add((state["stage"], state["step"]))
    assert len(reached) > 1
    ends_like(pool, path, tmp_path)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("place", "number"),
    [("within the file", 1), ("within the file", 9), ("before the renaming", 6), ("after the renaming", 6)],
)
def test_while_saving(pool, tmp_path, place, number):
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
            die()

    def before() -> None:
        if place == "within the file":
            torch.save = dying
        else:
            os.replace = dying

    path = tmp_path / "state.pt"
    assert train_aside(pool, path, before)
    assert path.exists() == (number > 1 or place == "after the renaming")
    ends_like(pool, path, tmp_path)
