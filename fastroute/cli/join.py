"""`fastroute join`: the result of shards."""

from __future__ import annotations

from pathlib import Path

import click

from fastroute.cli._common import Command


@click.command("join", cls=Command)
@click.argument("results", metavar="OUT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--quiet", is_flag=True, help="No progress bar and no summary, only errors.")
def command(results: tuple[Path, ...], quiet: bool) -> None:
    """Make one result of what the shards of `fastroute upscale` have left beside OUT.

    OUT is what was given to the shards. An array gets its name, and its pyramid if it is OME-Zarr; any other image is written
    from the parts; of a folder with a shared budget, what the shards left beside it is removed. What is joined already stays as
    it is, so this may be repeated, also after it was killed.
    """
    from fastroute.files.joining import join

    for path in results:
        joined = join(path, progress=not quiet)
        if not quiet:
            click.echo(f"{path}: {'joined' if joined else 'complete already'}")
