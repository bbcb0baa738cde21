"""`fastroute upscale --shard` where processes must agree: on one image, and on a budget that images share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

if TYPE_CHECKING:
    from fastroute.cli._task import Task
    from fastroute.files.jobs import Job
    from fastroute.files.many_files import Router
    from fastroute.files.shards import Shard


def upscale_share(task: Task, source: Path, target: Path, class_map: Path | None, resume: bool, shard: Shard) -> None:
    """A share of the rows of one file, beside one file."""
    from fastroute.budget.limits import Budget
    from fastroute.files import image_shards, jobs
    from fastroute.files.parts import Parts

    if class_map is not None:
        raise click.UsageError("--class-map is for an image in one process; leave out --shard")
    if task.saving:
        raise click.UsageError(f"--quality is for JPEG and WebP; {target} has none")
    job = jobs.Job(source, target)
    if not source.exists():
        raise click.ClickException(f"cannot read {source}: No such file or directory")
    jobs.check_apart([(source, target)])
    if resume and not Parts(target).begun and jobs.is_done(job):
        if not task.quiet:
            click.echo(f"{target} is there already, with what settings is not known")
        return
    # Trials of ways to run the networks would change last bits, which differ between shards then.
    router, chosen = replace(task, running={**task.running, "tune": False}).load()
    limit = Budget(*(chosen.get(name) for name in ("budget", "budget_flops", "budget_ms")))
    about = (limit, chosen.get("penalty", 0.0), task.reading, task.drop_alpha, task.settings())
    image = image_shards.LargeImage(source, target, *about)
    patches = image_shards.check_router(router)
    done = image_shards.upscale_share(image, patches, shard, resume, progress=not task.quiet, **task.limit)
    if task.quiet:
        return
    there = f", {done.before} there already" if done.before else ""
    rest = (
        f"{done.left} of all {done.bands} are missing"
        if done.left
        else f"all {done.bands} are done: run fastroute join {target}"
    )
    click.echo(f"shard {shard}: {done.written} bands written{there}; {rest}")


def share_classes(
    task: Task,
    router: Router,
    chosen: dict[str, Any],
    target: Path,
    everything: tuple[Job, ...],
    settings: dict[str, Any],
    shard: Shard,
) -> dict[str, Any]:
    """Classify all images with the other shards, under one budget. Returns the options of the router without it."""
    from fastroute.budget.limits import Budget
    from fastroute.files import folder_shards

    names = ("budget", "budget_flops", "budget_ms")
    limit = Budget(*(chosen.get(name) for name in names))
    folder = folder_shards.SharedFolder(target, everything, limit, task.reading, task.drop_alpha, settings)
    folder_shards.begin(folder, router)
    patches = cast("Any", router)
    folder_shards.classify_jobs(folder, patches, shard, progress=not task.quiet)
    class_map_of = folder_shards.agree_on_classes(folder, patches)
    return {**{name: value for name, value in chosen.items() if name not in names}, "class_map_of": class_map_of}
