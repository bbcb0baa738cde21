"""Many image files: reading and writing run in parallel to the computing. :mod:`fastroute.files.jobs` plans the jobs."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from torch import Tensor

from fastroute import buffers, io
from fastroute.backends import BackendError
from fastroute.budget.limits import Budget
from fastroute.cascades.router import CascadeRouter
from fastroute.files.jobs import Job, check_apart, check_distinct, is_done, make_plan, plan_jobs
from fastroute.files.pictures import upscaled_picture
from fastroute.files.shared_budget import share_budget
from fastroute.io.files import remove_parts, why_not_writable
from fastroute.io.hidden import fill_hidden
from fastroute.io.write import check_quality
from fastroute.patch.patch_router import PatchRouter
from fastroute.pixel.pixel_router import PixelRouter
from fastroute.runtime.border import EDGE, MARGIN, shown_continued
from fastroute.runtime.progress import Progress, shown
from fastroute.runtime.results import RoutingStats, Upscaled
from fastroute.runtime.transfer import to_device
from fastroute.visualize import class_overlay


def usable_cores() -> int:
    """The number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(cores: int) -> tuple[int, int]:
    """The numbers of readers and writers for a router with `cores` cores. Encoding takes longest, and a GPU waits for it."""
    writers = max(2, min(8, cores // 2))
    return max(2, writers // 2), writers


READERS, WRITERS = threads(usable_cores())
# The number of pictures read ahead, and limits on the results that wait to be written, in number and in bytes.
AHEAD, BEHIND, BEHIND_BYTES = READERS, WRITERS + 1, 1 << 30
# The exceptions to expect from a file with which something is wrong. Running out of memory on a GPU is a RuntimeError.
EXPECTED = (ValueError, TypeError, OSError, MemoryError, RuntimeError)

Router = PatchRouter | PixelRouter | CascadeRouter
__all__ = ["Job", "Outcome", "check_apart", "check_distinct", "make_plan", "plan_jobs", "run_jobs"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a job.

    Attributes:
        job: the job.
        error: why its target was not written; empty if it was.
        skipped: whether the target existed already.
        stats: statistics of the routing, if the job was run.
        notes: what was left out or changed on the way from file to file, in whole sentences.
    """

    job: Job
    error: str = ""
    skipped: bool = False
    stats: RoutingStats | None = None
    notes: tuple[str, ...] = ()


def run_jobs(
    router: Router,
    jobs: Sequence[Job],
    resume: bool = False,
    drop_alpha: bool = False,
    shared_budget: bool = False,
    quality: int | None = None,
    reading: Mapping[str, Any] | None = None,
    since: float = 0.0,
    progress: Progress = False,
    class_map_of: Callable[[Job], Tensor] | None = None,
    **options: Any,
) -> Iterator[Outcome]:
    """Run the jobs. Threads read and write files while the router works.

    A file that fails does not stop the others. Every target is written completely or not at all, after its class map.

    Args:
        router: a router, such as :func:`fastroute.load` returns.
        jobs: see :func:`plan_jobs`.
        resume: skip jobs whose target exists and is not older than its source or than `since`.
        drop_alpha: leave transparency out.
        shared_budget: whether all images share the budget among `options`, see :func:`fastroute.upscale_many`. Each image is
            then read twice.
        quality: quality of JPEG and WebP, 1 to 100.
        reading: arguments of :func:`fastroute.io.read_picture`, such as `max_pixels`.
        since: see :func:`fastroute.files.jobs.begin_run`.
        progress: show a progress bar, or call this function with the number of jobs that have ended and the number of all jobs.
            If it raises, the run ends as after Ctrl-C: files that are being written are completed, and no others are begun.
        class_map_of: returns the classes of the patches of a job's picture, instead of a budget, see
            :mod:`fastroute.files.folder_shards`.
        options: arguments of the router's `upscale`, such as `budget`.

    Yields:
        An :class:`Outcome` per job: first for jobs that are skipped or cannot be written, then for the others as they end.

    Raises:
        ValueError: a shared budget cannot be kept.
        fastroute.BackendError: the requested backend cannot run, so no job could.
    """
    check_quality("run_jobs", quality)
    saving = {} if quality is None else {"quality": quality}
    given = (saving, dict(reading or {}), since, class_map_of, options)
    outcomes = _run_jobs(router, jobs, resume, drop_alpha, shared_budget, *given)
    with closing(outcomes), shown(progress, len(jobs), "image") as bar:
        for outcome in outcomes:
            bar.update()
            yield outcome


def _run_jobs(
    router: Router,
    jobs: Sequence[Job],
    resume: bool,
    drop_alpha: bool,
    shared_budget: bool,
    saving: Mapping[str, Any],
    reading_options: Mapping[str, Any],
    since: float,
    class_map_of: Callable[[Job], Tensor] | None,
    options: dict[str, Any],
) -> Generator[Outcome, None, None]:
    """See :func:`run_jobs`."""
    ended, left = sort_out(jobs, resume, since)
    yield from ended
    rest, shared, number = deque(left), None, 0
    if shared_budget and rest:
        limit = Budget(*(options.pop(name, None) for name in ("budget", "budget_flops", "budget_ms")))
        shared = share_budget(cast(Any, router), limit, len(rest), "upscale", **options)
        options.pop("memory_limit", None)
    readers, writers = ThreadPoolExecutor(READERS, "read"), ThreadPoolExecutor(WRITERS, "write")
    reading: deque[tuple[Job, Future[io.Picture]]] = deque()
    writing: deque[tuple[Outcome, int, Future[None]]] = deque()
    try:
        if shared is not None:
            seen: list[Job] = []
            for job, future in read_ahead(rest, readers, drop_alpha, reading_options):
                try:
                    picture = future.result()
                    check_result_fits(router, job, picture, **options)
                    shared.look(to_device(fill_hidden(picture.color, picture.alpha), router.device))
                except BackendError:
                    raise
                except Exception as error:
                    yield Outcome(job, reason_of(job, error))
                    continue
                seen.append(job)
            shared.settle()
            rest = deque(seen)
        while rest or reading or writing:
            while rest and len(reading) < AHEAD + 1:
                job = rest.popleft()
                reading.append((job, readers.submit(read_job, job, drop_alpha, **reading_options)))
            if writing and (writing[0][2].done() or not reading):
                yield _ended(writing.popleft())
                continue
            while len(writing) >= BEHIND or sum(size for _, size, _ in writing) > BEHIND_BYTES:
                yield _ended(writing.popleft())
            job, future = reading.popleft()
            upscale = partial(router.upscale, **options) if shared is None else partial(shared.upscale, number)
            number += 1
            try:
                picture = future.result()
                check_result_fits(router, job, picture, **options)
                if class_map_of is not None:
                    decided: dict[str, Any] = {"class_map": class_map_of(job), "promote": True}
                    upscale = partial(router.upscale, **decided, **options)
                result, upscaled = upscaled_picture(picture, router.device, upscale)
            except BackendError:
                raise
            except Exception as error:
                yield Outcome(job, reason_of(job, error))
                continue
            size = result.color.numel() * result.color.itemsize
            notes = (*picture.origin.notes, *io.not_kept(job.target, result))
            write = writers.submit(write_job, router, job, result, upscaled, **saving)
            writing.append((Outcome(job, stats=upscaled.stats, notes=notes), size, write))
            # Only the writer keeps a reference, so the memory is free as soon as the file is written.
            del picture, result, upscaled, write, future
    finally:
        # Files that are being written are completed; no others are begun.
        readers.shutdown(cancel_futures=True)
        writers.shutdown(cancel_futures=True)


def read_ahead(
    jobs: Sequence[Job], readers: ThreadPoolExecutor, drop_alpha: bool, reading_options: Mapping[str, Any]
) -> Iterator[tuple[Job, Future[io.Picture]]]:
    """The pictures of all jobs, read ahead while earlier ones are processed."""
    rest, reading = deque(jobs), deque[tuple[Job, Future[io.Picture]]]()
    while rest or reading:
        while rest and len(reading) < AHEAD + 1:
            job = rest.popleft()
            reading.append((job, readers.submit(read_job, job, drop_alpha, **reading_options)))
        yield reading.popleft()


def sort_out(jobs: Sequence[Job], resume: bool, since: float = 0.0) -> tuple[list[Outcome], list[Job]]:
    """The outcomes of jobs that are skipped or cannot be written, and the jobs that are left.

    Temporary files of the latter, which a killed run may have left, are removed. For the arguments see :func:`run_jobs`.
    """
    ended: list[Outcome] = []
    rest: list[Job] = []
    for job in jobs:
        if resume and is_done(job, since):
            ended.append(Outcome(job, skipped=True))
        elif reason := _blocked(job):
            ended.append(Outcome(job, reason))
        else:
            rest.append(job)
    remove_parts(path for job in rest for path in (job.target, job.class_map) if path is not None)
    return ended, rest


def _blocked(job: Job) -> str:
    """Why the results of a job cannot be written; empty if they can."""
    for path in (job.target, job.class_map):
        if path is not None and (reason := why_not_writable(path, folders=True)):
            return f"cannot write {path}: {reason}"
    return ""


def _ended(written: tuple[Outcome, int, Future[None]]) -> Outcome:
    outcome, _, future = written
    try:
        future.result()
    except Exception as error:
        return Outcome(outcome.job, reason_of(outcome.job, error))
    return outcome


def reason_of(job: Job, error: BaseException) -> str:
    """Why `error` kept a job from being done, for its outcome."""
    if isinstance(error, io.ImageError):
        return str(error)
    if buffers.is_exhausted(error) and not buffers.ADVISED.search(str(error)):
        return f"cannot upscale {job.source}: out of memory; give a memory limit, or cut the image"
    lines = str(error).splitlines() or [type(error).__name__]
    # An unforeseen error at least states its type.
    kind = "" if isinstance(error, EXPECTED) or lines[0] == type(error).__name__ else f"{type(error).__name__}: "
    return f"cannot upscale {job.source}: {kind}{lines[0]}"


def read_job(job: Job, drop_alpha: bool = False, **reading: Any) -> io.Picture:
    """Read the picture of a job. `reading` are arguments of :func:`fastroute.io.read_picture`."""
    picture = io.read_picture(job.source, **reading)
    return replace(picture, alpha=None) if drop_alpha else picture


def check_result_fits(router: Router, job: Job, picture: io.Picture, **options: Any) -> None:
    """Fail now if the target cannot hold the result.

    Raises:
        fastroute.io.ImageError: see :func:`fastroute.io.check_holds`.
    """
    io.check_holds(job.target, *result_size(router, picture, **options), picture.alpha)


def write_job(router: Router, job: Job, result: io.Picture, upscaled: Upscaled, **saving: Any) -> None:
    """Write the class map and then the result of a job. `saving` are arguments of :func:`fastroute.io.write_picture`."""
    if job.class_map is not None:
        job.class_map.parent.mkdir(parents=True, exist_ok=True)
        io.write_image(job.class_map, overlay(router, result, upscaled))
    job.target.parent.mkdir(parents=True, exist_ok=True)
    io.write_picture(job.target, result, **saving)


def overlay(router: Router, result: io.Picture, upscaled: Upscaled) -> Any:
    """The picture of the classes, uint8 (3, H, W)."""
    color = result.as_bits(8).color
    if isinstance(router, CascadeRouter):
        return class_overlay(color, router.pixel_map(upscaled.class_map, color.shape[1:]), None, router.num_classes)
    if not isinstance(router, PatchRouter):
        return class_overlay(color, upscaled.class_map, None, router.num_classes)
    scale, margin = router.scale, 0
    if router.border == EDGE:
        # The class map is that of the extended image.
        color, margin = shown_continued(color, scale), MARGIN * scale
    height, width = color.shape[1] // scale, color.shape[2] // scale
    shown = class_overlay(color, upscaled.class_map, router.grid(height, width), router.num_classes)
    return shown[:, margin : shown.shape[1] - margin, margin : shown.shape[2] - margin]


def result_size(router: Router, picture: io.Picture, **options: Any) -> tuple[int, int]:
    """Height and width of the result of `upscale` for `picture`."""
    if not isinstance(router, PixelRouter):
        return router.output_size(picture.height, picture.width)
    return router.output_size(picture.height, picture.width, scale=options.get("scale"), size=options.get("size"))
