"""The examples run as they stand, and show what they say."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from pretrained import spandrel

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_tuning")]
EXAMPLES = Path(__file__).parents[1] / "examples"
TESTED = {"denoise", "spandrel_branch", "basicsr_pipeline"}


@pytest.fixture
def run(capsys, monkeypatch):
    def call(name: str) -> str:
        monkeypatch.setattr(sys, "argv", [name])
        with torch.random.fork_rng():
            call.names = runpy.run_path(str(EXAMPLES / f"{name}.py"))
        return capsys.readouterr().out

    return call


def numbers(text: str, unit: str) -> list[float]:
    return [float(number) for number in re.findall(rf"([\d.]+) {unit}", text)]


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == TESTED


def test_denoise(run):
    noisy, network, routed = numbers(run("denoise"), "dB")
    assert network > noisy + 5
    assert routed > noisy + 5


def test_basicsr_pipeline(run):
    bicubic, largest, routed = numbers(run("basicsr_pipeline"), "dB")
    assert largest > routed > bicubic
    # A router follows the module around it.
    network = torch.nn.Sequential(run.names["routed"])
    assert network.to("meta")[0].device == torch.device("meta")


def test_spandrel_branch(run):
    spandrel()
    text = run("spandrel_branch")
    assert "(3, 192, 256) to (3, 768, 1024)" in text
    free, quarter = (numbers(line, "% of the dense FLOPs")[0] for line in text.splitlines()[1:3])
    assert 0 < quarter <= 26 and 0 < free < 100
