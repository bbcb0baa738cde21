"""Options of the benchmark suite."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from benchmarks import measure
from benchmarks.setting import Setting

BEGUN = time.perf_counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--smoke", action="store_true", help="small sizes and few rounds: does everything run and agree?")
    parser.addoption("--full", action="store_true", help="all sizes, batches and photographs, no limit on compilations")
    parser.addoption("--save", action="store_true", help="write what was measured to benchmarks/results/<device>/")
    parser.addoption("--results", metavar="FOLDER", help="with --save: write to FOLDER/<device>/ instead")
    parser.addoption("--minutes", type=float, metavar="N", help="begin no further benchmark after N minutes")
    parser.addoption("--device", metavar="NAME", help="cpu or cuda; default the GPU if there is one")


def pytest_configure(config: pytest.Config) -> None:
    place, folder = config.getoption("--device"), config.getoption("--results")
    if place is not None:
        try:
            measure.use_device(place)
            torch.zeros(1, device=measure.device())
        except (RuntimeError, AssertionError) as error:
            raise pytest.UsageError(f"--device {place}: {error}") from error
    if config.getoption("--smoke") and config.getoption("--save") and not folder:
        raise pytest.UsageError("the times of a smoke run are not kept beside real ones: --save needs --results FOLDER here")
    if folder and not config.getoption("--save"):
        raise pytest.UsageError("--results says where --save writes: give both")
    measure.commit()


@pytest.fixture
def setting(request: pytest.FixtureRequest) -> Setting:
    option = request.config.getoption
    minutes = option("--minutes")
    if minutes is not None and time.perf_counter() - BEGUN > 60 * minutes:
        pytest.skip(f"the {minutes:g} minutes of --minutes are over")
    results = Path(option("--results") or measure.RESULTS) if option("--save") else None
    return Setting(option("--smoke"), option("--full"), results)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode():
        yield
