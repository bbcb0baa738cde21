"""Many image files at once: what is to be done, and reading and writing beside the computing."""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from fastroute import io
from fastroute.backends import BackendError
from fastroute.grid import TileGrid
from fastroute.io.files import SUFFIXES, remove_parts
from fastroute.io.hidden import fill_hidden
from fastroute.pictures import upscale_picture
from fastroute.routing.budgets import Budget
from fastroute.routing.patch_router import PatchRouter
from fastroute.routing.pixel_router import PixelRouter
from fastroute.routing.result import RoutingStats, Upscaled
from fastroute.routing.shared import Turn, share
from fastroute.streaming.transfer import to_device
from fastroute.visualize import class_overlay


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(cores: int) -> tuple[int, int]:
    """Readers and writers beside a router that is given `cores`: encoding takes longest, and a GPU waits for it."""
    writers = max(2, min(8, cores // 2))
    return max(2, writers // 2), writers


READERS, WRITERS = threads(usable_cores())
# Pictures read ahead; results that wait to be written, in number and, where they are large, in bytes.
AHEAD, BEHIND, BEHIND_BYTES = READERS, WRITERS + 1, 1 << 30
# What one file may raise without stopping the others. Running out of memory on a GPU is a RuntimeError.
FAILURES = (ValueError, TypeError, OSError, MemoryError, RuntimeError)

Router = PatchRouter | PixelRouter


@dataclass(frozen=True)
class Job:
    """One file to super-resolve, where to write it, and where the picture of its classes, if anywhere."""

    source: Path
    target: Path
    class_map: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        job: which.
        error: why its target was not written; empty when it was.
        skipped: the target was there already.
        stats: of the routing, where something was done.
    """

    job: Job
    error: str = ""
    skipped: bool = False
    stats: RoutingStats | None = None


def plan_jobs(
    sources: Sequence[str | Path],
    folder: str | Path,
    suffix: str | None = None,
    class_maps: str | Path | None = None,
    overwrite: bool = False,
) -> list[Job]:
    """A job for each image file of `sources`; nothing is read or written yet.

    Args:
        sources: files, glob patterns, and folders, which are searched recursively and whose tree is kept.
        folder: where results go, under the names of their sources.
        suffix: ending of the results, for example ".png". Default: that of the source, or ".png" where it cannot be written.
        class_maps: folder for pictures of the classes, as PNG.
        overwrite: a result may take the place of its source.

    Raises:
        ValueError: no images, two results of one name, or a result that would overwrite a source.
    """
    folder = Path(folder)
    jobs: dict[Path, Job] = {}
    written = [Path(path).resolve() for path in (folder, class_maps) if path is not None]
    for source, name in _expand(sources, written):
        ending = suffix or (source.suffix if source.suffix.lower() in SUFFIXES else ".png")
        target = folder / name.with_suffix(ending)
        if target in jobs:
            if jobs[target].source == source:
                continue
            raise ValueError(
                f"{jobs[target].source} and {source} would both be written to {target}; give them folders of their own"
            )
        # Their sources may differ in nothing but the ending.
        jobs[target] = Job(source, target, None if class_maps is None else Path(class_maps) / f"{name}.png")
    if not jobs:
        raise ValueError(f"no image file ({', '.join(SUFFIXES)}) in {', '.join(map(str, sources))}, the output folder apart")
    if not overwrite:
        check_apart([(job.source, path) for job in jobs.values() for path in (job.target, job.class_map) if path is not None])
    return list(jobs.values())


def _expand(sources: Sequence[str | Path], written: Sequence[Path], named: bool = False) -> Iterator[tuple[Path, Path]]:
    """Every file, and its name below the output folder; without what earlier runs wrote into a folder among the sources.

    A folder that is the only source stands for its content; others keep their names.
    """
    for source in map(Path, sources):
        if source.is_dir():
            root = source.resolve()
            own = [folder for folder in written if folder != root and folder.is_relative_to(root)]
            # Links that lead nowhere are among them: they are told, not passed over.
            for path in sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and not path.is_dir()):
                if not any(path.resolve().is_relative_to(folder) for folder in own):
                    name = path.relative_to(source)
                    yield path, Path(root.name) / name if named or len(sources) > 1 else name
        elif source.exists() or not glob.has_magic(str(source)):
            yield source, Path(source.name)
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(source), recursive=True))]
            matches = [match for match in matches if match.is_dir() or match.suffix.lower() in SUFFIXES]
            if not matches:
                raise ValueError(f"no image matches {source}")
            for match in matches:
                yield from _expand([match], written, named=True)


def check_apart(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Refuse to write over what is read.

    Args:
        pairs: what is read, and what is written.

    Raises:
        ValueError: one of the latter is one of the former.
    """
    read = {os.path.realpath(source) for source, _ in pairs}
    for _, target in pairs:
        if os.path.realpath(target) in read:
            raise ValueError(
                f"{target} is an input and would be overwritten; choose another place, or allow it with --overwrite"
            )


def run_jobs(
    router: Router,
    jobs: Sequence[Job],
    resume: bool = False,
    drop_alpha: bool = False,
    shared_budget: bool = False,
    **options: Any,
) -> Iterator[Outcome]:
    """Do the jobs; files are read and written in threads of their own while the router works.

    A file that fails does not stop the others. Every target is written whole or not at all, its class map before it.

    Args:
        router: as :func:`fastroute.load` gives it.
        jobs: see :func:`plan_jobs`.
        resume: skip jobs whose target exists and is no older than its source.
        drop_alpha: leave transparency out.
        shared_budget: the budget among `options` is that of all images together, see :func:`fastroute.upscale_many`; each is
            read twice.
        options: arguments of the router's `upscale`, such as `budget`.

    Yields:
        An :class:`Outcome` per job: first those skipped, then the others as they end.

    Raises:
        ValueError: a shared budget that cannot be kept.
        fastroute.BackendError: the backend asked for cannot run; no other job could.
    """
    rest = deque(jobs)
    if resume:
        rest = deque(job for job in jobs if not is_done(job))
        yield from (Outcome(job, skipped=True) for job in jobs if is_done(job))
        remove_parts(job.target for job in rest)
    shared, number = None, 0
    if shared_budget and rest:
        limit = Budget(*(options.pop(name, None) for name in ("budget", "budget_flops", "budget_ms")))
        shared = share(router, limit, len(rest), "upscale", **options)
        options.pop("memory_limit", None)
    readers, writers = ThreadPoolExecutor(READERS, "read"), ThreadPoolExecutor(WRITERS, "write")
    reading: deque[tuple[Job, Future[io.Picture]]] = deque()
    writing: deque[tuple[Outcome, int, Future[None]]] = deque()
    try:
        if shared is not None:
            seen: list[Job] = []
            for job, future in _ahead(rest, readers, drop_alpha):
                try:
                    picture = future.result()
                    check_target(router, job, picture, **options)
                    shared.look(to_device(fill_hidden(picture.color, picture.alpha), router.device))
                except BackendError:
                    raise
                except FAILURES as error:
                    yield Outcome(job, _reason(job, error))
                    continue
                seen.append(job)
            shared.settle()
            rest = deque(seen)
        while rest or reading or writing:
            while rest and len(reading) < AHEAD + 1:
                job = rest.popleft()
                reading.append((job, readers.submit(read_job, job, drop_alpha)))
            if writing and (writing[0][2].done() or not reading):
                yield _ended(writing.popleft())
                continue
            while len(writing) >= BEHIND or sum(size for _, size, _ in writing) > BEHIND_BYTES:
                yield _ended(writing.popleft())
            job, future = reading.popleft()
            turn = None if shared is None else Turn(shared, number)
            number += 1
            try:
                picture = future.result()
                check_target(router, job, picture, **options)
                if turn is not None:
                    result, upscaled = upscale_picture(cast(Router, turn), picture)
                else:
                    result, upscaled = upscale_picture(router, picture, **options)
            except BackendError:
                raise
            except FAILURES as error:
                yield Outcome(job, _reason(job, error))
                continue
            size = result.color.numel() * result.color.itemsize
            write = writers.submit(write_job, router, job, result, upscaled)
            writing.append((Outcome(job, stats=upscaled.stats), size, write))
            # No reference but the writer's: the memory is free as soon as the file is written.
            del picture, result, upscaled, write, future
    finally:
        # What is being written becomes whole; nothing else is begun.
        readers.shutdown(cancel_futures=True)
        writers.shutdown(cancel_futures=True)


def _ahead(jobs: Sequence[Job], readers: ThreadPoolExecutor, drop_alpha: bool) -> Iterator[tuple[Job, Future[io.Picture]]]:
    """The pictures of all jobs, read while those before are worked on."""
    rest, reading = deque(jobs), deque[tuple[Job, Future[io.Picture]]]()
    while rest or reading:
        while rest and len(reading) < AHEAD + 1:
            job = rest.popleft()
            reading.append((job, readers.submit(read_job, job, drop_alpha)))
        yield reading.popleft()


def is_done(job: Job) -> bool:
    """Whether the results of a job are there, and no older than its source."""
    try:
        age = job.source.stat().st_mtime_ns
        return all(path.stat().st_mtime_ns >= age for path in (job.target, job.class_map) if path is not None)
    except OSError:
        return False


def _ended(written: tuple[Outcome, int, Future[None]]) -> Outcome:
    outcome, _, future = written
    try:
        future.result()
    except FAILURES as error:
        return Outcome(outcome.job, _reason(outcome.job, error))
    return outcome


def _reason(job: Job, error: BaseException) -> str:
    if isinstance(error, io.ImageError):
        return str(error)
    lines = str(error).splitlines() or ["out of memory" if isinstance(error, MemoryError) else type(error).__name__]
    return f"cannot upscale {job.source}: {lines[0]}"


def read_job(job: Job, drop_alpha: bool = False) -> io.Picture:
    """The picture of a job."""
    picture = io.read_picture(job.source)
    return replace(picture, alpha=None) if drop_alpha else picture


def check_target(router: Router, job: Job, picture: io.Picture, **options: Any) -> None:
    """Fail now if the target cannot hold the result.

    Raises:
        fastroute.io.ImageError: see :func:`fastroute.io.check_holds`.
    """
    io.check_holds(job.target, *result_size(router, picture, **options), picture.alpha)


def write_job(router: Router, job: Job, result: io.Picture, upscaled: Upscaled) -> None:
    """Write what a job made: the class map, then the target."""
    if job.class_map is not None:
        job.class_map.parent.mkdir(parents=True, exist_ok=True)
        io.write_image(job.class_map, overlay(router, result, upscaled))
    job.target.parent.mkdir(parents=True, exist_ok=True)
    io.write_picture(job.target, result)


def overlay(router: Router, result: io.Picture, upscaled: Upscaled) -> Any:
    """The picture of the classes, uint8 (3, H, W)."""
    grid = None
    if isinstance(router, PatchRouter):
        height, width = result.height // router.scale, result.width // router.scale
        grid = TileGrid(height, width, router.patch, router.stride, router.scale)
    return class_overlay(result.as_bits(8).color, upscaled.class_map, grid, router.num_classes)


def result_size(router: Router, picture: io.Picture, **options: Any) -> tuple[int, int]:
    """Height and width of what `upscale` makes of `picture`."""
    if isinstance(router, PatchRouter):
        return picture.height * router.scale, picture.width * router.scale
    return router.output_size(picture.height, picture.width, options.get("scale"), options.get("size"))
