"""A GPU that is not there, and what would make the host wait for it.

Its tensors are meta tensors, which have no values: whatever needs one on the host raises by itself (`item`, `nonzero`, a mask
as an index, `if tensor`). A copy between host and device does not, but waits just as much, and no graph can hold it: it is
refused here.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastroute.backends import PRODUCTS

GPU = torch.device("meta")
ATEN = torch.ops.aten
# What reads values, or makes sizes of them, should it have a rule for meta tensors.
READING = {ATEN._local_scalar_dense, ATEN.bincount, ATEN.equal, ATEN.is_nonzero, ATEN.masked_select, ATEN.nonzero}
# What makes a tensor on a device of values of the host.
FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}


class WaitError(Exception):
    """The host would wait for the GPU."""


def tree_parts(index: Any) -> tuple:
    return index if isinstance(index, tuple) else (index,)


class HostValues(TorchFunctionMode):
    """Refuses tensors made on the GPU of numbers of the host: no operator says so, for meta tensors."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        numbers = args[1:2] if func is Tensor.new_tensor else args[:1]
        if func in FROM_HOST and result.device == GPU and not any(isinstance(x, Tensor) for x in numbers):
            raise WaitError(f"{func.__name__} copies numbers of the host to the GPU")
        if func is Tensor.__getitem__ and args[0].device == GPU and any(isinstance(i, list) for i in tree_parts(args[1])):
            raise WaitError("a list as an index is copied to the GPU")
        return result


class NoWaits(TorchDispatchMode):
    """Refuses what waits; `names` are the operators of this package that ran on the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        taken = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func.overloadpacket in READING and any(x.device == GPU for x in taken):
            raise WaitError(f"{func} reads values of the GPU")
        result = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        here = [x for x in (*taken, *given) if x.device != GPU]
        if len(here) == len(taken) + len(given):
            return result
        if func.namespace.startswith("fastroute"):
            # Its kernels read the costs of classes on the host before they run, and nothing else.
            self.names.append(func._schema.name.split("::")[1])
            here = [] if func.overloadpacket is torch.ops.fastroute.assign_classes else here
        # A number on the host becomes an argument of a kernel.
        copies = func.overloadpacket in (ATEN._to_copy, ATEN.copy_)
        if any(copies or x.ndim > 0 for x in here):
            raise WaitError(f"{func} copies between host and GPU")
        return result


@contextmanager
def no_waits(monkeypatch: pytest.MonkeyPatch, backend: str = "cuda") -> Iterator[NoWaits]:
    """Operators on the GPU are those of `backend`; what waits raises."""
    from fastroute.ops import _library, stitch_patches

    for module in (_library, stitch_patches):
        monkeypatch.setattr(module, "select", lambda op, device: backend if device == GPU else "cpu")
    with HostValues(), NoWaits() as seen:
        yield seen


def on_gpu(value: Any) -> Any:
    """Tensors and modules on the GPU; modules are changed in place, with what they hold beside parameters and buffers."""
    if not isinstance(value, nn.Module):
        return tree_map(lambda x: x.to(GPU) if isinstance(x, Tensor) else x, value)
    value.to(GPU)
    for module in value.modules():
        for name, held in list(vars(module).items()):
            if isinstance(held, torch.device):
                setattr(module, name, GPU)
            elif isinstance(held, Tensor | list | tuple) and not name.startswith("_"):
                setattr(module, name, on_gpu(held))
    return value


@contextmanager
def triton_launchers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Operators run the host code of their Triton kernels, which are not launched; gives the names of those that would be."""
    from fastroute.diagnostics import operators

    launched: list[str] = []
    modules = {op: importlib.import_module(f"fastroute.triton.{op}") for op in set(operators()) - PRODUCTS}
    helpers = [module for name, module in sys.modules.items() if name.startswith("fastroute.triton.")]
    for module in helpers:
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", lambda kernel, *args, **constants: launched.append(kernel.fn.__name__))

    def call(name: str, reference: Any, device: torch.device, *args: Any, **out: Any) -> Any:
        op, _, overload = name.partition(".")
        if device != GPU or op in PRODUCTS:
            return reference(*args, **out)
        overload = overload.removeprefix("default") or ("out" if out else "")
        return getattr(modules[op], "_".join(filter(None, (op, overload, "triton"))))(*args, **out)

    for name in [*(f"fastroute.ops.{op}" for op in operators()), "fastroute.patch.fixed_patches"]:
        monkeypatch.setattr(importlib.import_module(name), "call", call)
    yield launched
