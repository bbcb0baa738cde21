"""Options and helpers that several commands share."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import fastroute

if TYPE_CHECKING:
    import torch

    from fastroute.cascades.router import CascadeRouter
    from fastroute.patch.patch_router import PatchRouter
    from fastroute.pixel.pixel_router import PixelRouter


# The form of an error in which a function refuses one of its arguments.
REFUSED = re.compile(r"^(?:cannot use .*?: )?(?P<words>(?:[^:]*: )*(?P<name>\w+) must .*)", re.DOTALL)
# Each of these options decides by itself how classes are chosen.
DECIDING = ("budget", "budget_flops", "budget_ms", "fidelity", "penalty", "adaptive")


class Command(click.Command):
    """A command that names the option whose value a function refuses. Such an error is a usage error, with exit status 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (ValueError, TypeError) as error:
            found = REFUSED.search(str(error))
            hint = found and self._given(ctx, found["name"])
            if not found or not hint:
                raise
            raise click.BadParameter(found["words"], ctx, param_hint=hint) from error

    def _given(self, ctx: click.Context, name: str) -> str:
        """The option that gave the argument `name` of a function on the command line, if any."""
        flag = f"--{name.replace('_', '-')}"
        for option in self.params:
            if ctx.get_parameter_source(option.name or "") != click.core.ParameterSource.COMMANDLINE:
                continue
            if flag in option.opts and not isinstance(option.type, click.Path):
                return flag
            # Settings of `train`.
            if "--set" in option.opts and any(text.split("=")[0].strip() == name for text in ctx.params[option.name or ""]):
                return f"--set {name}"
        return ""


def device_of(name: str) -> torch.device:
    """The device `name`, once it is known to work."""
    from fastroute.loading import usable_device

    try:
        return usable_device(name)
    except ValueError as error:
        raise click.BadParameter(str(error).removeprefix("device "), param_hint="--device") from error


def precision_of(running: dict[str, Any]) -> torch.dtype:
    """The type that ``--precision`` names, once it is known that the device supports it."""
    from fastroute.models.precision import PRECISIONS, check_precision

    dtype = PRECISIONS[running["precision"]]
    try:
        check_precision("load", dtype, device_of(running["device"]))
    except ValueError as error:
        raise click.BadParameter(str(error).removeprefix("load: "), param_hint="--precision") from error
    return dtype


def running_of(options: dict[str, Any]) -> dict[str, Any]:
    """Remove the options of :func:`running_options` from all options and return them."""
    return {name: options.pop(name) for name in ("device", "precision", "engine", "tune")}


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of :func:`load_router`, except ``--model`` and ``--scale``."""
    patch = click.option("--patch", type=click.IntRange(min=1), metavar="N",
                         help="Side of a patch in input pixels.  [default: that of the checkpoint, or 32]")  # fmt: skip
    stride = click.option("--stride", type=click.IntRange(min=1), metavar="N",
                          help="Distance of patches.  [default: that of the checkpoint, or the patch minus 4]")  # fmt: skip
    table = click.option("--table", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
                         help="ARM: the table (.state) that its code stored beside the weights of MODEL.")  # fmt: skip
    eta = click.option("--eta", type=float, metavar="ETA", help="ARM: choose classes as its code does, by PSNR - cost / ETA; "
                       "larger is better and slower.  [default: the best expected PSNR]")  # fmt: skip
    published = click.option("--as-published", "published", is_flag=True, help="Route patches as the published code does: no "
                             "regions, means of patches of 8 bits, nothing beyond the last stride.")  # fmt: skip
    return patch(stride(table(eta(published(command)))))


def load_router(
    model: str,
    running: dict[str, Any],
    scale: float | None = None,
    patch: int | None = None,
    stride: int | None = None,
    **more: Any,
) -> PatchRouter | PixelRouter | CascadeRouter:
    """:func:`fastroute.load` with the options of :func:`running_options`. Errors name the option; warnings are single lines."""
    where, dtype = device_of(running["device"]), precision_of(running)
    with telling_warnings():
        try:
            places: dict[str, Any] = {"scale": scale, "patch": patch, "stride": stride}
            how: dict[str, Any] = {"dtype": dtype, "tune": running["tune"], "engine": running["engine"]}
            return fastroute.load(model, device=where, **how, **places, **more)
        except ValueError as error:
            words = str(error)
            if words.startswith("compile: "):
                raise click.BadParameter(words.removeprefix("compile: "), param_hint="--engine") from error
            for name, given in (*places.items(), *more.items()):
                if given is not None and words.startswith(f"load: {name} "):
                    raise click.BadParameter(words.removeprefix(f"load: {name} "), param_hint=f"--{name}") from error
            if scale is not None and words.endswith(f"alone; got scale={scale:g}"):
                raise click.BadParameter(words, param_hint="--scale") from error
            raise


@contextmanager
def telling_warnings() -> Iterator[None]:
    """Show warnings as single lines, without the place in the code."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for text in dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning):
                click.echo(f"Warning: {text}", err=True)


def tell_measuring() -> None:
    """Until the command ends, announce on the terminal when a speed is measured."""
    from fastroute.budget import speed
    from fastroute.runtime import tuning

    logger, handler = logging.getLogger("fastroute"), logging.StreamHandler()
    handler.addFilter(lambda record: record.msg in (speed.MEASURING, tuning.MEASURING))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

    def end() -> None:
        logger.removeHandler(handler)
        logger.setLevel(level)

    click.get_current_context().call_on_close(end)


def running_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options for how networks run: `device`, `precision`, `engine` and `tune` of :func:`load_router`."""
    device = click.option(
        "--device", metavar="DEVICE", default="cpu", show_default=True, help="Device to run on, such as cuda."
    )
    precision = click.option("--precision", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32",
                             show_default=True, help="Type in which networks compute. Images keep their own type.")  # fmt: skip
    tune = click.option("--no-tune", "tune", is_flag=True, flag_value=False, default=True,
                        help="Do not search, during the work, for the fastest way to run the networks.")  # fmt: skip
    engine = click.option("--engine", type=click.Choice(["torch", "torch.compile", "openvino", "tensorrt", "auto"]),
                          default="torch", show_default=True,
                          help="Engine that runs the branches; auto compares those installed.")  # fmt: skip
    return device(precision(engine(tune(command))))


def check_deciding(chosen: dict[str, Any], shared: bool = False) -> None:
    """Refuse options that contradict each other, before anything is loaded.

    Args:
        chosen: the options given on the command line, by the names of the router's arguments.
        shared: whether all inputs share the budget.
    """
    deciding = [f"--{name.replace('_', '-')}" for name in DECIDING if name in chosen]
    if len(deciding) > 1:
        raise click.UsageError(f"give one of {' and '.join(deciding)}: each decides alone")
    if "scale" in chosen and "size" in chosen:
        raise click.UsageError("give either --scale or --size")
    for name in ("budget_flops", "budget_ms"):
        if name in chosen and not 0 < chosen[name] < math.inf:
            flag = f"--{name.replace('_', '-')}"
            raise click.BadParameter(f"it must be positive and finite; got {chosen[name]:g}", param_hint=flag)
    if shared and not any(name.startswith("budget") for name in chosen):
        raise click.UsageError("--shared-budget needs --budget, --budget-flops or --budget-ms")
    if shared and "size" in chosen:
        raise click.UsageError("--shared-budget needs --scale instead of --size")


def check_routing(router: PatchRouter | PixelRouter | CascadeRouter, model: str, chosen: dict[str, Any]) -> dict[str, Any]:
    """The options of `upscale` that suit the router; those that do not are refused before anything is read.

    Args:
        router: the router of `model`.
        model: name of the model.
        chosen: the options given on the command line, by the names of the router's arguments.
    """
    from fastroute.budget.limits import check_possible
    from fastroute.cascades.router import CascadeRouter
    from fastroute.patch.patch_router import PatchRouter

    chosen = dict(chosen)
    if isinstance(router, CascadeRouter):
        return check_cascade(router, model, chosen)
    if "fidelity" in chosen:
        raise click.BadParameter(f"{model} is no calibrated cascade, which alone keeps a fidelity", param_hint="--fidelity")
    if isinstance(router, PatchRouter):
        chosen.pop("scale", None)  # the networks' own scale, which was checked when they were loaded
        refuse_pixel_options(model, chosen)
        costs = router.costs
    else:
        costs = router.class_cost(float(chosen.get("scale", router.scale)))
    check_deciding(chosen)
    if "budget" in chosen:
        try:
            check_possible(costs, chosen["budget"])
        except ValueError as error:
            raise click.BadParameter(str(error).removeprefix("assign_classes: "), param_hint="--budget") from error
    return chosen


def check_cascade(router: CascadeRouter, model: str, chosen: dict[str, Any]) -> dict[str, Any]:
    """:func:`check_routing` for networks over regions."""
    chosen.pop("scale", None)
    refuse_pixel_options(model, chosen)
    check_deciding(chosen)
    for name in ("budget_flops", "budget_ms", "penalty"):
        if name in chosen:
            flag = f"--{name.replace('_', '-')}"
            raise click.BadParameter(f"{model} keeps shares of the dense cost alone; give --budget", param_hint=flag)
    try:
        router.check(**chosen)
    except ValueError as error:
        words = str(error).removeprefix("upscale: ")
        named = next((name for name in ("budget", "fidelity") if words.startswith(f"{name} ")), None)
        raise (click.UsageError(words) if named is None else click.BadParameter(words, param_hint=f"--{named}")) from error
    return chosen


def refuse_pixel_options(model: str, chosen: dict[str, Any]) -> None:
    """Fail if an option of PCSR was given to a model that routes patches."""
    for name in ("size", "adaptive", "refine"):
        if name in chosen:
            raise click.BadParameter(f"{model} routes patches; this option is PCSR's", param_hint=f"--{name}")


def sorted_by_cost(branches: list[str]) -> list[str]:
    """The branches by their FLOPs; the last, whose results are wanted, must be the most expensive."""
    from fastroute.cascades.networks import Networks
    from fastroute.cascading import open_branches

    opened = open_branches("cascade", branches)
    flops = Networks([module for _, module, _ in opened], [facts for _, _, facts in opened]).flops()
    order = sorted(range(len(branches)), key=flops.__getitem__)
    if order[-1] != len(branches) - 1:
        raise ValueError(f"cascade: {branches[order[-1]]} is more expensive than {branches[-1]}; name it as --model")
    return [branches[n] for n in order]


def cheap_router(model: str, cheap: Sequence[str], running: dict[str, Any]) -> CascadeRouter:
    """`model` with cheaper networks beside it, run as :func:`running_options` says."""
    from fastroute.cascading import cascade

    where, dtype = device_of(running["device"]), precision_of(running)
    with telling_warnings():
        try:
            return cascade(sorted_by_cost([*cheap, model])).to(where, dtype).compile(running["engine"])
        except ValueError as error:
            for name, flag in (("compile: ", "--engine"), ("cascade: ", "--cheap")):
                if str(error).startswith(name):
                    raise click.BadParameter(str(error).removeprefix(name), param_hint=flag) from error
            raise


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, if they are missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"cannot make the folder {folder}: {error.strerror}") from error
