"""Fixtures of all tests. A new backend or device is added here and nowhere else."""

from __future__ import annotations

import importlib.util
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from interpreter import prepare
from support import EMULATED

import fastroute
from fastroute.backends import BACKENDS, unsupported_reasons
from fastroute.ops import _library
from fastroute.runtime import tuning

# The backend of an operator is fixed for a whole test, whatever the examples.
settings.register_profile(
    "fastroute",
    deadline=None,
    derandomize=True,
    max_examples=12 if os.environ.get("TRITON_INTERPRET") == "1" else 50,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("fastroute")

# The registered operator, whichever kernel the dispatcher finds: without an extension the only way to
# test schema, fake kernel and gradient.
DISPATCHER = "dispatcher"
# Words in the names of tests of errors that depend on values.
VALUE_TESTS = ("out_of_range", "nan_score", "infinite_score")


@dataclass(frozen=True)
class Backend:
    """What runs an operator in a test, and where its tensors lie."""

    name: str
    device: torch.device

    @property
    def is_reference(self) -> bool:
        """Whether plain PyTorch runs instead of a registered operator."""
        return self.name == "reference"

    @property
    def index_errors(self) -> tuple[type[Exception], ...]:
        """What an index out of range raises: kernels say ValueError, indexing in PyTorch says IndexError."""
        return (ValueError, IndexError) if self.name in ("reference", DISPATCHER) else (ValueError,)


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
        prepare()


# Files that take a minute or more, the longest first.
LONGEST = (
    "test_interpreter.py",
    "test_emulated.py",
    "test_races.py",
    "test_pixel_widths.py",
    "test_compiled.py",
    "test_compile.py",
)


# One in so many cases of slow tests; .ci/run sets it, with another turn for each commit.
SHARE = int(os.environ.get("FASTROUTE_TEST_SHARE", "1"))
TURN = os.environ.get("FASTROUTE_TEST_TURN", "0")
# Interpreted kernels are tested by a process of their own, and so are emulated ones.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.hookimpl(trylast=True)  # after what is deselected by name
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if SHARE > 1:
        chosen = sample(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]
    if hasattr(config, "workerinput"):
        # Where several processes share the files, none is to be left with a long one at the end.
        order = {name: number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: order.get(item.path.name, len(order)))


def sample(items: list[pytest.Item]) -> set[pytest.Item]:
    """One in `SHARE` of the slow tests of every file, and all others; of interpreted or emulated kernels half as many."""
    nested = EMULATED or INTERPRETED
    share, slow = SHARE * (2 if nested else 1), [item for item in items if nested or item.get_closest_marker("slow")]
    files: dict[Path, list[pytest.Item]] = {}
    for item in slow:
        files.setdefault(item.path, []).append(item)
    chosen = set(items) - set(slow)
    for tests in files.values():
        tests.sort(key=lambda item: zlib.crc32(f"{TURN} {item.nodeid}".encode()))
        chosen.update(tests[: -(-len(tests) // share)])
    return chosen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        targets = [("reference", "cpu"), ("cpu", "cpu"), (DISPATCHER, "cpu")]
        if os.environ.get("TRITON_INTERPRET") == "1":
            targets += [("triton", "cpu")]
        if torch.cuda.is_available():
            targets += [("reference", "cuda"), ("triton", "cuda"), ("cuda", "cuda"), (DISPATCHER, "cuda")]
        # The dispatcher is tested by the backend of each kernel that is registered for the device.
        ops = operators_of(metafunc.module)
        kernels = {device for _, device in targets if has_kernel(ops, torch.device(device))}
        targets = [(name, device) for name, device in targets if name != DISPATCHER or device not in kernels]
        if not {"operator", "kernel"}.isdisjoint(metafunc.fixturenames):
            targets = [(name, device) for name, device in targets if name != "reference"]
        metafunc.parametrize("backend", targets, ids=["-".join(t) for t in targets], indirect=True)


def operators_of(module: ModuleType) -> tuple[str, ...]:
    """The operators of a test file: its OPS, else the one in its name."""
    names: tuple[str, ...] = getattr(module, "OPS", (module.__name__.removeprefix("test_"),))
    if unknown := set(names) - set(_library.OPERATORS):
        # Backends would be skipped as ones that lack it.
        raise pytest.UsageError(f"{module.__file__}: no operator is called {', '.join(unknown)}; name them in OPS")
    return names


def has_kernel(ops: tuple[str, ...], device: torch.device) -> bool:
    return any(not unsupported_reasons(op, name, device) for op in ops for name in BACKENDS if name != "reference")


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Each backend that can run the operators of the test file."""
    name, device = request.param[0], torch.device(request.param[1])
    ops = operators_of(request.module)
    if name == DISPATCHER:
        monkeypatch.setattr(_library, "select", lambda op, device: DISPATCHER)
        yield Backend(name, device)
        return
    reasons = [f"{op}: {reason}" for op in ops for reason in unsupported_reasons(op, name, device)]
    if reasons:
        pytest.skip("; ".join(dict.fromkeys(reasons)))
    if device.type != "cpu" and any(word in request.node.name for word in VALUE_TESTS):
        pytest.skip("what a kernel finds wrong with a value on a GPU can only be raised by waiting for it")
    if (name == "triton" and device.type == "cpu") or EMULATED:
        # A run of the interpreter for every column of a Jacobian would take minutes; random projections of it do not.
        for check in ("gradcheck", "gradgradcheck"):
            monkeypatch.setattr(torch.autograd, check, partial(getattr(torch.autograd, check), fast_mode=True))
    elif name == "reference" and device.type == "cuda":
        # Its gradients of what is read several times are atomic sums there, whose order changes from run to run.
        for check in ("gradcheck", "gradgradcheck"):
            monkeypatch.setattr(torch.autograd, check, partial(getattr(torch.autograd, check), nondet_tol=1e-12))
    with fastroute.use_backend(name):
        yield Backend(name, device)


@pytest.fixture
def kernel(backend: Backend) -> Backend:
    """Every backend but the reference, for tests that compare with it."""
    return backend


@pytest.fixture
def operator(backend: Backend, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """A backend that is a registered operator: opcheck, compilation and registered gradients."""
    if backend.name == "triton":
        # Tests name operators of the main namespace; those of Triton have one of their own.
        monkeypatch.setattr(request.module, "opcheck", opcheck_of_triton, raising=False)
    return backend


def opcheck_of_triton(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Opcheck of the Triton operator of the name of `op`."""
    name, overload = op._schema.name.split("::")[1], op._schema.overload_name or "default"
    return torch.library.opcheck(getattr(getattr(torch.ops.fastroute_triton, name), overload), *args, **kwargs)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh allocations hold NaN (integers: the largest value), those made in C++ too."""
    was = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(1000).isnan().all(), "allocations are not poisoned: the test would prove nothing"
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        torch.utils.deterministic.fill_uninitialized_memory = was[2]


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of published checkpoints, recorded outputs and photographs."""
    folder = os.environ.get("FASTROUTE_DATA")
    if not folder:
        pytest.skip("FASTROUTE_DATA names no folder with the recorded fixtures")
    return Path(folder)


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tunings measured by these tests, so that each network is measured once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def no_user_cache(monkeypatch: pytest.MonkeyPatch, session_cache: Path) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("FASTROUTE_CACHE", str(session_cache))


@pytest.fixture
def quick_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Branches run as they do where nothing was measured."""
    monkeypatch.setenv(tuning.SWITCH, "0")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
