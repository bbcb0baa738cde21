"""Writes the measured tables of README.md from committed results: ``python -m benchmarks.report [--check]``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from benchmarks.measure import RESULTS
from fastroute import io

README = Path(__file__).parent.parent / "README.md"
SECTIONS = ("movement", "patch_routing", "quality")


def milliseconds(timing: dict) -> str:
    """A median as people read it."""
    value = 1e3 * timing["median"]
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 1 else f"{value:.2f} ms"


def footer(content: dict) -> str:
    """Where the numbers come from."""
    facts = content["facts"]
    return f"\n{facts['device']}; torch {facts['torch']}, commit {facts['commit']}; {content['notes']}. `{facts['command']}`\n"


def movement(folder: Path) -> str:
    """extract, stitch and group beside their floor and the usual way."""
    lines = ["| operation | fastroute | copy of the same bytes | usual way | faster |", "| --- | --- | --- | --- | --- |"]
    for op in ("extract_patches", "stitch_patches"):
        content = json.loads((folder / f"{op}.json").read_text())
        for row in content["rows"]:
            times = row["times"]
            floor = milliseconds(times["copy of the same bytes"])
            usual = f"{row['peer']}: {milliseconds(times[row['peer']])}"
            lines.append(f"| {row['op']} | {milliseconds(times['fastroute'])} | {floor} | {usual} | {row['speedup']:.1f} x |")
    content = json.loads((folder / "group_by_class.json").read_text())
    for row in content["rows"]:
        if row.get("dtype", "int64") != "int64":
            continue
        times = row["times"]
        usual = f"argsort: {milliseconds(times['argsort'])}"
        ours = milliseconds(times["fastroute"])
        lines.append(f"| group_by_class, {row['items']:,} items | {ours} | | {usual} | {row['speedup']:.1f} x |")
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


def quality(folder: Path) -> str:
    """PSNR of the shipped model."""
    content = json.loads((folder / "quality.json").read_text())
    lines = ["| network | PSNR (RGB) | over bicubic | true FLOPs |", "| --- | --- | --- | --- |"]
    for row in content["rows"]:
        flops = f"{100 * row['flops']:.0f} %" if row["flops"] else ""
        lines.append(f"| {row['network']} | {row['psnr']:.2f} dB | {row['gain']:+.2f} dB | {flops} |")
    return "\n".join(lines) + "\n" + footer(content)


def render(text: str, folder: Path) -> str:
    """`text` with every generated section made anew."""
    for name in SECTIONS:
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


if __name__ == "__main__":
    main()
