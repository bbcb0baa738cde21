"""`fastroute compare`: bicubic, dense and routed results of one image on one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastroute.catalogue import DEFAULT_MODEL
from fastroute.cli._common import (
    Command,
    device_of,
    precision_of,
    running_of,
    running_options,
    tell_measuring,
    telling_warnings,
)

# Options that take several values, up to the next option.
LISTS = ("--models", "--budget")
PLACE, SIDE = click.IntRange(min=0), click.IntRange(min=1)


class ListCommand(Command):
    """Lets ``--models A B`` stand for ``--models A --models B``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the name of a list before each of its values."""
        spread: list[str] = []
        name, first = "", False
        for arg in args:
            if arg.startswith("-"):
                option, equals, _ = arg.partition("=")
                name, first = (option if option in LISTS else ""), not equals
                spread.append(arg)
            else:
                spread += [arg] if first or not name else [name, arg]
                first = False
        return super().parse_args(ctx, spread)


@click.command("compare", cls=ListCommand, short_help="Show bicubic, dense and routed results on one HTML page.")
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.option("--models", multiple=True, default=[DEFAULT_MODEL], show_default=True, metavar="MODEL...",
              help="Shipped models, see `fastroute models`, or checkpoint files. IN comes before this option.")  # fmt: skip
@click.option("--budget", "budgets", multiple=True, type=float, metavar="BUDGET...",
              help="Route within each of these, such as 0.5 0.7.  [default: the model decides]")  # fmt: skip
@click.option("--reference", type=click.Path(path_type=Path), help="What the result should be, for PSNR and SSIM.")
@click.option("--downscale", is_flag=True, help="Reduce IN by the factor first; IN itself is then the reference.")
@click.option("--scale", type=float, help="Upscaling factor, for models that take any (PCSR) or whose checkpoint does "
              "not state it.  [default: that of the others]")  # fmt: skip
@click.option("--detail", type=(PLACE, PLACE, SIDE, SIDE), metavar="LEFT TOP WIDTH HEIGHT",
              help="Part that the slider shows, in pixels of the result.  [default: all, or where most changes]")  # fmt: skip
@click.option("--runs", type=click.IntRange(min=1), default=3, show_default=True, help="How often each variant is timed.")
@click.option("--out", type=click.Path(path_type=Path), help="The page to write.  [default: IN-compare.html, in this folder]")
@running_options
@click.option("--quiet", is_flag=True, help="No progress bar and no summary.")
def command(
    source: Path,
    models: tuple[str, ...],
    budgets: tuple[float, ...],
    reference: Path | None,
    downscale: bool,
    scale: float | None,
    detail: tuple[int, int, int, int] | None,
    runs: int,
    out: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Enlarge image IN by bicubic interpolation and by every model, dense and routed. Writes one HTML page with a slider
    between the results, class maps, FLOPs, times and, given a reference, PSNR. Of a cascade that `fastroute calibrate` wrote it
    also shows the difference to the dense result.
    """
    from fastroute import io
    from fastroute.report.comparison import compare
    from fastroute.report.comparison_page import check_page, write_page

    running = running_of(options)
    if not quiet:
        tell_measuring()
    target = Path(f"{source.stem}-compare.html") if out is None else out
    check_page(target)
    image = io.read_image(source)
    truth = None if reference is None else io.read_image(reference)
    with telling_warnings():
        comparison = compare(
            image,
            models,
            budgets,
            truth,
            downscale,
            scale,
            device_of(running["device"]),
            runs,
            progress=not quiet,
            dtype=precision_of(running),
            tune=running["tune"],
            engine=running["engine"],
        )
    write_page(target, comparison, source.name, detail)
    if quiet:
        return
    for variant in comparison.variants:
        facts = [f"{1000 * variant.seconds:,.0f} ms"]
        if variant.stats is not None:
            facts.append(f"{variant.stats.flops.routed / 1e9:,.1f} GFLOPs")
        if variant.quality:
            facts.append(f"PSNR {variant.quality['psnr']:.2f} dB")
        if variant.near is not None and variant.dense is not None:
            facts.append(f"{variant.near:.2f} dB to {variant.dense.name}")
        click.echo(f"  {variant.name}: {', '.join(facts)}")
    click.echo(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")
