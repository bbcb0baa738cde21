"""Half precision: which types a device computes in, and what of a network stays float32 all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

HALVES = (torch.float16, torch.bfloat16)
# By the names that the command line has for them.
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FullPrecision(nn.Module):
    """A module whose own parameters and buffers stay as they are when the network around them is made half.

    So are colours, thresholds and tables: one wrong in the third digit is wrong for every pixel.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FullPrecision:
        stores: list[dict[str, Any]] = [self._parameters, self._buffers]
        before = [{name: x.detach() for name, x in store.items() if x is not None} for store in stores]
        super()._apply(fn, recurse)
        for store, kept in zip(stores, before, strict=True):
            for name, old in kept.items():
                new = store[name]
                if new.dtype in HALVES and old.dtype not in HALVES:
                    new.data = old.to(new.device)
        return self


class Precisions:
    """The shorthands of :meth:`torch.nn.Module.to` for types."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move the networks to a device, a type, or both."""
        raise NotImplementedError

    def float(self) -> Self:
        """Let the networks compute in float32; returns self."""
        return self.to(torch.float32)

    def half(self) -> Self:
        """Let the networks compute in float16; returns self."""
        return self.to(torch.float16)

    def bfloat16(self) -> Self:
        """Let the networks compute in bfloat16; returns self."""
        return self.to(torch.bfloat16)


def sums_of(dtype: torch.dtype) -> torch.dtype:
    """The type of residuals, means and last additions of a network that computes in `dtype`."""
    return torch.float32 if dtype in HALVES else dtype


@torch.no_grad()
def halve(module: nn.Module, dtype: torch.dtype) -> None:
    """Let `module` compute in the half type `dtype`.

    The weights of a convolution are rounded so that their sums over its kernel stay: what rounding takes from one tap the next
    one gets. Smooth parts of an image, on which rounding to the nearest would be wrong everywhere alike, keep their colours.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and layer.weight.dtype not in HALVES:
            taps = layer.weight.flatten(2).unbind(2)
            rounded, carried = list(taps), torch.zeros_like(taps[0])
            # The smallest come last: what is left in the end is least.
            for number in sorted(range(len(taps)), key=lambda n: -float(taps[n].abs().sum())):
                wanted = taps[number] + carried
                rounded[number] = wanted.to(dtype).to(wanted.dtype)
                carried = wanted - rounded[number]
            layer.weight.data = torch.stack(rounded, dim=2).view_as(layer.weight)
    module.to(dtype)


def check_precision(op: str, dtype: torch.dtype, device: torch.device) -> None:
    """Networks can compute in `dtype` on `device`, and not only through code that takes a hundred times as long.

    Raises:
        TypeError: it is no floating type.
        ValueError: the processor has no convolutions of it.
    """
    if dtype not in (torch.float32, torch.float64, *HALVES):
        raise TypeError(f"{op}: dtype must be float32, bfloat16, float16 or float64; got {dtype}")
    if dtype == torch.float16 and device.type == "cpu" and not has_float16():
        raise ValueError(
            f"{op}: float16 cannot be used on this CPU, which has no float16 convolutions (AVX-512 FP16); "
            "use bfloat16, or float32"
        )


def has_float16() -> bool:
    """Whether this CPU has convolutions of float16."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    except (AttributeError, RuntimeError):
        return False


def parse_to(op: str, now: torch.dtype, where: torch.device, args: Any, kwargs: Any) -> tuple[torch.device, torch.dtype]:
    """Device and dtype that ``.to(*args, **kwargs)`` asks for, as :meth:`torch.nn.Module.to` takes them.

    Args:
        op: what the user called.
        now, where: what holds for what is not named.

    Raises:
        TypeError, ValueError: see :func:`check_precision`; also what torch raises.
    """
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    device, dtype = device or where, dtype or now
    check_precision(op, dtype, device)
    return device, dtype


def probed_dtype(fn: Callable[[Tensor], Tensor], like: Tensor) -> tuple[torch.device, torch.dtype]:
    """Where and to which type a function that a module applies to its tensors would bring one like `like`."""
    probe = fn(like.new_empty(0))
    return probe.device, probe.dtype
