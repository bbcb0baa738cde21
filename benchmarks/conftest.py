"""Options of the benchmark suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--smoke", action="store_true", help="small sizes and few rounds: does everything run and agree?")
    parser.addoption("--save", action="store_true", help="write what was measured to benchmarks/results/<device>/")


@pytest.fixture
def smoke(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--smoke")


@pytest.fixture
def saving(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--save")


@pytest.fixture
def data_folder() -> Path:
    folder = os.environ.get("FASTROUTE_DATA")
    if not folder:
        pytest.skip("FASTROUTE_DATA is not set")
    return Path(folder)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode():
        yield
