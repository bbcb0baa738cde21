"""What turns measurements into tables: a wrong number here would be believed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import device_report, measure, report
from benchmarks.measure import Timing
from benchmarks.ops._common import FLOOR, OURS

SECTIONS = ("operators", "patch_routing", "quality")


def page_of(*sections: str) -> str:
    """A page with a place for each section."""
    return "# Title\n" + "".join(f"<!-- generated: {name} -->\nold\n<!-- end: {name} -->\ntext\n" for name in sections)


PAGE = page_of(*SECTIONS)
FACTS = {"device": "Some CPU, 2 threads", "torch": "2.13.0", "commit": "abc", "command": "python -m pytest benchmarks"}


def timing(seconds: float) -> dict:
    return asdict(Timing(seconds, 0.9 * seconds, 1.1 * seconds, 9))


def operator_row(op: str, pixels: int, seconds: float, dtype: str = "float32") -> dict:
    times = {OURS: timing(seconds), FLOOR: timing(seconds / 2), "usual": timing(5 * seconds)}
    return {
        "op": f"{op}, {pixels} pixels, {dtype}",
        "dtype": dtype,
        "output_pixels": pixels,
        "times": times,
        "bytes": 12 * pixels,
        "flops": 0 if op == "extract_patches" else 6 * pixels,
        "floor_seconds": seconds / 2,
        "copy_bytes_per_second": 1e10,
        "peak_flops_per_second": 1e11,
        "peak_bytes": {OURS: 3_000_000},
        "cold": {OURS: timing(1.5 * seconds)},
        "time_over_floor": 2.0,
        "peer": "usual",
        "speedup": 5.0,
        "missing": {"other | way": "not installed"},
    }


def group_row(items: int, dtype: str) -> dict:
    times = {OURS: timing(1e-3), FLOOR: timing(5e-4), "argsort": timing(4e-3)}
    row = {**operator_row("group_by_class", items, 1e-3, dtype), "items": items, "times": times, "speedup": 4.0}
    return {**row, "op": f"group_by_class, {items:,} items, {dtype}", "peer": "argsort"}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of one device with all of the operators' tables and one end-to-end result."""
    folder = tmp_path / "results" / "some-cpu-2-threads"
    folder.mkdir(parents=True)
    routing = {"image": "<a>", "flops_ratio": 0.6, "time_ratio": 0.65, "times": {"routed": timing(0.2)}}
    mix = {
        "flops_ratio": 0.6,
        "time_ratio": 0.65,
        "times": {"routed": timing(0.2)},
        "mix": "test2k",
        "backbone": "carn",
        "class_shares": [0.5, 0.25, 0.25],
        "published_time_ratio": 0.86,
    }
    mix |= {"paper_flops_ratio": 0.66, "missing": {"compiled": "takes too long"}}
    grown = [
        {"kind": "megapixels", "x": x, "times": {"a": timing(x)}, "peak_bytes": {"a": 5e6}, "result_bytes": 3e6}
        for x in (0.5, 33.0)
    ]
    fit = {"kind": "fit", "of": "megapixels", "variant": "a", "unit": "megapixel", "seconds_per_unit": 0.1, "r2": 0.999}
    networks = [
        {"network": name, "psnr": psnr, "gain": 0.0, "flops": flops, "seconds_per_megapixel": 0.01}
        for name, psnr, flops in (
            ("bicubic", 31.0, None),
            ("Some-SR, largest branch everywhere", 32.0, 1.0),
            ("Some-SR, routed by its classifier", 31.9, 0.8),
            ("Some-SR, budget 0.5", 31.5, 0.55),
        )
    ]
    contents = {
        "extract_patches": [operator_row("extract_patches", n, n * 1e-9) for n in (2_000_000, 8_000_000)],
        "stitch_patches": [operator_row("stitch_patches", n, n * 2e-9) for n in (2_000_000, 8_000_000)],
        "group_by_class": [group_row(10_000, "int64"), group_row(10_000, "uint8")],
        "routing": [routing],
        "class_mixes_carn": [mix],
        "growth_pixels": [*grown, fit],
        "growth_classes": [{**grown[0], "kind": "classes", "x": 2}],
        "quality": networks,
    }
    for name, rows in contents.items():
        (folder / f"{name}.json").write_text(json.dumps({"facts": FACTS, "notes": "made up", "rows": rows}))
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    monkeypatch.setattr(report, "RESULTS", folder.parent)
    monkeypatch.setattr(report, "PAGES", {page: SECTIONS})
    monkeypatch.setattr(report, "CURVES", tmp_path / "budgets.svg")
    monkeypatch.setattr(device_report, "RESULTS", folder.parent)
    return folder


def run_report(monkeypatch: pytest.MonkeyPatch, *options: str) -> object:
    """The exit status or message of the report; None when it just ends."""
    monkeypatch.setattr(sys, "argv", ["report", *options])
    try:
        report.main()
    except SystemExit as end:
        return end.code
    return None


def written() -> str:
    """The page that the report writes."""
    (page,) = report.PAGES
    return page.read_text()


def test_check_fails_until_the_report_is_written(results: Path, monkeypatch: pytest.MonkeyPatch):
    assert "page.md is out of date" in str(run_report(monkeypatch, "--check"))
    assert written() == PAGE
    assert run_report(monkeypatch) is None
    assert run_report(monkeypatch, "--check") == 0
    path = results / "extract_patches.json"
    path.write_text(path.read_text().replace("2000000 pixels", "3000000 pixels"))
    assert "out of date" in str(run_report(monkeypatch, "--check"))


def test_tables_hold_the_numbers(results: Path, monkeypatch: pytest.MonkeyPatch):
    run_report(monkeypatch)
    text = written()
    assert (
        "| extract_patches, 2000000 pixels, float32 | 2.0 ms | 1.0 ms | usual: 10.0 ms | 5.0 x | usual: 10.0 ms | 5.0 x |"
        in text
    )
    assert text.count("| group_by_class, 10,000 items |") == 1, "several types of ids were measured, and the table shows one"
    assert text.count("Not measured yet") == 1
    assert text.startswith("# Title\n") and text.endswith("text\n")
    assert "| Some-SR, routed by its classifier | 31.90 dB |" in text
    assert "budget 0.5" not in text, "budgets are in the picture"


def test_the_curves_are_drawn(results: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib")
    run_report(monkeypatch)
    first = report.CURVES.read_bytes()
    assert b"Some-SR" in first and b"PSNR" in first and b"bicubic" not in first
    run_report(monkeypatch)
    assert report.CURVES.read_bytes() == first
    path = results / "quality.json"
    path.write_text(path.read_text().replace("31.5", "31.6"))
    run_report(monkeypatch)
    assert report.CURVES.read_bytes() != first


def test_mixes_are_written(results: Path):
    place = page_of("class_mixes")
    text = report.render(place, results, ["class_mixes"], "page.md")
    assert "| carn | test2k | 50 / 25 / 25 % | 60 % | 66 % | **65 %** | 86 % |" in text
    for path in results.glob("class_mixes_*.json"):
        path.unlink()
    assert "Not measured yet" in report.render(place, results, ["class_mixes"], "page.md")


def test_pixel_routing_is_written(results: Path):
    labels = ("fastroute", "dense, same machinery", "plain network, one pass", "published formulation")
    row = {"model": "carn", "image": "a", "lr_size": [8, 6], "heavy_share": 0.3, "flops_ratio": 0.6, "time_ratio": 0.7}
    row |= {"times": {label: timing(0.2 * (n + 1)) for n, label in enumerate(labels)}, "speedup": 4.0}
    row |= {"rest": 0.05, "rest_speedup": 9.0}
    content = {"facts": FACTS, "notes": "made up", "rows": [row]}
    (results / "pixel_routing_carn.json").write_text(json.dumps(content))
    text = report.render(page_of("pixel_routing"), results, ["pixel_routing"], "page.md")
    cells = "30 % | 60 % | **70 %** | 200 ms | 400 ms | 600 ms | 800 ms (4.0 x) | 50.0 ms | 9.0 x"
    assert f"| CARN, a (8 x 6) | {cells} |" in text


def test_the_headline_is_written(results: Path):
    labels = ("OpenVINO, LATENCY", "ONNX Runtime", "fastroute dense, torch", "fastroute routed, torch")
    row = {"backbone": "carn", "precision": "bfloat16", "lr_size": [8, 6], "engine": "torch", "routed": labels[3]}
    row |= {"times": {label: timing(0.2 * (n + 1)) for n, label in enumerate(labels)}, "fastest_dense": labels[0]}
    row |= {
        "of_fastest_dense": {labels[3]: 4.0, "fastroute routed, 50% of one pass": 0.55},
        "of_fastest_float32": {labels[3]: 2.5},
    }
    row |= {"flops_of_one_pass": {labels[3]: 0.62}, "floor_of_fastest_dense": 0.64, "over_floor": 1.07}
    content = {"facts": FACTS, "notes": "made up", "rows": [row]}
    (results / "headline_carn.json").write_text(json.dumps(content))
    both = ("headline", "headline_details")
    text = report.render(page_of(*both), results, both, "page.md")
    assert "| CARN, bfloat16 (8 x 6) | OpenVINO, LATENCY: 200 ms | torch: 800 ms | **4.00** | 0.62 |" in text
    cells = "OpenVINO, LATENCY: 200 ms | 600 ms | torch: 800 ms | **4.00** | 0.62 | 0.64 | 1.07 | 2.50 | 0.55"
    assert f"| carn, bfloat16 (8 x 6) | {cells} |" in text


def test_a_missing_section_is_an_error(results: Path):
    with pytest.raises(SystemExit, match=r"page\.md must have one section operators; it has 0"):
        report.render("# Title\n", results, SECTIONS, "page.md")


def test_milliseconds():
    assert [report.milliseconds({"median": s}) for s in (0.2504, 0.0123, 0.000456)] == ["250 ms", "12.3 ms", "0.46 ms"]


def test_device_report_in_markdown(results: Path):
    text = device_report.markdown(device_report.read(results), "Some CPU")
    assert "| class_mixes_carn | test2k | 50 / 25 / 25 | 60 % | 66 % | 65 % | 86 % |" in text
    line = "| stitch_patches, 8000000 pixels, float32 | 96.0 MB, 0.05 G | fastroute | 16.0 ms | 14.4 to 17.6 ms of 9 | 24.0 ms "
    assert line + "| 50 % | 3.0 MB | 1.00 |" in text
    assert "other \\| way | not timed | not installed" in text
    assert "| test2k | compiled | not timed | takes too long |" in text
    assert "| stitch_patches | 2 | 5.0 x | 5.0 x | 5.0 x | nowhere |" in text
    assert "| megapixels | a: 100 ms per megapixel, R² 0.999 |" in text
    assert "| bicubic | 31.00 dB | +0.00 dB |  | 10.0 ms |" in text
    # Every table has as many cells in its rows as in its head.
    for block in text.split("\n\n"):
        lines = [line.replace("\\|", "").count("|") for line in block.splitlines() if line.startswith("|")]
        assert len(set(lines)) <= 1, block


def test_a_peer_that_wins_is_named(results: Path):
    path = results / "stitch_patches.json"
    content = json.loads(path.read_text())
    content["rows"][0]["times"]["usual"] = timing(1e-3)
    path.write_text(json.dumps(content))
    text = device_report.markdown(device_report.read(results), "Some CPU")
    assert "| 0.2 x | 5.0 x | 5.0 x | stitch_patches, 2000000 pixels, float32: usual, 4.00 x as fast |" in text


def test_device_report_as_a_page(results: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib", reason="the plots need matplotlib: pip install '.[benchmark]'")
    monkeypatch.setattr(sys, "argv", ["device_report", str(results)])
    device_report.main()
    text = (results / "report.html").read_text()
    captions = [
        "Realised saving against FLOPs", "Roofline", "Time against image size", "Peak memory against image size",
        "PSNR against time", "How time grows", "Operators beside their floor", "extract_patches, float32",
        "stitch_patches, float32", "group_by_class: time against items",
    ]  # fmt: skip
    assert all(f'<img alt="{caption}' in text for caption in captions)
    assert text.count('src="data:image/png;base64,iVBOR') == len(captions)
    assert "&lt;a&gt;" in text and "<a>" not in text
    assert (results / "report.md").exists()


def test_device_report_without_results(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["device_report", str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="there are some-cpu-2-threads"):
        device_report.main()


def test_saved_results_are_read_back(tmp_path: Path):
    path = measure.save("some_op", [{"op": "case", "times": {OURS: Timing(1.0, 0.5, 2.0, 3)}}], "made up", tmp_path)
    assert path.parent == measure.device_folder(tmp_path)
    content = device_report.read(path.parent)["some_op"]
    assert content["rows"][0]["times"][OURS] == {"median": 1.0, "low": 0.5, "high": 2.0, "runs": 3}
    assert {"device", "commit", "torch", "command", "packages", "backends"} <= set(content["facts"])


def run_suite(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/ops/group_by_class.py", *options]
    return subprocess.run(command, cwd=measure.ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_smoke_results_stay_apart():
    run = run_suite("--smoke", "--save")
    assert run.returncode != 0 and "--results FOLDER" in run.stderr + run.stdout


@pytest.mark.slow
def test_no_benchmark_begins_after_its_minutes():
    run = run_suite("--smoke", "--minutes", "0")
    assert run.returncode == 0 and "1 skipped" in run.stdout


@pytest.mark.slow
def test_a_smoke_run_writes_what_the_report_reads(tmp_path: Path):
    run = run_suite("--smoke", "--save", "--results", str(tmp_path), "--device", "cpu")
    assert run.returncode == 0, run.stdout
    folder = next(tmp_path.iterdir())
    results = device_report.read(folder)
    assert "--smoke" in results["group_by_class"]["facts"]["command"]
    assert "| group_by_class, 10,000 items, uint8 |" in device_report.markdown(results, "here")
