"""Tests of the choice of a backend on a GPU that is not there: versions, drivers and devices are pretended."""

from __future__ import annotations

import sys

import pytest
import torch
from test_backends import CPU, OP, extract, no_request  # noqa: F401

import fastroute
from fastroute import backends
from fastroute.backends import BACKENDS, PRODUCTS, select, unsupported_reasons
from fastroute.diagnostics import operators

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def forgotten_choices():
    """What was found in a process is kept; here it changes from test to test."""
    backends.kernels_on_gpu.cache_clear()
    yield
    backends.kernels_on_gpu.cache_clear()
    backends._preferred.clear()


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
