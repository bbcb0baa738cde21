"""The wording of argument checks, once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGER_IMAGE = (torch.uint8, torch.uint16)
INDEX = (torch.int64, torch.int32, torch.int16, torch.uint8)


def tensor(op: str, name: str, x: object) -> Tensor:
    """`x` is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor; got {type(x).__name__}")
    return x


def rank(op: str, name: str, x: Tensor, shape: str, number: int) -> None:
    """`x` has `number` dimensions, called `shape`."""
    if not isinstance(x, Tensor) or x.ndim != number:
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


def same_device(op: str, first: str, x: Tensor, second: str, y: Tensor | None) -> None:
    """`y`, when given, is where `x` is."""
    if y is not None and x.device != y.device:
        raise ValueError(
            f"{op}: {first} and {second} must be on one device; got {x.device} and {y.device}; move one with .to()"
        )


def in_range(op: str, name: str, x: Tensor, limit: int) -> None:
    """Entries of `x` lie in [0, limit); looked at on the CPU alone, where looking costs no wait."""
    # What a compiler traces with is a tensor of another class.
    if x.device.type != "cpu" or x.numel() == 0 or torch.compiler.is_compiling() or type(x) is not Tensor:
        return
    low, high = int(x.long().min()), int(x.long().max())
    if low < 0 or high >= limit:
        raise ValueError(f"{op}: {name} must lie in [0, {limit}); got {low if low < 0 else high}")


def index(op: str, name: str, x: Tensor | None, length: int | None) -> None:
    """`x`, when given, is a 1-D integer tensor, of `length` when that is not None."""
    if x is None:
        return
    # Operators are called with small tensors too, where a call of Python counts: only what is wrong is looked into.
    if not isinstance(x, Tensor) or x.ndim != 1 or x.dtype != torch.int64:
        rank(op, name, x, "1-D", 1)
        dtype(op, name, x.dtype, (torch.int64,))
    if length is not None and x.shape[0] != length:
        raise ValueError(f"{op}: {name} must have {length} entries; got {x.shape[0]}")


def images(op: str, image: Tensor, channels: int, device: torch.device, sides: str = "H, W") -> Tensor:  # [B, C, H, W]
    """`image` as a batch: (B, C, H, W) or (C, H, W) of `channels` channels, not empty, on `device`."""
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
    # A look at some pixels finds an image in 0 … 255; a GPU would have to be waited for.
    if batch.is_floating_point() and batch.device.type == "cpu":
        some = batch[:1, :, :: batch.shape[2] // 64 + 1, :: batch.shape[3] // 64 + 1]
        if some.numel() and (largest := some.max().item()) > 2:
            raise ValueError(f"{op}: a floating image must lie in about [0, 1]; it has values like {largest:g}: divide by 255?")
    return batch
