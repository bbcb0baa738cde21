"""`fastroute evaluate`: the quality and the cost of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastroute.cli._common import (
    Command,
    check_routing,
    load_router,
    model_options,
    running_of,
    running_options,
    tell_measuring,
)


@click.command("evaluate", cls=Command, short_help="Measure a model on a folder of images: PSNR, SSIM, FLOPs, time.")
@click.argument("model")
@click.option("--images", required=True, type=click.Path(path_type=Path),
              help="Folder of high-resolution images, searched recursively, or one image.")  # fmt: skip
@click.option("--exclude", multiple=True, metavar="PATTERN", help="File names to leave out, say '*-x4.png'; may be repeated.")
@click.option("--budget", type=float, help="Branch FLOPs as a fraction of those of the most expensive.  "
              "[default: the classifier decides]")  # fmt: skip
@click.option("--scale", type=int, help="Upscaling factor: any whole number for PCSR; needed for other models "
              "whose checkpoint does not state it.")  # fmt: skip
@model_options
@click.option("--penalty", type=float, help="Exponent of the cost in the choice of classes.")
@click.option("--adaptive", is_flag=True, default=None, help="PCSR's adaptive decision (ADM) instead of --penalty.")
@click.option("--refine/--no-refine", default=None, help="PCSR's refinement of class borders; on by default.")
@running_options
@click.option("--json", "target", type=click.Path(path_type=Path), help="Also write every number to this file.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def command(
    model: str, images: Path, exclude: tuple[str, ...], scale: int | None, patch: int | None, stride: int | None,
    table: Path | None, eta: float | None, published: bool,
    target: Path | None, quiet: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Reduce the images of a folder, super-resolve them with MODEL, and compare with the originals: quality, FLOPs, seconds,
    classes. MODEL is a shipped model, see `fastroute models`, or a checkpoint file.
    """
    import torch

    import fastroute
    from fastroute.cli._summary import tell_groups
    from fastroute.report import evaluation as evaluation

    if target is not None and not target.resolve().parent.is_dir():
        raise click.BadParameter(f"the folder {target.parent} does not exist", param_hint="--json")
    running = running_of(options)
    chosen = {name: value for name, value in options.items() if value is not None}
    if not quiet:
        tell_measuring()
    router = load_router(model, running, scale, patch, stride, table=table, eta=eta, published=published)
    chosen = check_routing(router, model, chosen)
    errors: list[str] = []
    notes: list[tuple[Path, str]] = []
    rows = evaluation.evaluate(router, images, scale, exclude, not quiet, errors, notes, **chosen)
    click.echo(f"{evaluation.table(rows)}\n\n{evaluation.LEGEND}")
    if not quiet:
        tell_groups("left out, or read in part", notes)
    if target is not None:
        evaluation.write_json(
            target, rows, model=model, options={**chosen, **running, "scale": scale}, device=running["device"],
            threads=torch.get_num_threads(),
            fastroute=fastroute.__version__,
        )  # fmt: skip
        click.echo(f"wrote {target}")
    if errors:
        lines = "\n".join(f"  {error}" for error in errors)
        raise click.ClickException(f"{len(errors)} of {len(errors) + len(rows)} images are left out:\n{lines}")
