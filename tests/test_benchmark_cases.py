"""How variants of an operator are checked, timed and compared, and at which sizes."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import measure
from benchmarks.ops import _common
from benchmarks.ops._common import FLOOR, OURS, Variant, cases, compare, known, same
from benchmarks.setting import Setting

SMOKE = Setting(smoke=True)


def test_a_wrong_peer_is_not_timed(capsys: pytest.CaptureFixture):
    right = torch.arange(8)
    variants = {
        OURS: Variant(right.clone, same(right)),
        "usual": Variant(lambda: right + 0, same(right)),
        "wrong": Variant(lambda: right + 1, same(right), foreign=True),
        "absent": "not installed",
    }
    row = compare("case", variants, 128, "usual", SMOKE, size="tiny")
    assert set(row["times"]) == {OURS, "usual", FLOOR, "copy to a new tensor"}
    assert row["missing"] == {"wrong": "disagrees: another result", "absent": "not installed"}
    assert row["time_over_floor"] == row["times"][OURS].median / row["floor_seconds"]
    assert row["floor_seconds"] == row["times"][FLOOR].median and row["size"] == "tiny"
    assert set(row["cold"]) == {OURS, "usual", FLOOR}
    assert row["speedup"] == row["times"]["usual"].median / row["times"][OURS].median
    assert "wrong" in capsys.readouterr().out


def test_a_wrong_result_of_ours_is_an_error():
    right = torch.arange(8)
    with pytest.raises(AssertionError, match="another result"):
        compare("case", {OURS: Variant(lambda: right + 1, same(right))}, 128, OURS, SMOKE)


def test_the_floor_is_the_longer_of_bytes_and_flops(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "peak_flops", lambda dtype: 1e9)
    row = compare("case", {OURS: Variant(lambda: None, lambda result: None)}, 128, OURS, SMOKE, flops=10**9)
    assert row["floor_seconds"] == 1.0 and row["flops"] == 10**9


def test_a_variant_without_memory_is_not_timed():
    def too_much() -> None:
        raise torch.OutOfMemoryError("4 GB more than there are")

    variants = {OURS: Variant(lambda: None, lambda r: None), "other": Variant(too_much, lambda r: None, foreign=True)}
    assert compare("case", variants, 128, OURS, SMOKE)["missing"] == {"other": "out of memory: 4 GB more than there are"}


@pytest.mark.slow
def test_a_slow_variant_is_timed_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_common, "SLOW_SECONDS", 0.01)
    variants = {
        OURS: Variant(lambda: time.sleep(0.02), lambda r: None),
        "slow": Variant(lambda: time.sleep(0.02), lambda r: None),
    }
    row = compare("case", variants, 128, "slow", Setting())
    assert row["times"]["slow"].runs == 1 and row["times"][OURS].runs > 1
    assert set(row["cold"]) == {OURS, FLOOR}


def test_what_others_are_compared_with_runs_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_common, "SLOW_SECONDS", 0.01)
    calls: list[float] = []

    def reference() -> torch.Tensor:
        calls.append(time.perf_counter())
        time.sleep(0.03)
        return torch.arange(8)

    expected, usual = known(reference)
    variants = {OURS: Variant(lambda: torch.arange(8), same(expected)), "usual": usual}
    # Above half a second memory is not looked at again.
    monkeypatch.setattr(_common, "QUICK_SECONDS", 0.01)
    row = compare("case", variants, 128, "usual", Setting())
    assert len(calls) == 1 and row["times"]["usual"].runs == 1 and row["times"]["usual"].median >= 0.03
    assert "usual" in row["peak_bytes"] or measure.peak_memory(lambda: None) is None


@pytest.mark.parametrize(
    ("kind", "apart", "message"),
    [
        (torch.float32, 0.9e-3, None),
        (torch.float32, 2.5e-3, "values differ by up to 2.5e-03"),
        (torch.float32, float("nan"), "values differ"),
        (torch.uint8, 1, None),
        (torch.uint8, 2, "values differ by up to 2"),
    ],
)
def test_close_looks_at_every_row(kind: torch.dtype, apart: float, message: str | None):
    expected = torch.zeros(2, 3, 2 * _common.ROWS + 5, 4, dtype=kind)
    other = expected.clone()
    other[1, 2, -1, 3] = apart
    check = _common.close(expected, 1e-3)
    check(expected)
    if message is None:
        check(other)
    else:
        with pytest.raises(AssertionError, match=message):
            check(other)
    with pytest.raises(AssertionError, match="another shape or type"):
        check(expected[:1])


def test_cases_of_an_operator():
    made = cases(Setting(), (torch.float32, torch.uint8), (torch.float16,))
    assert sum(case.plain for case in made) == 3 * 2 + 1
    assert [case.name for case in made if case.channels_last] == ["2K", "4K"]
    assert all(case.batch * 16 * case.height * case.width <= 8 * 3840 * 2160 for case in made)
    alike = cases(Setting(), (torch.float32, torch.float16), formats=False, alike=True)
    assert [case.name for case in alike if case.plain and case.dtype == torch.float16] == ["4K"]
    assert [case.name for case in alike if case.plain and case.dtype == torch.float32] == ["2K", "4K", "8K"]
    whole = cases(Setting(full=True), (torch.float32, torch.float16), alike=True)
    for told in ([case for case in whole if case.batch == 8], [case for case in whole if case.channels_last]):
        assert [case.name for case in told] == ["2K", "4K", "8K"]
    assert sum(case.plain for case in whole) == 3 * 2
    assert made[0].suffix == "float32" and made[0].facts["output_pixels"] == 1920 * 1080


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
