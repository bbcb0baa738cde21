"""`fastroute distill`: a small network learns what a large one makes of images."""

from __future__ import annotations

from pathlib import Path

import click

from fastroute.cli._common import device_of


@click.command("distill", short_help="Train a small network to do what a large one does; run again to resume.")
@click.option("--teacher", required=True, metavar="MODEL", help="The large network: a checkpoint file or a shipped model.")
@click.option("--images", required=True, type=click.Path(path_type=Path), help="Folder of images such as you will upscale, "
              "searched recursively. They need no reference.")  # fmt: skip
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The student's file, .safetensors or .pth; the "
              "state of the training and what the teacher made lie beside it.")  # fmt: skip
@click.option("--minutes", type=float, default=60, show_default=True, help="How long, the time of earlier runs included.")
@click.option("--init", type=click.Path(path_type=Path), help="Start from this Compact checkpoint, whose width and depth are "
              "taken; a published one of the teacher's scale saves much time.")  # fmt: skip
@click.option("--width", type=click.IntRange(1, 1024), metavar="N", help="Channels of the student.  [default: 64]")
@click.option("--depth", type=click.IntRange(0, 256), metavar="N", help="Layers between its first and last.  [default: 16]")
@click.option("--cost", type=float, metavar="SHARE", help="Choose the width by the share of the teacher's FLOPs, say 0.03.")
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Squares per step.  [default: 8]")
@click.option("--rate", type=float, help="Peak of the learning rate.  [default: 0.0004]")
@click.option("--visits", type=click.IntRange(min=1), metavar="N",
              help="Images that the teacher looks at, three crops each, at most.  [default: 300]")  # fmt: skip
@click.option("--exclude", multiple=True, metavar="PATTERN", help="File names to leave out, say '*-x4.png'; may be repeated.")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder for what the teacher made.  [default: beside --out]")
@click.option("--seed", type=int, default=0, show_default=True, help="Fixes places and batches.")
@click.option("--device", metavar="DEVICE", default="cpu", show_default=True, help="Where to train, say cuda.")
@click.option("--precision", type=click.Choice(("auto", "float32", "bfloat16")), default="auto", show_default=True,
              help="Of the convolutions; auto takes bfloat16 where it is faster. Weights are float32.")  # fmt: skip
@click.option("--quiet", is_flag=True, help="No progress bar and no lines.")
def command(
    teacher: str,
    images: Path,
    out: Path,
    minutes: float,
    init: Path | None,
    cost: float | None,
    exclude: tuple[str, ...],
    cache: Path | None,
    device: str,
    precision: str,
    quiet: bool,
    **settings: float | None,
) -> None:
    """Train a small network to do what a large one does. The same command goes on where it was stopped; with more --minutes it
    learns on. What it learns from are your images alone and the large network's results for them.

    The student is a cheap branch for `fastroute calibrate`, or an upscaler of its own.
    """
    import torch

    from fastroute import buffers
    from fastroute.cascades.distil import distil, half_pays
    from fastroute.cascades.sources import is_named_code
    from fastroute.cascades.stored import digest
    from fastroute.cascades.student import Recipe
    from fastroute.loading import open_network, weights_of
    from fastroute.models.checkpoints import CheckpointError

    if cost is not None and (init is not None or settings["width"] is not None):
        raise click.UsageError("give one of --cost, --width and --init: each decides the width alone")
    if init is not None and settings["depth"] is not None:
        raise click.UsageError("give either --depth or --init, whose depth is taken")
    at = device_of(device)
    if at.type == "cpu":
        buffers.keep_freed()
    half = precision == "bfloat16" or (precision == "auto" and half_pays(at))
    recipe = Recipe(**{name: value for name, value in settings.items() if value is not None})  # type: ignore[arg-type]
    if out.suffix not in (".safetensors", ".pth", ".pt"):
        raise click.BadParameter(f"its ending must be .safetensors or .pth; got {out}", param_hint="--out")
    try:
        learnt = distil(
            open_network("distill", teacher),
            digest(weights_of(teacher)) if not is_named_code(teacher) else teacher,
            images,
            out,
            minutes,
            recipe,
            init=init,
            cost=cost,
            exclude=exclude,
            cache=cache,
            device=at,
            dtype=torch.bfloat16 if half else torch.float32,
            progress=not quiet,
            tell=(lambda line: None) if quiet else click.echo,
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise click.UsageError(str(error).removeprefix("distill: ")) from error
    if not quiet:
        click.echo(
            f"wrote {out}: {learnt.psnr:.2f} dB to the teacher on images that it has not seen, after {learnt.steps:,} steps on "
            f"{learnt.crops} crops; use it with: fastroute calibrate --model {teacher} --cheap {out} --cheap bicubic ..."
        )
