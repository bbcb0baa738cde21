"""Reference of `refine_boundaries`: cheap pixels beside more expensive ones become the mean of their neighbourhood."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def refine_boundaries_reference(
    image: Tensor,  # [B, C, H, W]
    class_map: Tensor,  # [B, H, W]
    rows: tuple[int, int] | None = None,
) -> Tensor:  # [B, C, H, W]
    """See :func:`fastroute.refine_boundaries`.

    A pixel that is not in the outermost row or column, is of class 0 and has a pixel of another class among its 8
    neighbours becomes the mean of the 3 x 3 pixels of `image` around it, itself included. All others are copied, so the
    published padding is never read. Reads `image` only, never a refined pixel: the order does not matter.
    """
    begin, end = (0, image.shape[2]) if rows is None else rows
    output = image.clone(memory_format=torch.contiguous_format)
    if image.numel() > 0 and image.shape[2] >= 3 and image.shape[3] >= 3:
        work = torch.float64 if image.dtype == torch.float64 else torch.float32
        mean = F.avg_pool2d(image.to(work), 3, stride=1).to(image.dtype)
        output[:, :, 1:-1, 1:-1] = torch.where(boundary(class_map), mean, image[:, :, 1:-1, 1:-1])
    return output if rows is None else output[:, :, begin:end].contiguous()


def boundary(class_map: Tensor) -> Tensor:  # [B, H, W] -> [B, 1, H - 2, W - 2]
    """Which inner pixels are refined."""
    expensive = (class_map != 0)[:, None]
    beside_expensive = F.max_pool2d(expensive.to(torch.float32), 3, stride=1) > 0
    return ~expensive[:, :, 1:-1, 1:-1] & beside_expensive


def _refine_boundaries_backward_reference(
    grad: Tensor,  # [B, C, rows, W]
    class_map: Tensor,  # [B, H, W]
    row_begin: int,
    row_end: int,
) -> Tensor:  # [B, C, H, W]
    """The adjoint: a refined pixel hands a ninth of its gradient to each pixel around it, any other keeps it."""
    height, width = class_map.shape[1:]
    work = torch.float64 if grad.dtype == torch.float64 else torch.float32
    whole = F.pad(grad.to(work), (0, 0, row_begin, height - row_end))
    if whole.numel() > 0 and height >= 3 and width >= 3:
        refined = F.pad(boundary(class_map), (1, 1, 1, 1))
        spread = F.avg_pool2d(whole * refined, 3, stride=1, padding=1)
        whole = whole * ~refined + spread
    return whole.to(grad.dtype).contiguous()
