"""`fastroute train`: a training recipe on one's own images."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import click

from fastroute.cli._common import Command, device_of

# The recipes of fastroute.training.recipes, which is imported only to train.
RECIPE_NAMES = tuple(
    f"{system}-{backbone}"
    for system, backbones in (
        ("classsr", ("fsrcnn", "carn", "srresnet", "rcan")),
        ("cdnsr", ("fsrcnn", "carn", "srresnet", "rcan")),
        ("arm", ("fsrcnn", "carn", "srresnet", "rcan")),
        ("pcsr", ("fsrcnn", "carn", "srresnet", "rcan")),
    )
    for backbone in backbones
)


@click.command("train", cls=Command, short_help="Train a model on your own images; run again to resume.")
@click.argument("recipe", metavar="RECIPE", type=click.Choice(RECIPE_NAMES))
@click.option("--images", required=True, type=click.Path(path_type=Path), help="Folder of high-resolution images, searched "
              "recursively. No side may be below 128 pixels: a patch of 32 times the factor.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the state of training, from which the same command "
              "resumes, and the result.  [default: runs/RECIPE]")  # fmt: skip
@click.option("--exclude", multiple=True, metavar="PATTERN", help="File names to leave out, such as '*-x4.png'; repeatable.")
@click.option("--shrinks", default="1,1.6,2.5", show_default=True, metavar="N,N,...",
              help="Use every image reduced by each of these factors: the larger, the crisper its edges.")  # fmt: skip
@click.option("--init", type=click.Path(path_type=Path), help="Start from the weights of this checkpoint: of the same recipe, "
              "of a ClassSR (cdnsr takes its branches, arm and pcsr the largest), or of one network (arm, pcsr).")  # fmt: skip
@click.option("--config", type=click.Path(path_type=Path), help="YAML file of settings, NAME: VALUE; the options below and "
              "--set overrule it. Every run writes one beside its result.")  # fmt: skip
@click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE",
              help="Any setting of the recipe; may be repeated. A wrong name lists them.")  # fmt: skip
@click.option("--scale", metavar="N", help="Upscaling factor; pcsr may learn several, --set scales=2,3,4.  [default: 4]")
@click.option("--branch-steps", metavar="N,N,...",
              help="Steps of each branch, cheapest first (classsr, cdnsr).  [default: 6000,8000,12000]")  # fmt: skip
@click.option("--classifier-steps", metavar="N",
              help="Steps of the classifier alone (classsr, cdnsr).  [default: 1200; cdnsr 2000]")  # fmt: skip
@click.option("--joint-steps", metavar="N",
              help="Steps of classifier and branches together (classsr, cdnsr).  [default: 800; cdnsr 2000]")  # fmt: skip
@click.option("--routing-steps", metavar="N",
              help="Last steps of the classifier alone, by the cost of each choice (classsr).  [default: 1500]")  # fmt: skip
@click.option("--batch", metavar="N", help="Patches per step.  [default: 32; pcsr 16]")
@click.option("--seed", metavar="N", help="Fixes initial weights and batches.  [default: 0]")
@click.option("--device", metavar="DEVICE", default="cpu", show_default=True, help="Device to train on, such as cuda.")
@click.option("--validate", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Images that are not trained on: their PSNR and SSIM are measured at intervals, and best.safetensors and "
              "last.safetensors written beside the state.")  # fmt: skip
@click.option("--validate-every", type=click.IntRange(min=1), metavar="N", default=1000, show_default=True,
              help="Steps between two validations.")  # fmt: skip
@click.option("--log", "logs", type=click.Choice(("csv", "tensorboard")), multiple=True,
              help="Write the numbers of the training to log.csv, or for TensorBoard; may be repeated.")  # fmt: skip
@click.option("--resume/--no-resume", default=None, help="Require a saved state to go on from, or begin anew over one.  "
              "[default: go on if there is one]")  # fmt: skip
@click.option("--precision", type=click.Choice(("float32", "bfloat16", "float16")), default="float32", show_default=True,
              help="Type of the convolutions. Weights stay in float32.")  # fmt: skip
def command(
    recipe: str,
    images: Path,
    out: Path | None,
    exclude: tuple[str, ...],
    shrinks: str,
    init: Path | None,
    config: Path | None,
    assignments: tuple[str, ...],
    device: str,
    validate: Path | None,
    validate_every: int,
    logs: tuple[str, ...],
    resume: bool | None,
    precision: str,
    **options: str | None,
) -> None:
    """Train a model on your own images. The same command continues where it was stopped. RECIPE is one of:

    \b
    classsr-fsrcnn  classsr-carn  classsr-srresnet  classsr-rcan
    cdnsr-fsrcnn    cdnsr-carn    cdnsr-srresnet    cdnsr-rcan
    arm-fsrcnn      arm-carn      arm-srresnet      arm-rcan
    pcsr-fsrcnn     pcsr-carn     pcsr-srresnet     pcsr-rcan

    On several GPUs or machines: torchrun --nproc-per-node N -m fastroute train RECIPE ... --device cuda
    """
    from fastroute import buffers
    from fastroute.training.data import SHRINKS, Pool
    from fastroute.training.distributed import processes, rank
    from fastroute.training.logs import make_log
    from fastroute.training.recipes import RECIPES, configure, write_config
    from fastroute.training.start import Start
    from fastroute.training.state import read_state
    from fastroute.training.validation import Validation

    factors = _factors(shrinks)
    settings = {name: value for name, value in options.items() if value is not None}
    for assignment in assignments:
        name, equals, value = (part.strip() for part in assignment.partition("="))
        if not equals:
            raise click.BadParameter(f"must be NAME=VALUE; got {assignment!r}", param_hint="--set")
        name = name.replace("-", "_")
        if options.get(name) not in (None, value):
            option = f"--{name.replace('_', '-')} {options[name]}"
            raise click.BadParameter(f"{assignment} contradicts {option}; give one of them", param_hint="--set")
        settings[name] = value
    plan = configure(recipe, settings, config)
    start = None if init is None else Start.read(init)
    folder = Path("runs") / recipe if out is None else out
    _check_folder(folder)
    origin = _origin(images, exclude, factors, init)
    with processes(device) as where:
        at = device_of(where)
        if at.type == "cpu":
            buffers.keep_freed()
        first = rank() == 0
        watched = None
        if first:
            # What is wrong whatever the images are is said before they are read.
            held = read_state(folder / "state.pt", plan, precision, resume, origin)
            RECIPES[recipe][1].check(plan, start)
            watched = Validation(validate, plan.scale, validate_every, exclude) if validate is not None else None
        pool = Pool.build(images, plan.scale, plan.patch, factors, exclude=exclude)
        trainer = RECIPES[recipe][1](
            pool, plan, folder / "state.pt", start, device=at, precision=precision, validation=watched,
            logs=[make_log(name, folder) for name in logs], resume=resume, origin=origin,
        )  # fmt: skip
        if first:
            click.echo(f"{len(pool.positions):,} patches from {pool.images} images, whole and reduced")
            if held is not None and held["stage"] >= len(trainer.stages):
                click.echo("this training is complete; --no-resume begins it anew, and another --out another one")
            folder.mkdir(parents=True, exist_ok=True)
        trainer.run()
        if not first:
            return
        more = (f" --init {init}" if init is not None else "") + (f" --shrinks {shrinks}" if factors != SHRINKS else "")
        command = f"python -m fastroute train {recipe} --images DIR --config FILE{more} --precision {precision}"
        write_config(folder / "config.yaml", plan, f"To repeat the training: {command}")
        target = folder / f"{recipe}-x{plan.scale}.safetensors"
        trainer.write(target)
    click.echo(f"wrote {target}; use it with: fastroute upscale IN OUT --model {target}")


def _factors(text: str) -> tuple[float, ...]:
    from fastroute.training.data import check_shrinks

    try:
        factors = tuple(float(part) for part in text.split(","))
        check_shrinks(factors)
    except ValueError:
        raise click.BadParameter(f"must be numbers of at least 1; got {text!r}", param_hint="--shrinks") from None
    return factors


def _origin(images: Path, exclude: tuple[str, ...], factors: tuple[float, ...], init: Path | None) -> dict[str, str]:
    """What a state belongs to beside its recipe: names and sizes of the images, what is made of them, and the first weights."""
    from fastroute import io
    from fastroute.cascades.stored import digest

    paths = io.list_images(images, exclude)
    root = images if images.is_dir() else images.parent
    told = sorted(f"{path.relative_to(root)} {path.stat().st_size}" for path in paths)
    names = hashlib.sha256("\n".join(told).encode()).hexdigest()
    return {
        "images": names,
        "--shrinks": ",".join(f"{factor:g}" for factor in factors),
        "--init": "" if init is None else digest(init),
    }


def _check_folder(folder: Path) -> None:
    """Check before the work that `folder` can be made and written."""
    parent = folder
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        reason = "permission denied" if parent.is_dir() else f"{parent} is not a folder"
        raise click.ClickException(f"cannot make the folder {folder}: {reason}")
