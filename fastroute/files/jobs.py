"""Jobs for many image files: they are planned, and refused if results would be lost, before anything is read."""

from __future__ import annotations

import glob
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastroute.io.files import SUFFIXES
from fastroute.io.recognise import READ_SUFFIXES, is_image
from fastroute.io.walk import NO_IMAGE, walk
from fastroute.runtime.json_cache import JsonCache

# For every output folder, the settings of the last run and when these settings were first used.
RUNS = JsonCache("runs.json")


@dataclass(frozen=True)
class Job:
    """One file to super-resolve, with the paths of its result and, if wanted, of the picture of its classes."""

    source: Path
    target: Path
    class_map: Path | None = None


@dataclass
class Plan:
    """Jobs, and everything else that was found.

    Attributes:
        jobs: one job per image.
        left: files and linked folders that were left out, with reasons.
        unreadable: folders that could not be searched, with reasons.
    """

    jobs: list[Job] = field(default_factory=list)
    left: list[tuple[Path, str]] = field(default_factory=list)
    unreadable: list[tuple[Path, str]] = field(default_factory=list)


def plan_jobs(
    sources: Sequence[str | Path],
    folder: str | Path,
    suffix: str | None = None,
    class_maps: str | Path | None = None,
    overwrite: bool = False,
) -> list[Job]:
    """The jobs of :func:`make_plan`."""
    return make_plan(sources, folder, suffix, class_maps, overwrite).jobs


def make_plan(
    sources: Sequence[str | Path],
    folder: str | Path,
    suffix: str | None = None,
    class_maps: str | Path | None = None,
    overwrite: bool = False,
) -> Plan:
    """Plan a job for each image file of `sources`. Nothing is read or written yet.

    Args:
        sources: files, glob patterns, and folders. Folders are searched recursively, linked ones too, and their tree is kept.
        folder: folder of the results, which get the names of their sources.
        suffix: ending of the results, for example ".png". Default: that of the source, or ".png" if it cannot be written.
        class_maps: folder for pictures of the classes, as PNG.
        overwrite: whether a result may overwrite its source.

    Raises:
        ValueError: there are no images, two files would be written under one name, or one would overwrite a source.
    """
    if suffix is not None and suffix.lower() not in SUFFIXES:
        raise ValueError(f"plan_jobs: suffix must be one of {', '.join(SUFFIXES)}; got {suffix!r}")
    folder, plan = Path(folder), Plan()
    seen: set[tuple[Path, Path]] = set()
    written = tuple(Path(path).resolve() for path in (folder, class_maps) if path is not None)
    for source, name in _expand(sources, written, plan):
        if (source, name) in seen:
            continue
        seen.add((source, name))
        ending = suffix or (source.suffix if source.suffix.lower() in SUFFIXES else ".png")
        # The dot of any other name may be part of the name.
        target = folder / (name.with_suffix(ending) if name.suffix.lower() in READ_SUFFIXES else Path(f"{name}{ending}"))
        # Two sources may differ only in their ending.
        plan.jobs.append(Job(source, target, None if class_maps is None else Path(class_maps) / f"{name}.png"))
    if not plan.jobs:
        among = f"; no images are {_names([path for path, _ in plan.left])}" if plan.left else ""
        raise ValueError(f"no image file in {', '.join(map(str, sources))}, the output folder apart{among}")
    if not overwrite:
        check_apart([(job.source, path) for job in plan.jobs for path in (job.target, job.class_map) if path is not None])
    check_distinct(plan.jobs)
    return plan


def _expand(
    sources: Sequence[str | Path], written: tuple[Path, ...], plan: Plan, named: bool = False
) -> Iterator[tuple[Path, Path]]:
    """Every file with its name below the output folder, except what earlier runs wrote into a folder among the sources.

    A folder that is the only source stands for its content. Several folders keep their names.
    """
    for source in map(Path, sources):
        if source.is_dir():
            root = source.resolve()
            found = walk(source, tuple(folder for folder in written if folder != root and folder.is_relative_to(root)))
            plan.left += found.others
            plan.unreadable += found.unreadable
            for path in found.images:
                name = path.relative_to(source)
                yield path, Path(root.name) / name if named or len(sources) > 1 else name
        elif os.path.lexists(source) or not glob.has_magic(str(source)):
            yield source, Path(source.name)
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(source), recursive=True))]
            images = [match for match in matches if match.is_dir() or is_image(match)]
            plan.left += [(match, NO_IMAGE) for match in matches if match not in images]
            if not images:
                raise ValueError(f"no image matches {source}")
            for match in images:
                yield from _expand([match], written, plan, named=True)


def check_distinct(jobs: Sequence[Job]) -> None:
    """Refuse to write two files under one name, whether they are results or class maps.

    Raises:
        ValueError: this would happen. The message names both sources.
    """
    taken: dict[str, tuple[Job, str]] = {}
    for kind in ("target", "class_map"):
        for job in jobs:
            path = getattr(job, kind)
            if path is None:
                continue
            other, held = taken.setdefault(os.path.realpath(path), (job, kind))
            if (other, held) == (job, kind):
                continue
            if kind == held == "target":
                raise ValueError(
                    f"{other.source} and {job.source} would both be written to {path}; give them folders of their own"
                )
            what = "result" if held == "target" else "class map"
            raise ValueError(
                f"the class map of {job.source} would be written to {path}, where the {what} of {other.source} goes; choose "
                "another folder for class maps"
            )


def check_apart(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Refuse to overwrite inputs.

    Args:
        pairs: paths that are read and paths that are written.

    Raises:
        ValueError: a path would be both read and written.
    """
    read = {os.path.realpath(source) for source, _ in pairs}
    for _, target in pairs:
        if os.path.realpath(target) in read:
            raise ValueError(
                f"{target} is an input and would be overwritten; choose another place, or allow it with --overwrite"
            )


def is_done(job: Job, since: float = 0.0) -> bool:
    """Whether the results of a job exist and are not older than its source or than `since`, in seconds."""
    try:
        age = max(job.source.stat().st_mtime_ns, int(since * 1e9))
        return all(path.stat().st_mtime_ns >= age for path in (job.target, job.class_map) if path is not None)
    except OSError:
        return False


def begin_run(folder: str | Path, settings: Mapping[str, Any], resume: bool) -> float | None:
    """Remember the settings with which results go into `folder`, in the user's cache.

    Args:
        folder: folder of the results.
        settings: the settings that results depend on, by name, with values as in JSON.
        resume: whether results of the same settings are kept.

    Returns:
        The time (seconds since the epoch) from which on results were made with these settings, or None if nothing is known
        about the present results.

    Raises:
        ValueError: with `resume`, the present results were made with other settings. The message names both.
    """
    now, key = json.loads(json.dumps(dict(settings))), os.path.realpath(folder)
    entry = RUNS.read().get(key, {})
    before, since = entry.get("settings"), entry.get("since")
    if isinstance(before, dict) and isinstance(since, int | float):
        if before == now:
            return since
        if not resume:
            before = None
    else:
        before = None
    if before is not None:
        changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        told = ", ".join(f"{name} was {_told(before.get(name))} and is {_told(now.get(name))}" for name in changed)
        raise ValueError(
            f"cannot resume in {folder}: its results were made with other settings ({told}); give the same, choose another "
            "folder, or leave out --resume to redo everything"
        )
    # File systems record the time of a write less exactly.
    since = 0.0 if resume else time.time() - 0.05
    RUNS.remember(key, {"settings": now, "since": since})
    return None if resume else since


def _told(value: object) -> str:
    return "not given" if value is None else str(value)


def _names(paths: Sequence[Path], most: int = 10) -> str:
    more = len(paths) - most
    return ", ".join(map(str, paths[:most])) + (f" and {more} more" if more > 0 else "")
