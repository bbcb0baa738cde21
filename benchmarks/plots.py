"""The plots of a device's report, as PNG in data URLs: they need no file beside the page."""

from __future__ import annotations

import base64
import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

FLOOR = "copy of the same bytes"
CLONE = "copy to a new tensor"
MARKERS = "os^Dv<>Ph*Xpd8"
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#997700", "#994455", "#004488", "#777777")


def data_url(figure: Figure) -> str:
    """The figure as an image that a page can hold."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def styles(names: Any) -> dict[str, dict[str, Any]]:
    """A marker and a colour for every name."""
    return {
        name: {"marker": MARKERS[number % len(MARKERS)], "color": COLOURS[number % len(COLOURS)]}
        for number, name in enumerate(dict.fromkeys(names))
    }


def realised_saving(points: list[tuple[str, float, float]]) -> Figure:
    """Time against FLOPs, both as a share of dense; on the diagonal nothing of the saving is lost.

    Args:
        points: system, share of the FLOPs, share of the time; several per system.
    """
    figure = Figure(figsize=(8.4, 4.8), layout="constrained")
    axes: Axes = figure.subplots()
    most = 100 * max(max(flops, time) for _, flops, time in points) + 10
    axes.plot([0, most], [0, most], color="0.6", linestyle="--", label="all of the saving realised")
    for name, style in styles(name for name, _, _ in points).items():
        own = [(100 * flops, 100 * time) for system, flops, time in points if system == name]
        axes.plot(*zip(*own, strict=True), linestyle="none", label=name, **style)
    axes.set(xlim=(0, most), ylim=(0, most), xlabel="FLOPs, % of dense", ylabel="time, % of dense")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def over_floor(rows: list[tuple[str, float]]) -> Figure:
    """How near each operator comes to the least possible time: 100 % is as fast."""
    figure = Figure(figsize=(9.2, 1.2 + 0.28 * len(rows)), layout="constrained")
    axes: Axes = figure.subplots()
    shares = [100 * share for _, share in rows]
    bars = axes.barh(range(len(rows)), shares, color=COLOURS[0])
    # White behind the numbers, which may lie on the line.
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.bar_label(bars, fmt="%.0f %%", padding=3, fontsize="small", bbox=behind)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize="small")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.axvline(100, color="0.4", linestyle="--", zorder=0)
    axes.set(xlim=(0, max(115, *(share * 1.15 for share in shares))), xlabel="speed, % of the floor's")
    return figure


def roofline(points: list[tuple[str, float, float]], bandwidth: float, peak: float) -> Figure:
    """FLOPs per second against FLOPs per byte, under what copies and matrix products reach.

    Args:
        points: operator, FLOPs per byte and FLOPs per second of every case.
        bandwidth: bytes per second of a copy.
        peak: FLOPs per second of a matrix product.
    """
    figure = Figure(figsize=(8.4, 4.8), layout="constrained")
    axes: Axes = figure.subplots()
    low = min(intensity for _, intensity, _ in points) / 2
    high = max(*(intensity for _, intensity, _ in points), peak / bandwidth) * 4
    ends = sorted([low, peak / bandwidth, high])
    roof = [min(bandwidth * x, peak) / 1e9 for x in ends]
    axes.plot(ends, roof, color="0.3", label=f"{bandwidth / 1e9:.1f} GB/s, {peak / 1e9:.0f} GFLOP/s")
    for name, style in styles(name for name, _, _ in points).items():
        own = [(x, y / 1e9) for system, x, y in points if system == name]
        axes.plot(*zip(*own, strict=True), linestyle="none", label=name, **style)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte that must be moved", ylabel="GFLOP/s")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def by_size(rows: list[tuple[str, float, float]], ylabel: str, xlabel: str = "output, megapixels") -> Figure:
    """Something of every variant against size; both axes logarithmic, so proportional is a line of slope 1.

    Args:
        rows: variant, size and value.
    """
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    axes: Axes = figure.subplots()
    for name, style in styles(name for name, _, _ in rows).items():
        own = sorted((x, y) for variant, x, y in rows if variant == name)
        if name in (FLOOR, CLONE):
            style = {**style, "color": "0.4" if name == FLOOR else "0.7", "linestyle": "--"}
        axes.plot(*zip(*own, strict=True), linewidth=2.5 if name == "fastroute" else 1.2, label=name, **style)
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    places = sorted({x for _, x, _ in rows})
    # Labels of sizes that are nearly alike would overlap.
    kept = [x for number, x in enumerate(places) if number == 0 or x > 1.15 * places[number - 1]]
    axes.set_xticks(kept, [f"{x:.2g}" if x < 10 else f"{x:.0f}" for x in kept])
    axes.minorticks_off()
    readable(axes.yaxis)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def readable(axis: Any) -> None:
    """Numbers at 1, 2 and 5 of every decade of a logarithmic axis, since a plot may span less than one."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def quality_by_time(rows: list[tuple[str, float, float]]) -> Figure:
    """PSNR against time: up and to the left is better. What a model reaches with several budgets is joined by a line.

    Args:
        rows: model, seconds per megapixel, PSNR in dB; several per model.
    """
    figure = Figure(figsize=(9.2, 4.8), layout="constrained")
    axes: Axes = figure.subplots()
    for name, style in styles(name for name, _, _ in rows).items():
        own = sorted((decibels, 1e3 * seconds) for model, seconds, decibels in rows if model == name)
        axes.plot([ms for _, ms in own], [decibels for decibels, _ in own], label=name, linewidth=0.8, **style)
    axes.set(xscale="log", xlabel="time, ms per megapixel of output", ylabel="PSNR (RGB), dB")
    readable(axes.xaxis)
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def budget_curves(curves: dict[str, list[tuple[float, float]]], own: dict[str, tuple[float, float]]) -> Figure:
    """PSNR against FLOPs: what every model makes of a budget, and as stars what its classifier chooses by itself.

    Args:
        curves: model to FLOPs as a share of its most expensive branch everywhere, and PSNR in dB, for every budget.
        own: model to the same of its own choice.
    """
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    axes: Axes = figure.subplots()
    star = {"marker": "*", "markersize": 15, "markeredgecolor": "black", "markeredgewidth": 0.7}
    for name, style in styles(curves).items():
        axes.plot(*zip(*((100 * flops, psnr) for flops, psnr in sorted(curves[name])), strict=True), label=name, **style)
        flops, psnr = own[name]
        axes.plot([100 * flops], [psnr], linestyle="none", color=style["color"], zorder=3, **star)
    axes.plot([], [], linestyle="none", color="0.7", label="own choice", **star)
    axes.set(xlabel="FLOPs with the classifier, % of the most expensive branch everywhere", ylabel="PSNR (RGB), dB")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower right")
    return figure


def growth(panels: list[tuple[str, list[tuple[str, float, float]]]]) -> Figure:
    """Time against what grows, straight axes from zero, one panel each."""
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    for axes, (xlabel, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, style in styles(name for name, _, _ in rows).items():
            own = sorted((x, y) for variant, x, y in rows if variant == name)
            axes.plot(*zip(*own, strict=True), label=name, **style)
        right, top = (1.08 * max(row[place] for row in rows) for place in (1, 2))
        axes.set(xlabel=xlabel, ylabel="time, ms", xlim=(0, right), ylim=(0, top))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="lower right")
    return figure
