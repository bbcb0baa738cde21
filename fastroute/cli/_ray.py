"""`fastroute upscale --ray`: the images of a folder on the machines of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fastroute.cli._task import Task
    from fastroute.files.many_files import Job, Outcome, Router

# Addresses that Ray knows beside HOST:PORT: a running cluster, and a new one of this machine.
AUTO, LOCAL = "auto", "local"
# The form of the networks that shows which options suit a model, on any machine.
ANYWHERE = {"device": "cpu", "precision": "float32", "engine": "torch", "tune": False}


class RayAddress(click.ParamType):
    """An address of a Ray cluster; "" for the one that Ray finds by itself."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The address."""
        if not value or value in (AUTO, LOCAL) or ":" in value:
            return str(value)
        return self.fail(
            f"ADDRESS must be HOST:PORT, {AUTO} or {LOCAL}; got {value}. Write --ray behind IN and OUT", param, ctx
        )


ray_option = click.option("--ray", type=RayAddress(), is_flag=False, flag_value="", metavar="[ADDRESS]", help="Run on a Ray "
                          "cluster whose machines all see IN and OUT: HOST:PORT, auto for one that must run already, or local "
                          "for a new one. Without ADDRESS, the one of RAY_ADDRESS or of this machine.")  # fmt: skip


def checking(task: Task) -> Task:
    """`task` as it is checked on the machine of the command, which may lack the device of the workers."""
    device = task.running["device"]
    if device.startswith("cuda:"):
        raise click.BadParameter("Ray gives every worker a GPU of its own; give --device cuda", param_hint="--device")
    return replace(task, running=ANYWHERE)


def on_ray(task: Task, address: str) -> Callable[..., Iterator[Outcome]]:
    """Connect to the cluster until the command ends; return what stands for :func:`fastroute.files.many_files.run_jobs`."""
    from fastroute import ray

    click.get_current_context().with_resource(ray.connected(address or None))
    anywhere = ray.runs.found_anywhere
    task = replace(
        task,
        model=anywhere(task.model),
        cheap=tuple(map(anywhere, task.cheap)),
        places={**task.places, "table": anywhere(task.places["table"])},
    )

    def run(_: Router, jobs: list[Job], resume: bool, drop_alpha: bool, _shared: bool, **options: Any) -> Iterator[Outcome]:
        gpus = int(task.running["device"] == "cuda")
        options = {"resume": resume, "drop_alpha": drop_alpha, "num_gpus": gpus, **options}
        return ray.run_jobs(jobs, partial(_router, task), **options)

    return run


def _router(task: Task) -> Router:
    """The router of a worker."""
    return task.load()[0]
