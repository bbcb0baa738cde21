"""What `fastroute upscale` tells at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from fastroute.batch import Job, Outcome, Router
from fastroute.io import Picture
from fastroute.routing.patch_router import PatchRouter
from fastroute.routing.result import RoutingStats
from fastroute.visualize import class_colours, colour_names


def tell_one(
    router: Router, job: Job, source: Picture, result: Picture, stats: RoutingStats, chosen: dict[str, Any], model: str
) -> None:
    """What was done with one picture."""
    sizes = [f"({picture.width} x {picture.height})" for picture in (source, result)]
    click.echo(f"{job.source} {sizes[0]} -> {job.target} {sizes[1]}, {result}, model {model}")
    tell_routing(router, job, stats, chosen)
    if job.class_map is not None:
        click.echo(f"  class map: {job.class_map}")


def tell_routing(router: Router, job: Job, stats: RoutingStats, chosen: dict[str, Any]) -> None:
    """Classes, FLOPs and times."""
    unit = "patches" if isinstance(router, PatchRouter) else "pixels"
    total = max(sum(stats.patches_per_class), 1)
    names, colours = colour_names(router.num_classes), class_colours(router.num_classes).tolist()
    for k, count in enumerate(stats.patches_per_class):
        rank = "cheapest" if k == 0 else "dearest" if k == router.num_classes - 1 else ""
        notes = [note for note in (rank, f"{names[k]} in the class map" if job.class_map else "") if note]
        # Shown on a terminal; click leaves colours out of files and pipes.
        swatch = click.style("  ", bg=tuple(colours[k])) if job.class_map and sys.stdout.isatty() else ""
        click.echo(f"  class {k + 1}: {count:9,d} {unit}, {100 * count / total:5.1f} %  {swatch} {', '.join(notes)}".rstrip())
    flops, paper = stats.flops, stats.paper_flops
    click.echo(f"  FLOPs: {flops.routed / 1e9:.1f} G, classifier included: {100 * flops.fraction:.0f} % of the dense "
               f"{flops.dense / 1e9:.1f} G, which all {unit} in the dearest class take")  # fmt: skip
    click.echo(f"         as the papers count, without the classifier: {100 * paper.fraction:.0f} %")
    if "budget" in chosen:
        click.echo(f"         the budget of {chosen['budget']:g} bounds the branches alone, without the classifier")
    seconds = stats.seconds
    parts = {name: taken for name, taken in seconds.items() if name != "total"}
    # Much in a process's first call: memory is mapped, kernels are built.
    other = max(seconds["total"] - sum(parts.values()), 0.0)
    stages = ", ".join(f"{name} {taken:.3f}" for name, taken in (parts | {"other": other}).items())
    asked = f" of the {chosen['budget_ms']:g} ms asked for" if "budget_ms" in chosen else ""
    click.echo(f"  time: {seconds['total']:.3f} s{asked} ({stages})")


def tell_many(jobs: Sequence[Job], outcomes: Iterable[Outcome], folder: Path, quiet: bool) -> None:
    """Show a bar while the jobs are done, then what was written, and last what failed and why: then the exit is 1."""
    start = time.perf_counter()
    done: list[Outcome] = []
    with tqdm(total=len(jobs), desc="upscale", unit="image", disable=quiet) as bar:
        for outcome in outcomes:
            done.append(outcome)
            bar.update()
            failures = sum(bool(outcome.error) for outcome in done)
            if failures:
                bar.set_postfix_str(f"{failures} failed")
    failed = [outcome for outcome in done if outcome.error]
    skipped = sum(outcome.skipped for outcome in done)
    written = [outcome for outcome in done if not outcome.error and not outcome.skipped]
    if not quiet:
        parts = [f"{len(written)} written to {folder}"]
        parts += [f"{skipped} there already"] if skipped else []
        parts += [f"{len(failed)} failed"] if failed else []
        click.echo(f"{len(jobs)} images: {', '.join(parts)}; {time.perf_counter() - start:.1f} s")
        stats = [outcome.stats for outcome in written if outcome.stats is not None]
        if stats:
            routed, dense = (sum(getattr(s.flops, name) for s in stats) for name in ("routed", "dense"))
            counts = [sum(column) for column in zip(*(s.patches_per_class for s in stats), strict=True)]
            shares = " / ".join(f"{100 * count / max(sum(counts), 1):.0f}" for count in counts)
            click.echo(f"  classes, cheapest first: {shares} %; FLOPs, classifier included: {routed / 1e9:.1f} G, "
                       f"{100 * routed / dense if dense else 100:.0f} % of dense")  # fmt: skip
    if failed:
        lines = "\n".join(f"  {outcome.error}" for outcome in failed)
        raise click.ClickException(f"{len(failed)} of {len(jobs)} images failed:\n{lines}")
