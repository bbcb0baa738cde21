"""`fastroute warmup`: compiles and measures ahead of the first image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

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


@click.command("warmup", cls=Command, short_help="Compile kernels and find the fastest settings ahead of the first image.")
@click.argument("model")
@click.option("--image-size", nargs=2, type=click.IntRange(1, 1 << 20), required=True, metavar="WIDTH HEIGHT",
              help="Size of the images to come, before upscaling.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["uint8", "uint16", "float32"]), default="uint8", show_default=True,
              help="Type of the images to come.")  # fmt: skip
@click.option("--budget", type=float, help="That of the images to come: branch FLOPs as a fraction of those of the most "
              "expensive.  [default: the classifier decides]")  # fmt: skip
@click.option("--budget-ms", type=float, help="The same in milliseconds for a whole image; the speed is then measured.")
@click.option("--scale", type=float, help="Upscaling factor: any for PCSR.")
@model_options
@running_options
@click.option("--quiet", is_flag=True, help="No summary.")
def command(
    model: str, image_size: tuple[int, int], dtype: str, budget: float | None, budget_ms: float | None, scale: float | None,
    patch: int | None, stride: int | None, table: Path | None, eta: float | None, published: bool, quiet: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Upscale pictures of noise with MODEL, so that the first image does not wait: Triton and torch.compile compile what they
    keep in their caches, and the search for the fastest way to run the networks is completed and kept. MODEL is a shipped
    model, see `fastroute models`, or a checkpoint file.

    \b
    fastroute warmup classsr-fsrcnn-x4 --image-size 1920 1080 --device cuda --precision float16
    """
    import torch

    import fastroute

    running = running_of(options)
    chosen = {name: value for name, value in (("budget", budget), ("budget_ms", budget_ms)) if value is not None}
    check_deciding(chosen)
    if not quiet:
        tell_measuring()
    router = load_router(model, running, scale, patch, stride, table=table, eta=eta, published=published)
    chosen = check_routing(router, model, chosen)
    width, height = image_size
    found = fastroute.warmup(router, (height, width), dtype=getattr(torch, dtype), **chosen)
    if not quiet:
        click.echo(str(found))
