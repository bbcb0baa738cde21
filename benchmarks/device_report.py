"""Everything measured on one device as report.md and report.html: ``python -m benchmarks.device_report [FOLDER]``."""

from __future__ import annotations

import html
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, device_folder
from benchmarks.report import footer, milliseconds
from fastroute import io

Result = dict[str, Any]
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;font-size:90%}td,th{border:1px solid #bbb;padding:.2rem .5rem;text-align:left}"
    "img{max-width:100%}footer,small{color:#555}"
)


def read(folder: Path) -> dict[str, Result]:
    """All results of a folder by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def operator_rows(results: dict[str, Result]) -> dict[str, list[dict]]:
    """Results of operators that were measured beside a copy, by name."""
    found = {name: [row for row in result["rows"] if "floor_seconds" in row] for name, result in results.items()}
    return {name: rows for name, rows in found.items() if rows}


def routing_points(results: dict[str, Result]) -> list[tuple[str, float, float]]:
    """System, share of the dense FLOPs and share of the dense time of every end-to-end row that has both."""
    return [
        (name, row["flops_ratio"], row["time_ratio"])
        for name, result in results.items()
        for row in result["rows"]
        if "flops_ratio" in row and "time_ratio" in row
    ]


def operator_table(rows: list[dict]) -> list[list[str]]:
    """Ours, the floor and every other variant; what could not be timed says why."""
    lines = [["case", "at least moved", "variant", "median", "quartiles", "of the speed of a copy", "time / fastroute"]]
    for row in rows:
        ours = row["times"]["fastroute"]["median"]
        for name, timing in row["times"].items():
            quartiles = f"{1e3 * timing['low']:.3g} to {1e3 * timing['high']:.3g} ms"
            share = f"{100 * row['floor_seconds'] / timing['median']:.0f} %"
            ratio = f"{timing['median'] / ours:.2f}"
            lines.append([row["op"], f"{row['bytes'] / 1e6:.1f} MB", name, milliseconds(timing), quartiles, share, ratio])
        lines += [[row["op"], "", name, "not timed", reason, "", ""] for name, reason in row["missing"].items()]
    return lines


def timing_table(rows: list[dict]) -> list[list[str]]:
    """Medians of results that have no floor."""
    lines = [["case", "variant", "median", "quartiles"]]
    for number, row in enumerate(rows):
        label = str(row.get("op") or row.get("image") or row.get("items") or number + 1)
        for name, timing in row.get("times", {}).items():
            quartiles = f"{1e3 * timing['low']:.3g} to {1e3 * timing['high']:.3g} ms"
            lines.append([label, name, milliseconds(timing), quartiles])
    return lines


def sections(results: dict[str, Result]) -> list[tuple[str, list[list[str]], str]]:
    """Title, table and origin of every result that holds times."""
    operators, made = operator_rows(results), []
    for name, result in results.items():
        table = operator_table(operators[name]) if name in operators else timing_table(result["rows"])
        if len(table) > 1:
            made.append((name, table, footer(result).strip()))
    return made


def markdown(results: dict[str, Result], device: str) -> str:
    """The report as Markdown, tables only."""
    parts = [f"# Benchmarks on {device}\n"]
    points = routing_points(results)
    if points:
        parts.append("## Realised saving\n\n| result | true FLOPs, of dense | time, of dense |\n| --- | --- | --- |")
        parts.append("\n".join(f"| {name} | {100 * flops:.0f} % | {100 * time:.0f} % |" for name, flops, time in points) + "\n")
    for title, (head, *body), origin in sections(results):
        lines = [head, ["---"] * len(head), *body]
        cells = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines]
        parts.append(f"## {title}\n\n" + "\n".join(f"| {line} |" for line in cells) + f"\n\n{origin}\n")
    return "\n".join(parts)


def page(results: dict[str, Result], device: str) -> str:
    """The report as one page that needs no other file."""
    # Only this page needs matplotlib, which the extra `benchmark` brings.
    from benchmarks import plots

    figures = []
    if points := routing_points(results):
        figures.append(("Realised saving against FLOPs", plots.realised_saving(points)))
    operators = operator_rows(results)
    if operators:
        shares = [(row["op"], 1 / row["time_over_copy"]) for rows in operators.values() for row in rows]
        figures.append(("Operators beside their floor", plots.over_floor(shares)))
    for name, rows in operators.items():
        sized = [row for row in rows if "output_pixels" in row]
        for kind in dict.fromkeys(row["dtype"] for row in sized):
            own = [row for row in sized if row["dtype"] == kind]
            figures.append((f"{name}, {kind}: time against image size", plots.time_by_size(f"{name}, {kind}", own)))
    title = html.escape(f"Benchmarks on {device}")
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>'
    ]
    for caption, figure in figures:
        text = html.escape(caption)
        parts.append(f'<h2>{text}</h2><img alt="{text}" src="{plots.data_url(figure)}">')
    for name, (head, *body), origin in sections(results):
        cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in body)
        parts.append(
            f"<h2>{html.escape(name)}</h2><table><tr>{cells}</tr>{rows}</table><p><small>{html.escape(origin)}</small></p>"
        )
    return "\n".join(parts) + "</html>\n"


def main() -> None:
    """Write both reports into the folder given, or into this device's."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else device_folder()
    results = read(folder)
    if not results:
        raise SystemExit(f"no results in {folder}: run `python -m pytest benchmarks --save` first; there are {list_folders()}")
    device = str(next(iter(results.values()))["facts"]["device"])
    for name, text in (("report.md", markdown(results, device)), ("report.html", page(results, device))):
        io.write_atomically(folder / name, lambda file, text=text: file.write(text.encode()))
        print(folder / name)


def list_folders() -> str:
    """The devices that have results."""
    return ", ".join(sorted(path.name for path in RESULTS.iterdir() if path.is_dir())) or "none"


if __name__ == "__main__":
    main()
