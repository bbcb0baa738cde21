"""Everything measured on one device as report.md and report.html: ``python -m benchmarks.device_report [FOLDER]``."""

from __future__ import annotations

import html
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import device_tables as tables
from benchmarks.device_tables import Result, Table, operator_rows
from benchmarks.measure import RESULTS, device_folder
from benchmarks.report import footer
from fastroute import io

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;font-size:85%}td,th{border:1px solid #bbb;padding:.2rem .5rem;text-align:left}"
    "img{max-width:100%}small{color:#555}"
)
PANELS = {"growth_patches": "patches", "growth_classes": "classes", "growth_expensive_share": "share of expensive patches"}
RULES = (
    "Every variant is checked against the others before it is timed; what disagrees or cannot run is named with the reason. "
    "Variants run in turn after a warm-up, the device being waited for before and after each run; times are medians and "
    "quartiles, with what the caches held from the run before; of what is far "
    'slower than fastroute there is one run. Where it says "caches swept", they were overwritten before each '
    "run. The floor of an operator is the longer of two times: a copy of the bytes that must be moved, measured in the same "
    "turns, and the FLOPs that must be done at the rate of the best matrix product. Peak memory is what a call needs beyond "
    "what was held before, its result included."
)


def read(folder: Path) -> dict[str, Result]:
    """All results of a folder by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def routing_points(results: dict[str, Result]) -> list[tuple[str, float, float]]:
    """System, share of the dense FLOPs and share of the dense time of every end-to-end row; the papers' own beside."""
    points, papers = [], []
    for name, result in results.items():
        for row in result["rows"]:
            found = [row] if "flops_ratio" in row and "time_ratio" in row else []
            points += [(name, r["flops_ratio"], r["time_ratio"]) for r in [*found, *row.get("mixes", [])]]
            if row.get("published_time_ratio"):
                papers.append(("papers, FLOPs as they count", row["paper_flops_ratio"], row["published_time_ratio"]))
    return points + papers


def sections(results: dict[str, Result]) -> Iterator[tuple[str, Table, str]]:
    """Title, table and origin: what matters most first, then every result in full."""
    quality, whole = (footer(results[name]).strip() if name in results else "" for name in ("quality", "whole_images"))
    summaries = [
        ("Realised saving", tables.saving_table(results), "Dense: everything in the most expensive class, same machinery."),
        ("Operators beside their peers", tables.peers_table(results), "The fastest of all others that give the same result."),
        ("Whole images", tables.whole_table(results), whole),
        ("Time budgets", tables.budgets_table(results), "The error is the median call's; of all budgets, without its sign."),
        ("How cost grows", tables.growth_table(results), "Least squares; the power is the slope of the logarithms."),
        ("Quality", tables.quality_table(results), quality),
    ]
    yield from (entry for entry in summaries if len(entry[1]) > 1)
    operators = operator_rows(results)
    for name, result in results.items():
        table = tables.operator_table(operators[name]) if name in operators else tables.timing_table(result["rows"])
        if len(table) > 1:
            yield name, table, footer(result).strip()


def plain(row: dict) -> bool:
    """Whether a row of an operator is of one contiguous image."""
    return not row.get("channels_last") and row.get("batch", 1) == 1


def figures(results: dict[str, Result]) -> Iterator[tuple[str, Figure]]:
    """Caption and figure of everything that there are results for."""
    # Only these need matplotlib, which the extra `benchmark` brings.
    from benchmarks import plots

    if points := routing_points(results):
        yield "Realised saving against FLOPs", plots.realised_saving(points)
    operators = operator_rows(results)
    every = [(name, row) for name, rows in operators.items() for row in rows]
    computing = [
        (name, row["flops"] / row["bytes"], row["flops"] / row["times"]["fastroute"]["median"])
        for name, row in every
        if row.get("flops")
    ]
    if computing:
        bandwidth = statistics.median(row["copy_bytes_per_second"] for _, row in every)
        peak = statistics.median(row["peak_flops_per_second"] for _, row in every if row.get("dtype") != "bfloat16")
        yield "Roofline of the operators that compute", plots.roofline(computing, bandwidth, peak)
    sizes = [row for row in results.get("growth_pixels", {"rows": []})["rows"] if row["kind"] == "megapixels"]
    if sizes:
        times = [(name, row["x"], 1e3 * t["median"]) for row in sizes for name, t in row["times"].items()]
        yield "Time against image size", plots.by_size(times, "time, ms")
        memory = [(n, row["x"], b / 1e6) for row in sizes for n, b in row["peak_bytes"].items() if b]
        memory += [("the result itself", row["x"], row["result_bytes"] / 1e6) for row in sizes]
        yield "Peak memory against image size", plots.by_size(memory, "peak memory, MB")
    quality = [row for row in results.get("quality", {"rows": []})["rows"] if row.get("seconds_per_megapixel")]
    if quality:
        models = [row["network"].partition(", ")[0] for row in quality]
        networks = [(m, row["seconds_per_megapixel"], row["psnr"]) for m, row in zip(models, quality, strict=True)]
        yield "PSNR against time", plots.quality_by_time(networks)
    panels = []
    for name, label in PANELS.items():
        rows = [row for row in results.get(name, {"rows": []})["rows"] if "x" in row]
        if rows:
            panels.append((label, [(n, row["x"], 1e3 * t["median"]) for row in rows for n, t in row["times"].items()]))
    if panels:
        yield "How time grows", plots.growth(panels)
    usual = [row for _, row in every if row["dtype"] in ("float32", "int64") and plain(row)]
    if usual:
        yield "Operators beside their floor", plots.over_floor([(row["op"], 1 / row["time_over_floor"]) for row in usual])
    for name, rows in operators.items():
        sized = [row for row in rows if "output_pixels" in row and plain(row)]
        kinds = dict.fromkeys((row["dtype"], row.get("setup"), row.get("mlp")) for row in sized)
        for kind in kinds:
            own = [row for row in sized if (row["dtype"], row.get("setup"), row.get("mlp")) == kind]
            if len({row["output_pixels"] for row in own}) > 1:
                values = [(n, row["output_pixels"] / 1e6, 1e3 * t["median"]) for row in own for n, t in row["times"].items()]
                title = ", ".join([name, *(str(part) for part in kind if part)])
                yield f"{title}: time against image size", plots.by_size(values, "time, ms")
    items = [row for row in operators.get("group_by_class", []) if row["dtype"] == "int64"]
    if items:
        values = [(n, row["items"], 1e3 * t["median"]) for row in items for n, t in row["times"].items()]
        yield "group_by_class: time against items", plots.by_size(values, "time, ms", "items")


def markdown(results: dict[str, Result], device: str) -> str:
    """The report as Markdown, tables only."""
    parts = [f"# Benchmarks on {device}\n\n{RULES}\n"]
    for title, (head, *body), origin in sections(results):
        lines = [head, ["---"] * len(head), *body]
        cells = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines]
        parts.append(f"## {title}\n\n" + "\n".join(f"| {line} |" for line in cells) + f"\n\n{origin}\n")
    return "\n".join(parts)


def page(results: dict[str, Result], device: str) -> str:
    """The report as one page that needs no other file."""
    title = html.escape(f"Benchmarks on {device}")
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<h1>{title}</h1><p>{html.escape(RULES)}</p>"
    ]
    from benchmarks import plots

    for caption, figure in figures(results):
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
