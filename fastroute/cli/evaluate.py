"""`fastroute evaluate`: how good and how dear a model is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastroute.cli._common import Command, check_routing, device_of


@click.command("evaluate", cls=Command)
@click.argument("model")
@click.option("--images", required=True, type=click.Path(path_type=Path), help="Folder of HR images, searched recursively.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="File names to leave out, say '*-x4.png'; may be repeated.")
@click.option("--budget", type=float, help="Mean branch FLOPs as a fraction of the dearest's.")
@click.option("--scale", type=int, help="Upscaling factor; any whole one for PCSR, that of its branches for other models.")
@click.option("--k", type=float, help="Cost exponent of PCSR's decision.")
@click.option("--adaptive", is_flag=True, default=None, help="PCSR's adaptive decision (ADM) instead of --k.")
@click.option("--refine/--no-refine", default=None, help="PCSR's refinement of class borders; on by default.")
@click.option("--device", metavar="DEVICE", default="cpu", show_default=True, help="Where to run, as torch names it.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Also write every number to this file.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def command(
    model: str, images: Path, exclude: tuple[str, ...], scale: int | None, device: str, target: Path | None, quiet: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Reduce the images of a folder, super-resolve them with MODEL and compare: quality, FLOPs, seconds, classes."""
    import torch

    import fastroute
    from fastroute import evaluate as evaluation

    if target is not None and not target.resolve().parent.is_dir():
        raise click.BadParameter(f"the folder {target.parent} does not exist", param_hint="--json")
    chosen = {name: value for name, value in options.items() if value is not None}
    router = fastroute.load(model, device_of(device))
    chosen = check_routing(router, model, chosen)
    rows = evaluation.evaluate(router, images, scale, exclude, progress=not quiet, **chosen)
    click.echo(f"{evaluation.table(rows)}\n\n{evaluation.LEGEND}")
    if target is not None:
        evaluation.write_json(
            target, rows, model=model, options={**chosen, "scale": scale}, device=device, threads=torch.get_num_threads(),
            fastroute=fastroute.__version__,
        )  # fmt: skip
        click.echo(f"wrote {target}")
