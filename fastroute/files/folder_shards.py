"""One budget for the images of a folder that several processes upscale, without knowing of each other.

All images are classified first, by all processes together. One of them divides the budget over all patches of all images, and
the others take the classes that it has found. Then each upscales its share. The steps are functions, which another driver may
call: `begin`, `classify_jobs`, `agree_on_classes`, and :func:`fastroute.files.many_files.run_jobs` with `class_map_of`. What
they hand on to each other lies in :class:`fastroute.files.parts.Parts` beside the folder of the results.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastroute.backends import BackendError
from fastroute.budget.limits import Budget
from fastroute.files.jobs import Job
from fastroute.files.many_files import READERS, Router, check_result_fits, read_ahead
from fastroute.files.parts import Parts
from fastroute.files.shards import Shard
from fastroute.files.shared_budget import SharedPatchBudget, share_budget
from fastroute.io.hidden import fill_hidden
from fastroute.patch.classify import Scores, classifying_flops
from fastroute.patch.patch_router import PatchRouter
from fastroute.runtime.progress import Progress, shown
from fastroute.runtime.transfer import to_device

OP = "upscale"
# The number of images whose scores lie in one file.
GROUP = 16


@dataclass(frozen=True)
class SharedFolder:
    """A folder of images that share one budget, the same in all processes.

    Attributes:
        target: folder of the results.
        jobs: all images, in one order.
        limit: what the classes of all images may cost: a fraction or FLOPs.
        reading: see :func:`fastroute.io.read_picture`.
        drop_alpha: leave transparency out.
        settings: what else the results depend on, such as the model, by name.
    """

    target: Path
    jobs: tuple[Job, ...]
    limit: Budget
    reading: Mapping[str, Any] = field(default_factory=dict)
    drop_alpha: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        """The number of groups of images."""
        return -(-len(self.jobs) // GROUP)

    def group(self, number: int) -> tuple[Job, ...]:
        """The images of a group."""
        return self.jobs[number * GROUP : (number + 1) * GROUP]

    def inputs(self) -> str:
        """What all processes must find alike: the number of images, and a digest of their names and sizes."""
        digest = hashlib.sha256()
        for job in self.jobs:
            size = job.source.stat().st_size if job.source.is_file() else -1
            digest.update(os.fsencode(f"{os.path.relpath(job.target, self.target)} {size}\n"))
        return f"{len(self.jobs)} images ({digest.hexdigest()[:12]})"


def begin(folder: SharedFolder, router: Router) -> None:
    """Make the folder of what the processes hand on to each other, unless another process has. Nothing is computed.

    Raises:
        ValueError: the budget is impossible, the router cannot share it, or others began with other settings or images.
    """
    _budget(folder, router)
    names = [os.path.relpath(job.target, folder.target) for job in folder.jobs]
    facts = {"images": folder.inputs(), **folder.settings}
    folder.target.parent.mkdir(parents=True, exist_ok=True)
    Parts(folder.target).begin(facts, lambda new: Parts.note(new, "results", {"names": names}))


def classify_jobs(folder: SharedFolder, router: PatchRouter, shard: Shard, progress: Progress = False) -> None:
    """Store the scores of the patches of all images, by groups of images, those of the shard first.

    What others have stored by the time its turn comes is left out. So processes that run side by side share the work, and none
    waits for another. An image that cannot be read or whose result cannot be written has no part of the budget.
    """
    parts = Parts(folder.target)
    if parts.path("classes").is_dir():
        return
    first = folder.groups * (shard.number - 1) // shard.count
    with ThreadPoolExecutor(READERS, "read") as readers, shown(progress, len(folder.jobs), "image", "classify") as bar:
        for group in (*range(first, folder.groups), *range(first)):
            if not parts.has(_scores(group)):
                sizes, scores = _classified(folder, router, folder.group(group), readers)
                parts.put(_sizes(group), sizes)
                # Its presence says that both are there.
                parts.put(_scores(group), scores)
            bar.update(len(folder.group(group)))


def _classified(
    folder: SharedFolder, router: PatchRouter, jobs: tuple[Job, ...], readers: ThreadPoolExecutor
) -> tuple[np.ndarray, np.ndarray]:  # [n, 2], [N, K]
    """Height and width of each picture, 0 without a part of the budget, and the scores of their patches."""
    looked, sizes = _budget(folder, router), np.zeros((len(jobs), 2), np.int64)
    for n, (job, future) in enumerate(read_ahead(jobs, readers, folder.drop_alpha, folder.reading)):
        try:
            picture = future.result()
            check_result_fits(router, job, picture)
            looked.look(to_device(fill_hidden(picture.color, picture.alpha), router.device))
        except BackendError:
            raise
        except Exception:  # whatever is wrong with a file is told by the process that upscales it
            continue
        sizes[n] = picture.height, picture.width
    found = [score.float().cpu() for score in looked.scores]
    return sizes, torch.cat(found).numpy() if found else np.zeros((0, router.num_classes), np.float32)


def agree_on_classes(folder: SharedFolder, router: PatchRouter) -> Callable[[Job], Tensor]:
    """Divide the budget over all images, unless another process has.

    Returns:
        For each job the classes of its patches, [rows, cols]; what :func:`fastroute.files.many_files.run_jobs` takes.

    Raises:
        ValueError: the images need more than the budget.
    """
    parts = Parts(folder.target)
    sizes = np.concatenate([parts.get(_sizes(group)) for group in range(folder.groups)])
    grids = [router.grid(int(height), int(width)) if height else None for height, width in sizes]

    def make() -> np.ndarray:
        shared, places = _budget(folder, router), iter(grids)
        for group in range(folder.groups):
            score = torch.from_numpy(parts.get(_scores(group))).to(router.device)
            for grid in (next(places) for _ in folder.group(group)):
                if grid is not None:
                    own, score = score[: grid.num_patches], score[grid.num_patches :]
                    shared.add(1, grid, Scores(own, classifying_flops(shared.classifier, router.channels, grid)))
        shared.settle()
        maps = [ids.to("cpu", torch.uint8) for ids in shared.maps]
        return torch.cat(maps).numpy() if maps else np.zeros(1, np.uint8)

    classes = parts.agreed("classes", make)
    ends = np.cumsum([0 if grid is None else grid.num_patches for grid in grids]).tolist()
    number = {job: n for n, job in enumerate(folder.jobs)}

    def class_map_of(job: Job) -> Tensor:
        n = number[job]
        grid = grids[n]
        if grid is None:
            raise ValueError("it could not be read when all images were classified; run it again on its own")
        own = np.array(classes[ends[n] - grid.num_patches : ends[n]])
        return torch.from_numpy(own).view(grid.rows, grid.cols)

    return class_map_of


def _budget(folder: SharedFolder, router: Router) -> SharedPatchBudget:
    """An empty budget of all images.

    Raises:
        ValueError: it is impossible, or not one for processes that do not know of each other.
    """
    if folder.limit.ms is not None:
        raise ValueError(f"{OP}: budget_ms must be left out with shards, whose machines differ; give budget or budget_flops")
    shared = share_budget(router, folder.limit, len(folder.jobs), OP)  # type: ignore[arg-type]
    if not isinstance(shared, SharedPatchBudget):
        raise ValueError(
            f"{OP}: a model that routes pixels keeps a shared budget from image to image, in one process; leave out --shard, "
            "or give each image a budget"
        )
    return shared


def _scores(group: int) -> str:
    return f"scores/{group:06}"


def _sizes(group: int) -> str:
    return f"scores/{group:06}-sizes"
