"""Reference of `refine_boundaries`: light pixels beside dearer ones become the mean of their neighbourhood."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def refine_boundaries_reference(
    image: Tensor,  # [B, C, H, W]
    class_map: Tensor,  # [B, H, W]
) -> Tensor:  # [B, C, H, W]
    """See :func:`fastroute.refine_boundaries`.

    A pixel that is not in the outermost row or column, is of class 0 and has a pixel of another class among its 8
    neighbours becomes the mean of the 3 x 3 pixels of `image` around it, itself included. All others are copied, so the
    published padding is never read. Reads `image` only, never a refined pixel: the order does not matter.
    """
    output = image.clone(memory_format=torch.contiguous_format)
    if image.numel() == 0 or image.shape[2] < 3 or image.shape[3] < 3:
        return output
    work = torch.float64 if image.dtype == torch.float64 else torch.float32
    mean = F.avg_pool2d(image.to(work), 3, stride=1).to(image.dtype)
    dearer = (class_map != 0)[:, None]
    beside_dearer = F.max_pool2d(dearer.to(torch.float32), 3, stride=1) > 0
    boundary = ~dearer[:, :, 1:-1, 1:-1] & beside_dearer
    output[:, :, 1:-1, 1:-1] = torch.where(boundary, mean, image[:, :, 1:-1, 1:-1])
    return output
