"""Half precision: the types in which a device computes, and the parts of a network that stay float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

HALVES = (torch.float16, torch.bfloat16)
# The types by their names on the command line.
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FullPrecision(nn.Module):
    """A module whose own parameters and buffers keep their type when the network around them is converted to a half type.

    Such are colours, thresholds and tables: an error in the third digit would be an error in every pixel.
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


def sums_of(dtype: torch.dtype) -> torch.dtype:
    """The type of residuals, means and last additions of a network that computes in `dtype`."""
    return torch.float32 if dtype in HALVES else dtype


@torch.no_grad()
def round_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights of the convolutions of `module` to the half type `dtype`, in which it will compute.

    Sums over the kernel are preserved: the rounding error of one tap is passed on to the next. So smooth parts of an image keep
    their colours; rounding to nearest would make the same error everywhere.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and layer.weight.dtype not in HALVES:
            taps = layer.weight.flatten(2).unbind(2)
            rounded, carried = list(taps), torch.zeros_like(taps[0])
            # The smallest taps come last, so that the error left in the end is least.
            for number in sorted(range(len(taps)), key=lambda n: -float(taps[n].abs().sum())):
                wanted = taps[number] + carried
                rounded[number] = wanted.to(dtype).to(wanted.dtype)
                carried = wanted - rounded[number]
            layer.weight.data = torch.stack(rounded, dim=2).view_as(layer.weight)


def check_precision(op: str, dtype: torch.dtype, device: torch.device) -> None:
    """Check that networks can compute in `dtype` on `device`, other than by code that takes a hundred times as long.

    Raises:
        TypeError: `dtype` is not a floating type.
        ValueError: the processor has no convolutions in this type.
    """
    if dtype not in (torch.float32, torch.float64, *HALVES):
        raise TypeError(f"{op}: dtype must be float32, bfloat16, float16 or float64; got {dtype}")
    if dtype == torch.float16 and device.type == "cpu" and not has_float16():
        raise ValueError(
            f"{op}: float16 cannot be used on this CPU, which has no float16 convolutions (AVX-512 FP16); "
            "use bfloat16, or float32"
        )


def has_float16() -> bool:
    """Whether this CPU has convolutions in float16."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    except (AttributeError, RuntimeError):
        return False


def probed_dtype(fn: Callable[[Tensor], Tensor], like: Tensor) -> tuple[torch.device, torch.dtype]:  # [...]
    """The device and type to which a function that a module applies to its tensors would convert a tensor like `like`."""
    probe = fn(like.new_empty(0))
    return probe.device, probe.dtype
