"""Writes the measured tables of the README and the docs from committed results: ``python -m benchmarks.report [--check]``."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import cascade_tables, loss_tables
from benchmarks.measure import RESULTS, ROOT
from fastroute import io
from fastroute._extras import remedy

# The sections that each page has, and has once.
PAGES = {
    ROOT / "README.md": ("headline", "cascade_today"),
    ROOT / "docs" / "pretrained.md": ("cascade_savings", "cascade_pictures"),
    ROOT / "docs" / "training.md": ("losses", "norms"),
    ROOT / "docs" / "benchmarks.md": (
        "operators",
        "headline_details",
        "patch_routing",
        "class_mixes",
        "pixel_routing",
        "quality",
        "quality_scales",
    ),
}
# Results of the operators, in the order of the table. Those in full have a row per size, the others only the smallest and the
# largest one.
IN_FULL = ("extract_patches", "stitch_patches", "group_by_class")
OPERATORS = (
    *IN_FULL,
    "stitch_patches_upsampled",
    "cell_mlp",
    "conv3x3",
    "conv1x1",
    "merge_regions",
    "gather_groups",
    "scatter_groups",
    "assign_classes_penalty",
    "assign_classes_budget",
    "pixel_mlp",
    "adaptive_threshold",
    "refine_boundaries",
)
# The types that the table shows. Other types, memory formats and batches are in the report of the device.
SHOWN = ("float32", "int64")
FLOOR = "copy of the same bytes"
# Entries of an operator's result that are not peers of fastroute.
NO_PEERS = (FLOOR, "copy to a new tensor")
# Parts of the names of rows in the result of the quality benchmark.
BUDGET, OWN = ", budget ", "routed by its classifier"
CURVES = ROOT / "assets" / "budgets.svg"


def results(folder: Path, names: Iterable[str], prefix: str = "") -> dict[str, dict]:
    """The results that exist, by their names without `prefix`.

    Raises:
        FileNotFoundError: none of them exists.
    """
    paths = {name.removeprefix(prefix): folder / f"{name}.json" for name in names}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    if not found:
        raise FileNotFoundError(f"no results in {folder}")
    return found


def milliseconds(timing: dict) -> str:
    """A median, rounded for people to read."""
    value = 1e3 * timing["median"]
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 1 else f"{value:.2f} ms"


def footer(content: dict) -> str:
    """Where the numbers of one result come from."""
    return footers({"": content})


def footers(contents: Mapping[str, dict]) -> str:
    """Where the numbers of several results come from, by the names that the table has for them.

    What all results have in common is stated once, and what differs is stated for each by name.
    """
    runs: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name, content in contents.items():
        facts = content["facts"]
        kind = f" ({facts['instructions']})" if "instructions" in facts else ""
        origin = f"{facts['device']}{kind}; torch {facts['torch']}, commit {facts['commit']}"
        if "backends" in facts:
            origin += f", backend {' and '.join(facts['backends'])}"
        runs.setdefault((origin, facts["command"]), {}).setdefault(content["notes"], []).append(name)
    alike = len(runs) == 1 and all(len(notes) == 1 for notes in runs.values())
    lines = []
    for (origin, command), notes in runs.items():
        told = notes if alike else [f"{', '.join(names)}: {note}" for note, names in notes.items()]
        lines.append(f"{origin}; {'. '.join(told)}. `{command}`")
    return "\n" + "\n\n".join(lines) + "\n"


def peers(times: dict[str, dict]) -> dict[str, float]:
    """The medians of all other implementations of the same operation."""
    return {name: t["median"] for name, t in times.items() if not name.startswith("fastroute") and name not in NO_PEERS}


def representative(name: str, rows: Sequence[dict]) -> list[dict]:
    """The rows of an operator that the table shows."""
    chosen = [
        row
        for row in rows
        if row.get("dtype", SHOWN[0]) in SHOWN and row.get("batch", 1) == 1 and not row.get("channels_last")
        if row.get("mlp", "mixed") == "mixed"
    ]
    if name in IN_FULL:
        return chosen
    setups = dict.fromkeys(row.get("setup") for row in chosen)
    if len(setups) > 1:
        return [[row for row in chosen if row["setup"] == setup][-1] for setup in setups]
    return chosen if len(chosen) < 2 else [chosen[0], chosen[-1]]


def operators(folder: Path) -> str:
    """Every operator beside a copy of its bytes, the usual way and the fastest alternative."""
    lines = [
        "| operation | fastroute | copy of the same bytes | usual way | faster | fastest other | faster |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    contents = results(folder, OPERATORS)
    for name, content in contents.items():
        for row in representative(name, content["rows"]):
            times, ours = row["times"], row["times"]["fastroute"]
            others = peers(times)
            fastest = min(others, key=others.__getitem__)
            cells = [row["op"].removesuffix(", int64"), milliseconds(ours), milliseconds(times[FLOOR])]
            for peer in (row["peer"], fastest):
                cells += [f"{peer}: {milliseconds(times[peer])}", f"{times[peer]['median'] / ours['median']:.1f} x"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" + footers(contents)


# Backbones as their papers write them.
BACKBONES = {"carn": "CARN", "srresnet": "SRResNet", "fsrcnn": "FSRCNN"}


def headline_rows(folder: Path) -> tuple[list[dict], str]:
    """The rows of all headline results, and where they come from."""
    contents = results(folder, sorted(path.stem for path in folder.glob("headline_*.json")), "headline_")
    return [row for content in contents.values() for row in content["rows"]], footers(contents)


def headline(folder: Path) -> str:
    """Routed whole images beside the fastest dense engine, which runs the most expensive branch in one pass."""
    rows, _ = headline_rows(folder)
    runs = [json.loads(path.read_text())["facts"] for path in sorted(folder.glob("headline_*.json"))]
    commits = ", ".join(dict.fromkeys(facts["commit"] for facts in runs))
    origin = (
        f"{runs[0]['device']}; torch {runs[0]['torch']}, commit {commits}; medians of alternating runs at a factor of 4. "
        "[All measurements](docs/benchmarks.md) say how."
    )
    lines = [
        "| network, precision (LR size) | fastest dense engine | fastroute, routed | **routed / dense, time** | "
        "routed / dense, FLOPs of one pass |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        times, routed = row["times"], row["routed"]
        cells = [
            f"{BACKBONES[row['backbone']]}, {row['precision']} ({row['lr_size'][0]} x {row['lr_size'][1]})",
            f"{row['fastest_dense']}: {milliseconds(times[row['fastest_dense']])}",
            f"{row['engine']}: {milliseconds(times[routed])}",
            f"**{row['of_fastest_dense'][routed]:.2f}**",
            f"{row['flops_of_one_pass'][routed]:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\n{origin}\n"


def headline_details(folder: Path) -> str:
    """The headline with what explains it: the dense router, the floor, float32 and a budget of half of one pass."""
    rows, origin = headline_rows(folder)
    lines = [
        "| branches, precision (LR size) | fastest dense engine | fastroute, dense | fastroute, routed | **routed / fastest "
        "dense** | FLOPs of one pass | floor / fastest dense | routed / floor | routed / fastest dense in float32 | half "
        "of one pass / fastest dense |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        times, ratios, routed = row["times"], row["of_fastest_dense"], row["routed"]
        dense = next(name for name in times if name.startswith("fastroute dense"))
        half = next((f"{ratio:.2f}" for name, ratio in ratios.items() if name.endswith("of one pass")), "")
        cells = [
            f"{row['backbone']}, {row['precision']} ({row['lr_size'][0]} x {row['lr_size'][1]})",
            f"{row['fastest_dense']}: {milliseconds(times[row['fastest_dense']])}",
            milliseconds(times[dense]),
            f"{row['engine']}: {milliseconds(times[routed])}",
            f"**{ratios[routed]:.2f}**",
            f"{row['flops_of_one_pass'][routed]:.2f}",
            f"{row['floor_of_fastest_dense']:.2f}",
            f"{row['over_floor']:.2f}",
            f"{row['of_fastest_float32'][routed]:.2f}",
            half,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" + origin


def patch_routing(folder: Path) -> str:
    """The realised saving per photograph."""
    content = json.loads((folder / "patch_routing.json").read_text())
    lines = [
        "| photograph (LR size) | classes | FLOPs, true | FLOPs, as papers count | **time, realised** | routed | dense | "
        "one pass, largest branch | plain PyTorch, batched | published loop | overhead |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in content["rows"]:
        times = row["times"]
        shares = " / ".join(f"{100 * share:.0f}" for share in row["class_shares"])
        cells = [
            f"{row['image']} ({row['lr_size'][0]} x {row['lr_size'][1]})",
            f"{shares} %",
            f"{100 * row['flops_ratio']:.0f} %",
            f"{100 * row['paper_flops_ratio']:.0f} %",
            f"**{100 * row['time_ratio']:.0f} %**",
            milliseconds(times["routed"]),
            milliseconds(times["dense, same machinery"]),
            milliseconds(times["largest branch, one pass"]),
            milliseconds(times["plain PyTorch, batched per class"]),
            milliseconds(times["published way"]),
            f"{100 * row['overhead']:.1f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" + footer(content)


def class_mixes(folder: Path) -> str:
    """The realised saving at given class mixes, beside the time ratios of the papers."""
    lines = [
        "| branches | mix | classes | FLOPs, true | FLOPs, as papers count | **time, realised** | time, as the papers print |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    contents = results(folder, sorted(path.stem for path in folder.glob("class_mixes_*.json")), "class_mixes_")
    for row in (row for content in contents.values() for row in content["rows"] if "time_ratio" in row):
        shares = " / ".join(f"{100 * share:.0f}" for share in row["class_shares"])
        printed = row["published_time_ratio"]
        cells = [
            row["backbone"],
            row["mix"],
            f"{shares} %",
            *(f"{100 * row[k]:.0f} %" for k in ("flops_ratio", "paper_flops_ratio")),
        ]
        cells += [f"**{100 * row['time_ratio']:.0f} %**", f"{100 * printed:.0f} %" if printed else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" + footers(contents)


def pixel_routing(folder: Path) -> str:
    """PCSR per photograph, beside its published formulation and the plain network."""
    lines = [
        "| encoder, photograph (LR size) | expensive pixels | FLOPs, true | **time, realised** | routed | dense | "
        "plain network, one pass | published formulation | routed, after the encoder | faster than published |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    found = sorted((path.stem for path in folder.glob("pixel_routing_*.json")), reverse=True)
    contents = {name.upper(): content for name, content in results(folder, found, "pixel_routing_").items()}
    for row in (row for content in contents.values() for row in content["rows"]):
        times = row["times"]
        cells = [
            f"{row['model'].upper()}, {row['image']} ({row['lr_size'][0]} x {row['lr_size'][1]})",
            f"{100 * row['heavy_share']:.0f} %",
            f"{100 * row['flops_ratio']:.0f} %",
            f"**{100 * row['time_ratio']:.0f} %**",
            milliseconds(times["fastroute"]),
            milliseconds(times["dense, same machinery"]),
            milliseconds(times["plain network, one pass"]),
            f"{milliseconds(times['published formulation'])} ({row['speedup']:.1f} x)",
            milliseconds({"median": row["rest"]}),
            f"{row['rest_speedup']:.1f} x",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" + footers(contents)


def cascade_today(folder: Path) -> str:
    """Real-ESRGAN as people run it today, beside dense and routed runs."""
    return of_rows(folder, "cascades", cascade_tables.today_table)


def cascade_savings(folder: Path) -> str:
    """What routing Real-ESRGAN saves, by fidelity and by what stands beside it."""
    return of_rows(folder, "cascades", cascade_tables.savings_table, "picture")


def cascade_pictures(folder: Path) -> str:
    """Every picture at one fidelity."""
    return of_rows(folder, "cascades", cascade_tables.pictures_table, "picture")


def losses(folder: Path) -> str:
    """What each loss of the recipes does."""
    return of_rows(folder, "losses", loss_tables.losses_table)


def norms(folder: Path) -> str:
    """What batch norms should normalise by in joint training."""
    return of_rows(folder, "losses", loss_tables.norms_table)


def of_rows(folder: Path, name: str, table: Callable[[Sequence[dict]], str], kind: str | None = None) -> str:
    """A table of the result `name`, which must have rows of `kind`."""
    content = json.loads((folder / f"{name}.json").read_text())
    if kind is not None and not cascade_tables.of_kind(content["rows"], kind):
        raise FileNotFoundError(f"{name} holds no {kind}")
    return table(content["rows"]) + footer(content)


def quality(folder: Path) -> str:
    """PSNR of the shipped models, dense and by their own choice; budgets are in the picture."""
    content = json.loads((folder / "quality.json").read_text())
    lines = ["| network | PSNR (RGB) | over bicubic | true FLOPs |", "| --- | --- | --- | --- |"]
    for row in content["rows"]:
        if BUDGET in row["network"]:
            continue
        flops = f"{100 * row['flops']:.0f} %" if row["flops"] else ""
        lines.append(f"| {row['network']} | {row['psnr']:.2f} dB | {row['gain']:+.2f} dB | {flops} |")
    return "\n".join(lines) + "\n" + footer(content)


def quality_scales(folder: Path) -> str:
    """PSNR of the shipped models at factors other than 4."""
    content = json.loads((folder / "quality_scales.json").read_text())
    lines = ["| factor | network | PSNR (RGB) | over bicubic | true FLOPs |", "| --- | --- | --- | --- | --- |"]
    for row in content["rows"]:
        flops = f"{100 * row['flops']:.0f} %" if row["flops"] else ""
        lines.append(f"| {row['scale']} | {row['network']} | {row['psnr']:.2f} dB | {row['gain']:+.2f} dB | {flops} |")
    return "\n".join(lines) + "\n" + footer(content)


def draw_budgets(folder: Path, target: Path) -> None:
    """PSNR against FLOPs of every shipped model, as a picture of vectors; the same bytes from the same results."""
    import matplotlib

    from benchmarks.plots import budget_curves

    curves: dict[str, list[tuple[float, float]]] = {}
    own = {}
    for row in json.loads((folder / "quality.json").read_text())["rows"]:
        model, _, variant = row["network"].partition(", ")
        if row["flops"] is None or model.startswith("published"):
            continue
        if variant == OWN:
            own[model] = (row["flops"], row["psnr"])
        else:
            curves.setdefault(model, []).append((row["flops"], row["psnr"]))
    curves = {model: points for model, points in curves.items() if len(points) > 1}
    with matplotlib.rc_context({"svg.hashsalt": "fastroute", "svg.fonttype": "none"}):
        figure = budget_curves(curves, {model: own[model] for model in curves})
        io.write_atomically(target, lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))


def render(text: str, folder: Path, sections: Sequence[str], page: str) -> str:
    """`text`, the page named `page`, with all its generated sections made anew."""
    for name in sections:
        try:
            table = globals()[name](folder)
        except FileNotFoundError:
            table = "Not measured yet on this version.\n"
        pattern = rf"(<!-- generated: {name} -->\n).*?(<!-- end: {name} -->)"
        text, count = re.subn(pattern, lambda m, table=table: f"{m[1]}\n{table}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{page} must have one section {name}; it has {count}")
    return text


def main() -> None:
    """Rewrite the pages. With --check, change nothing and fail if a page is out of date."""
    folders = sorted(path for path in RESULTS.iterdir() if any(path.glob("*.json")))
    if not folders:
        raise SystemExit(f"no results in {RESULTS}: run the benchmarks with --save first")
    for path, sections in PAGES.items():
        text = path.read_text()
        made = render(text, folders[0], sections, path.name)
        if "--check" not in sys.argv:
            io.write_atomically(path, lambda file, made=made: file.write(made.encode()))
        elif made != text:
            sys.exit(f"{path.name} is out of date: python -m benchmarks.report")
    if "--check" in sys.argv:
        sys.exit(0)
    if not (folders[0] / "quality.json").exists():
        return
    if importlib.util.find_spec("matplotlib") is None:
        print(f"{CURVES} is left as it is: it needs matplotlib ({remedy('benchmark')})")
    else:
        draw_budgets(folders[0], CURVES)


if __name__ == "__main__":
    main()
