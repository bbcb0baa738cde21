"""What the kernels share: how they are launched, products that are rounded on their own, the variants to compile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Whether TRITON_INTERPRET=1 was set when the kernels were defined: they then run on the CPU, for tests.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# What a block of elements is multiplied by: the interpreter's time goes by steps, not by lanes.
WIDER = 16 if INTERPRETED else 1

# Names of element types in signatures.
NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.uint16: "u16",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
# Compute capabilities, times ten, for which kernels are compiled in tests: Ampere, Hopper, Blackwell.
ARCHS = (80, 90, 100)
FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGER_IMAGE = (torch.uint8, torch.uint16)

_tracing = threading.local()


@dataclass(frozen=True)
class Variant:
    """One way in which a launcher calls a kernel, for compilation without a GPU.

    Attributes:
        kernel: the jitted function.
        types: type of every argument that is no constant, as Triton's signatures name it: "*fp32", "i32", "fp64".
        constants: the `tl.constexpr` arguments, and None for a pointer that is not given.
        options: num_warps and the like, as passed to the launch.
        archs: compute capabilities, times ten, of GPUs on which it is called that way.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    archs: tuple[int, ...] = ARCHS

    @property
    def signature(self) -> dict[str, str]:
        """Types of all arguments in order."""
        return {name: "constexpr" if name in self.constants else self.types[name] for name in self.kernel.arg_names}


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Run `programs` programs of `kernel`; none is no error.

    Within a trace of torch.compile the launch becomes a node of the graph, which the compiler can look into.
    """
    if getattr(_tracing, "on", False):
        kernel = torch.library.wrap_triton(kernel)
        programs = torch.sym_max(programs, 1)
    elif programs == 0:
        return
    kernel[(programs,)](*args, **constants)


def traced(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a launcher such that its kernels become nodes of the graph being traced."""
    before = getattr(_tracing, "on", False)
    _tracing.on = True
    try:
        return function(*args, **kwargs)
    finally:
        _tracing.on = before


def work_type(*dtypes: torch.dtype) -> Any:
    """The type of sums: float64 where anything is float64, else float32."""
    return tl.float64 if torch.float64 in dtypes else tl.float32


def next_power(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    """`a / b` rounded up."""
    return (a + b - 1) // b


def check_on_host(x: Tensor) -> bool:  # [...]
    """Whether values of `x` can be looked at without a wait: under the interpreter."""
    return x.device.type == "cpu"


# A branch on a constant is compiled alone, but what follows a `return` is compiled too: hence every `else` below.


@triton.jit
def product(a, b):
    """a · b, rounded before anything is added to it: compilers would otherwise make one multiply-add of both."""
    if INTERPRETED:
        return a * b
    elif a.dtype == tl.float64:
        return tl.inline_asm_elementwise("mul.rn.f64 $0, $1, $2;", "=d,d,d", [a, b], dtype=tl.float64, is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def quotient(a, b):
    """a / b as IEEE 754 rounds it; Triton's own division of float32 is approximate."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def to_work(value, dtype: tl.constexpr):
    """An element as a number to calculate with."""
    if INTERPRETED and value.dtype == tl.bfloat16:
        # The interpreter's own conversions of bfloat16 are not exact.
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(dtype)
    else:
        return value.to(dtype)


@triton.jit
def to_type(value, dtype: tl.constexpr):
    """A sum in the type of an output; float64 goes to the half types by way of float32, as in PyTorch."""
    if INTERPRETED and dtype == tl.bfloat16:
        narrow = value.to(tl.float32)
        bits = narrow.to(tl.uint32, bitcast=True)
        rounded = tl.where(narrow != narrow, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (rounded >> 16).to(tl.uint16).to(dtype, bitcast=True)
    elif dtype == tl.float16 or dtype == tl.bfloat16:
        return value.to(tl.float32).to(dtype)
    else:
        return value.to(dtype)


@triton.jit
def to_pixel(value, dtype: tl.constexpr):
    """A sum as a pixel: a float is rounded; integers are [0, 1] scaled, clamped and rounded half to even, NaN being 0."""
    if dtype == tl.uint8 or dtype == tl.uint16:
        value = tl.where(value > 0.0, tl.where(value < 1.0, value, 1.0), 0.0).to(value.dtype)
        maximum = tl.full((), 255.0 if dtype == tl.uint8 else 65535.0, value.dtype)
        # Adding 1.5 · 2^m pushes the fraction out of the mantissa, so the addition itself rounds half to even.
        shift = tl.full((), 6755399441055744.0 if value.dtype == tl.float64 else 12582912.0, value.dtype)
        return ((product(value, maximum) + shift) - shift).to(tl.int32).to(dtype)
    else:
        return to_type(value, dtype)
