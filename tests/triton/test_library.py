"""The Triton operators within PyTorch: when they are loaded, what torch.compile sees of them."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from resources import OPS, describe, variants
from torch._dynamo.backends.common import aot_autograd

import fastroute
from fastroute import TileGrid, backends

pytest.importorskip("triton.language", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are hidden from the compiler", allow_module_level=True)


@pytest.mark.slow
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


def stitch_regions(patches):
    places = torch.zeros(6, dtype=torch.int64)
    return fastroute.stitch_patches([patches, patches[:, :, :8]], TileGrid(11, 14, 8, 3), "hann", places, region=places)


def cut_regions(image):
    return fastroute.extract_patches(image, TileGrid(image.shape[2], image.shape[3], 8, 5), size=(13, 18))


def merge(ids):
    return fastroute.merge_regions(ids.flatten().long(), TileGrid(11, 14, 8, 3), torch.ones(3))


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
        (stitch_regions, (2, 3, 11, 14), 4),
        (cut_regions, (2, 3, 20, 30), 1),
        (merge, (2, 6), 1),
        (gather, (9, 4), 1),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
@pytest.mark.slow
def test_compiler_sees_the_kernels(monkeypatch, function, shape, kernels):
    names = traced(monkeypatch, function, torch.zeros(shape, dtype=torch.int64 if function is group else torch.float32))
    assert len([name for name in names if "triton_kernel_wrapper" in name]) == kernels, names
    assert not any("fastroute" in name for name in names), names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "op", "argument"),
    [(assign, "assign_classes", torch.rand(9, 2)), (group, "group_by_class", torch.zeros(40, dtype=torch.int64))],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_be_looked_into_stays_one_node(monkeypatch, function, op, argument):
    names = traced(monkeypatch, function, argument)
    # Within a budget, assign_classes is an overload of its own.
    overload = "budget" if op == "assign_classes" else "default"
    assert [name for name in names if "triton" in name] == [f"fastroute_triton.{op}.{overload}"]


# What a kernel writes, where it is not `out`.
WRITTEN = {
    "adaptive_threshold_range_kernel": ["ranges"],
    "adaptive_threshold_sum_kernel": ["state", "sums"],
    "merge_regions_kernel": ["acts", "executed", "group", "highest", "least", "lowest", "region"],
    "stitch_patches_regions_kernel": ["table"],
    "stitch_patches_weights_kernel": ["weights"],
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.slow
def test_compiler_knows_what_is_written(monkeypatch, op):
    """torch copies an input that it takes for written, captures no CUDA graph with it, and refuses an expanded one."""
    import triton
    from torch._higher_order_ops import triton_kernel_wrap
    from triton.backends.compiler import GPUTarget

    from fastroute.triton import _library
    from fastroute.triton._common import NAMES

    if not hasattr(triton_kernel_wrap, "identify_accessed_tensors"):
        pytest.skip("this torch analyses kernels in another way")
    _library.load()
    if hasattr(_library.MODULES[op], "OPAQUE"):
        return
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))
    dtypes = {f"*{name}": dtype for dtype, name in NAMES.items()}
    for variant in variants(op):
        arguments = dict(variant.constants)
        for name, kind in variant.types.items():
            if name in variant.kernel.arg_names and name not in arguments:
                arguments[name] = torch.empty(2, dtype=dtypes[kind]) if kind in dtypes else 2
        found = triton_kernel_wrap.identify_accessed_tensors(variant.kernel, arguments, {})
        written = sorted(dep.name for dep in found.read_writes.writes)
        assert written == WRITTEN.get(variant.kernel.__name__, ["out"]), describe(variant)


class OnDevice(torch.Tensor):
    """A tensor that says to lie on the second GPU."""

    is_cuda = True
    device = torch.device("cuda", 1)


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize(
    "args",
    [
        (torch.ones(2), torch.ones(1).as_subclass(OnDevice), 3),
        (torch.ones(2), None, [torch.ones(2), torch.ones(1).as_subclass(OnDevice)]),
    ],
    ids=["tensor", "list"],
)
def test_kernels_run_on_the_device_of_their_tensors(monkeypatch, args, current):
    """Triton launches on the current device, which may be another one."""
    from fastroute.triton import _library

    entered = []

    @contextlib.contextmanager
    def device(index):
        entered.append(index)
        yield
        entered.append("left")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", device)

    def launcher(*args, out=None):
        entered.append("launched")
        return out

    assert _library._on_its_device(launcher)(*args, out=5) == 5
    assert entered == (["launched"] if current == 1 else [1, "launched", "left"])
    entered.clear()
    assert _library._on_its_device(launcher)(torch.ones(2), out=args[-1]) is args[-1]
    assert entered == (["launched"] if current == 1 or args[-1] == 3 else [1, "launched", "left"])


def test_every_kernel_is_registered_with_the_guard(monkeypatch):
    from fastroute.triton import _library

    _library.load()
    registered = []
    monkeypatch.setattr(_library.LIBRARY, "define", lambda schema: None)
    monkeypatch.setattr(_library.LIBRARY, "impl", lambda name, function, key: registered.append((function, key)))
    monkeypatch.setattr(_library.LIBRARY, "_register_torch_dispatch_rule", lambda *args: None)
    monkeypatch.setattr(_library, "register_rules", lambda *args: None)
    for op, module in _library.MODULES.items():
        for schema in importlib.import_module(f"fastroute.ops.{op}").SCHEMAS:
            _library._register(schema, module)
    kernels = [function for function, key in registered if key == "CUDA"]
    assert len(kernels) >= len(OPS)
    assert all(function.__code__ is _library._on_its_device(print).__code__ for function in kernels)


@pytest.mark.parametrize("rows", range(1, 9))
def test_tables_of_any_length_are_aligned(monkeypatch, rows):
    """Else the kernels of `pixel_mlp`, the most expensive to compile, are compiled again for bands of other heights."""
    from fastroute.triton import _pixel_prepare

    monkeypatch.setattr(_pixel_prepare, "launch", lambda *args, **kwargs: None)
    shape, device = (1, 3, 8, 6), torch.device("cpu")
    tables = _pixel_prepare.axis_tables(shape, (4, 3), (0, rows), (0, 4), None, None, device)
    entries = rows + 6
    places = [tables.feature, tables.target, *tables.source, tables.relative, tables.blend]
    assert [place.shape for place in places] == [(entries,)] * 6
    assert tables.source.is_contiguous()
    # A torch tensor on a CPU begins at a multiple of 64 bytes.
    assert all(table.data_ptr() % 16 == 0 for table in (*places[:2], tables.source, *places[4:]))
    ranges = sorted((place.data_ptr(), place.data_ptr() + place.nbytes) for place in places)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(ranges))


def test_files_are_looked_for_once(monkeypatch):
    from fastroute.triton import _library

    _library.load()
    monkeypatch.setattr(_library.Path, "glob", lambda *args: pytest.fail("looked again"))
    _library.load()


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
