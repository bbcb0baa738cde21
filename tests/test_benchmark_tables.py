"""Tables of whole images, of time budgets and of all operators, and what stands under tables of several results."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from test_benchmarks import FACTS, operator_row, timing

from benchmarks import device_report, measure, report
from benchmarks.device_tables import budgets_table, whole_table
from benchmarks.e2e import _ways, whole_images
from benchmarks.measure import Timing
from benchmarks.ops._common import OURS
from fastroute.runtime.results import Upscaled


def result(*rows: dict, notes: str = "made up", **facts: str) -> dict:
    """As it is read from a file."""
    return json.loads(json.dumps({"facts": {**FACTS, **facts}, "notes": notes, "rows": rows}, default=asdict))


def whole_row(op: str, seconds: float | None, images: int = 1) -> dict:
    row = {"op": op, "model": "some-x4", "images": images, "lr_size": [20, 10], "size": [80, 40]}
    row |= {"input_bytes": 2_000_000, "output_bytes": 32_000_000, "times": {}, "peak_bytes": {OURS: None}, "missing": {}}
    if seconds is None:
        return row | {"missing": {OURS: "needs zarr"}}
    row |= {"times": {OURS: timing(seconds)}, "peak_bytes": {OURS: 40e6}, "beyond_bytes": 7e6}
    return row | {"megapixels_per_second": 12.34, "images_per_second": images / seconds}


def test_whole_images_in_a_table():
    results = {"whole_images": result(whole_row("upscale", 0.5), whole_row("folder", 2.0, 8), whole_row("to zarr", None))}
    head, *lines = whole_table(results)
    sizes = ["some-x4", "20 x 10", "80 x 40", "2.0 MB, 32.0 MB"]
    assert lines[0] == ["upscale", *sizes, "500 ms", "12.3", "2.00", "40.0 MB", "7.0 MB"]
    assert lines[1][2:4] == ["8 of 20 x 10", "8 of 80 x 40"] and lines[1][7] == "4.00"
    assert lines[2] == ["to zarr", *sizes, "not timed", "needs zarr", "", "", ""]
    assert {len(line) for line in lines} == {len(head)}
    text = device_report.markdown(results, "here")
    assert text.index("## Whole images") < text.index("## whole_images"), "the summary comes first"
    assert "Time budgets" not in text, "a table without rows is left out"


def budget_rows() -> list[dict]:
    bounds = {"cheapest": Timing(0.1, 0.1, 0.1, 5), "most_expensive": Timing(0.3, 0.3, 0.3, 5)}
    image = torch.zeros(1, 3, 6, 8)
    taken = [([0.2, 0.21, 0.24], None), ([0.15, 0.15, 0.12], "too little"), ([], "far too little")]
    asked = (0.2, 0.15, 0.125)
    return [whole_images.row_of("a", image, 0.5, seconds, *part, bounds) for seconds, part in zip(asked, taken, strict=True)]


def test_time_budgets_in_a_table():
    rows = budget_rows()
    met = whole_images.overall(rows)
    assert (met["budgets"], met["refused"]) == (2, 2)
    assert [met[key] for key in ("median_error", "worst_error", "worst_call")] == pytest.approx([0.025, 0.05, 0.2])
    head, *lines = budgets_table({"time_budgets_patches": result(*rows, met)})
    cells = ["time_budgets_patches", "a (8 x 6)", "100 ms to 300 ms"]
    assert lines == [
        [*cells, "200 ms", "210 ms", "+5.0 %", "+20.0 %"],
        [*cells, "150 ms", "150 ms", "+0.0 %", "-20.0 %"],
        [*cells, "150 ms", "refused", "too little", ""],
        [*cells, "125 ms", "refused", "far too little", ""],
        ["time_budgets_patches", "all 2 budgets", "", "", "", "median 2.5 %, worst 5.0 %", "20.0 %"],
    ]
    assert len(head) == len(lines[0])


def test_refused_budgets_have_no_error():
    met = whole_images.overall(budget_rows()[2:])
    assert met == {"kind": "overall", "budgets": 0, "refused": 1}
    assert len(budgets_table({"time_budgets_pixels": result(met)})) == 1


def test_results_in_memory_are_counted():
    image, class_map = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.int64)
    assert _ways.result_bytes(Upscaled(image, class_map, None)) == 3 * 64 + 32
    assert _ways.result_bytes(image) == 192 and _ways.result_bytes(Path("out.tif")) == 0


def test_what_results_share_is_told_once():
    assert report.footers({"a": result(), "b": result()}) == report.footer(result())
    text = report.footers({"a": result(notes="n of 4"), "b": result(notes="n of 2"), "c": result(notes="n of 4")})
    assert text == "\nSome CPU, 2 threads; torch 2.13.0, commit abc; a, c: n of 4. b: n of 2. `python -m pytest benchmarks`\n"


def test_results_of_other_commits_are_told_apart():
    text = report.footers({"a": result(), "b": result(commit="def"), "c": result(command="other")})
    lines = text.strip().split("\n\n")
    assert [line.partition("; torch ")[2] for line in lines] == [
        "2.13.0, commit abc; a: made up. `python -m pytest benchmarks`",
        "2.13.0, commit def; b: made up. `python -m pytest benchmarks`",
        "2.13.0, commit abc; c: made up. `other`",
    ]


def test_all_operators_stand_in_one_table(tmp_path: Path):
    sizes = (1000, 2000, 3000)
    mlps = [
        {**operator_row("pixel_mlp", n, 1e-3), "op": f"pixel_mlp, {mlp}, {setup}, {n}", "setup": setup, "mlp": mlp}
        for setup in ("FSRCNN", "CARN")
        for n in sizes[:2]
        for mlp in ("expensive", "mixed")
    ]
    contents = {
        "extract_patches": result(*(operator_row("extract_patches", n, 1e-3) for n in sizes)),
        "gather_groups": result(*(operator_row("gather_groups", n, 1e-3) for n in sizes), notes="others"),
        "refine_boundaries": result(operator_row("refine_boundaries", 1000, 1e-3)),
        "pixel_mlp": result(*mlps, {**mlps[1], "op": "half", "dtype": "bfloat16"}),
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    text = report.operators(tmp_path)
    told = re.findall(r"^\| (\w+), .*?(\d+)(?: pixels, float32)? \| 1.0 ms \| 0.50 ms \| usual: 5.0 ms \| 5.0 x \|", text, re.M)
    assert told == [
        *(("extract_patches", str(n)) for n in sizes),
        ("gather_groups", "1000"),
        ("gather_groups", "3000"),
        ("pixel_mlp", "2000"),
        ("pixel_mlp", "2000"),
        ("refine_boundaries", "1000"),
    ]
    assert "| pixel_mlp, mixed, FSRCNN, 2000 |" in text and "| pixel_mlp, mixed, CARN, 2000 |" in text
    assert "half" not in text and "expensive" not in text
    assert "extract_patches, pixel_mlp, refine_boundaries: made up. gather_groups: others." in text
    with pytest.raises(FileNotFoundError):
        report.operators(tmp_path / "none")


def test_every_operator_has_its_place():
    ops = {path.stem for path in (measure.ROOT / "fastroute" / "ops").glob("[a-z]*.py")}
    assert {re.sub("_(penalty|budget|upsampled)$", "", name) for name in report.OPERATORS} == ops


def test_every_page_has_its_sections():
    for path, sections in report.PAGES.items():
        markers = re.findall(r"<!-- generated: (\w+) -->", path.read_text())
        assert sorted(markers) == sorted(sections), path.name
    sections = [name for names in report.PAGES.values() for name in names]
    assert len(sections) == len(set(sections)) and all(callable(getattr(report, name)) for name in sections)


def test_the_committed_tables_are_those_of_the_committed_results(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["report", "--check"])
    with pytest.raises(SystemExit) as end:
        report.main()
    assert end.value.code == 0
