"""`fastroute upscale`: one image, or many."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastroute.catalogue import DEFAULT_MODEL, default_model
from fastroute.cli._common import (
    Command,
    check_deciding,
    make_folder,
    model_options,
    running_of,
    running_options,
    tell_measuring,
)
from fastroute.cli._ray import checking, on_ray, ray_option
from fastroute.cli._task import Task
from fastroute.cli._types import Pixels, ShardType

if TYPE_CHECKING:
    from fastroute.files.many_files import Job
    from fastroute.files.shards import Shard

# The windows of fastroute.windows, which imports torch.
WINDOWS = ("uniform", "linear", "hann", "gaussian", "crop")
FORMATS = ("png", "jpg", "jpeg", "webp", "tif", "tiff", "bmp")
ZARR = ".zarr"
# The formats that have a quality.
LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif", ".webp")
# From this many pixels on, encoding takes some seconds.
SLOW_TO_WRITE = 1 << 25


@click.command("upscale", cls=Command)
@click.argument("sources", metavar="IN...", nargs=-1, type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path())
@click.option("--model", metavar="MODEL", help="A shipped model, see `fastroute models`, a checkpoint file, or "
              "package.module:function, which gives a network of your own.  "
              f"[default: {DEFAULT_MODEL}, or the one for --scale]")  # fmt: skip
@click.option("--cheap", multiple=True, metavar="MODEL", help="A cheaper network of MODEL's scale, or bicubic, for the easy "
              "parts; may be repeated. Needs --budget.")  # fmt: skip
@click.option("--budget", type=float, help="Branch FLOPs as a fraction of what the most expensive branch takes everywhere, say "
              "0.7; the classifier comes on top.  [default: the classifier decides]")  # fmt: skip
@click.option("--budget-flops", type=float, metavar="FLOPS",
              help="FLOPs of every image instead, such as 2e11; with --shared-budget, of all together.")  # fmt: skip
@click.option("--budget-ms", type=float, metavar="MS", help="Milliseconds for every image instead, not counting files; with "
              "--shared-budget, for all together.")  # fmt: skip
@click.option("--fidelity", type=float, metavar="DB", help="Nearness to what the most expensive network makes of the whole "
              "image, in dB; for a model that `fastroute calibrate` wrote.")  # fmt: skip
@click.option("--shared-budget", is_flag=True,
              help="All inputs share one budget, which is spent where it helps most. Reads them twice.")  # fmt: skip
@click.option("--scale", type=float,
              help="Upscaling factor: any for PCSR; needed for others whose checkpoint does not state it. Without --model "
              "any: it chooses the model.")  # fmt: skip
@model_options
@click.option("--window", type=click.Choice(WINDOWS), help="How overlapping patches are blended.  [default: hann]")
@click.option("--border", type=click.Choice(["zero", "edge"]), default="zero", show_default=True,
              help="What networks see beyond the edge of an image. edge keeps flat borders flat.")  # fmt: skip
@click.option("--merge", type=click.Choice(["1", "2", "4", "8"]), help="Side of a block of patches that may run as one region. "
              "1 runs each on its own, as published code does.  [default: 4]")  # fmt: skip
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Patches per pass of a branch.  [default: by "
              "measurement, which is remembered]")  # fmt: skip
@click.option("--size", type=(int, int), metavar="HEIGHT WIDTH", help="Output size instead of a factor (PCSR).")
@click.option(
    "--penalty", type=float, help="Exponent of the cost in the choice of classes: 0 is the best quality, larger is cheaper."
)
@click.option("--adaptive", is_flag=True, help="PCSR's adaptive decision (ADM) instead of --penalty.")
@click.option("--refine/--no-refine", default=None, help="PCSR's refinement of class borders; on by default.")
@click.option("--class-map", type=click.Path(path_type=Path),
              help="Also write a picture of the class of every patch or pixel. A folder if OUT is one.")  # fmt: skip
@click.option(
    "--format",
    "file_format",
    type=click.Choice(FORMATS),
    help="Format of the results in folder OUT.  [default: that of the input]",
)
@click.option("--quality", type=click.IntRange(1, 100), metavar="N", help="Quality of JPEG and WebP, 1 to 100.  [default: 95]")
@click.option("--drop-alpha", is_flag=True, help="Leave transparency out, for example for JPEG.")
@click.option("--white", type=float, metavar="VALUE", help="Value of white in floating-point images, say 255.  [default: 1]")
@click.option("--max-pixels", type=Pixels(), metavar="N", default="auto", help="Read images of up to this many pixels, or none "
              "for no limit.  [default: about 179 million]")  # fmt: skip
@click.option("--resume", is_flag=True, help="Skip inputs whose result is in folder OUT already and not older, or with --shard "
              "bands of one image that are done. Refused if the last run into OUT had other settings.")  # fmt: skip
@click.option("--shard", type=ShardType(), metavar="K/N", help="Upscale only share K of N of the inputs, or of the rows of one "
              "image, about as many pixels as every other: one share on each machine. auto takes K and N from a Slurm array or "
              "from torchrun. `fastroute join OUT` completes one image.")  # fmt: skip
@ray_option
@click.option("--overwrite", is_flag=True, help="Allow a result to overwrite its input. Any other file is replaced anyway.")
@click.option("--memory-limit", type=click.IntRange(min=1), metavar="MB",
              help="Work in bands within this much memory. For one IN and OUT this includes reading and writing; for a folder, "
              "each image and its result are held beside it.")  # fmt: skip
@running_options
@click.option("--quiet", is_flag=True, help="No progress bar and no summary, only errors.")
def command(
    sources: tuple[Path, ...],
    out: str,
    model: str | None,
    cheap: tuple[str, ...],
    class_map: Path | None,
    file_format: str | None,
    quality: int | None,
    patch: int | None,
    stride: int | None,
    table: Path | None,
    eta: float | None,
    published: bool,
    window: str | None,
    border: str,
    merge: str | None,
    batch: int | None,
    drop_alpha: bool,
    white: float | None,
    max_pixels: int | str | None,
    resume: bool,
    shard: Shard | None,
    ray: str | None,
    overwrite: bool,
    memory_limit: int | None,
    shared_budget: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Super-resolve an image, or many.

    \b
    fastroute upscale IN OUT        one image; the ending of OUT names the format
    fastroute upscale IN... FOLDER  images, folders, and patterns such as 'photos/**/*.jpg'; for one image a
                                    new FOLDER needs a / at its end

    Depth, transparency, colour profile and metadata are kept as far as the format holds them.
    """
    target = Path(out)
    if not sources:
        # click takes a single argument for the last one.
        raise click.UsageError(f"Missing argument 'OUT': only {target} is given; say also what to write, a file or a folder")
    import logging
    import warnings

    from PIL import Image

    from fastroute.io import SUFFIXES

    # Files that cannot be read are reported once, by this command; the limit on pixels is an error here, not a warning.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    running = running_of(options)
    chosen = {name: value for name, value in options.items() if value is not None and value is not False}
    if options["refine"] is not None:
        chosen["refine"] = options["refine"]
    check_deciding(chosen, shared_budget)
    if white is not None and not 0 < white < math.inf:
        raise click.BadParameter(f"it must be positive and finite; got {white:g}", param_hint="--white")
    if not quiet:
        tell_measuring()
    reading = {} if max_pixels == "auto" else {"max_pixels": max_pixels}
    task = Task(
        model or default_model(chosen.get("scale")),
        running,
        {
            "scale": chosen.get("scale"),
            "patch": patch,
            "stride": stride,
            "window": window,
            "table": table,
            "eta": eta,
            "published": published,
            "batch": batch,
            "border": border,
            "merge": None if merge is None else int(merge),
        },
        chosen,
        {} if memory_limit is None else {"memory_limit": memory_limit * 1_000_000},
        reading if white is None else {**reading, "white": white},
        {} if quality is None else {"quality": quality},
        drop_alpha,
        overwrite,
        quiet,
        cheap,
    )
    # A zarr array is a folder, but one picture.
    named = target.suffix.lower() in (*SUFFIXES, ZARR) and not out.endswith(("/", os.sep))
    folder = not named and (out.endswith(("/", os.sep)) or target.is_dir())
    one = len(sources) == 1 and (sources[0].is_file() or sources[0].suffix.lower() == ZARR)
    many = not (one and named) and (
        len(sources) > 1 or sources[0].is_dir() or folder or any(sign in str(sources[0]) for sign in "*?[")
    )
    if many:
        if resume and overwrite:
            raise click.UsageError("--resume cannot tell which inputs have been overwritten; leave --overwrite out")
        if not folder and (named or target.exists()):
            what = "it is a folder" if sources[0].is_dir() else "there are several inputs"
            raise click.UsageError(f"cannot read {sources[0]} into the one file {target}: {what}, so OUT must be a folder")
        if ray is not None and shared_budget:
            raise click.UsageError("--shared-budget needs all inputs in one process; leave out --ray, or give each image one")
        if shard is not None and overwrite:
            raise click.UsageError("--shard must find the same inputs in every process; leave out --overwrite")
        upscale_many(task, sources, target, class_map, file_format, resume, shared_budget, shard, ray)
        return
    several: dict[str, object] = {"format": file_format, "shared-budget": shared_budget, "ray": ray is not None}
    if shard is None or not named:
        several |= {"resume": resume, "shard": shard}
    for name, given in several.items():
        if given:
            raise click.UsageError(
                f"--{name} is for an OUT that is a folder; {target} is none (a / at its end would make it one)"
            )
    if shard is not None:
        from fastroute.cli._shares import upscale_share

        upscale_share(task, sources[0], target, class_map, resume, shard)
        return
    upscale_one(task, sources[0], target, class_map)


def upscale_many(
    task: Task,
    sources: Sequence[Path],
    target: Path,
    class_map: Path | None,
    file_format: str | None,
    resume: bool,
    shared_budget: bool,
    shard: Shard | None,
    ray: str | None,
) -> None:
    """Whatever is found in `sources`, or a share of it, into the folder `target`."""
    from fastroute.cli._summary import tell_many
    from fastroute.files import jobs, many_files
    from fastroute.io import SUFFIXES

    if task.saving and file_format is not None and f".{file_format}" not in LOSSY:
        raise click.UsageError(f"--quality is for JPEG and WebP; --format {file_format} has none")
    as_file = class_map is not None and class_map.suffix.lower() in SUFFIXES and not class_map.is_dir()
    made = jobs.make_plan(sources, target, file_format and f".{file_format}", None if as_file else class_map, task.overwrite)
    if class_map is not None and as_file:
        if len(made.jobs) > 1 or sources[0].is_dir():
            raise click.BadParameter(
                f"{class_map} is one file; OUT is a folder, so it must be one too", param_hint="--class-map"
            )
        made.jobs[0] = replace(made.jobs[0], class_map=class_map)
        jobs.check_distinct(made.jobs)
        if not task.overwrite:
            jobs.check_apart([(made.jobs[0].source, class_map)])
    everything = tuple(made.jobs)
    if shard is not None:
        made.jobs = shard.share(everything)
        if not task.quiet:
            click.echo(f"shard {shard}: {len(made.jobs)} of {len(everything)} images")
        if not made.jobs:
            return
    router, chosen = (task if ray is None else checking(task)).load()
    run_jobs = many_files.run_jobs if ray is None else on_ray(task, ray)
    settings = task.settings(format=file_format, **{"shared-budget": shared_budget or None})
    if shard is not None and shared_budget:
        from fastroute.cli._shares import share_classes

        chosen, shared_budget = share_classes(task, router, chosen, target, everything, settings, shard), False
    since = jobs.begin_run(target, settings, resume)
    for folder in (target, None if as_file else class_map):
        if folder is not None:
            make_folder(folder)
    outcomes = run_jobs(
        router, made.jobs, resume, task.drop_alpha, shared_budget, reading=task.reading, since=since or 0.0, **task.saving,
        **chosen, **task.limit,
    )  # fmt: skip
    tell_many(made, outcomes, target, task.quiet, since is not None)


def upscale_one(task: Task, source: Path, target: Path, class_map: Path | None) -> None:
    """One file to one file."""
    from fastroute.cli._summary import tell_one
    from fastroute.files import many_files
    from fastroute.files.pictures import upscale_picture
    from fastroute.io import check_writable, not_kept
    from fastroute.io.files import remove_parts

    if class_map is not None and class_map.resolve() == target.resolve():
        raise click.UsageError("OUT and --class-map are the same file")
    if task.saving and target.suffix.lower() not in LOSSY:
        raise click.UsageError(f"--quality is for JPEG and WebP; {target} has none")
    job = many_files.Job(source, target, class_map)
    if not job.source.exists():
        raise click.ClickException(f"cannot read {job.source}: No such file or directory")
    if not target.suffix:
        raise click.UsageError(
            f"cannot write {target}: it has no ending that names a format; a folder that is to be made ends in /"
        )
    zarr = ZARR in (source.suffix.lower(), target.suffix.lower())
    streamed = bool(task.limit) or zarr
    outputs = [path for path in (target, class_map) if path is not None]
    for path in outputs:
        if not (zarr and path == target):
            check_writable(path)
        if not task.overwrite:
            many_files.check_apart([(job.source, path)])
    if streamed:
        if class_map is not None:
            raise click.UsageError("--class-map shows the classes over the result, which a streamed one is too large for")
        remove_parts(outputs)
        _stream(job, task)
        return
    # A file that cannot be read is told before the model is loaded.
    picture = many_files.read_job(job, task.drop_alpha, **task.reading)
    router, chosen = task.load()
    many_files.check_result_fits(router, job, picture, **chosen)
    result, upscaled = upscale_picture(router, picture, progress=not task.quiet, **chosen, **task.limit)
    start = time.perf_counter()
    if not task.quiet and result.height * result.width > SLOW_TO_WRITE:
        click.echo(f"writing {target} …", err=True)
    remove_parts(outputs)
    many_files.write_job(router, job, result, upscaled, **task.saving)
    if not task.quiet:
        tell_one(router, job, picture, result, upscaled.stats, chosen, task.model)
        click.echo(f"  writing: {time.perf_counter() - start:.2f} s")
        for note in (*picture.origin.notes, *not_kept(target, result)):
            click.echo(f"  {note}")


def _stream(job: Job, task: Task) -> None:
    from fastroute.cli._summary import tell_routing
    from fastroute.files.file_to_file import upscale_file
    from fastroute.files.writers import check_target

    check_target(job.target)
    router, chosen = task.load()
    written = upscale_file(
        job.source, job.target, router, progress=not task.quiet, drop_alpha=task.drop_alpha, **task.limit, **task.reading,
        **task.saving, **chosen,
    )  # fmt: skip
    if not task.quiet:
        click.echo(f"{job.source} -> {written}, model {task.model}")
        tell_routing(router, job, written.stats, chosen)
        for note in getattr(written, "notes", ()):
            click.echo(f"  {note}")
