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
from fastroute.backends import BACKENDS, PRODUCTS, VARIABLE, Extension, select, unsupported_reasons
from fastroute.diagnostics import operators

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


def test_environment_variable_in_a_fresh_process():
    code = """
        import torch, fastroute
        from fastroute.backends import select
        print(select("extract_patches", torch.device("cpu")))
    """
    assert VARIABLE == "FASTROUTE_BACKEND"
    assert run(code, FASTROUTE_BACKEND="reference") == "reference"


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


GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def forgotten_choices():
    """What was found in a process is kept; here it changes from test to test."""
    backends._fastest.cache_clear()
    yield
    backends._fastest.cache_clear()


@pytest.fixture
def capability(monkeypatch):
    """A GPU, as far as the predicate asks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize(("version", "word"), [(None, "not installed"), ("3.5.1", "3.5.1 is older than 3.6"), ("2.0", "older")])
def test_reasons_against_triton(monkeypatch, version, word):
    monkeypatch.setattr(backends, "installed_version", lambda package: version)
    (reason,) = unsupported_reasons(OP, "triton", GPU)
    assert word in reason
    with fastroute.use_backend("triton"), pytest.raises(backends.BackendError, match=word):
        select(OP, GPU)


def test_info_tells_whole_reasons(monkeypatch):
    monkeypatch.setattr(backends, "installed_version", lambda package: None)
    told = str(fastroute.info())
    assert "\n  triton cannot run here: " + unsupported_reasons(OP, "triton", torch.device("cpu"))[0] + "\n" in told + "\n"
    # What names an operator is told once for all of them.
    module = sys.modules["fastroute.diagnostics"]
    monkeypatch.setattr(module, "unsupported_reasons", lambda op, backend, device: [f"there is no kernel of {op}"])
    monkeypatch.setattr(module, "select", lambda op, device: "reference")
    assert "\n  cpu cannot run here: there is no kernel\n" in str(fastroute.info())


def test_triton_needs_a_recent_gpu(monkeypatch):
    monkeypatch.setattr(backends, "installed_version", lambda package: "3.6.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert unsupported_reasons(OP, "triton", GPU) == ["the device is of compute capability 7.5, 8.0 is needed"]


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(backends, "installed_version", lambda package: "3.6.0")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with fastroute.use_backend("triton"), pytest.raises(RuntimeError, match=r"the tensors are on cpu .*TRITON_INTERPRET=1"):
        extract()


@pytest.mark.usefixtures("capability")
def test_a_gpu_without_cuda_kernels_runs_triton(monkeypatch):
    pytest.importorskip("triton.language", reason="triton is not installed")
    monkeypatch.setattr(backends.EXTENSION, "info", {"cuda": False, "cuda_left_out": "nvcc was not found"})
    monkeypatch.setattr(backends.EXTENSION, "reasons", [])
    assert "without CUDA kernels, because nvcc was not found" in unsupported_reasons(OP, "cuda", GPU)[0]
    for op in set(operators()) - PRODUCTS:
        assert unsupported_reasons(op, "triton", GPU) == []
        assert select(op, GPU) == "triton"
        with fastroute.use_backend("reference"):
            assert select(op, GPU) == "reference"
    assert "no triton kernel of unheard_of" in unsupported_reasons("unheard_of", "triton", GPU)[0]


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("op", sorted(PRODUCTS))
def test_matrix_products_are_those_of_torch_on_a_gpu(op):
    assert op in operators()
    assert select(op, GPU) == "reference"
    for backend in ("triton", "cuda"):
        assert "matrix products of torch" in unsupported_reasons(op, backend, GPU)[0]
        with fastroute.use_backend(backend):
            assert select(op, GPU) == "reference"
            with pytest.raises(fastroute.BackendError, match="the tensors are on cpu"):
                select(op, torch.device("cpu"))
    with fastroute.use_backend("cpu"), pytest.raises(fastroute.BackendError, match="the tensors are on cuda"):
        select(op, GPU)


@pytest.mark.usefixtures("capability")
def test_reasons_against_cuda(monkeypatch):
    monkeypatch.setattr(backends.EXTENSION, "reasons", ["it is not there"])
    assert unsupported_reasons(OP, "cuda", GPU) == ["it is not there"]
    monkeypatch.setattr(backends.EXTENSION, "reasons", [])
    monkeypatch.setattr(backends.EXTENSION, "info", {"cuda": True, "cuda_archs": ["80", "100"]})
    has_kernel = {f"fastroute::{OP}": True}
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: has_kernel.get(op, False))
    assert unsupported_reasons("stitch_patches", "cuda", GPU) == ["this version has no cuda kernel of stitch_patches"]
    # 9.0 has neither machine code of its own generation nor PTX of an older one.
    (reason,) = unsupported_reasons(OP, "cuda", GPU)
    assert reason == "the device is of compute capability 9.0, the extension was built for 8.0, 10.0"
    for archs in (["80", "90", "100"], ["90"], ["80"]):
        monkeypatch.setattr(backends.EXTENSION, "info", {"cuda": True, "cuda_archs": archs})
        assert unsupported_reasons(OP, "cuda", GPU) == []
        assert select(OP, GPU) == "cuda"


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("archs", [["80", "90"], ["80"]], ids=["machine code", "PTX"])
@pytest.mark.parametrize(
    ("nvcc", "driver", "runs"),
    [
        ("12.8", 12080, (True, True)),
        ("12.4", 13000, (True, True)),
        # A driver of the same generation runs machine code, but does not know newer PTX.
        ("12.9", 12020, (True, False)),
        ("13.0", 12080, (False, False)),
        ("13.0", 0, (True, True)),  # unknown
    ],
)
def test_a_driver_that_is_older_than_nvcc(monkeypatch, archs, nvcc, driver, runs):
    monkeypatch.setattr(backends.EXTENSION, "reasons", [])
    monkeypatch.setattr(backends.EXTENSION, "info", {"cuda": True, "cuda_archs": archs, "nvcc": nvcc})
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: True)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    reasons = unsupported_reasons(OP, "cuda", GPU)
    if runs[archs == ["80"]]:
        assert reasons == [] and select(OP, GPU) == "cuda"
        return
    major, minor = driver // 1000, driver % 1000 // 10
    known = f"the driver knows CUDA {major}.{minor}, the extension was built by nvcc {nvcc}"
    assert reasons == [f"{known} (update the driver, or build with an older nvcc)"]
    assert select(OP, GPU) != "cuda"
    with fastroute.use_backend("cuda"), pytest.raises(fastroute.BackendError, match="update the driver"):
        select(OP, GPU)


@pytest.mark.usefixtures("capability")
def test_a_torch_for_amd_gpus(monkeypatch):
    """It calls its devices "cuda", and comes with a distribution called "triton"."""
    monkeypatch.setattr(torch.version, "hip", "6.4.43484")
    monkeypatch.setattr(backends, "installed_version", lambda package: "3.6.0")
    monkeypatch.setattr(backends.EXTENSION, "reasons", [])
    monkeypatch.setattr(backends.EXTENSION, "info", {"cuda": True, "cuda_archs": ["90"], "nvcc": "12.8"})
    expected = "this torch is built for AMD GPUs (ROCm 6.4.43484); the kernels are those of NVIDIA GPUs"
    for op in set(operators()) - PRODUCTS:
        assert select(op, GPU) == "reference"
        for backend in ("triton", "cuda"):
            assert unsupported_reasons(op, backend, GPU) == [expected]
    with fastroute.use_backend("triton"), pytest.raises(fastroute.BackendError, match="built for AMD GPUs"):
        select(OP, GPU)
    assert select(OP, CPU) == ("reference" if unsupported_reasons(OP, "cpu", CPU) else "cpu")


def test_a_gpu_of_another_maker():
    device = torch.device("xpu", 0)
    assert select(OP, device) == "reference"
    for backend in ("triton", "cuda"):
        assert unsupported_reasons(OP, backend, device) == ["the tensors are on xpu:0; the kernels are those of NVIDIA GPUs"]
    assert unsupported_reasons(OP, "cpu", device) == ["the tensors are on xpu:0"]


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("name", backends.TRITON)
def test_the_names_of_triton(monkeypatch, name):
    pytest.importorskip("triton.language", reason="triton is not installed")
    monkeypatch.setattr(backends, "installed_version", {name: "3.6.1"}.get)
    assert unsupported_reasons(OP, "triton", GPU) == []


@pytest.mark.usefixtures("capability")
def test_a_triton_for_other_gpus_alone(monkeypatch):
    monkeypatch.setattr(backends, "installed_version", {"pytorch-triton-xpu": "3.6.0"}.get)
    (reason,) = unsupported_reasons(OP, "triton", GPU)
    assert "triton is not installed" in reason and reason.endswith("; pytorch-triton-xpu is for Intel GPUs")


@pytest.mark.parametrize(
    ("capability", "keeps"),
    [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 3), True), ((12, 0), False), ((12, 1), False)],
)
def test_only_some_products_read_weights_in_shared_memory(monkeypatch, capability, keeps):
    kernel = pytest.importorskip("fastroute.triton.pixel_mlp", reason="triton is not installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert kernel.keeps_weights(GPU) is keeps


def test_a_gpu_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(backends, "unsupported_reasons", lambda op, backend, device: asked.append((backend, device)) or ["no"])
    for device in (GPU, GPU, torch.device("cuda", 1)):
        assert select(OP, device) == "reference"
    assert asked == [(backend, device) for device in (GPU, torch.device("cuda", 1)) for backend in ("cuda", "triton")]


def test_every_backend_answers_for_every_op():
    for op in (OP, "stitch_patches", "group_by_class"):
        for name in BACKENDS:
            reasons = unsupported_reasons(op, name, CPU)
            assert all(isinstance(reason, str) and reason for reason in reasons)
            if reasons:
                with fastroute.use_backend(name), pytest.raises(RuntimeError) as error:
                    select(op, CPU)
                assert all(reason in str(error.value) for reason in (op, name, *reasons))
