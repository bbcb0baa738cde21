"""Tests of the choice of a backend, and of what importing the package does."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

import fastroute
from fastroute import backends
from fastroute.backends import VARIABLE, Extension, select, unsupported_reasons

CPU = torch.device("cpu")
OP = "extract_patches"


@pytest.fixture(autouse=True)
def no_request(monkeypatch):
    """No test starts with a request, nor leaves one behind."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(backends, "_thread", backends._Requests())


def extract() -> torch.Tensor:
    return fastroute.extract_patches(torch.ones(1, 1, 2, 2), fastroute.TileGrid(2, 2, 2, 1))


def run(code: str, **environment: str) -> str:
    """Standard output of `code` in a fresh Python that finds the package where this one found it."""
    path = os.pathsep.join([str(Path(fastroute.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_automatic_choice_is_the_fastest_that_can_run():
    expected = "reference" if unsupported_reasons(OP, "cpu", CPU) else "cpu"
    assert select(OP, CPU) == expected
    # No kernel runs on a device that holds no data.
    assert select(OP, torch.device("meta")) == "reference"


def test_the_reference_always_can():
    for device in ("cpu", "cuda", "meta"):
        assert unsupported_reasons(OP, "reference", torch.device(device)) == []
    assert unsupported_reasons(OP, "cpu", torch.device("cuda", 0)) == ["the tensors are on cuda:0"]


def test_use_backend_as_a_call():
    fastroute.use_backend("reference")
    assert select(OP, CPU) == "reference"
    fastroute.use_backend("cuda")
    with pytest.raises(RuntimeError):
        select(OP, CPU)
    fastroute.use_backend(None)
    assert select(OP, CPU) in ("cpu", "reference")


def test_use_backend_in_a_with_block():
    fastroute.use_backend("cuda")
    with fastroute.use_backend("reference"):
        assert select(OP, CPU) == "reference"
        with fastroute.use_backend("triton"), pytest.raises(RuntimeError, match="triton"):
            select(OP, CPU)
        assert select(OP, CPU) == "reference"
        with fastroute.use_backend(None):
            assert not unsupported_reasons(OP, select(OP, CPU), CPU)
        assert select(OP, CPU) == "reference"
    with pytest.raises(RuntimeError, match="cuda"):
        select(OP, CPU)


def test_with_block_restores_after_an_error():
    with pytest.raises(KeyError), fastroute.use_backend("reference"):
        raise KeyError
    assert backends.requested() is None


def test_blocks_need_not_end_in_the_order_in_which_they_began():
    first, second = fastroute.use_backend("reference"), fastroute.use_backend("cuda")
    with contextlib.ExitStack() as inner:
        with first:
            inner.enter_context(second)
            # Asked for last, whichever was entered last.
            assert backends.requested() == "cuda"
        assert backends.requested() == "cuda"
    assert backends.requested() is None
    # A request serves for a second block too.
    with first:
        assert backends.requested() == "reference"
    assert backends.requested() is None


def test_calls_without_a_block_do_not_pile_up():
    for _ in range(100):
        fastroute.use_backend("reference")
        with fastroute.use_backend("cuda"):
            assert backends.requested() == "cuda"
        assert backends.requested() == "reference"
    assert len(backends._thread.requests) <= 2


def test_a_request_holds_for_its_thread():
    """Blocks of two threads that overlap leave nothing behind in either, nor in a third."""
    seen, turns = {}, {name: threading.Event() for name in ("a in", "b in", "a out")}

    def first():
        with fastroute.use_backend("reference"):
            turns["a in"].set()
            turns["b in"].wait(5)
            seen["a"] = backends.requested()
        seen["a after"] = backends.requested()
        turns["a out"].set()

    def second():
        turns["a in"].wait(5)
        with fastroute.use_backend("cuda"):
            turns["b in"].set()
            turns["a out"].wait(5)
            seen["b"] = backends.requested()
        seen["b after"] = backends.requested()

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"a": "reference", "a after": None, "b": "cuda", "b after": None}
    assert backends.requested() is None


def test_impossible_choice_raises_with_reasons():
    with (
        fastroute.use_backend("cuda"),
        pytest.raises(RuntimeError, match=rf"^{OP}: backend 'cuda' .*cannot run: the tensors are on cpu$"),
    ):
        extract()


def test_reasons_are_those_of_the_predicate(monkeypatch):
    monkeypatch.setattr(backends, "unsupported_reasons", lambda op, backend, device: [f"{op} is ill", "so is the device"])
    with fastroute.use_backend("cpu"), pytest.raises(RuntimeError, match=f"{OP} is ill; so is the device"):
        extract()
    assert select(OP, CPU) == "reference"


def test_unknown_name():
    with pytest.raises(ValueError, match=r"backend must be one of .*reference.*cuda.*; got 'opencl'"):
        fastroute.use_backend("opencl")
    assert backends.requested() is None


def test_environment_variable(monkeypatch):
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(RuntimeError, match="'cuda' was asked for"):
        extract()
    # The call decides where both speak.
    with fastroute.use_backend("reference"):
        assert select(OP, CPU) == "reference"
    monkeypatch.setenv(VARIABLE, "opencl")
    with pytest.raises(ValueError, match=r"backend must be one of .*; got 'opencl'"):
        extract()
    monkeypatch.setenv(VARIABLE, "")
    assert select(OP, CPU) in ("cpu", "reference")


@pytest.mark.slow
def test_environment_variable_in_a_fresh_process():
    code = """
        import torch, fastroute
        from fastroute.backends import select
        print(select("extract_patches", torch.device("cpu")))
    """
    assert VARIABLE == "FASTROUTE_BACKEND"
    assert run(code, FASTROUTE_BACKEND="reference") == "reference"


@pytest.mark.slow
def test_import_compiles_nothing_and_touches_no_gpu():
    output = run("""
        import sys
        import torch
        started = []
        launches = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn")
        sys.addaudithook(lambda event, args: started.append(event) if event in launches else None)
        import fastroute
        print(started, torch.cuda.is_initialized(), "torch.utils.cpp_extension" in sys.modules, "triton" in sys.modules)
    """)
    assert output == "[] False False False"


@pytest.mark.slow
def test_works_without_the_extension():
    output = run("""
        import json
        json.loads = lambda text: {"reason": "no C++ compiler was found"}
        import torch, fastroute, fastroute.ops
        from fastroute.backends import select, unsupported_reasons
        cpu = torch.device("cpu")
        print(unsupported_reasons("extract_patches", "cpu", cpu), select("extract_patches", cpu))
        image, grid = torch.rand(1, 2, 5, 6, requires_grad=True), fastroute.TileGrid(5, 6, 3, 2)
        patches = fastroute.extract_patches(image, grid)
        fastroute.stitch_patches(patches, grid).sum().backward()
        print(torch.allclose(image.grad, torch.ones_like(image)))
        # The registered operators exist too, and give the same.
        same = torch.ops.fastroute.extract_patches(image, None, None, None, 3, 2, False, None, False, 3, 3)
        print(torch.equal(same, patches))
        try:
            with fastroute.use_backend("cpu"):
                fastroute.extract_patches(image, grid)
        except RuntimeError as error:
            print(error)
    """)
    reason = f"the C++ extension was not built, because no C++ compiler was found ({backends.REMEDY})"
    assert output.splitlines() == [
        f"['{reason}'] reference",
        "True",
        "True",
        f"extract_patches: backend 'cpu' was asked for but cannot run: {reason}",
    ]


def test_stale_extension_is_not_loaded(monkeypatch):
    monkeypatch.setattr(backends.json, "loads", lambda text: {"schema_digest": "of other sources"})
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("loaded"))
    extension = Extension()
    extension.load("of these sources")
    assert extension.info == {}
    assert len(extension.reasons) == 1
    assert "built from other sources" in extension.reasons[0]
