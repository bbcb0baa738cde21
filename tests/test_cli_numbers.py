"""Numbers at their edges in every option of every command: one line that names the option and status 2, or done."""

from __future__ import annotations

import os

import pytest
import torch
from click.testing import CliRunner
from networks import picture

from fastroute import io
from fastroute.cli import main

HUGE = "1" + "0" * 400
# Of the first, each option takes some; the soak takes all.
VALUES = ["nan", "inf", "-1", "0", HUGE]
MORE = [
    *VALUES,
    "-inf",
    "2147483647",
    "2147483648",
    "4294967297",
    str(2**63 - 1),
    str(2**63),
    "1e308",
    "5e-324",
    "True",
    "x",
    "",
]

UPSCALE = ["upscale", "in.png", "out.png", "--quiet", "--no-tune"]
PCSR = ["--model", "pcsr-fsrcnn-x4"]
COMPARE = ["compare", "in.png", "--models", "pcsr-fsrcnn-x4", "--quiet", "--no-tune", "--out", "page.html"]
STEPS = ["--branch-steps", "1,1,1", "--classifier-steps", "1", "--joint-steps", "1", "--routing-steps", "1"]
TRAIN = ["train", "classsr-fsrcnn", "--images", "in.png", "--out", "run", *STEPS]
BUDGETS = ("--budget", "--budget-flops", "--budget-ms")
PATCHES = ("--scale", "--patch", "--stride", "--merge", "--batch", "--penalty", "--white", "--max-pixels", "--memory-limit")

# What stands before the value.
CALLS = [
    *([*UPSCALE, option] for option in (*BUDGETS, *PATCHES, "--quality")),
    *([*UPSCALE, *PCSR, option] for option in (*BUDGETS, "--scale", "--penalty", "--memory-limit")),
    [*UPSCALE, *PCSR, "--size", "9"],
    *(["upscale", "in.png", "folder/", "--quiet", "--shared-budget", option] for option in BUDGETS),
    *(["evaluate", "classsr-fsrcnn-x4", "--images", "in.png", "--quiet", option]
      for option in ("--budget", "--scale", "--penalty", "--patch", "--stride")),
    *(["evaluate", "pcsr-fsrcnn-x4", "--images", "in.png", "--quiet", option]
      for option in ("--budget", "--scale", "--penalty")),
    *([*COMPARE, option] for option in ("--budget", "--scale")),
    [*COMPARE, "--detail", "0", "0", "9"],
    *([*TRAIN, option] for option in ("--scale", "--branch-steps", "--classifier-steps", "--batch", "--seed")),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTROUTE_CACHE", str(tmp_path / "cache"))
    io.write_image("in.png", (picture(1, 3, 48, 56)[0] * 255).to(torch.uint8))


def told(before):
    return next(word for word in reversed(before) if word.startswith("--"))


@pytest.mark.parametrize("values", [pytest.param(None, id="some"), pytest.param(MORE, id="all", marks=pytest.mark.soak)])
@pytest.mark.parametrize("before", CALLS, ids=" ".join)
def test_a_number_at_its_edge(folder, before, values):
    # Of five values each option takes one by its turn.
    for value in values or [VALUES[CALLS.index(before) % 5]]:
        endless = told(before).endswith("-steps") and values is not None and value.isdigit() and value != "0"
        if endless:  # steps that may be asked for, and take for ever
            continue
        result = CliRunner().invoke(main, [*before, value])
        lines = [line for line in result.output.splitlines() if line.startswith("Error: ")]
        assert result.exception is None or isinstance(result.exception, SystemExit), (value, result.exception)
        if result.exit_code == 2:
            assert len(lines) == 1 and told(before) in lines[0], result.output
            assert result.output.rstrip().endswith(lines[0].rstrip()), result.output
        elif result.exit_code == 1:
            # What depends on the image and not on the number alone.
            assert "out of memory" in result.output or "in.png" in result.output or "out.png" in result.output, result.output
        else:
            assert result.exit_code == 0, (value, result.output)
    assert not [name for name in os.listdir() if ".part" in name]
