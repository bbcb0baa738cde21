"""The faster of two kernels of an operator on a GPU that is not there: its times are pretended."""

from __future__ import annotations

import json

import pytest
import torch
from test_backends import no_request  # noqa: F401
from test_gpu_backends import forgotten_choices  # noqa: F401 - applies to all

import fastroute
from fastroute import backends
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR
from fastroute.runtime import kernels
from fastroute.runtime.kernels import ROUNDS, choose_kernels
from fastroute.warming import Warmed, warmup

GPU = torch.device("cuda", 0)
# Milliseconds of an image by operator and backend; the rest of it takes 10.
TIMES = {
    "pixel_mlp": {"cuda": 4.0, "triton": 2.0},
    "stitch_patches": {"cuda": 1.0, "triton": 5.0},
    "assign_classes": {"cuda": 1.0},
}


class Image:
    """An image that calls these operators; what it takes is told by the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, operators: tuple[str, ...] = tuple(TIMES)) -> None:
        self.operators, self.now, self.runs = operators, 0.0, 0
        monkeypatch.setattr(kernels.time, "perf_counter", lambda: self.now)

    def __call__(self) -> None:
        self.runs += 1
        self.now += 0.010 + sum(TIMES[op][backends.select(op, GPU)] for op in self.operators) / 1e3
        # The first runs of a kernel compile it.
        self.now += 1.0 if self.runs < 3 else 0.0


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTROUTE_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTROUTE_TUNE", raising=False)
    monkeypatch.delenv("FASTROUTE_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    reasons = lambda op, backend, device: [] if backend in TIMES.get(op, ()) else ["no kernel"]  # noqa: E731
    monkeypatch.setattr(backends, "unsupported_reasons", reasons)


def test_the_faster_kernel_is_used_from_then_on(monkeypatch, tmp_path):
    assert [backends.select(op, GPU) for op in TIMES] == ["cuda", "cuda", "cuda"]
    image = Image(monkeypatch)
    assert choose_kernels(torch.device("cuda"), image, ["router"]) == {"pixel_mlp": "triton", "stitch_patches": "cuda"}
    assert [backends.select(op, GPU) for op in TIMES] == ["triton", "cuda", "cuda"]
    assert image.runs == 1 + 2 * 2 * (ROUNDS + 1)
    with fastroute.use_backend("cuda"):
        assert backends.select("pixel_mlp", GPU) == "cuda", "a request stands above it"
    # Another GPU is none of its business.
    assert backends.select("pixel_mlp", torch.device("cuda", 1)) == "cuda"
    # Another process takes it over.
    backends._preferred.clear()
    image.runs = 0
    assert choose_kernels(GPU, image, ["router"])["pixel_mlp"] == "triton" and image.runs == 1
    assert backends.select("pixel_mlp", GPU) == "triton"
    backends._preferred.clear()
    choose_kernels(GPU, image, ["another router"])
    assert image.runs > 10
    # An entry that says something else is measured again.
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps({key: {"kernels": {"pixel_mlp": "cpu"}} for key in json.loads(path.read_text())}))
    image.runs = 0
    assert choose_kernels(GPU, image, ["router"])["pixel_mlp"] == "triton" and image.runs > 10


def test_noise_decides_nothing(monkeypatch):
    monkeypatch.setitem(TIMES, "pixel_mlp", {"cuda": 4.0, "triton": 3.9})
    assert choose_kernels(GPU, Image(monkeypatch), [])["pixel_mlp"] == "cuda"


def test_what_was_preferred_is_forgotten():
    backends.prefer("pixel_mlp", 0, "triton")
    backends.prefer("pixel_mlp", 0, None)
    backends.prefer("pixel_mlp", 0, None)
    assert backends.select("pixel_mlp", GPU) == "cuda"


def test_nothing_is_measured_where_there_is_no_choice(monkeypatch):
    image = Image(monkeypatch)
    assert choose_kernels(torch.device("cpu"), image, []) == {} and image.runs == 0
    with fastroute.use_backend("cuda"):
        assert choose_kernels(GPU, image, []) == {}
    monkeypatch.setenv("FASTROUTE_TUNE", "0")
    assert choose_kernels(GPU, image, []) == {} and image.runs == 0
    monkeypatch.delenv("FASTROUTE_TUNE")
    alone = Image(monkeypatch, ("assign_classes",))
    assert choose_kernels(GPU, alone, []) == {} and alone.runs == 1
    assert backends._called is None, "nothing is recorded any more"


def test_a_failure_ends_the_recording(monkeypatch):
    def fails() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        choose_kernels(GPU, fails, [])
    assert backends._called is None


def test_warmup_asks_for_it(monkeypatch):
    asked = []

    def chosen(device, run, about):
        run()
        asked.append((device, json.dumps(about)))
        return {"pixel_mlp": "triton"}

    monkeypatch.undo()
    monkeypatch.setattr("fastroute.warming.choose_kernels", chosen)
    torch.manual_seed(0)
    router = fastroute.PixelRouter(PCSR.build(FSRCNN(4, upsample=False), [[4], [4, 4]], [3]), scale=2)
    warmed = warmup(router, (12, 16), penalty=0.1)
    assert warmed.kernels == {"pixel_mlp": "triton"} and warmed.images == 1 + 1 + 2
    assert asked[0][0] == router.device and "[12, 16]" in asked[0][1] and "penalty" in asked[0][1]
    assert str(Warmed(3, 1.5, (), {"pixel_mlp": "triton"})) == "3 images in 1.5 s; pixel_mlp by triton"
