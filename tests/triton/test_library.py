"""The Triton operators within PyTorch: when they are loaded, what torch.compile sees of them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from resources import OPS
from torch._dynamo.backends.common import aot_autograd

import fastroute
from fastroute import TileGrid, backends

pytest.importorskip("triton.language", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are hidden from the compiler", allow_module_level=True)


def test_import_loads_no_triton():
    code = "import sys, fastroute; fastroute.info(); print(any(name.split('.')[0] == 'triton' for name in sys.modules))"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "False", result.stderr


def test_every_file_is_registered():
    from fastroute.triton import _library

    _library.load()
    assert _library.FAILED == {}
    assert sorted(_library.MODULES) == OPS
    for op in OPS:
        packet = getattr(torch.ops.fastroute_triton, op)
        original = getattr(torch.ops.fastroute, op)
        assert packet.overloads() == original.overloads()
        for overload in packet.overloads():
            schema = str(getattr(packet, overload)._schema)
            assert schema.replace("fastroute_triton::", "fastroute::") == str(getattr(original, overload)._schema)
            name = f"fastroute_triton::{op}" + ("" if overload == "default" else f".{overload}")
            # What has no kernel of its own runs the reference.
            function = f"{op}_triton" if overload == "default" else f"{op}_{overload}_triton"
            key = "CUDA" if hasattr(_library.MODULES[op], function) else "CompositeExplicitAutograd"
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
        assert hasattr(_library.MODULES[op], f"{op}_triton")


class Seen(Exception):
    """What a compiled graph would call."""


def extract(image):
    return fastroute.extract_patches(image, TileGrid(image.shape[2], image.shape[3], 8, 5), dtype=torch.float16)


def stitch(patches):
    return fastroute.stitch_patches(patches, TileGrid(11, 14, 8, 3), "hann")


def stitch_into(patches):
    return fastroute.stitch_patches(patches, TileGrid(11, 14, 8, 3), "hann", out=torch.empty(1, 3, 11, 14))


def group(ids):
    return fastroute.group_by_class(ids, 3)


def gather(x):
    places = torch.arange(x.shape[0])
    return fastroute.gather_groups(x, fastroute.ClassGroups(places, places, places))


def assign(score):
    return fastroute.assign_classes(score, [1.0, 2.0], budget=0.8)


@pytest.mark.parametrize(
    ("function", "shape", "kernels"),
    [
        (extract, (2, 3, 20, 30), 1),
        (stitch, (6, 3, 8, 8), 2),
        (stitch_into, (6, 3, 8, 8), 2),
        (group, (40,), 2),
        (gather, (9, 4), 1),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_compiler_sees_the_kernels(monkeypatch, function, shape, kernels):
    names = traced(monkeypatch, function, torch.zeros(shape, dtype=torch.int64 if function is group else torch.float32))
    assert len([name for name in names if "triton_kernel_wrapper" in name]) == kernels, names
    assert not any("fastroute" in name for name in names), names


def test_what_reads_the_host_stays_one_node(monkeypatch):
    names = traced(monkeypatch, assign, torch.rand(9, 2))
    assert [name for name in names if "triton" in name] == ["fastroute_triton.assign_classes.default"]


def traced(monkeypatch, function, *args) -> list[str]:
    """Targets of the graph that torch.compile makes; nothing is run, which on a CPU could not be."""
    from fastroute.triton import _library

    _library.load()
    monkeypatch.setattr(backends, "unsupported_reasons", lambda op, backend, device: [])

    def seen(graph, inputs):
        raise Seen([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=seen))
    with fastroute.use_backend("triton"), pytest.raises(Exception) as error:
        compiled(*args)
    cause = error.value
    while cause is not None and not isinstance(cause, Seen):
        cause = cause.__cause__ or getattr(cause, "inner_exception", None)
    assert cause is not None, error.value
    return cause.args[0]
