"""Reference of `extract_patches`: plain indexing."""

from __future__ import annotations

import torch
from torch import Tensor

from fastroute._levels import MAXIMUM
from fastroute.grid import tile_origins


def extract_patches_reference(
    image: Tensor,  # [B, C, H, W]
    order: Tensor | None,  # [M]
    mean: Tensor | None,  # [C]
    std: Tensor | None,  # [C]
    patch: int,
    stride: int,
    crop: bool,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    rows: int | None = None,
    cols: int | None = None,
) -> Tensor:  # [M, C, rows, cols]
    """See :func:`fastroute.extract_patches`; `rows` and `cols` are those of a patch by default."""
    c, height, width = image.shape[1:]
    size = (patch if rows is None else rows, patch if cols is None else cols)
    down = _reads(height, patch, stride, crop, torch.arange(size[0], device=image.device))  # [tile rows, rows]
    across = _reads(width, patch, stride, crop, torch.arange(size[1], device=image.device))  # [tile columns, cols]
    # Indexing is not implemented for uint16; its bits are those of int16.
    source = image.view(torch.int16) if image.dtype == torch.uint16 else image
    patches = source[:, :, down[:, None, :, None], across[None, :, None, :]]  # [B, C, tile rows, tile columns, *size]
    patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, c, *size)
    if order is not None:
        patches = patches[order]
    if image.dtype == torch.uint16:
        patches = patches.view(torch.uint16)
    patches = convert(patches, mean, std, dtype)
    return patches.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def convert(x: Tensor, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype | None) -> Tensor:  # [N, C, p, p], [C], [C]
    """Integers to [0, 1], then (x - mean) / std, in float32 (float64 for float64), then rounded to `dtype`."""
    dtype = dtype or x.dtype
    if dtype == x.dtype and mean is None and std is None:
        return x
    work = torch.float64 if torch.float64 in (x.dtype, dtype) else torch.float32
    value = x.to(work)
    if x.dtype in MAXIMUM:
        # By a tensor: a GPU would multiply by the reciprocal of a number, which rounds differently.
        value = value / torch.full((), MAXIMUM[x.dtype], dtype=work, device=x.device)
    if mean is not None:
        value = value - mean.to(work)[:, None, None]
    if std is not None:
        value = value / std.to(work)[:, None, None]
    return value.to(dtype)


def _extract_patches_backward_reference(
    grad: Tensor,  # [M, C, p, p]
    order: Tensor | None,  # [M]
    batch: int,
    height: int,
    width: int,
    patch: int,
    stride: int,
    crop: bool,
) -> Tensor:  # [B, C, H, W]
    """The adjoint: every pixel collects the gradients of all patch pixels that read it."""
    m, c = grad.shape[:2]
    steps = torch.arange(patch, device=grad.device)
    rows = _reads(height, patch, stride, crop, steps)
    cols = _reads(width, patch, stride, crop, steps)
    work = torch.float64 if grad.dtype == torch.float64 else torch.float32
    image = grad.new_zeros(batch, c, height, width, dtype=work)
    tiles = rows.shape[0] * cols.shape[0]
    number = torch.arange(m, device=grad.device) if order is None else order.long()
    which, row, col = number // tiles, number % tiles // cols.shape[0], number % cols.shape[0]
    channel = torch.arange(c, device=grad.device)
    index = (which[:, None, None, None], channel[:, None, None], rows[row][:, None, :, None], cols[col][:, None, None, :])
    return image.index_put_(index, grad.to(work), accumulate=True).to(grad.dtype)


def _reads(size: int, patch: int, stride: int, crop: bool, steps: Tensor) -> Tensor:  # [tiles, p]
    origins = torch.tensor(tile_origins(size, patch, stride, crop), device=steps.device)
    return (origins[:, None] + steps).clamp(max=size - 1)
