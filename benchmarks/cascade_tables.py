"""The tables of routed networks that are not of this package, from the rows of :mod:`benchmarks.cascades`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

FASTROUTE, TODAY = "fastroute dense", "PyTorch, whole"
# For which the README's row is.
ROUTED = ("student", 40.0)


def of_kind(rows: Sequence[dict], kind: str) -> list[dict]:
    """The rows of a kind."""
    return [row for row in rows if row.get("kind") == kind]


def smoother(rows: Sequence[dict]) -> list[dict]:
    """Those of the half of the pictures with the weaker edges."""
    strength = {row["picture"]: row["edges"] for row in rows}
    half = sorted(strength, key=strength.__getitem__)[: max(len(strength) // 2, 1)]
    return [row for row in rows if row["picture"] in half]


def mean(rows: Sequence[dict], name: str) -> float:
    """The mean of a value."""
    return statistics.mean(row[name] for row in rows)


def savings_table(rows: Sequence[dict]) -> str:
    """Fidelity against time by what stands beside the network, the means over all pictures."""
    lines = [
        "| promised | cheaper networks | time, native | time, smoother half of these | time, reduced | longest | PSNR kept | "
        "least PSNR | strongest border |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    pictures = of_kind(rows, "picture")
    for fidelity, cheap in dict.fromkeys((row["fidelity"], row["cheap"]) for row in pictures):
        own = [row for row in pictures if (row["fidelity"], row["cheap"]) == (fidelity, cheap)]
        native, reduced = ([row for row in own if row["size"] == size] for size in ("native", "reduced"))
        cells = [
            f"{fidelity:g} dB",
            "bicubic and student" if cheap == "both" else cheap,
            f"**{mean(native, 'time'):.2f}**" if native else "",
            f"{mean(smoother(native), 'time'):.2f}" if native else "",
            f"**{mean(reduced, 'time'):.2f}**" if reduced else "",
            f"{max(row['time'] for row in own):.2f}",
            f"{sum(row['psnr'] >= fidelity for row in own)} of {len(own)}",
            f"{min(row['psnr'] for row in own):.1f} dB",
            f"{max(row['border'] for row in own):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def pictures_table(rows: Sequence[dict]) -> str:
    """Every picture at the fidelity and with the networks of the README's row."""
    lines = [
        "| picture | size | mean edge | PSNR to dense | time | FLOPs of one pass |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    own = [row for row in of_kind(rows, "picture") if (row["cheap"], row["fidelity"]) == ROUTED]
    for row in sorted(own, key=lambda row: (row["size"], row["edges"])):
        near = "identical" if row["psnr"] >= 119 else f"{row['psnr']:.1f} dB"
        cells = [row["picture"], row["size"], f"{row['edges']:.1f}", near, f"{row['time']:.2f}", f"{row['flops'] or 0:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def today_table(rows: Sequence[dict]) -> str:
    """The network as people run it today, by the fastest dense engine, by fastroute in full, and routed."""
    dense = {row["precision"]: row for row in of_kind(rows, "dense")}
    today = dense["float32"]
    base = today["times"][TODAY]["median"]
    tiled = next(name for name in today["times"] if name.startswith("PyTorch, tiles"))
    native = [r for r in of_kind(rows, "picture") if r["size"] == "native" and (r["cheap"], r["fidelity"]) == ROUTED]
    lines = ["| Real-ESRGAN x4plus | precision | time | faster than PyTorch, whole |", "| --- | --- | --- | --- |"]
    found = [(TODAY, "float32", base), (tiled, "float32", today["times"][tiled]["median"])]
    for name, row in dense.items():
        found += [(way, name, row["times"][way]["median"]) for way in (row["fastest"], FASTROUTE)]
    last = list(dense)[-1]
    if native:
        # Relative to the fastest dense run of the same picture, which took its time on this crop.
        fastest = min(dense[last]["times"][way]["median"] for way in (dense[last]["fastest"], FASTROUTE))
        found.append(
            (f"fastroute, routed within {ROUTED[1]:g} dB of its dense result, mean", last, fastest * mean(native, "time"))
        )
    for way, name, seconds in found:
        lines.append(f"| {way} | {name} | {seconds:.1f} s | {base / seconds:.2f} x |")
    return "\n".join(lines) + "\n"
