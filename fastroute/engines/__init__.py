"""What executes a branch: PyTorch as it is, torch.compile, OpenVINO or TensorRT, behind one protocol.

An engine compiles a network into a function of a list of batches. It is believed only after what it computes has been compared
with what PyTorch computes, and refused by name otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# A function of batches (N, C, h, w) that gives one result for each.
Compiled = Callable[[Sequence[Tensor]], list[Tensor]]
TORCH, ANY = "torch", "auto"
# By the names that users give them; each is a module of this package.
ENGINES = {TORCH: "eager", "torch.compile": "inductor", "openvino": "openvino", "tensorrt": "tensorrt"}
# Largest difference to PyTorch, as a share of the largest value: float32 sums in another order; in a half type the rounding of
# every layer, at other places.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.01}


class Programs(dict[tuple[int, str], Compiled]):
    """Branches as engines have compiled them, by number and engine; a copy compiles its own."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Programs:
        return Programs()

    def __reduce__(self) -> tuple[type[Programs], tuple[()]]:
        return Programs, ()


class Engine(Protocol):
    """What a module of an engine has.

    Attributes:
        FLOAT32_ENDS: batches and results are float32, whatever it computes in; else they are what the branch reads and gives.
        PARALLEL: it runs batches side by side where there are several threads.
    """

    FLOAT32_ENDS: bool
    PARALLEL: bool

    def unsupported_reasons(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        """Why it cannot run networks there, in that type; empty where it can."""

    def compile(self, branch: nn.Module, shapes: Sequence[tuple[int, ...]], precision: torch.dtype, threads: int) -> Compiled:
        """A function that computes what `branch` does.

        Args:
            branch: in evaluation mode. It is not changed.
            shapes: (N, C, h, w) of batches that will come, the largest last; others may come too.
            precision: type in which it computes.
            threads: of the CPU, together.
        """


def engine_of(name: str) -> Engine:
    """The engine `name`.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in ENGINES:
        raise ValueError(f"compile: engine must be one of {', '.join([*ENGINES, ANY])}; got {name!r}")
    return import_module(f"fastroute.engines.{ENGINES[name]}")


def check_engine(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """The engine `name` can run networks on `device` in `dtype`.

    Raises:
        ValueError: it cannot; says why.
    """
    reasons = engine_of(name).unsupported_reasons(device, dtype)
    if reasons:
        raise ValueError(f"compile: engine {name!r} cannot be used: {'; '.join(reasons)}")


def usable_engines(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Names of the engines that can run networks on `device` in `dtype`."""
    return [name for name in ENGINES if not engine_of(name).unsupported_reasons(device, dtype)]


def compiled(name: str, branch: nn.Module, reads: torch.dtype, size: Sequence[int], precision: torch.dtype) -> Compiled:
    """`branch` compiled by the engine `name`, once its results have been compared with those of PyTorch.

    Args:
        reads: type of the batches that it reads.
        size: (1, C, p, p) of a patch.
        precision: type in which it computes.

    Raises:
        ValueError: the engine cannot compile it, or computes something else; the message names both.
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
        except Exception as error:  # whatever an engine raises: it is another's code
            words = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"{what}: {words[0]}") from error
    for got, wanted in zip(found, expected, strict=True):
        if got.shape != wanted.shape:
            raise ValueError(f"{what}: it gives {tuple(got.shape)} instead of {tuple(wanted.shape)}")
        apart, most = float((got - wanted).abs().max()), AGREEMENT.get(precision, 1e-4) * max(float(wanted.abs().max()), 1e-3)
        if not apart <= most:
            raise ValueError(f"{what}: it differs from PyTorch by {apart:.2g}, more than {most:.2g}")
    return run
