"""Registration of the Triton kernels: operators of the same schemas in the namespace `fastroute_triton`.

`<op>_triton` is the kernel of schema `<op>`, `_<op>_backward_triton` that of its gradient, `<op>_out_triton` that of the
overload `<op>.out`. What has a schema but no such function runs the reference.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch._subclasses.functional_tensor import FunctionalTensorMode

from fastroute.ops._library import OPERATORS, TRITON_NAMESPACE, as_kernel, register_rules
from fastroute.triton._common import INTERPRETED, traced

LIBRARY = torch.library.Library(TRITON_NAMESPACE, "FRAGMENT")
MODULES: dict[str, ModuleType] = {}
FAILED: dict[str, str] = {}

_loading = threading.Lock()
_loaded = False


def load() -> None:
    """Register every operator that has a file in this package; one that cannot be imported is left out."""
    global _loaded
    if _loaded:
        return
    with _loading:
        if not _loaded:
            _load()
            _loaded = True


def _load() -> None:
    # Beside the modules of the operators, this one registers an overload.
    importlib.import_module("fastroute.ops._upsampled")
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        op = path.stem
        if op in MODULES or op in FAILED:
            continue
        try:
            module = importlib.import_module(f"fastroute.triton.{op}")
        except (ImportError, SyntaxError) as error:
            FAILED[op] = f"the triton kernel of {op} failed to load: {error}"
            continue
        for schema in importlib.import_module(f"fastroute.ops.{op}").SCHEMAS:
            _register(schema, module)
        MODULES[op] = module


def reasons(op: str, device: torch.device) -> list[str]:
    """What the kernel of `op` says against running on `device`."""
    load()
    if op not in MODULES:
        return [FAILED.get(op, f"this version has no triton kernel of {op}")]
    return MODULES[op].unsupported_reasons(device)


def _register(schema: str, module: ModuleType) -> None:
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    function = getattr(module, f"{name.replace('.', '_')}_triton", None)
    if function is None:
        LIBRARY.impl(name, as_kernel(name, OPERATORS[name].reference), "CompositeExplicitAutograd")
    else:
        for key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
            LIBRARY.impl(name, _on_its_device(function), key)
    register_rules(LIBRARY, TRITON_NAMESPACE, name)
    # Launchers that read values on the host, and interpreted kernels, stay one node of a graph.
    if function is not None and not INTERPRETED and name not in getattr(module, "OPAQUE", ()):
        LIBRARY._register_torch_dispatch_rule(name, FunctionalTensorMode, _looked_into(function))


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """A launcher that makes the device of its tensors the current one: Triton launches on that, wherever pointers lead.

    torch does so for its own kernels and in compiled graphs, but not for kernels registered from Python.
    """

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        index = _cuda_index((*args, *kwargs.values()))
        if index is None or index == torch.cuda.current_device():
            return function(*args, **kwargs)
        with torch.cuda.device(index):
            return function(*args, **kwargs)

    return guarded


def _cuda_index(args: Iterable[Any]) -> int | None:
    """Number of the device of the first CUDA tensor among arguments, some of which are lists; others may be on the CPU."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            if arg.is_cuda:
                return arg.device.index
        elif isinstance(arg, (list, tuple)):
            index = _cuda_index(arg)
            if index is not None:
                return index
    return None


def _looked_into(function: Callable[..., Any]) -> Callable[..., Any]:
    """The rule by which torch.compile replaces an operator by what its launcher does, down to the kernels."""

    def rule(mode: Any, op: Any, types: Any, args: tuple, kwargs: dict) -> Any:
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        if custom_triton_ops_decomposition_disabled():
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return traced(function, *args, **kwargs)

    return rule
