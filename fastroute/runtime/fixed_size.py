"""Arguments and results that the routers of fixed sizes have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from fastroute._arguments import LARGEST_IMAGE, whole
from fastroute.ops import _checks as check


class FixedUpscaled(NamedTuple):
    """The result of an upscale at a fixed size: tensors on the device, which may still be computing them.

    Attributes:
        image: like the input: rank, dtype and device; `scale` times as high and wide.
        class_map: the branch of every patch, int64 (B, rows, cols), or of every pixel, uint8 (B, H, W); without B for an
            unbatched input.
        overflow: int64 (K,), patches of each class that found no slot of their class and ran in another branch; 0 for pixels.
    """

    image: Tensor
    class_map: Tensor
    overflow: Tensor


# So that programs that return one can be saved; what loads them must have imported it too.
_register_namedtuple(FixedUpscaled, serialized_type_name="fastroute.FixedUpscaled")


def check_shape(op: str, shape: Sequence[int], channels: int) -> tuple[int, ...]:
    """The shape of the images to come, once it has been checked.

    Raises:
        ValueError: `shape` is neither (B, C, H, W) nor (C, H, W), has another number of channels, or has a side of 0.
    """
    sizes = tuple(whole(op, "shape", n, LARGEST_IMAGE, least=0) for n in shape)
    if math.prod(sizes) > LARGEST_IMAGE >> 8:
        raise ValueError(f"{op}: shape must have at most {LARGEST_IMAGE >> 8} values, which are held at once; got {sizes}")
    if len(sizes) not in (3, 4) or sizes[-3] != channels or min(sizes) < 1:
        raise ValueError(f"{op}: shape must be (B, {channels}, H, W) or ({channels}, H, W), none 0; got {sizes}")
    return sizes


def check_fixed(
    op: str,
    image: Tensor,  # [B, C, H, W] or [C, H, W]
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """`image` as a batch (B, C, H, W).

    Raises:
        ValueError: `image` has another shape or device than the upscaler was made for.
        TypeError: `image` has another dtype or is not a tensor.
    """
    check.tensor(op, "image", image)
    if tuple(image.shape) != shape or image.dtype != dtype or image.device != device:
        expected, got = (str(d).removeprefix("torch.") for d in (dtype, image.dtype))
        message = (
            f"{op}: image must be {expected} {shape} on {device}, as this was made for; "
            f"got {got} {tuple(image.shape)} on {image.device}"
        )
        raise ValueError(message) if image.dtype == dtype else TypeError(message)
    return image if image.ndim == 4 else image[None]
