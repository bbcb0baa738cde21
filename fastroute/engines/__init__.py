"""Engines that execute a branch, behind one protocol: plain PyTorch, torch.compile, OpenVINO or TensorRT.

An engine compiles a network into a function of a list of batches. It is used only if its results agree with those of PyTorch,
and refused by name otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# A function of batches (N, C, h, w) that returns one result for each.
Compiled = Callable[[Sequence[Tensor]], list[Tensor]]
TORCH, ANY = "torch", "auto"
# The engines by the names that users give them. Each is a module of this package.
ENGINES = {TORCH: "eager", "torch.compile": "inductor", "openvino": "openvino", "tensorrt": "tensorrt"}
# The largest difference from PyTorch, as a share of the largest value. In float32, sums have another order; in a half type,
# every layer is rounded in other places.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.01}


class Programs(dict[tuple[int, str], Compiled]):
    """Compiled branches by number and engine. A copy of this object compiles its own."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Programs:
        return Programs()

    def __reduce__(self) -> tuple[type[Programs], tuple[()]]:
        return Programs, ()


class Engine(Protocol):
    """The interface of an engine's module.

    Attributes:
        FLOAT32_ENDS: whether batches and results are float32 in any precision. Otherwise they have the types of the branch.
        PARALLEL: whether it runs batches side by side if there are several threads.
    """

    FLOAT32_ENDS: bool
    PARALLEL: bool

    def unsupported_reasons(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        """Why the engine cannot run networks on `device` in `dtype`; empty if it can."""

    def compile(self, branch: nn.Module, shapes: Sequence[tuple[int, ...]], precision: torch.dtype, threads: int) -> Compiled:
        """Compile a function that computes what `branch` does.

        Args:
            branch: a module in evaluation mode. It is not changed.
            shapes: (N, C, h, w) of batches to expect, the largest last. Other shapes may come too.
            precision: type in which it computes.
            threads: total number of CPU threads.
        """


def engine_of(name: str) -> Engine:
    """The engine `name`.

    Raises:
        ValueError: there is no engine of that name.
    """
    if name not in ENGINES:
        raise ValueError(f"compile: engine must be one of {', '.join([*ENGINES, ANY])}; got {name!r}")
    return import_module(f"fastroute.engines.{ENGINES[name]}")


def check_engine(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Check that the engine `name` can run networks on `device` in `dtype`.

    Raises:
        ValueError: it cannot. The message says why.
    """
    reasons = engine_of(name).unsupported_reasons(device, dtype)
    if reasons:
        raise ValueError(f"compile: engine {name!r} cannot be used: {'; '.join(reasons)}")


def usable_engines(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The names of the engines that can run networks on `device` in `dtype`."""
    return [name for name in ENGINES if not engine_of(name).unsupported_reasons(device, dtype)]


def compiled(name: str, branch: nn.Module, reads: torch.dtype, size: Sequence[int], precision: torch.dtype) -> Compiled:
    """`branch` compiled by the engine `name`, once its results have been compared with those of PyTorch.

    Args:
        reads: type of the batches that the branch reads.
        size: (1, C, p, p), the shape of a patch.
        precision: type in which the engine computes.

    Raises:
        ValueError: the engine cannot compile the branch or computes something else. The message names both.
    """
    what = f"compile: engine {name!r} cannot be used for {type(branch).__name__}"
    device = next((p.device for p in branch.parameters()), torch.device("cpu"))
    shapes = [(n, size[1], side, side) for n, side in ((1, size[2]), (2, size[2]), (1, 2 * size[2] - 4))]
    generator = torch.Generator().manual_seed(0)
    examples = [torch.rand(shape, generator=generator).to(device) for shape in shapes if min(shape) > 0]
    engine = engine_of(name)
    with torch.inference_mode():
        expected = [branch(x.to(reads)).float() for x in examples]
        try:
            run = engine.compile(branch, shapes, precision, torch.get_num_threads())
            found = [y.float() for y in run([x if engine.FLOAT32_ENDS else x.to(reads) for x in examples])]
        except Exception as error:  # an engine is foreign code and may raise anything
            raise ValueError(f"{what}: {told(error)}") from error
    for got, wanted in zip(found, expected, strict=True):
        if got.shape != wanted.shape:
            raise ValueError(f"{what}: it gives {tuple(got.shape)} instead of {tuple(wanted.shape)}")
        apart, most = float((got - wanted).abs().max()), AGREEMENT.get(precision, 1e-4) * max(float(wanted.abs().max()), 1e-3)
        if not apart <= most:
            raise ValueError(f"{what}: it differs from PyTorch by {apart:.2g}, more than {most:.2g}")
    return run


def told(error: Exception) -> str:
    """What an error says, in one line: its first one, continued if it ends in a colon, and a compiler's own first complaint."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    complaint = next((line for line in lines if "error: " in line and line not in first), None)
    return first if complaint is None else f"{first} ({complaint})"
