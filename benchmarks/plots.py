"""The plots of a device's report, as PNG in data URLs: they need no file beside the page."""

from __future__ import annotations

import base64
import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

FLOOR = "copy of the same bytes"
MARKERS = "os^Dv<>Ph*"


def data_url(figure: Figure) -> str:
    """The figure as an image that a page can hold."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def realised_saving(points: list[tuple[str, float, float]]) -> Figure:
    """Time against FLOPs, both as a share of dense; on the diagonal nothing of the saving is lost.

    Args:
        points: system, share of the FLOPs, share of the time; several per system.
    """
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes: Axes = figure.subplots()
    most = 100 * max(max(flops, time) for _, flops, time in points) + 10
    axes.plot([0, most], [0, most], color="0.6", linestyle="--", label="all of the saving realised")
    for marker, system in zip(MARKERS, dict.fromkeys(name for name, _, _ in points), strict=False):
        own = [(100 * flops, 100 * time) for name, flops, time in points if name == system]
        axes.plot(*zip(*own, strict=True), marker, label=system)
    axes.set(xlim=(0, most), ylim=(0, most), xlabel="true FLOPs, % of dense", ylabel="time, % of dense")
    axes.legend(loc="upper left")
    axes.grid(alpha=0.3)
    return figure


def over_floor(rows: list[tuple[str, float]]) -> Figure:
    """How near each operator comes to a copy of the same bytes: 100 % is as fast."""
    figure = Figure(figsize=(8.4, 1.2 + 0.3 * len(rows)), layout="constrained")
    axes: Axes = figure.subplots()
    shares = [100 * share for _, share in rows]
    bars = axes.barh(range(len(rows)), shares, color="#4477aa")
    axes.bar_label(bars, fmt="%.0f %%", padding=3)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.axvline(100, color="0.4", linestyle="--")
    axes.set(xlim=(0, max(115, *(share * 1.15 for share in shares))), xlabel="speed, % of a copy of the same bytes")
    return figure


def time_by_size(title: str, rows: list[dict[str, Any]]) -> Figure:
    """Time of every variant against the megapixels of output; both axes logarithmic, so proportional is a line of slope 1."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes: Axes = figure.subplots()
    names = dict.fromkeys(name for row in rows for name in row["times"])
    for number, name in enumerate(names):
        own = [(row["output_pixels"] / 1e6, 1e3 * row["times"][name]["median"]) for row in rows if name in row["times"]]
        style = {"color": "0.4", "linestyle": "--"} if name == FLOOR else {"linewidth": 2.5 if name == "fastroute" else 1.2}
        axes.plot(*zip(*sorted(own), strict=True), marker=MARKERS[number % len(MARKERS)], label=name, **style)
    axes.set(xscale="log", yscale="log", xlabel="output, megapixels", ylabel="time, ms", title=title)
    places = sorted({round(row["output_pixels"] / 1e6, 2) for row in rows})
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure
