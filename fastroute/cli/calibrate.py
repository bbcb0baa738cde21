"""`fastroute calibrate`: what a cascade of networks may be expected to do to one's own images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastroute.cli._common import device_of, precision_of, running_of, running_options, sorted_by_cost


@click.command("calibrate", short_help="Learn on your own images where cheaper networks are near enough.")
@click.option("--model", required=True, metavar="MODEL", help="The network whose results are wanted.")
@click.option("--cheap", multiple=True, required=True, metavar="MODEL", help="A cheaper network of the same scale, such as "
              "`fastroute distill` writes, or bicubic; may be repeated.")  # fmt: skip
@click.option("--images", required=True, type=click.Path(path_type=Path), help="Folder of images such as you will upscale, "
              "searched recursively.")  # fmt: skip
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The .safetensors file to write, for --model; it "
              "names the networks by their places beside it.")  # fmt: skip
@click.option("--fidelity", type=float, default=40.0, show_default=True, metavar="DB",
              help="For which promises are tested, and the default of the file.")  # fmt: skip
@click.option("--crops", type=click.IntRange(1, 64), default=1, show_default=True, metavar="N",
              help="Of every image at each of its two sizes.")  # fmt: skip
@click.option("--exclude", multiple=True, metavar="PATTERN", help="File names to leave out, say '*-x4.png'; may be repeated.")
@click.option("--seed", type=int, default=0, show_default=True, help="Fixes the places of the crops.")
@running_options
@click.option("--quiet", is_flag=True, help="No progress bar and no summary.")
def command(
    model: str,
    cheap: tuple[str, ...],
    images: Path,
    out: Path,
    fidelity: float,
    crops: int,
    exclude: tuple[str, ...],
    seed: int,
    quiet: bool,
    **options: Any,
) -> None:
    """Learn on your own images where cheaper networks come near enough to MODEL's results. No reference is needed.

    \b
    fastroute calibrate --model heavy.pth --cheap student.safetensors --cheap bicubic --images DIR --out routed.safetensors
    fastroute upscale photo.jpg photo-x4.png --model routed.safetensors --fidelity 40
    """
    from fastroute import buffers, io
    from fastroute.cascades.calibrate import calibrate
    from fastroute.cascades.stored import save_cascade
    from fastroute.cascading import cascade

    if out.suffix != ".safetensors":
        raise click.BadParameter(f"its ending must be .safetensors; got {out}", param_hint="--out")
    if not 0 < fidelity < 200:
        raise click.BadParameter(f"it must be above 0 and below 200; got {fidelity:g}", param_hint="--fidelity")
    running = running_of(options)
    where, dtype = device_of(running["device"]), precision_of(running)
    if where.type == "cpu":
        buffers.keep_freed()
    paths = io.list_images(images, exclude)
    try:
        # By what a network without weights costs it is the first; others by their FLOPs.
        branches = sorted_by_cost([*cheap, model])
        router = cascade(branches).to(where, dtype).compile(running["engine"])
        found = calibrate(router, paths, fidelity, crops=crops, seed=seed, progress=not quiet)
    except ValueError as error:
        for name in ("cascade: ", "calibrate: "):
            if str(error).startswith(name):
                raise click.UsageError(str(error).removeprefix(name)) from error
        raise
    left_out = {Path(branches[k]).stem: round(spent, 4) for k, spent in found.left_out.items()}
    branches = [branches[k] for k in found.classes]
    save_cascade(out, branches, found, precision=running["precision"], left_out=left_out)
    if quiet:
        return
    click.echo(f"{found.cells:,} cells of {found.pictures} pictures; costs relative to {Path(model).stem}: " + ", ".join(
        f"{Path(name).stem} {cost:.3f}" for name, cost in zip(branches[:-1], found.costs, strict=False)))  # fmt: skip
    spent = ", ".join(f"{name} {share:.2f}" for name, share in found.tried.items())
    which = "that which is learned" if found.score is not None else "the strength of edges"
    if found.base is not None:
        which = f"that of what {Path(branches[found.base]).stem} makes of them"
    click.echo(f"of the dense cost, pictures held out take by score: {spent}; {which} is kept")
    for name, share in left_out.items():
        click.echo(f"{name} is left out: with it they take {share:.2f}")
    kept = sum(value >= fidelity for value in found.reached)
    sampling = found.table.sampling
    or_by = (
        "" if sampling is None else f", or by {sampling.margins[-1]:.2f} where cells of the picture itself are measured first"
    )
    click.echo(f"promised {fidelity:g} dB, reached by {kept} of {len(found.reached)} crops held out, the least "
               f"{min(found.reached):.1f} dB; expected errors are multiplied by {found.table.margin:.2f}{or_by}")  # fmt: skip
    click.echo(f"wrote {out}; use it with: fastroute upscale IN OUT --model {out}")
