"""The tables of a device's report, each a head and rows of text, from results as they lie in its folder."""

from __future__ import annotations

from typing import Any

from benchmarks.e2e.growth import sentence
from benchmarks.report import milliseconds, peers

Result = dict[str, Any]
Table = list[list[str]]


def operator_rows(results: dict[str, Result]) -> dict[str, list[dict]]:
    """Results of operators that were measured beside a floor, by name."""
    found = {name: [row for row in result["rows"] if "floor_seconds" in row] for name, result in results.items()}
    return {name: rows for name, rows in found.items() if rows}


def quartiles(timing: dict) -> str:
    """The two quartiles of a time and of how many runs they are."""
    if timing["runs"] == 1:
        return "one run"
    return f"{1e3 * timing['low']:.3g} to {1e3 * timing['high']:.3g} ms of {timing['runs']}"


def megabytes(count: float | None) -> str:
    """Bytes as people read them; nothing where there is no number."""
    return "" if count is None else f"{count / 1e6:.1f} MB"


def percent(share: float | None) -> str:
    """A share; nothing where there is no number."""
    return "" if share is None else f"{100 * share:.0f} %"


def operator_table(rows: list[dict]) -> Table:
    """Ours, the copy and every other variant; what could not be timed says why."""
    head = ["case", "bytes, FLOPs", "variant", "median", "quartiles", "caches swept", "of the floor's speed", "peak memory"]
    lines = [[*head, "time / fastroute"]]
    for row in rows:
        ours = row["times"]["fastroute"]["median"]
        model = f"{row['bytes'] / 1e6:.1f} MB, {row.get('flops', 0) / 1e9:.2f} G"
        cold, memory = row.get("cold", {}), row.get("peak_bytes", {})
        for name, timing in row["times"].items():
            swept = milliseconds(cold[name]) if name in cold else ""
            reached = percent(row["floor_seconds"] / timing["median"])
            ratio = f"{timing['median'] / ours:.2f}"
            cells = [row["op"], model, name, milliseconds(timing), quartiles(timing), swept, reached]
            lines.append([*cells, megabytes(memory.get(name)), ratio])
        lines += [[row["op"], "", name, "not timed", reason, "", "", "", ""] for name, reason in row["missing"].items()]
    return lines


def timing_table(rows: list[dict]) -> Table:
    """Medians and memory of end-to-end results; what could not be timed says why."""
    lines = [["case", "variant", "median", "quartiles", "peak memory"]]
    for number, row in enumerate(rows):
        label = str(row.get("image") or row.get("mix") or row.get("op") or number + 1)
        if "x" in row:
            label = f"{row['kind'].replace('_', ' ')}: {row['x']:.3g}"
        memory = row.get("peak_bytes", {})
        for name, timing in row.get("times", {}).items():
            lines.append([label, name, milliseconds(timing), quartiles(timing), megabytes(memory.get(name))])
        lines += [[label, name, "not timed", reason, ""] for name, reason in row.get("missing", {}).items()]
    return lines


def saving_table(results: dict[str, Result]) -> Table:
    """The headline: time beside FLOPs, both as a share of dense, and what the papers' own times came to."""
    lines = [
        ["result", "image or mix", "classes, %", "FLOPs, true", "FLOPs, as papers count", "time, realised", "time, table I"]
    ]
    for name, result in results.items():
        for row in result["rows"]:
            if "flops_ratio" in row and "time_ratio" in row:
                shares = row.get("class_shares") or [1 - row.get("heavy_share", 0), row.get("heavy_share", 0)]
                mix = " / ".join(f"{100 * share:.0f}" for share in shares)
                ratios = (row["flops_ratio"], row.get("paper_flops_ratio"), row["time_ratio"], row.get("published_time_ratio"))
                lines.append([name, str(row.get("mix") or row.get("image") or ""), mix, *map(percent, ratios)])
            for point in row.get("mixes", []):
                mix = f"{100 * (1 - point['heavy_share']):.0f} / {100 * point['heavy_share']:.0f}"
                ratios = (point["flops_ratio"], None, point["time_ratio"], None)
                lines.append([name, f"{row['image']}, k = {point['k']:g}", mix, *map(percent, ratios)])
    return lines


def peers_table(results: dict[str, Result]) -> Table:
    """How much faster than the fastest of the others, at the worst, in the middle and at best; and where one wins."""
    lines = [["operator", "cases", "fastest peer / fastroute: least", "median", "most", "where a peer wins"]]
    for name, rows in operator_rows(results).items():
        factors = []
        wins = []
        for row in rows:
            others = peers(row["times"])
            if not others:
                continue
            best = min(others, key=others.__getitem__)
            factor = others[best] / row["times"]["fastroute"]["median"]
            factors.append(factor)
            if factor < 1:
                wins.append(f"{row['op']}: {best}, {1 / factor:.2f} x as fast")
        if factors:
            ordered = sorted(factors)
            told = [f"{value:.1f} x" for value in (ordered[0], ordered[len(ordered) // 2], ordered[-1])]
            lines.append([name, str(len(factors)), *told, "; ".join(wins) or "nowhere"])
    return lines


def growth_table(results: dict[str, Result]) -> Table:
    """The fitted slopes in words."""
    lines = [["what grows", "fit"]]
    for result in results.values():
        lines += [[row["of"].replace("_", " "), sentence(row)] for row in result["rows"] if row.get("kind") == "fit"]
    return lines


def whole_table(results: dict[str, Result]) -> Table:
    """Every way to upscale whole images: sizes, time, throughput and memory."""
    head = ["way", "model", "input", "output", "input, output", "time", "megapixels per second", "images per second"]
    lines = [[*head, "peak memory", "beyond the result"]]
    for row in results.get("whole_images", {"rows": []})["rows"]:
        count = f"{row['images']} of " if row["images"] > 1 else ""
        sizes = [f"{count}{row[key][0]} x {row[key][1]}" for key in ("lr_size", "size")]
        weights = f"{megabytes(row['input_bytes'])}, {megabytes(row['output_bytes'])}"
        cells = [row["op"], row["model"], *sizes, weights]
        for name, timing in row["times"].items():
            speeds = [f"{row['megapixels_per_second']:.1f}", f"{row['images_per_second']:.2f}"]
            memory = [megabytes(row["peak_bytes"][name]), megabytes(row["beyond_bytes"])]
            lines.append([*cells, milliseconds(timing), *speeds, *memory])
        lines += [[*cells, "not timed", reason, "", "", ""] for reason in row["missing"].values()]
    return lines


def budgets_table(results: dict[str, Result]) -> Table:
    """Time budgets: what was asked for, what it took, and by how much it was missed; all together in the last line of each."""
    head = ["result", "image (LR size)", "cheapest to most expensive", "asked", "taken", "error", "worst single call"]
    lines = [head]
    for name, result in results.items():
        for row in (row for row in result["rows"] if "asked" in row):
            ends = " to ".join(milliseconds({"median": row[end]}) for end in ("cheapest", "most_expensive"))
            label = f"{row['image']} ({row['lr_size'][0]} x {row['lr_size'][1]})"
            cells = [name, label, ends, milliseconds({"median": row["asked"]})]
            for timing in row["times"].values():
                worst = max(row["errors"], key=abs)
                lines.append([*cells, milliseconds(timing), f"{100 * row['error']:+.1f} %", f"{100 * worst:+.1f} %"])
            lines += [[*cells, "refused", reason, ""] for reason in row["missing"].values()]
        for row in (row for row in result["rows"] if row.get("kind") == "overall" and row["budgets"]):
            errors = f"median {100 * row['median_error']:.1f} %, worst {100 * row['worst_error']:.1f} %"
            lines.append([name, f"all {row['budgets']} budgets", "", "", "", errors, f"{100 * row['worst_call']:.1f} %"])
    return lines


def quality_table(results: dict[str, Result]) -> Table:
    """PSNR beside time."""
    lines = [["network", "PSNR (RGB)", "over bicubic", "true FLOPs", "per megapixel of output"]]
    for row in results.get("quality", {"rows": []})["rows"]:
        seconds = row.get("seconds_per_megapixel")
        time = "" if seconds is None else milliseconds({"median": seconds})
        lines.append([row["network"], f"{row['psnr']:.2f} dB", f"{row['gain']:+.2f} dB", percent(row["flops"]), time])
    return lines
