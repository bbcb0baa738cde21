"""The wording of argument checks, once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGER_IMAGE = (torch.uint8, torch.uint16)
INDEX = (torch.int64, torch.int32, torch.int16, torch.uint8)


def tensor(op: str, name: str, x: object) -> Tensor:
    """`x` is a tensor whose elements have places in memory."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor; got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise TypeError(f"{op}: {name} must be a dense tensor; got a {kind} one; convert it first, for example by .to_dense()")
    return x


def rank(op: str, name: str, x: Tensor, shape: str, number: int) -> None:  # [...]
    """`x` has `number` dimensions, called `shape`."""
    if not isinstance(x, Tensor) or x.ndim != number or x.layout is not torch.strided:
        tensor(op, name, x)
        hint = "; add a batch dimension with unsqueeze(0)" if number == 4 and x.ndim == 3 else ""
        raise ValueError(f"{op}: {name} must be {shape}; got {x.ndim} dimension(s), {tuple(x.shape)}{hint}")


# Types of class ids by their size. Operators take the size: AOTInductor of torch before 2.12 hands them another dtype than it
# was given.
ID_TYPES = {8: torch.int64, 4: torch.int32, 1: torch.uint8}


def dtype(op: str, name: str, got: torch.dtype, allowed: Iterable[torch.dtype]) -> None:
    """`got` is one of `allowed`."""
    if got not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{op}: {name} must be one of {names}; got {str(got).removeprefix('torch.')}")


def convolution_dtype(op: str, name: str, got: torch.dtype, image: torch.dtype | None) -> None:
    """`got` is a type of an argument of a convolution whose image has the type `image`; None for the image itself.

    The numbers of whole channels, bias and slope, may be float32 beside bfloat16.
    """
    if image is None:
        dtype(op, name, got, (torch.float32, torch.bfloat16))
    else:
        dtype(op, name, got, dict.fromkeys((image, torch.float32 if name in ("bias", "slope") else image)))


def same_device(op: str, first: str, x: Tensor, second: str, y: Tensor | None) -> None:  # [...], [...]
    """`y`, when given, is where `x` is."""
    if y is not None and x.device != y.device:
        raise ValueError(
            f"{op}: {first} and {second} must be on one device; got {x.device} and {y.device}; move one with .to()"
        )


def shapes(op: str, *expected: tuple[str, Tensor | None, tuple[int, ...]]) -> None:
    """Each tensor that is given has the shape beside it."""
    for name, x, shape in expected:
        if x is not None and tuple(tensor(op, name, x).shape) != shape:
            raise ValueError(f"{op}: {name} must be {shape}; got {tuple(x.shape)}")


def at_least(op: str, least: int, **numbers: Any) -> None:
    """Each of `numbers` is an integer, at least `least`; what a compiler does not know is left alone."""
    for name, value in numbers.items():
        # What a compiler traces with is an integer to it, but knows no attributes.
        known = isinstance(value, (int, torch.SymInt)) or hasattr(value, "__index__")
        if isinstance(value, (bool, float)) or not known:
            raise TypeError(f"{op}: {name} must be an integer; got {value!r}")
        if not isinstance(value, torch.SymInt) and not least <= value < 2**63:
            limit = f"at least {least}" if value < least else "below 2^63"
            raise ValueError(f"{op}: {name} must be {limit}; got {value}")


def product(op: str, what: str, *sizes: int | torch.SymInt) -> None:
    """The product of `sizes` fits into an address."""
    if not any(isinstance(size, torch.SymInt) for size in sizes) and math.prod(sizes) > 2**62:
        raise ValueError(f"{op}: {what} is too large; got {' * '.join(map(str, sizes))}")


def rows(op: str, wanted: tuple[int, int] | None, height: int) -> tuple[int, int]:
    """`wanted` rows of an output of `height`, first and one past the last; all of them by default."""
    if wanted is None:
        return 0, height
    begin, end = wanted
    if any(isinstance(row, (bool, float)) or not hasattr(row, "__index__") for row in wanted):
        raise TypeError(f"{op}: rows must be integers; got {wanted}")
    if not 0 <= begin <= end <= height:
        raise ValueError(f"{op}: rows must be ordered and lie in [0, {height}]; got {wanted}")
    return begin, end


def geometry(
    op: str, height: int | torch.SymInt, width: int | torch.SymInt, patch: int, stride: int, crop: bool, scale: int = 1
) -> None:
    """What :class:`fastroute.TileGrid` checks, where an operator is given the numbers of one."""
    at_least(op, 1, height=height, width=width, patch=patch, stride=stride, scale=scale)
    if stride > patch:
        raise ValueError(f"{op}: stride must be at most patch ({patch}), or pixels between patches are lost; got {stride}")
    known = not isinstance(height, torch.SymInt) and not isinstance(width, torch.SymInt)
    if crop and known and (height < patch or width < patch):
        raise ValueError(
            f"{op}: coverage='crop' needs an image of at least {patch} x {patch} pixels; got {height} x {width}; use "
            "coverage='full'"
        )


def one_device(op: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """All of `tensors` are where the first is."""
    first: tuple[str, Tensor] | None = None
    for name, x in tensors:
        first = first or (name, x)
        same_device(op, *first, name, x)


# Tensors whose memory can be asked for.
PLAIN = (Tensor, torch.nn.Parameter)


def written(op: str, name: str, out: Tensor, inputs: Iterable[Any]) -> None:  # [B, C, rows, W·s]
    """Every element of `out` has an address of its own, which none of `inputs` has."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    if torch.compiler.is_compiling() or type(out) not in PLAIN or wrapped(out) or out.numel() == 0:
        return
    axes = _axes(out)
    extent = 1
    for stride, size in reversed(axes):
        if stride < extent:
            raise ValueError(
                f"{op}: {name} must not share memory between its own elements, as an expanded tensor does; give a "
                ".contiguous() one"
            )
        extent += (size - 1) * stride
    for x in inputs:
        if type(x) in PLAIN and not wrapped(x) and x.device == out.device and x.device.type != "meta" and _may_overlap(out, x):
            raise ValueError(
                f"{op}: {name} must not share memory with an input, which is read while it is written; give a tensor of its own"
            )


def without_gradient(op: str, out: Tensor | None) -> None:  # [...]
    """Raise the error of torch's own operators for an `out` that is part of a graph: what is written has no gradient."""
    if out is not None and torch.is_grad_enabled() and out.requires_grad:
        raise RuntimeError(f"{op}: out must not require gradients, which a result written has not; use torch.no_grad()")


def channels_side_by_side(op: str, out: Tensor | None) -> None:  # [B, C, H, W]
    """A convolution can write into `out`."""
    if out is not None and out.numel() and out.shape[1] > 1 and out.stride(1) != 1:
        raise ValueError(f"{op}: out must have its channels side by side (channels_last); its strides are {out.stride()}")


def _axes(x: Tensor) -> list[tuple[int, int]]:  # [...]
    """(stride, size) of the dimensions with more than one element, the largest stride first."""
    return sorted(((x.stride(d), x.shape[d]) for d in range(x.ndim) if x.shape[d] > 1), reverse=True)


def _may_overlap(x: Tensor, y: Tensor) -> bool:  # [...], [...]
    """Whether elements may share addresses: slices of one tensor are told apart, as csrc/common/written.h does."""
    if x.numel() == 0 or y.numel() == 0:
        return False
    (at_x, of_x), (at_y, of_y) = sorted(((t.data_ptr(), _axes(t)) for t in (x, y)), key=lambda pair: pair[0])
    item = x.element_size()
    lower = x if x.data_ptr() == at_x else y
    if at_x + (sum(stride * (size - 1) for stride, size in of_x) + 1) * lower.element_size() <= at_y:
        return False
    if item != y.element_size() or (at_y - at_x) % item:
        return True
    rest, apart, radix = (at_y - at_x) // item, False, None
    while of_x or of_y:
        # One element along a stride that only the other has.
        stride = max(axes[0][0] for axes in (of_x, of_y) if axes)
        size, count = (axes.pop(0)[1] if axes and axes[0][0] == stride else 1 for axes in (of_x, of_y))
        if stride <= 0:
            return True
        digit, left = divmod(rest, stride)
        if radix is not None and max(size, digit + count) > radix // stride:
            return True
        apart, rest, radix = apart or digit >= size, left, stride
    return rest != 0 or not apart


def looks_at(x: Tensor) -> bool:  # [...]
    """Whether there are values of `x` that can be looked at without a wait: on the CPU, and while nothing traces."""
    # What a compiler traces with is a tensor of another class.
    plain = x.device.type == "cpu" and x.numel() > 0 and not torch.compiler.is_compiling() and type(x) is Tensor
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def in_range(op: str, name: str, x: Tensor, limit: int) -> None:  # [...]
    """Entries of `x` lie in [0, limit); looked at on the CPU alone, where looking costs no wait."""
    if not looks_at(x):
        return
    low, high = int(x.long().min()), int(x.long().max())
    if low < 0 or high >= limit:
        raise ValueError(f"{op}: {name} must lie in [0, {limit}); got {low if low < 0 else high}")


def index(op: str, name: str, x: Tensor | None, length: int | None) -> None:  # [...]
    """`x`, when given, is a 1-D integer tensor, of `length` when that is not None."""
    if x is None:
        return
    # Operators are called with small tensors too, where a call of Python counts: only what is wrong is looked into.
    if not isinstance(x, Tensor) or x.ndim != 1 or x.dtype != torch.int64:
        rank(op, name, x, "1-D", 1)
        dtype(op, name, x.dtype, (torch.int64,))
    if length is not None and x.shape[0] != length:
        raise ValueError(f"{op}: {name} must have {length} entries; got {x.shape[0]}")


def images(
    op: str, image: Tensor, channels: int, device: torch.device, sides: str = "H, W", bounded: bool = True
) -> Tensor:  # [B, C, H, W]
    """`image` as a batch: (B, C, H, W) or (C, H, W) of `channels` channels, not empty, on `device`.

    Of a floating image on the CPU no value exceeds 2, wherever it lies, if it is `bounded`; on a GPU none is looked at.
    """
    tensor(op, "image", image)
    if image.ndim not in (3, 4):
        raise ValueError(f"{op}: image must be (B, C, {sides}) or (C, {sides}); got {tuple(image.shape)}")
    dtype(op, "image", image.dtype, FLOATING + INTEGER_IMAGE)
    batch = image if image.ndim == 4 else image[None]
    if batch.shape[1] != channels:
        raise ValueError(f"{op}: image must have {channels} channels; got {tuple(image.shape)}")
    if 0 in batch.shape[2:]:
        raise ValueError(f"{op}: image must have at least one pixel; got {tuple(image.shape)}")
    if batch.device != device:
        raise ValueError(f"{op}: image must be on {device}, where the networks are; got {batch.device}")
    # All of it, so that where a value lies makes no difference; a GPU would have to be waited for, so none of it there.
    if bounded and batch.is_floating_point() and looks_at(batch):
        # What is expanded repeats itself; `amax` copies nothing.
        own = batch[tuple(slice(0, None if stride else 1) for stride in batch.stride())]
        if (largest := own.amax().item()) > 2:
            wanted = f"a floating image must lie in about [0, 1]; it has values like {largest:g}"
            raise ValueError(f"{op}: {wanted}: divide by 255, or give the router of an HDR network value_range=None")
    return batch
