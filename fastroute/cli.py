"""The command line: ``fastroute`` or ``python -m fastroute``."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch

import fastroute
from fastroute import io
from fastroute.grid import TileGrid
from fastroute.models.checkpoints import read_checkpoint, save_checkpoint, state_dict_of
from fastroute.routing.load import DEFAULT_MODEL
from fastroute.visualize import class_overlay

# Those of fastroute.training.recipes, which is imported only to train.
RECIPE_NAMES = tuple(
    f"{system}-{backbone}"
    for system, backbones in (
        ("classsr", ("fsrcnn", "carn", "srresnet", "rcan")),
        ("cdnsr", ("fsrcnn", "carn", "srresnet", "rcan")),
        ("arm", ("fsrcnn", "carn", "srresnet")),
        ("pcsr", ("fsrcnn", "carn")),
    )
    for backbone in backbones
)


class Group(click.Group):
    """Errors that a user can mend end the command with their message alone."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; see the class."""
        # A terminated run tidies up like an interrupted one: no temporary file is left.
        signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().invoke(ctx)
        except (ValueError, TypeError, fastroute.BackendError, MemoryError, torch.OutOfMemoryError) as error:
            raise click.ClickException(str(error) or "out of memory") from error


def _terminate(number: int, frame: object) -> None:
    sys.exit(128 + number)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fastroute.__version__)
def main() -> None:
    """Dynamic-routing super-resolution in the time that its FLOPs promise."""


@main.command()
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="A shipped model or a checkpoint file.")
@click.option(
    "--budget", type=float, help="Mean branch FLOPs as a fraction of the dearest's, say 0.7; the classifier comes on top."
)
@click.option("--scale", type=float, help="Upscaling factor; any for PCSR, that of its branches for other models.")
@click.option("--size", type=(int, int), metavar="HEIGHT WIDTH", help="Output size instead of a factor (PCSR).")
@click.option("--k", type=float, help="Cost exponent of PCSR's decision: 0 is best quality, larger is cheaper.")
@click.option("--adaptive", is_flag=True, help="PCSR's adaptive decision (ADM) instead of --k.")
@click.option("--refine/--no-refine", default=None, help="PCSR's refinement of class borders; on by default.")
@click.option("--class-map", type=click.Path(path_type=Path), help="Also write a picture of the class of every patch or pixel.")
@click.option("--device", default="cpu", show_default=True, help="Where to run, as torch names it.")
@click.option("--quiet", is_flag=True, help="No progress bar and no summary.")
def upscale(source: Path, target: Path, model: str, class_map: Path | None, device: str, quiet: bool, **options: Any) -> None:
    """Super-resolve image IN and write OUT; the format follows OUT's ending."""
    if class_map is not None and class_map.resolve() == target.resolve():
        raise click.UsageError("OUT and --class-map are the same file")
    for path in (target, class_map):
        if path is not None:
            io.check_writable(path)
    image = io.read_image(source)
    router = fastroute.load(model, _device(device))
    unset = {"adaptive": False}
    chosen = {name: value for name, value in options.items() if value is not None and value is not unset.get(name)}
    if isinstance(router, fastroute.PatchRouter):
        scale = chosen.pop("scale", router.scale)
        if scale != router.scale:
            raise click.BadParameter(f"{model} upscales by {router.scale} alone; got {scale:g}", param_hint="--scale")
        _refuse_pixel_options(model, chosen)
    result = router.upscale(image.to(router.device), progress=not quiet, **chosen)
    start = time.perf_counter()
    io.write_image(target, result.image)
    if class_map is not None:
        grid = None
        if isinstance(router, fastroute.PatchRouter):
            grid = TileGrid(image.shape[1], image.shape[2], router.patch, router.stride, router.scale)
        io.write_image(class_map, class_overlay(result.image, result.class_map, grid, router.num_classes))
    if quiet:
        return
    stats = result.stats
    unit = "patches" if isinstance(router, fastroute.PatchRouter) else "pixels"
    total = sum(stats.patches_per_class)
    (height, width), (out_height, out_width) = image.shape[1:], result.image.shape[1:]
    click.echo(f"{source} ({width} x {height}) -> {target} ({out_width} x {out_height}), model {model}")
    for number, count in enumerate(stats.patches_per_class, start=1):
        click.echo(f"  class {number}: {count:9,d} {unit}, {100 * count / total:5.1f} %")
    click.echo(
        f"  FLOPs: {stats.flops.routed / 1e9:.1f} G, {100 * stats.flops.fraction:.0f} % of all {unit} in the dearest class"
        f" ({100 * stats.paper_flops.fraction:.0f} % as the papers count)"
    )
    seconds = stats.seconds
    stages = ", ".join(f"{name} {seconds[name]:.3f}" for name in seconds if name != "total")
    click.echo(f"  time: {seconds['total']:.3f} s ({stages}); writing {time.perf_counter() - start:.2f} s")
    if class_map is not None:
        click.echo(f"  class map: {class_map} (green: cheapest class, red: dearest)")


@main.command()
def info() -> None:
    """Show versions, devices, and which backend runs which operator."""
    click.echo(str(fastroute.info()))


@main.command()
def models() -> None:
    """List the shipped models."""
    for name in fastroute.list_models():
        click.echo(f"{name}{'  (default)' if name == DEFAULT_MODEL else ''}")


@main.command()
@click.argument("model")
@click.option("--images", required=True, type=click.Path(path_type=Path), help="Folder of HR images, searched recursively.")
@click.option("--exclude", multiple=True, help="File names to leave out, as a glob pattern; may be repeated.")
@click.option("--budget", type=float, help="Mean branch FLOPs as a fraction of the dearest's.")
@click.option("--scale", type=int, help="Upscaling factor; any whole one for PCSR, that of its branches for other models.")
@click.option("--k", type=float, help="Cost exponent of PCSR's decision.")
@click.option("--adaptive", is_flag=True, default=None, help="PCSR's adaptive decision (ADM) instead of --k.")
@click.option("--refine/--no-refine", default=None, help="PCSR's refinement of class borders; on by default.")
@click.option("--device", default="cpu", show_default=True, help="Where to run, as torch names it.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Also write every number to this file.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def evaluate(
    model: str, images: Path, exclude: tuple[str, ...], scale: int | None, device: str, target: Path | None, quiet: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Reduce the images of a folder, super-resolve them with MODEL and compare: quality, FLOPs, seconds, classes."""
    from fastroute import evaluate as evaluation

    if target is not None and not target.resolve().parent.is_dir():
        raise click.BadParameter(f"the folder {target.parent} does not exist", param_hint="--json")
    chosen = {name: value for name, value in options.items() if value is not None}
    router = fastroute.load(model, _device(device))
    if isinstance(router, fastroute.PatchRouter):
        _refuse_pixel_options(model, chosen)
    rows = evaluation.evaluate(router, images, scale, exclude, progress=not quiet, **chosen)
    click.echo(evaluation.table(rows))
    if target is not None:
        evaluation.write_json(
            target, rows, model=model, options={**chosen, "scale": scale}, device=device, threads=torch.get_num_threads(),
            fastroute=fastroute.__version__,
        )  # fmt: skip
        click.echo(f"wrote {target}")


@main.command()
@click.argument("recipe", type=click.Choice(RECIPE_NAMES))
@click.option("--images", required=True, type=click.Path(path_type=Path), help="Folder of HR images, searched recursively.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the state of training, from which the same command "
              "resumes, and the result.  [default: runs/RECIPE]")  # fmt: skip
@click.option("--exclude", multiple=True, help="File names to leave out, as a glob pattern; may be repeated.")
@click.option("--init", type=click.Path(path_type=Path), help="Start from the weights of this checkpoint.")
@click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE",
              help="Any setting of the recipe; may be repeated. A wrong name lists them.")  # fmt: skip
@click.option("--scale", help="Upscaling factor.")
@click.option("--branch-steps", help="Steps of each branch, cheapest first, for example 6000,8000,12000.")
@click.option("--classifier-steps", help="Steps of the classifier alone.")
@click.option("--joint-steps", help="Steps of classifier and branches together.")
@click.option("--routing-steps", help="Last steps of the classifier alone, by what each choice costs.")
@click.option("--batch", help="Patches per step.")
@click.option("--seed", help="Fixes initial weights and batches.")
@click.option("--device", default="cpu", show_default=True, help="Where to train, as torch names it.")
def train(
    recipe: str,
    images: Path,
    out: Path | None,
    exclude: tuple[str, ...],
    init: Path | None,
    assignments: tuple[str, ...],
    device: str,
    **options: str | None,
) -> None:
    """Train RECIPE on your own images; run again to resume."""
    from fastroute.training.data import Pool
    from fastroute.training.recipes import RECIPES, configure

    settings = {name: value for name, value in options.items() if value is not None}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise click.BadParameter(f"must be NAME=VALUE; got {assignment!r}", param_hint="--set")
        settings[name.strip().replace("-", "_")] = value.strip()
    plan, where = configure(recipe, settings), _device(device)
    start = None if init is None else state_dict_of(read_checkpoint(init)[0], init)
    folder = Path("runs") / recipe if out is None else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"cannot make the folder {folder}: {error.strerror}") from error
    pool = Pool.build(images, plan.scale, plan.patch, exclude=exclude)
    click.echo(f"{len(pool.positions)} patches in {len(pool.lr)} images and their reductions")
    model = RECIPES[recipe][1](pool, plan, folder / "state.pt", start, str(init), device=where).run()
    target = folder / f"{recipe}-x{plan.scale}.safetensors"
    save_checkpoint(target, model, {**dataclasses.asdict(plan), "scale": plan.scale, "stride": 28, "system": recipe})
    click.echo(f"wrote {target}; use it with: fastroute upscale IN OUT --model {target}")


def _refuse_pixel_options(model: str, chosen: dict[str, Any]) -> None:
    for name in ("size", "k", "adaptive", "refine"):
        if name in chosen:
            raise click.BadParameter(f"{model} routes patches; this option is PCSR's", param_hint=f"--{name}")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise click.BadParameter(f"{name!r} cannot be used: {reason}", param_hint="--device") from error
    return device
