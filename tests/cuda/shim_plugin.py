"""A pytest plugin: tests of the C++ CPU kernels run the CUDA kernels instead, emulated on the CPU.

    FASTROUTE_SHIM=<library> python -m pytest -p shim_plugin tests/ops      with tests/cuda on PYTHONPATH

The library registers its kernels for the CPU, in the place of those of csrc/cpu, so gradients, opcheck and compilation
are tested too. Tests of errors that a kernel on a GPU cannot raise, and those of other backends, are left out.
"""

from __future__ import annotations

import ctypes
import os
import warnings

import pytest

# On a GPU a kernel cannot raise: emulated_cases.py tests what it does with such indices and scores. Compilation and repetition
# launch the same kernels again.
LEFT_OUT = ("out_of_range", "nan_score", "infinite_score", "compiles_", "deterministic")
OWN = "emulated_cases.py"

_launches: dict[str, int] = {}
_library: ctypes.CDLL


def pytest_configure(config: pytest.Config) -> None:
    global _library
    import torch

    import fastroute.backends

    assert not fastroute.backends.EXTENSION.reasons, fastroute.backends.EXTENSION.reasons
    path = os.environ["FASTROUTE_SHIM"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*verrid")
        torch.ops.load_library(path)
    _library = ctypes.CDLL(path)
    _library.shim_launches.restype = ctypes.c_int64


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def wanted(item: pytest.Item) -> bool:
        if item.path.name == OWN:
            return True
        return "[cpu-cpu" in item.name and not any(word in item.name for word in LEFT_OUT)

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):  # type: ignore[no-untyped-def]
    before = _library.shim_launches()
    try:
        return (yield)
    finally:
        _launches[item.path.stem] = _launches.get(item.path.stem, 0) + _library.shim_launches() - before


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, number in _launches.items():
        terminalreporter.write_line(f"{name}: {number} kernels launched")
