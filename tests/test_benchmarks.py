"""What turns measurements into tables: a wrong number here would be believed."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks import device_report, measure, report
from benchmarks.baselines import packages
from benchmarks.measure import Timing, alternate, summary
from benchmarks.ops import _common
from benchmarks.ops._common import FLOOR, OURS, Variant, compare, same
from fastroute import TileGrid

PAGE = "# Title\n" + "".join(f"<!-- generated: {name} -->\nold\n<!-- end: {name} -->\ntext\n" for name in report.SECTIONS)
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
        "floor_seconds": seconds / 2,
        "time_over_copy": 2.0,
        "peer": "usual",
        "speedup": 5.0,
        "missing": {"other | way": "not installed"},
    }


def group_row(items: int, dtype: str) -> dict:
    times = {OURS: timing(1e-3), FLOOR: timing(5e-4), "argsort": timing(4e-3)}
    return {**operator_row("group_by_class", items, 1e-3, dtype), "items": items, "times": times, "speedup": 4.0}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of one device with all of the operators' tables and one end-to-end result."""
    folder = tmp_path / "results" / "some-cpu-2-threads"
    folder.mkdir(parents=True)
    routing = {"image": "<a>", "flops_ratio": 0.6, "time_ratio": 0.65, "times": {"routed": timing(0.2)}}
    contents = {
        "extract_patches": [operator_row("extract_patches", n, n * 1e-9) for n in (2_000_000, 8_000_000)],
        "stitch_patches": [operator_row("stitch_patches", n, n * 2e-9) for n in (2_000_000, 8_000_000)],
        "group_by_class": [group_row(10_000, "int64"), group_row(10_000, "uint8")],
        "routing": [routing],
    }
    for name, rows in contents.items():
        (folder / f"{name}.json").write_text(json.dumps({"facts": FACTS, "notes": "made up", "rows": rows}))
    readme = tmp_path / "README.md"
    readme.write_text(PAGE)
    monkeypatch.setattr(report, "RESULTS", folder.parent)
    monkeypatch.setattr(report, "README", readme)
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


def test_check_fails_until_the_report_is_written(results: Path, monkeypatch: pytest.MonkeyPatch):
    assert "out of date" in str(run_report(monkeypatch, "--check"))
    assert report.README.read_text() == PAGE
    assert run_report(monkeypatch) is None
    assert run_report(monkeypatch, "--check") == 0
    path = results / "extract_patches.json"
    path.write_text(path.read_text().replace('"speedup": 5.0', '"speedup": 6.0'))
    assert "out of date" in str(run_report(monkeypatch, "--check"))


def test_tables_hold_the_numbers(results: Path, monkeypatch: pytest.MonkeyPatch):
    run_report(monkeypatch)
    text = report.README.read_text()
    assert "| extract_patches, 2000000 pixels, float32 | 2.0 ms | 1.0 ms | usual: 10.0 ms | 5.0 x |" in text
    assert text.count("| group_by_class, 10,000 items |") == 1, "of several types of ids the README names one"
    assert text.count("Not measured yet") == 2
    assert text.startswith("# Title\n") and text.endswith("text\n")


def test_a_missing_section_is_an_error(results: Path):
    with pytest.raises(SystemExit, match="one section movement; it has 0"):
        report.render("# Title\n", results)


def test_milliseconds():
    assert [report.milliseconds({"median": s}) for s in (0.2504, 0.0123, 0.000456)] == ["250 ms", "12.3 ms", "0.46 ms"]


def test_device_report_in_markdown(results: Path):
    text = device_report.markdown(device_report.read(results), "Some CPU")
    assert "| routing | 60 % | 65 % |" in text
    line = "| stitch_patches, 8000000 pixels, float32 | 96.0 MB | fastroute | 16.0 ms | 14.4 to 17.6 ms | 50 % | 1.00 |"
    assert line in text
    assert "other \\| way | not timed | not installed" in text
    columns = [line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(columns) == {4, 5, 8}


def test_device_report_as_a_page(results: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib", reason="the plots need matplotlib: pip install 'fastroute[benchmark]'")
    monkeypatch.setattr(sys, "argv", ["device_report", str(results)])
    device_report.main()
    text = (results / "report.html").read_text()
    # Saving, floors, and size for two operators and for group_by_class in two types.
    assert text.count('src="data:image/png;base64,iVBOR') == 6
    assert "&lt;a&gt;" in text and "<a>" not in text
    assert (results / "report.md").exists()


def test_device_report_without_results(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["device_report", str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="there are some-cpu-2-threads"):
        device_report.main()


def test_summary():
    assert summary([3.0]) == Timing(3.0, 3.0, 3.0, 1)
    assert summary([5.0, 1.0, 3.0, 2.0, 4.0]) == Timing(3.0, 2.0, 4.0, 5)


def test_alternate_takes_turns():
    calls: list[str] = []
    times = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert all(taken.runs == 3 and taken.low <= taken.median <= taken.high for taken in times.values())


@pytest.mark.parametrize(("limit", "runs"), [(0.0, 4), (math.inf, 9)])
def test_alternate_ends_early(limit, runs):
    assert alternate({"a": lambda: None}, rounds=9, limit=limit)["a"].runs == runs


def test_a_wrong_peer_is_not_timed(capsys: pytest.CaptureFixture):
    right = torch.arange(8)
    variants = {
        OURS: Variant(right.clone, same(right)),
        "usual": Variant(lambda: right + 0, same(right)),
        "wrong": Variant(lambda: right + 1, same(right), foreign=True),
        "absent": "not installed",
    }
    row = compare("case", variants, 128, "usual", smoke=True, size="tiny")
    assert set(row["times"]) == {OURS, "usual", FLOOR, "copy to a new tensor"}
    assert row["missing"] == {"wrong": "disagrees: another result", "absent": "not installed"}
    assert row["time_over_copy"] == row["times"][OURS].median / row["floor_seconds"]
    assert row["speedup"] == row["times"]["usual"].median / row["times"][OURS].median
    assert "wrong" in capsys.readouterr().out


def test_a_wrong_result_of_ours_is_an_error():
    right = torch.arange(8)
    with pytest.raises(AssertionError, match="another result"):
        compare("case", {OURS: Variant(lambda: right + 1, same(right))}, 128, OURS, smoke=True)


def test_same_looks_at_every_tensor():
    _common.same((torch.ones(2), torch.zeros(2)))((torch.ones(2), torch.zeros(2)))
    with pytest.raises(AssertionError):
        _common.same((torch.ones(2), torch.zeros(2)))((torch.ones(2), torch.ones(2)))


def test_a_share_of_classes_may_differ():
    expected = torch.zeros(100)
    other = expected.clone()
    other[0] = 1
    _common.same_classes(expected, 0.01)(other)
    with pytest.raises(AssertionError, match="of another class"):
        _common.same_classes(expected, 0.009)(other)


def test_saved_results_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    path = measure.save("some_op", [{"op": "case", "times": {OURS: Timing(1.0, 0.5, 2.0, 3)}}], "made up")
    assert path.parent == measure.device_folder()
    content = device_report.read(path.parent)["some_op"]
    assert content["rows"][0]["times"][OURS] == {"median": 1.0, "low": 0.5, "high": 2.0, "runs": 3}
    assert {"device", "commit", "torch", "command"} <= set(content["facts"])


def test_packages_that_are_missing_say_so(monkeypatch: pytest.MonkeyPatch):
    for name in ("kornia", "monai", "tiler"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("kornia.contrib", "monai.inferers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    grid = TileGrid(40, 40, 16, 12)
    for ways in (packages.extractors(grid), packages.mergers(grid)):
        assert all(isinstance(reason, str) and "fastroute[benchmark]" in reason for reason in ways.values())


def test_padding_fills_whole_strides():
    grid = TileGrid(41, 30, 16, 12)
    image = torch.rand(1, 3, 41, 30)
    padded = packages.pad_image(image, grid)
    assert padded.shape[2:] == packages.padded_size(grid) == (52, 40)
    assert torch.equal(padded[:, :, :41, :30], image)
    assert torch.equal(padded[:, :, 51, :30], image[:, :, 40])
