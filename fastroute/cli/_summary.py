"""The summary that `fastroute upscale` prints at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn
from tqdm import tqdm

from fastroute.cascades.router import CascadeRouter
from fastroute.engines import TORCH
from fastroute.files.jobs import Plan
from fastroute.files.many_files import Job, Outcome, Router
from fastroute.io import Picture
from fastroute.pixel.pixel_router import PixelRouter
from fastroute.profiling import PCSR
from fastroute.runtime.results import RoutingStats
from fastroute.visualize import class_colours, colour_names

# The largest number of files that are named together in one remark.
NAMED_AT_MOST = 20


def tell_one(
    router: Router, job: Job, source: Picture, result: Picture, stats: RoutingStats, chosen: dict[str, Any], model: str
) -> None:
    """Print what was done with one picture."""
    sizes = [f"({picture.width} x {picture.height})" for picture in (source, result)]
    click.echo(f"{job.source} {sizes[0]} -> {job.target} {sizes[1]}, {result}, model {model}")
    tell_routing(router, job, stats, chosen)
    if job.class_map is not None:
        click.echo(f"  class map: {job.class_map}")


def tell_routing(router: Router, job: Job, stats: RoutingStats, chosen: dict[str, Any]) -> None:
    """Print classes, FLOPs and times."""
    unit = "pixels" if isinstance(router, PixelRouter) else "cells" if isinstance(router, CascadeRouter) else "patches"
    total = max(sum(stats.counts_per_class), 1)
    names, colours = colour_names(router.num_classes), class_colours(router.num_classes).tolist()
    for k, count in enumerate(stats.counts_per_class):
        rank = "cheapest" if k == 0 else "most expensive" if k == router.num_classes - 1 else ""
        notes = [note for note in (rank, f"{names[k]} in the class map" if job.class_map else "") if note]
        # Colours are shown on a terminal only; click leaves them out of files and pipes.
        swatch = click.style("  ", bg=tuple(colours[k])) if job.class_map and sys.stdout.isatty() else ""
        click.echo(f"  class {k + 1}: {count:9,d} {unit}, {100 * count / total:5.1f} %  {swatch} {', '.join(notes)}".rstrip())
    flops, paper = stats.flops, stats.paper_flops
    click.echo(f"  FLOPs: {flops.routed / 1e9:.1f} G, classifier included: {100 * flops.fraction:.0f} % of the dense "
               f"{flops.dense / 1e9:.1f} G, which all {unit} in the most expensive class take")  # fmt: skip
    counted = "with" if paper.paper == PCSR else "without"
    if paper.paper:
        click.echo(f"         as {paper.paper} counts, {counted} the classifier: {100 * paper.fraction:.0f} %")
    if "budget" in chosen:
        click.echo(f"         the budget of {chosen['budget']:g} bounds only the branches, not the classifier")
    if told := _how(router):
        click.echo(f"  networks: {told}")
    seconds = stats.seconds
    parts = {name: taken for name, taken in seconds.items() if name != "total"}
    # This can be long in a process's first call, which maps memory and builds kernels.
    other = max(seconds["total"] - sum(parts.values()), 0.0)
    stages = ", ".join(f"{name} {taken:.3f}" for name, taken in (parts | {"other": other}).items())
    asked = f" of the {chosen['budget_ms']:g} ms asked for" if "budget_ms" in chosen else ""
    click.echo(f"  time: {seconds['total']:.3f} s{asked} ({stages})")


def _how(router: Router) -> str:
    """In which precision and by which engine the networks ran, where that is not PyTorch in float32 for all of them.

    A router in half precision keeps networks in float32 that would lose too much, or gain no time.
    """
    networks: Iterable[nn.Module]
    if isinstance(router, CascadeRouter):
        networks, engines = router.networks.members, [TORCH] * router.num_classes
    elif isinstance(router, PixelRouter):
        networks, engines = [router], [TORCH]
    else:
        networks = router.branches
        engines = [router.networks.setting(c, router.device).engine for c in range(router.num_classes)]
    kinds = [next((str(x.dtype).removeprefix("torch.") for x in n.parameters()), "float32") for n in networks]
    found = list(dict.fromkeys(zip(kinds, engines, strict=True)))
    if found == [("float32", TORCH)] and router.dtype == torch.float32:
        return ""
    if len(found) == 1:
        return f"{found[0][0]} by {found[0][1]}"
    return ", ".join(f"class {k + 1} {kind} by {name}" for k, (kind, name) in enumerate(zip(kinds, engines, strict=True)))


def tell_many(plan: Plan, outcomes: Iterable[Outcome], folder: Path, quiet: bool, known: bool = True) -> None:
    """Show a bar while the jobs run, then what was written and left out, and finally what failed and why, with exit status 1.

    Args:
        plan: the plan of all jobs.
        outcomes: the outcomes of the jobs, as they end.
        folder: folder of the results.
        quiet: whether only failures are shown.
        known: whether the settings of existing results are known.
    """
    start, jobs = time.perf_counter(), plan.jobs
    done: list[Outcome] = []
    failures = 0
    with tqdm(total=len(jobs), desc="upscale", unit="image", disable=quiet) as bar:
        for outcome in outcomes:
            done.append(outcome)
            bar.update()
            failures += bool(outcome.error)
            if failures:
                bar.set_postfix_str(f"{failures} failed")
    errors = [outcome.error for outcome in done if outcome.error]
    errors += [f"cannot search the folder {path}: {reason}" for path, reason in plan.unreadable]
    skipped = sum(outcome.skipped for outcome in done)
    written = [outcome for outcome in done if not outcome.error and not outcome.skipped]
    if not quiet:
        parts = [f"{len(written)} written to {folder}"]
        parts += [f"{skipped} there already{'' if known else ', with what settings is not known'}"] if skipped else []
        parts += [f"{failures} failed"] if failures else []
        click.echo(f"{len(jobs)} image{'s' if len(jobs) > 1 else ''}: {', '.join(parts)}; {time.perf_counter() - start:.1f} s")
        stats = [outcome.stats for outcome in written if outcome.stats is not None]
        if stats:
            routed, dense = (sum(getattr(s.flops, name) for s in stats) for name in ("routed", "dense"))
            counts = [sum(column) for column in zip(*(s.counts_per_class for s in stats), strict=True)]
            shares = " / ".join(f"{100 * count / max(sum(counts), 1):.0f}" for count in counts)
            click.echo(f"  classes, cheapest first: {shares} %; FLOPs, classifier included: {routed / 1e9:.1f} G, "
                       f"{100 * routed / dense if dense else 100:.0f} % of dense")  # fmt: skip
        tell_groups("not quite as it was", [(outcome.job.target, note) for outcome in written for note in outcome.notes])
        tell_groups("left out", plan.left)
    if errors:
        lines = "\n".join(f"  {error.replace('raise max_pixels', 'raise --max-pixels')}" for error in errors)
        what = f"{failures} of {len(jobs)} images" if failures else f"{len(errors)} folders"
        raise click.ClickException(f"{what} failed:\n{lines}")


def tell_groups(title: str, found: Sequence[tuple[Path, str]]) -> None:
    """Print remarks about files, grouped by remark."""
    groups: dict[str, list[Path]] = {}
    for path, reason in found:
        groups.setdefault(reason, []).append(path)
    if groups:
        number = len({path for path, _ in found})
        click.echo(f"  {title}: {number} file{'s' if number > 1 else ''}")
    for reason, paths in groups.items():
        more = f" and {len(paths) - NAMED_AT_MOST} more" if len(paths) > NAMED_AT_MOST else ""
        click.echo(f"    {reason}: {', '.join(map(str, paths[:NAMED_AT_MOST]))}{more}")
