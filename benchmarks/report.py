"""Writes the measured tables of README.md from committed results: ``python -m benchmarks.report [--check]``."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

from benchmarks.measure import RESULTS
from fastroute import io

README = Path(__file__).parent.parent / "README.md"
SECTIONS = ("movement", "patch_routing", "quality")
# Those that the README may leave out.
OPTIONAL = ("class_mixes", "pixel_routing")
# What stands beside fastroute in an operator's result and is no peer.
NO_PEERS = ("copy of the same bytes", "copy to a new tensor")
# Parts of the names of rows in the result of the quality benchmark.
BUDGET, OWN = ", budget ", "routed by its classifier"
CURVES = README.parent / "assets" / "budgets.svg"


def milliseconds(timing: dict) -> str:
    """A median as people read it."""
    value = 1e3 * timing["median"]
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 1 else f"{value:.2f} ms"


def footer(content: dict) -> str:
    """Where the numbers come from."""
    facts = content["facts"]
    origin = f"{facts['device']}; torch {facts['torch']}, commit {facts['commit']}"
    if "backends" in facts:
        origin += f", backend {' and '.join(facts['backends'])}"
    return f"\n{origin}; {content['notes']}. `{facts['command']}`\n"


def peers(times: dict[str, dict]) -> dict[str, float]:
    """Medians of all others that do the same job."""
    return {name: t["median"] for name, t in times.items() if not name.startswith("fastroute") and name not in NO_PEERS}


def movement(folder: Path) -> str:
    """extract, stitch and group beside their floor, the usual way and the fastest of all others."""
    lines = [
        "| operation | fastroute | copy of the same bytes | usual way | faster | fastest other | faster |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]

    def fastest(times: dict[str, dict]) -> str:
        name, seconds = min(peers(times).items(), key=lambda item: item[1])
        return f"{name}: {milliseconds({'median': seconds})} | {seconds / times['fastroute']['median']:.1f} x"

    for op in ("extract_patches", "stitch_patches"):
        content = json.loads((folder / f"{op}.json").read_text())
        for row in content["rows"]:
            # The other types, formats and batches are in the report of the device.
            if row.get("dtype", "float32") != "float32" or row.get("batch", 1) > 1 or row.get("channels_last"):
                continue
            times = row["times"]
            floor = milliseconds(times["copy of the same bytes"])
            usual = f"{row['peer']}: {milliseconds(times[row['peer']])}"
            told = f"{milliseconds(times['fastroute'])} | {floor} | {usual} | {row['speedup']:.1f} x"
            lines.append(f"| {row['op']} | {told} | {fastest(times)} |")
    content = json.loads((folder / "group_by_class.json").read_text())
    for row in content["rows"]:
        if row.get("dtype", "int64") != "int64":
            continue
        times = row["times"]
        usual = f"argsort: {milliseconds(times['argsort'])}"
        ours = milliseconds(times["fastroute"])
        told = f"{ours} | | {usual} | {row['speedup']:.1f} x | {fastest(times)}"
        lines.append(f"| group_by_class, {row['items']:,} items | {told} |")
    return "\n".join(lines) + "\n" + footer(content)


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
    files = sorted(folder.glob("class_mixes_*.json"))
    if not files:
        raise FileNotFoundError("class_mixes")
    contents = [json.loads(path.read_text()) for path in files]
    for row in (row for content in contents for row in content["rows"] if "time_ratio" in row):
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
    return "\n".join(lines) + "\n" + footer(contents[0])


def pixel_routing(folder: Path) -> str:
    """PCSR per photograph, beside its published formulation and the plain network."""
    lines = [
        "| encoder, photograph (LR size) | dear pixels | FLOPs, true | **time, realised** | routed | dense | plain network, "
        "one pass | published formulation | routed, after the encoder | faster than published |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    files = sorted(folder.glob("pixel_routing_*.json"), reverse=True)
    if not files:
        raise FileNotFoundError("pixel_routing")
    contents = [json.loads(path.read_text()) for path in files]
    for row in (row for content in contents for row in content["rows"]):
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
    return "\n".join(lines) + "\n" + footer(contents[0])


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


def render(text: str, folder: Path) -> str:
    """`text` with every generated section made anew."""
    for name in (*SECTIONS, *(name for name in OPTIONAL if f"<!-- generated: {name} -->" in text)):
        try:
            table = globals()[name](folder)
        except FileNotFoundError:
            table = "Not measured yet on this version.\n"
        pattern = rf"(<!-- generated: {name} -->\n).*?(<!-- end: {name} -->)"
        text, count = re.subn(pattern, lambda m, table=table: f"{m[1]}\n{table}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"README.md must have one section {name}; it has {count}")
    return text


def main() -> None:
    """Rewrite README.md; with --check, only fail when it is out of date."""
    folders = sorted(path for path in RESULTS.iterdir() if any(path.glob("*.json")))
    if not folders:
        raise SystemExit(f"no results in {RESULTS}: run the benchmarks with --save first")
    text = README.read_text()
    made = render(text, folders[0])
    if "--check" in sys.argv:
        sys.exit("README.md is out of date: python -m benchmarks.report" if made != text else 0)
    io.write_atomically(README, lambda file: file.write(made.encode()))
    if not (folders[0] / "quality.json").exists():
        return
    if importlib.util.find_spec("matplotlib") is None:
        print(f"{CURVES} is left as it is: it needs matplotlib (pip install 'fastroute[benchmark]')")
    else:
        draw_budgets(folders[0], CURVES)


if __name__ == "__main__":
    main()
