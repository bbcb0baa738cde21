"""The source and the destination of a streamed image: two small protocols, and adapters for arrays."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor


@runtime_checkable
class Reader(Protocol):
    """An image that is read in rectangles.

    Attributes:
        shape: (C, H, W).
        dtype: type of the pixels that `read` returns: uint8, uint16, or floating in [0, 1], which is not checked.
    """

    @property
    def shape(self) -> tuple[int, int, int]: ...  # noqa: D102

    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102

    def read(self, y0: int, y1: int, x0: int, x1: int) -> Tensor:  # [C, y1 - y0, x1 - x0]
        """The pixels of rows y0 to y1 and columns x0 to x1, excluding y1 and x1."""


@runtime_checkable
class Writer(Protocol):
    """An image that is written in bands of rows from top to bottom, by a single thread other than the caller's.

    An attribute `row_step`, such as the height of a tile, requests bands that begin and end at a multiple of it, except for the
    end of the last one.
    """

    def write(self, y: int, x: int, pixels: Tensor) -> None:  # [C, h, w]
        """Store `pixels`, on the CPU, with their top left corner at (y, x). The tensor is overwritten after the call."""


class ArrayReader:
    """A NumPy or zarr array, a memory map, or anything indexed like them, as a :class:`Reader`.

    Args:
        array: (H, W, C), (H, W), or with `channels_first` (C, H, W); anything with a shape, a dtype and slices.
        channels_first: whether the channels are the first dimension.
    """

    def __init__(self, array: Any, channels_first: bool = False) -> None:
        rank = len(array.shape)
        if rank != 3 and (rank != 2 or channels_first):
            wanted = "(C, H, W)" if channels_first else "(H, W, C) or (H, W)"
            raise ValueError(f"ArrayReader: array must be {wanted}; got {tuple(array.shape)}")
        self.array, self.channels_first = array, channels_first
        height, width, channels = (*array.shape, 1)[:3]
        if channels_first:
            channels, height, width = array.shape
        self.shape = (int(channels), int(height), int(width))
        self.dtype = torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype

    def read(self, y0: int, y1: int, x0: int, x1: int) -> Tensor:  # [C, y1 - y0, x1 - x0]
        """See :class:`Reader`."""
        if self.channels_first:
            return torch.from_numpy(np.array(self.array[:, y0:y1, x0:x1]))
        pixels = torch.from_numpy(np.array(self.array[y0:y1, x0:x1]))
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


class ArrayWriter:
    """A NumPy or zarr array or a memory map as a :class:`Writer`.

    Args:
        array: (H, W, C), (H, W), or with `channels_first` (C, H, W).
        channels_first: whether the channels are the first dimension.
        row_step: number of rows that are stored together, such as the height of a zarr array's chunks.
    """

    def __init__(self, array: Any, channels_first: bool = False, row_step: int = 1) -> None:
        self.array, self.channels_first, self.row_step = array, channels_first, row_step

    def write(self, y: int, x: int, pixels: Tensor) -> None:  # [C, h, w]
        """See :class:`Writer`."""
        here = slice(y, y + pixels.shape[1]), slice(x, x + pixels.shape[2])
        if self.channels_first:
            self.array[:, here[0], here[1]] = pixels.numpy()
        elif len(self.array.shape) == 2:
            self.array[here] = pixels[0].numpy()
        else:
            self.array[here] = pixels.permute(1, 2, 0).numpy()


def check_reader(op: str, reader: Reader, channels: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """Check that `reader` has images that a router takes.

    Raises:
        TypeError: `reader` lacks a part of :class:`Reader`, or has an unsupported dtype.
        ValueError: the image has another number of channels or no pixel.
    """
    if not isinstance(reader, Reader):
        raise TypeError(f"{op}: reader must have shape, dtype and read(y0, y1, x0, x1); got {type(reader).__name__}")
    shape = tuple(reader.shape)
    if len(shape) != 3 or shape[0] != channels:
        raise ValueError(f"{op}: reader must give ({channels}, H, W); its shape is {shape}")
    if 0 in shape:
        raise ValueError(f"{op}: reader must have at least one pixel; its shape is {shape}")
    if reader.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: reader must give one of {names}; got {str(reader.dtype).removeprefix('torch.')}")
