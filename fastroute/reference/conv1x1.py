"""Reference of `conv1x1`: one matrix product over the joined channels."""

from __future__ import annotations

import torch
from torch import Tensor


def conv1x1_reference(
    images: list[Tensor],  # [B, C, H, W] each
    weight: Tensor,  # [O, C of all images]
    bias: Tensor | None,  # [O]
    slope: Tensor | None,  # [O]
    residual: Tensor | None,  # [B, O, H, W]
) -> Tensor:  # [B, O, H, W], channels_last
    """See :func:`fastroute.conv1x1`.

    y = W x + bias + residual at every pixel, x the channels of all images one after the other, then slope · y where y is
    negative. In bfloat16 all of it is computed in float32 and rounded at the end.
    """
    if images[0].dtype == torch.bfloat16:
        rest = (None if x is None else x.float() for x in (bias, slope, residual))
        return conv1x1_reference([x.float() for x in images], weight.float(), *rest).to(torch.bfloat16)
    y = torch.cat(images, dim=1).permute(0, 2, 3, 1) @ weight.t()
    if bias is not None:
        y = y + bias
    y = y.permute(0, 3, 1, 2)
    if residual is not None:
        y = y + residual
    if slope is not None:
        y = torch.where(y > 0, y, y * slope[:, None, None])
    return y.contiguous(memory_format=torch.channels_last)
