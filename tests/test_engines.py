"""Engines compute what PyTorch computes, or are refused by name."""

from __future__ import annotations

import copy
import logging
import pickle
import sys
import types

import pytest
import torch
from click.testing import CliRunner
from networks import picture, randomise
from torch import nn

import fastroute
from fastroute import PatchRouter, PixelRouter, engines
from fastroute.cli import _common
from fastroute.cli.evaluate import command as evaluate
from fastroute.engines import Programs, compiled, engine_of, inductor, tensorrt, told, usable_engines
from fastroute.models.arm import Bicubic
from fastroute.models.carn import CARN
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR
from fastroute.models.srresnet import SRResNet
from fastroute.runtime import tuning
from fastroute.runtime.tuning import Setting, SettingSearch

CPU = torch.device("cpu")
BACKBONES = {
    "fsrcnn": lambda: [FSRCNN(6, 4), FSRCNN(12, 4)],
    "carn": lambda: [CARN(8, 4), CARN(12, 4, mean_layers=True)],
    "srresnet": lambda: [SRResNet(8, 4, blocks=1), Bicubic(4)],
}


@pytest.fixture
def no_tuning(monkeypatch):
    monkeypatch.setenv(tuning.SWITCH, "0")


@pytest.fixture
def openvino():
    return pytest.importorskip("openvino", reason="openvino is not installed")


def router_of(name: str) -> PatchRouter:
    return PatchRouter([randomise(b, k) for k, b in enumerate(BACKBONES[name]())], None, patch=32, stride=28, scale=4)


@pytest.mark.slow
@pytest.mark.usefixtures("no_tuning", "openvino")
@pytest.mark.parametrize(
    ("name", "dtype", "error", "threads"),
    [
        ("fsrcnn", torch.float32, 1e-5, 1),
        ("fsrcnn", torch.bfloat16, 0.03, 3),
        ("srresnet", torch.float32, 1e-5, 3),
        ("carn", torch.bfloat16, 0.03, 3),
    ],
)
def test_openvino_agrees(name, dtype, error, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        router, image = router_of(name).to(dtype), picture(1, 3, 101, 130)
        ids = torch.arange(5 * 4).remainder(2).view(4, 5)
        expected = router.upscale(image, class_map=ids).image
        assert router.compile("openvino") is router and router.networks.setting(0, CPU).engine == "openvino"
        result = router.upscale(image, class_map=ids).image
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(result, expected, rtol=0, atol=error * float(expected.abs().max()))
    # Batches of regions of other shapes than the router's own go through the same program.
    for shape in ((1, 3, 60, 32), (3, 3, 116, 60)):
        patches = torch.rand(shape)
        (got, *more), (wanted, *_) = router.networks.run(0, patches), router_of(name).to(dtype).networks.run(0, patches)
        assert torch.cat([got, *more]).shape[1:] == wanted.shape[1:]
    assert router.compile("torch").networks.setting(0, CPU).engine == "torch"
    torch.testing.assert_close(router.upscale(image, class_map=ids).image, expected, rtol=0, atol=error)


@pytest.mark.slow
@pytest.mark.usefixtures("no_tuning", "openvino")
def test_copies_and_changes_of_type_compile_anew():
    router, image = router_of("carn").compile("openvino"), picture(1, 3, 60, 60)
    expected = router.upscale(image, budget=1).image
    assert torch.equal(copy.deepcopy(router).upscale(image, budget=1).image, expected)
    assert pickle.loads(pickle.dumps(Programs({(0, "x"): print}))) == {}
    half = router.bfloat16()
    assert half.networks.setting(1, CPU).engine == "openvino"
    assert 0 < (half.upscale(image, budget=1).image - expected).abs().max() < 0.1


class Lying(types.ModuleType):
    """An engine whose results are made up."""

    FLOAT32_ENDS = PARALLEL = False

    def __init__(self, change, reasons=()):
        super().__init__("lying")
        self.change, self.reasons = change, list(reasons)

    def unsupported_reasons(self, device, dtype):
        return self.reasons

    def compile(self, branch, shapes, precision, threads):
        return lambda batches: [self.change(branch(x)) for x in batches]


def broken(_):
    raise MemoryError("not today\nor tomorrow")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y: y * 1.01, r"differs from PyTorch by .* more than"),
        (lambda y: y * float("nan"), r"differs from PyTorch by nan"),
        (lambda y: y[:, :, 1:], r"gives \(1, 3, 127, 128\) instead of \(1, 3, 128, 128\)"),
        (broken, "not today$"),
    ],
)
def test_an_engine_that_computes_something_else_is_refused_by_name(monkeypatch, change, words, caplog):
    monkeypatch.setitem(engines.ENGINES, "openvino", "lying")
    monkeypatch.setitem(sys.modules, "fastroute.engines.lying", Lying(change))
    router, image = router_of("carn"), picture(1, 3, 40, 40)
    expected = router.upscale(image, budget=1).image
    with pytest.raises(ValueError, match=rf"compile: engine 'openvino' cannot be used for CARN: .*{words}") as caught:
        compiled("openvino", router.branches[0], torch.float32, (1, 3, 32, 32), torch.float32)
    assert "(branch" not in str(caught.value)
    with pytest.raises(ValueError, match=r"\(branch 0\)"):
        router.compile("openvino")
    # The router stays as it was, and "auto" goes on without.
    assert torch.equal(router.upscale(image, budget=1).image, expected)
    monkeypatch.setattr(inductor, "unsupported_reasons", lambda *_: ["no"])
    with caplog.at_level(logging.INFO, "fastroute"):
        router.compile("auto")
    assert "'openvino' cannot be used for CARN" in caplog.text and router.networks._engines(0) == ["torch"]


@pytest.mark.slow
def test_engines_that_cannot_run_here_are_refused(monkeypatch):
    router = router_of("fsrcnn")
    with pytest.raises(ValueError, match=r"engine must be one of torch, torch\.compile, openvino, tensorrt, auto; got 'onnx'"):
        router.compile("onnx")
    with pytest.raises(
        ValueError, match="'tensorrt' cannot be used: tensorrt runs on NVIDIA GPUs only; the networks are on cpu"
    ):
        router.compile("tensorrt")
    with pytest.raises(ValueError, match="openvino computes in float32 and bfloat16"):
        PatchRouter([nn.Conv2d(3, 3, 3, padding=1).double()], scale=1).compile("openvino")
    monkeypatch.setattr(torch, "__path__", ["/home/me/my environment/torch"])
    with pytest.raises(ValueError, match=r"torch lies at a path with spaces, /home/me/my environment/torch"):
        router.compile("torch.compile")
    monkeypatch.undo()
    monkeypatch.setattr(inductor.shutil, "which", lambda _: None)
    with pytest.raises(ValueError, match=r"torch\.compile needs a C\+\+ compiler"):
        router.compile("torch.compile")
    with pytest.raises(ValueError, match="'tensorrt' cannot be used"):
        fastroute.load(engine="tensorrt")
    pixels = PixelRouter(PCSR.build(FSRCNN(12, upsample=False), [None], [16]))
    assert pixels.compile("auto") is pixels and pixels.compile("torch") is pixels
    with pytest.raises(ValueError, match="cannot run a PixelRouter"):
        pixels.compile("openvino")
    result = CliRunner().invoke(evaluate, ["arm-fsrcnn-x4", "--images", ".", "--engine", "tensorrt"])
    assert result.exit_code == 2 and "Invalid value for --engine: engine 'tensorrt' cannot be used" in result.output
    assert "engine" in _common.running_of({"device": "cpu", "precision": "float32", "engine": "auto", "tune": True})


@pytest.mark.slow
def test_torch_compile_agrees(monkeypatch):
    # What its compiler makes is not ours to test: whether the function gets and gives what it should.
    seen = []

    def compile_(module, dynamic):
        assert dynamic
        return lambda x: seen.append((x.is_inference(), torch.is_grad_enabled())) or module(x)

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(inductor, "unsupported_reasons", lambda *_: [])
    router, image = router_of("carn"), picture(1, 3, 60, 60)
    expected = router.upscale(image, budget=1).image
    router.compile("torch.compile")
    torch.testing.assert_close(router.upscale(image, budget=1).image, expected, rtol=0, atol=1e-5)
    assert set(seen) == {(False, False)}


def test_tensorrt_is_asked_for_what_it_documents(monkeypatch):
    asked = {}

    class Input:
        def __init__(self, **sizes):
            asked.update(sizes)

    def compile_(module, ir, inputs, enabled_precisions):
        asked.update(ir=ir, precisions=enabled_precisions, inputs=len(inputs))

        def program(x):
            for n, least, most in zip(x.shape, asked["min_shape"], asked["max_shape"], strict=True):
                assert least <= n <= most
            asked.setdefault("sizes", []).append(x.shape[0])
            return module(x)

        return program

    fake = types.ModuleType("torch_tensorrt")
    fake.Input, fake.compile = Input, compile_
    monkeypatch.setitem(sys.modules, "torch_tensorrt", fake)
    monkeypatch.setattr(tensorrt, "MOST_PATCHES", 5)
    branch = nn.Conv2d(3, 3, 3, padding=1)
    with torch.inference_mode():
        run = compiled("tensorrt", branch, torch.float32, (1, 3, 32, 32), torch.float32)
        patches = torch.rand(12, 3, 60, 32)
        torch.testing.assert_close(run([patches])[0], branch(patches))
    assert asked["sizes"][-3:] == [5, 5, 2] and asked["ir"] == "dynamo" and asked["dtype"] == torch.float32
    assert asked["precisions"] == {torch.float32} and asked["opt_shape"] == (2, 3, 32, 32)
    monkeypatch.setattr(tensorrt, "find_spec", lambda _: None)
    assert "not installed" in tensorrt.unsupported_reasons(torch.device("cuda"), torch.float16)[0]


def test_auto_compares_those_that_are_there():
    race = SettingSearch("key of engines", "CARN", CPU, 2, ["torch", "openvino"])
    first = set(race._first)
    assert Setting(tuning.PARALLEL_PIXELS[0], False, True, "openvino") in first
    assert {s.engine for s in first} == {"torch", "openvino"} and len(first) == 5
    for _ in range(100):
        turn = race.trial((32, 32), 1000)
        if turn is None:
            break
        race.add((32, 32), turn, 1.0 if turn.engine == "openvino" and turn.pixels == 1 << 13 else 2.0)
    assert race.best == Setting(1 << 13, False, True, "openvino")
    assert tuning.search_of(nn.Conv2d(3, 3, 3), torch.rand(1, 3, 8, 8), 1, ["torch", "openvino"]).key.endswith(
        "-torch-openvino"
    )
    assert "torch" in usable_engines(CPU, torch.float32) and engine_of("torch").compile(nn.ReLU(), [], torch.float32, 1)([
        torch.tensor([-1.0])
    ])[0].tolist() == [0.0]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("no such layer\nat line 7"), "no such layer"),
        (KeyError(), "KeyError"),
        (RuntimeError("backend raised:\n\nCompileError: C++\nCommand: g++"), "backend raised: CompileError: C++"),
        (RuntimeError("it raised:\nC++\nOutput:\na.cpp:1: fatal error: x.h: No such file"),
         "it raised: C++ (a.cpp:1: fatal error: x.h: No such file)"),
    ],
)  # fmt: skip
def test_errors_of_engines_are_told_in_one_line(error, words):
    assert told(error) == words
