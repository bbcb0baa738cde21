"""`fastroute upscale`: one image, or many."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastroute.catalogue import DEFAULT_MODEL
from fastroute.cli._common import (
    Command,
    check_deciding,
    check_routing,
    load_router,
    model_options,
    running_of,
    running_options,
    tell_measuring,
)

if TYPE_CHECKING:
    from fastroute.batch import Job

FORMATS = ("png", "jpg", "webp", "tif")
# What is written in tiles, and so need not be in memory.
STREAMED = (".tif", ".tiff", ".zarr")
# Pixels from which encoding takes some seconds.
SLOW_TO_WRITE = 1 << 25


@click.command("upscale", cls=Command)
@click.argument("sources", metavar="IN...", nargs=-1, type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--model", metavar="MODEL", default=DEFAULT_MODEL, show_default=True,
              help="A shipped model, see `fastroute models`, or a checkpoint file.")  # fmt: skip
@click.option("--budget", type=float, help="Mean branch FLOPs as a fraction of the dearest's, say 0.7; the classifier comes on "
              "top.  [default: the classifier decides]")  # fmt: skip
@click.option("--budget-flops", type=float, metavar="FLOPS",
              help="FLOPs of every image instead, say 2e11; with --shared-budget of all together.")  # fmt: skip
@click.option("--budget-ms", type=float, metavar="MS", help="Milliseconds for every image instead, its files not counted; with "
              "--shared-budget for all together.")  # fmt: skip
@click.option("--shared-budget", is_flag=True,
              help="One budget over all inputs, not one for each, spent where it helps most; reads them twice.")  # fmt: skip
@click.option(
    "--scale", type=float, help="Upscaling factor: any for PCSR; needed for other models whose checkpoint does not tell theirs."
)
@model_options
@click.option("--size", type=(int, int), metavar="HEIGHT WIDTH", help="Output size instead of a factor (PCSR).")
@click.option("--k", type=float, help="Cost exponent of PCSR's decision: 0 is best quality, larger is cheaper.")
@click.option("--adaptive", is_flag=True, help="PCSR's adaptive decision (ADM) instead of --k.")
@click.option("--refine/--no-refine", default=None, help="PCSR's refinement of class borders; on by default.")
@click.option("--class-map", type=click.Path(path_type=Path),
              help="Also write a picture of the class of every patch or pixel; a folder, where OUT is one.")  # fmt: skip
@click.option(
    "--format", "file_format", type=click.Choice(FORMATS), help="Of the files in folder OUT.  [default: each input's own]"
)
@click.option("--drop-alpha", is_flag=True, help="Leave transparency out, say for JPEG.")
@click.option("--resume", is_flag=True, help="Skip inputs whose result is in folder OUT already and no older.")
@click.option("--overwrite", is_flag=True, help="Allow a result to take the place of its input; any other file is replaced.")
@click.option("--memory-limit", type=click.IntRange(min=1), metavar="MB",
              help="Work in bands within so much memory, beside input and result. With a .tif or .zarr as OUT these are "
              "streamed too, and the limit holds for all; metadata and transparency are then left out.")  # fmt: skip
@running_options
@click.option("--quiet", is_flag=True, help="No progress bar and no summary; errors are shown.")
def command(
    sources: tuple[Path, ...],
    target: Path,
    model: str,
    class_map: Path | None,
    file_format: str | None,
    patch: int | None,
    stride: int | None,
    drop_alpha: bool,
    resume: bool,
    overwrite: bool,
    memory_limit: int | None,
    shared_budget: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Super-resolve an image, or many.

    \b
    fastroute upscale IN OUT        one image; the ending of OUT names the format
    fastroute upscale IN... FOLDER  images, folders, and patterns such as 'photos/**/*.jpg'

    Depth, transparency, colour profile and metadata are kept as far as the format holds them.
    """
    if not sources:
        # Of one argument click takes the last.
        raise click.UsageError(f"Missing argument 'OUT': only {target} is given; say also what to write, a file or a folder")
    import logging
    import warnings

    from PIL import Image

    from fastroute import batch
    from fastroute.cli._summary import tell_many, tell_one
    from fastroute.io import SUFFIXES, check_writable
    from fastroute.pictures import upscale_picture

    # Files that cannot be read are reported once, by this command; the limit on pixels is an error here, not a warning.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    running = running_of(options)
    chosen = {name: value for name, value in options.items() if value is not None and value is not False}
    if options["refine"] is not None:
        chosen["refine"] = options["refine"]
    check_deciding(chosen, shared_budget)
    if not quiet:
        tell_measuring()
    places = {"scale": chosen.get("scale"), "patch": patch, "stride": stride}
    limit = {} if memory_limit is None else {"memory_limit": memory_limit * 1_000_000}
    many = len(sources) > 1 or sources[0].is_dir() or target.is_dir() or any(sign in str(sources[0]) for sign in "*?[")
    if sources[0].is_file() and len(sources) == 1 and target.suffix.lower() in SUFFIXES:
        many = False
    if many:
        if resume and overwrite:
            raise click.UsageError("--resume cannot tell which inputs have been overwritten; leave --overwrite out")
        if target.suffix.lower() in SUFFIXES or (target.exists() and not target.is_dir()):
            what = "it is a folder" if sources[0].is_dir() else "there are several inputs"
            raise click.UsageError(f"cannot read {sources[0]} into the one file {target}: {what}, so OUT must be a folder")
        jobs = batch.plan_jobs(sources, target, file_format and f".{file_format}", class_map, overwrite)
        router = load_router(model, running, **places)
        chosen = check_routing(router, model, chosen)
        for folder in (target, class_map):
            if folder is not None:
                _make_folder(folder)
        outcomes = batch.run_jobs(router, jobs, resume, drop_alpha, shared_budget, **chosen, **limit)
        tell_many(jobs, outcomes, target, quiet)
        return
    for flag, given in (("--resume", resume), ("--format", file_format), ("--shared-budget", shared_budget)):
        if given:
            raise click.UsageError(f"{flag} is for an OUT that is a folder; {target} is none")
    if class_map is not None and class_map.resolve() == target.resolve():
        raise click.UsageError("OUT and --class-map are the same file")
    job = batch.Job(sources[0], target, class_map)
    if not job.source.exists():
        raise click.ClickException(f"cannot read {job.source}: No such file or directory")
    streamed = bool(limit) and target.suffix.lower() in STREAMED
    for path in (target, class_map):
        if path is not None:
            if not (streamed and path == target):
                check_writable(path)
            if not overwrite:
                batch.check_apart([(job.source, path)])
    if streamed:
        if class_map is not None:
            raise click.UsageError("--class-map shows the classes over the result, which a streamed one is too large for")
        _stream(job, model, running, places, quiet, chosen, limit["memory_limit"])
        return
    # A file that cannot be read is told before the model is loaded.
    picture = batch.read_job(job, drop_alpha)
    router = load_router(model, running, **places)
    chosen = check_routing(router, model, chosen)
    batch.check_target(router, job, picture, **chosen)
    result, upscaled = upscale_picture(router, picture, progress=not quiet, **chosen, **limit)
    start = time.perf_counter()
    if not quiet and result.height * result.width > SLOW_TO_WRITE:
        click.echo(f"writing {target} …", err=True)
    batch.write_job(router, job, result, upscaled)
    if not quiet:
        tell_one(router, job, picture, result, upscaled.stats, chosen, model)
        click.echo(f"  writing: {time.perf_counter() - start:.2f} s")


def _stream(
    job: Job,
    model: str,
    running: dict[str, Any],
    places: dict[str, Any],
    quiet: bool,
    chosen: dict[str, Any],
    memory_limit: int,
) -> None:
    from fastroute.cli._summary import tell_routing
    from fastroute.streaming.files import check_target
    from fastroute.streaming.upscale_file import upscale_file

    check_target(job.target)
    router = load_router(model, running, **places)
    chosen = check_routing(router, model, chosen)
    written = upscale_file(job.source, job.target, router, memory_limit, progress=not quiet, **chosen)
    if not quiet:
        click.echo(f"{job.source} -> {written}, model {model}; without metadata and transparency")
        tell_routing(router, job, written.stats, chosen)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"cannot make the folder {folder}: {error.strerror}") from error
