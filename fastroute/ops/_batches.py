"""Patches that `stitch_patches` is given in several tensors, checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastroute.grid import TileGrid
from fastroute.ops import _checks as check


def _list_of(patches: Sequence[Tensor]) -> list[Tensor]:  # [M_i, C, P, P] each
    op = "stitch_patches"
    if not (isinstance(patches, (list, tuple)) and all(isinstance(batch, Tensor) for batch in patches)):
        raise TypeError(f"{op}: patches must be a torch.Tensor or a list of them; got {type(patches).__name__}")
    if not patches:
        raise ValueError(f"{op}: patches must hold at least one tensor; got none")
    return list(patches)


def checked_batches(patches: Sequence[Tensor], out: Tensor | None) -> list[Tensor]:  # [M_i, C, P, P] each, [B, C, rows, W·s]
    """`patches` as a list of tensors that differ in their number of patches alone."""
    op = "stitch_patches"
    batches = _list_of(patches)
    first = batches[0]
    check.rank(op, "patches", first, "(M, C, P, P)", 4)
    device, dtype, shape, strides = first.device, first.dtype, first.shape[1:], first.stride()[1:]
    for number, batch in enumerate(batches):
        # There may be hundreds, nearly always alike.
        if batch.dtype == dtype and batch.shape[1:] == shape and batch.stride()[1:] == strides and batch.device == device:
            continue
        check.rank(op, "patches", batch, "(M, C, P, P)", 4)
        check.same_device(op, "patches", first, "patches", batch)
        if batch.dtype != dtype:
            raise TypeError(f"{op}: patches must have one dtype; got {dtype} and {batch.dtype}")
        if batch.shape[1:] != shape:
            raise ValueError(f"{op}: patches must have one shape; got {tuple(first.shape)} and {tuple(batch.shape)}")
        if any(n > 1 and a != b for n, a, b in zip(shape, strides, batch.stride()[1:], strict=True)):
            raise ValueError(f"{op}: patches must have one memory format")
        # The stride of a dimension of size 1 says nothing, and tensors of one pixel have either format.
        batches[number] = batch.as_strided(batch.shape, (batch.stride(0), *strides))
    if out is None:
        raise ValueError(f"{op}: patches in several tensors need `out`")
    return batches


def checked_regions(
    patches: Tensor | Sequence[Tensor], inverse: Tensor | None, region: Tensor, grid: TileGrid, shuffle: int
) -> list[Tensor]:  # [M_i, C, P, P] each, [N], [N]
    """`patches` as a list of tensors of regions, which may differ in their height and width too."""
    op = "stitch_patches"
    batches = [patches] if isinstance(patches, Tensor) else _list_of(patches)
    first = batches[0]
    if inverse is None:
        raise ValueError(f"{op}: region needs `inverse`, the row of `patches` that holds the region of each patch")
    check.index(op, "region", region, inverse.shape[0] if isinstance(inverse, Tensor) and inverse.ndim == 1 else None)
    check.same_device(op, "patches", first, "region", region)
    if shuffle >= 1 and grid.scale % shuffle:
        raise ValueError(f"{op}: shuffle must divide the scale, {grid.scale}, for regions; got {shuffle}")
    least = grid.patch * grid.scale // max(shuffle, 1)
    for batch in batches:
        check.rank(op, "patches", batch, "(M, C, h, w)", 4)
        check.same_device(op, "patches", first, "patches", batch)
        if batch.dtype != first.dtype:
            raise TypeError(f"{op}: patches must have one dtype; got {first.dtype} and {batch.dtype}")
        if batch.shape[1] != first.shape[1] or min(batch.shape[2:]) < least:
            raise ValueError(
                f"{op}: regions must have {first.shape[1]} channels and at least {least} x {least} pixels; "
                f"got {tuple(batch.shape)}"
            )
    # One memory format for all, which the kernels read: that of the first.
    layout = torch.contiguous_format
    if not first.is_contiguous() and first.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    return [batch.contiguous(memory_format=layout) for batch in batches]
