"""`run_jobs`: the jobs of a folder on a Ray cluster."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fastroute.catalogue import DEFAULT_MODEL
from fastroute.files.jobs import Job
from fastroute.files.many_files import Outcome, Router, sort_out
from fastroute.io.files import remove_parts
from fastroute.io.write import check_quality
from fastroute.ray.cluster import ClusterError, cause_of, imported
from fastroute.ray.upscaler import Upscaler, stats_of
from fastroute.runtime.progress import Progress, shown

# The images that a worker has in hand at a time, on a CPU and on a GPU: while one of them is computed, the others are read and
# written. Encoding takes longer than a GPU computes.
IN_HAND = (2, 8)
# How often an image is begun before it is given up. An image that kills its worker must not keep a run from its end.
BEGUN_AT_MOST = 3


def run_jobs(
    jobs: Sequence[Job],
    model: str | Path | Router | Callable[[], Router] = DEFAULT_MODEL,
    *,
    resume: bool = False,
    since: float = 0.0,
    num_cpus: float = 1,
    num_gpus: float = 0,
    concurrency: int | None = None,
    progress: Progress = False,
    **upscaler: Any,
) -> Iterator[Outcome]:
    """:func:`fastroute.files.many_files.run_jobs` on a Ray cluster: workers on its machines take the jobs one by one.

    All machines must see the files under the same paths. If a worker or its machine dies, the images that it had in hand are
    done again elsewhere, and no others. An image whose worker died three times is reported as failed.

    Args:
        jobs: see :func:`fastroute.files.jobs.plan_jobs`.
        model: see :class:`Upscaler`.
        resume, since: see :func:`fastroute.files.many_files.run_jobs`.
        num_cpus, num_gpus: CPUs and GPUs for each worker, not both 0.
        concurrency: number of workers. By default as many as the machines of the cluster have room for.
        progress: show a progress bar, or call this function with the number of jobs that have ended and the number of all jobs.
        **upscaler: other arguments of :class:`Upscaler`, such as `device` and `budget`.

    Yields:
        An :class:`fastroute.files.many_files.Outcome` per job: first for jobs that are skipped or cannot be written, then for
        the others as they end.

    Raises:
        ImportError: Ray is missing.
        ClusterError: workers cannot be started, for example because the model is missing on their machine.
    """
    ray = imported()
    check_quality("run_jobs", upscaler.get("quality"))
    if not num_cpus and not num_gpus:
        raise ValueError("run_jobs: num_cpus and num_gpus must not both be 0, or all workers would run on one machine")
    model = found_anywhere(model)
    ended, rest = sort_out(jobs, resume, since)
    with shown(progress, len(jobs), "image") as bar:
        for outcome in ended:
            bar.update()
            yield outcome
        try:
            for outcome in _run(ray, rest, {"model": model, **upscaler}, num_cpus, num_gpus, concurrency) if rest else ():
                bar.update()
                yield outcome
        finally:
            # Where a file system has no nameless files, those that a dead worker was writing are left.
            remove_parts(path for job in rest for path in (job.target, job.class_map) if path is not None)


def _run(
    ray: Any, jobs: Sequence[Job], options: dict[str, Any], num_cpus: float, num_gpus: float, concurrency: int | None
) -> Iterator[Outcome]:
    if not ray.is_initialized():
        ray.init()
    if concurrency is None:
        concurrency = min(_room(ray, num_cpus, num_gpus), len(jobs))
        if not concurrency:
            needed = f"{num_cpus:g} CPUs and {num_gpus:g} GPUs"
            raise ClusterError(f"run_jobs: no machine of the cluster has {needed}; give concurrency to wait for one that has")
    in_hand = IN_HAND[bool(num_gpus)]
    begun = _start_begun(ray)
    rows = [
        {
            "number": n,
            "path": os.path.abspath(job.source),
            "target": os.path.abspath(job.target),
            "class_map": os.path.abspath(job.class_map) if job.class_map else "",
        }
        for n, job in enumerate(jobs)
    ]
    # A block, and so a task, for each image: a dead worker loses only the images that it had in hand.
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    # These settings are the dataset's own.
    dataset.context.enable_progress_bars = dataset.context.print_on_execution_start = False
    pool = ray.data.ActorPoolStrategy(
        size=concurrency, max_concurrent_calls_per_actor=in_hand, enable_true_multi_threading=True
    )
    done = dataset.map_batches(
        CountingUpscaler,
        batch_size=1,
        fn_constructor_kwargs={"begun": begun, "in_hand": in_hand, **options},
        compute=pool,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )
    try:
        for row in done.iter_rows():
            notes = tuple(row["notes"].splitlines())
            yield Outcome(jobs[row["number"]], row["error"], stats=stats_of(row), notes=notes)
    except ray.exceptions.RayError as error:
        raise ClusterError(
            f"run_jobs: Ray cannot run the workers: {cause_of(error)}; every machine needs fastroute, the model and the files "
            "under the same paths"
        ) from error


def found_anywhere(model: Any) -> Any:
    """`model`, whose path is absolute if it is a file: workers have a working directory of their own."""
    return os.path.abspath(model) if isinstance(model, str | Path) and os.path.isfile(model) else model


def _room(ray: Any, num_cpus: float, num_gpus: float) -> int:
    """How many workers the machines of the cluster have room for."""
    needs = {name: number for name, number in (("CPU", num_cpus), ("GPU", num_gpus)) if number > 0}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(has.get(name, 0) / number) for name, number in needs.items()) for has in nodes)


class Begun:
    """How often the work on each image was begun and not ended: an actor on the machine of the program that runs the jobs."""

    def __init__(self) -> None:
        self.times: Counter[int] = Counter()

    def count(self, number: int) -> int:
        """How often image `number` was begun and not ended."""
        return self.times[number]

    def begin(self, number: int) -> None:
        """Count once more."""
        self.times[number] += 1

    def end(self, number: int) -> None:
        """Forget the count: no worker died over the image."""
        del self.times[number]


def _start_begun(ray: Any) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=-1)(Begun).remote()


class CountingUpscaler(Upscaler):
    """An :class:`Upscaler` that gives up images whose workers die.

    An image that is begun again is the only one in hand, so that no other image shares its fate.
    """

    def __init__(self, *args: Any, begun: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.begun, self.alone = begun, threading.Lock()

    @contextmanager
    def begin(self, row: Mapping[str, Any]) -> Iterator[str]:
        """See :meth:`Upscaler.begin`."""
        import ray

        number, count = row["number"], ray.get(self.begun.count.remote(row["number"]))
        if count >= BEGUN_AT_MOST:
            yield f"cannot upscale {row['path']}: its worker died {count} times, perhaps for want of memory"
            return
        with ExitStack() as held:
            if count:
                held.enter_context(self.alone)
            for _ in range(self.threads if count else 1):
                held.enter_context(self.in_hand)
            ray.get(self.begun.begin.remote(number))
            yield ""
            # A worker may die over another image before Ray has taken the outcome of this one. Then it is done again.
            ray.get(self.begun.end.remote(number))
