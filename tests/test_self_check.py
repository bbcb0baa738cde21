"""`fastroute info --check`: what it says of a right, a wrong and a broken backend."""

import pytest
import torch
from click.testing import CliRunner

from fastroute.cli import main
from fastroute.engines import TORCH
from fastroute.report import self_check
from fastroute.report.self_check import KNOWN, Verdict, judge, known_picture

CPU = torch.device("cpu")


def test_the_picture_is_the_same_everywhere():
    picture = known_picture()
    assert picture.shape == (3, 40, 56) and picture.dtype == torch.uint8
    assert picture[:, 0, [0, 1, 27, 28, 55]].tolist() == [[0, 2, 54, 138, 202], [20, 22, 74, 169, 233], [40, 42, 94, 200, 8]]


@pytest.mark.slow
@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.what)
def test_a_right_result(known):
    expected = self_check.upscale(known, CPU, TORCH)
    assert judge("cpu", known, expected, CPU, TORCH) == Verdict("ok", "cpu")


@pytest.mark.slow
def test_a_wrong_and_a_broken_result(monkeypatch):
    known = KNOWN[0]
    right = self_check.upscale(known, CPU, TORCH)
    wrong = right.clone()
    wrong[0, :20] ^= 128
    monkeypatch.setattr(self_check, "upscale", lambda *_: wrong)
    verdict = judge("cpu", known, right, CPU, TORCH)
    assert str(verdict) == "WRONG    cpu: 4,480 of 107,520 values differ from the reference, by up to 128 of 255 levels"
    # Both alike, but not what is known.
    assert judge("cpu", known, wrong, CPU, TORCH).status == "WRONG"
    monkeypatch.setattr(self_check, "upscale", lambda *_: right[:, :-1])
    assert judge("cpu", known, right, CPU, TORCH).remark == "the result is (3, 159, 224) instead of (3, 160, 224)"

    def broken(*_):
        raise RuntimeError("no kernel image\nlong explanation")

    monkeypatch.setattr(self_check, "upscale", broken)
    assert judge("cpu", known, right, CPU, TORCH) == Verdict("FAILED", "cpu", "no kernel image")


@pytest.mark.parametrize(
    ("status", "code", "end"), [("ok", 0, "All 2 checks are ok; 1 cannot run"), ("WRONG", 1, "1 of 2 checks")]
)
def test_the_command_ends_with_an_error_if_a_result_is_wrong(monkeypatch, status, code, end):
    verdicts = [Verdict("ok", "cpu, backend cpu"), Verdict(status, "other"), Verdict("skipped", "third", "there is none")]
    monkeypatch.setattr(self_check, "check_installation", lambda: iter(verdicts))
    result = CliRunner().invoke(main, ["info", "--check"])
    assert result.exit_code == code
    assert f"\n  {status:<8} other\n  skipped  third: there is none\n{end}" in result.output
