"""Results as zarr arrays of version 3 that several processes write, by rows of shards, and OME-Zarr pyramids of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastroute._extras import remedy
from fastroute.files.readers import ZARR, dtype_of, require

# OME-Zarr's own ending, and the version of its specification, https://ngff.openmicroscopy.org/0.5.
OME, OME_VERSION = ".ome.zarr", "0.5"
# The wanted side of a chunk, its bounds, and how many chunks lie side by side in a shard.
CHUNK, LEAST, MOST, PER_SHARD = 512, 128, 1024, 16
# The most bytes of the pixels of a block, a row of neighbouring shards that are computed together, if one shard has fewer.
BLOCK_BYTES = 40 << 20
# The longer side of the smallest level of a pyramid is at most this.
SMALLEST_LEVEL = 1024
COLOURS = ("FF0000", "00FF00", "0000FF")


@dataclass(frozen=True)
class Layout:
    """How a result lies in an array: in square chunks, of which a row forms shards, each a file.

    Attributes:
        shape: (C, H, W).
        dtype: NumPy's name of the type of the pixels.
        chunk: side of a chunk, and height of a shard.
        ome: whether the array is the first level of an OME-Zarr image, (C, H, W), instead of a plain array (H, W, C).
    """

    shape: tuple[int, int, int]
    dtype: str
    chunk: int
    ome: bool = False

    @classmethod
    def of(cls, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, rows: int) -> Layout:
        """The layout of a result at `path` that is computed in bands of a multiple of `rows` rows."""
        return cls(shape, str(dtype_of(dtype)), chunk_side(rows), is_ome(path))

    @classmethod
    def from_json(cls, known: dict[str, Any]) -> Layout:
        """The layout that `json` described."""
        return cls(**{**known, "shape": tuple(known["shape"])})

    def json(self) -> dict[str, Any]:
        """The layout as JSON has it."""
        return {**asdict(self), "shape": list(self.shape)}

    @property
    def bands(self) -> int:
        """The number of bands: of rows of shards."""
        return -(-self.shape[1] // self.chunk)

    def rows(self, first: int, end: int) -> tuple[int, int]:
        """The rows of pixels in bands `first` to `end`, excluding `end`."""
        return first * self.chunk, min(end * self.chunk, self.shape[1])

    @property
    def columns(self) -> list[tuple[int, int]]:
        """The columns of pixels of each block of a band, the first and one past the last."""
        width, wide = self.shape[2], max(BLOCK_BYTES // self.shard_bytes, 1) * PER_SHARD * self.chunk
        return [(left, min(left + wide, width)) for left in range(0, width, wide)]

    def blocks(self, bands: Iterable[int], column: int) -> list[int]:
        """The numbers of the blocks of some bands at one of `columns`."""
        across = len(self.columns)
        return [band * across + column for band in bands]

    def bands_at(self, blocks: Iterable[int], column: int) -> set[int]:
        """The bands whose block at one of `columns` is among `blocks`."""
        across = len(self.columns)
        return {block // across for block in blocks if block % across == column}

    def complete(self, blocks: Collection[int]) -> set[int]:
        """The bands whose blocks are all among `blocks`."""
        return set.intersection(*(self.bands_at(blocks, column) for column in range(len(self.columns))))

    @property
    def shard_bytes(self) -> int:
        """The bytes of the pixels of a shard."""
        return self.shape[0] * self.chunk * min(self.shape[2], PER_SHARD * self.chunk) * np.dtype(self.dtype).itemsize

    @property
    def levels(self) -> list[tuple[int, int, int]]:
        """The shapes of the levels of a pyramid, each half as high and wide as the one before."""
        shapes = [self.shape]
        while max(shapes[-1][1:]) > SMALLEST_LEVEL:
            channels, height, width = shapes[-1]
            shapes.append((channels, -(-height // 2), -(-width // 2)))
        return shapes


def is_ome(path: Path) -> bool:
    """Whether the name of a path asks for an OME-Zarr image."""
    return path.name.lower().endswith(OME)


def chunk_side(rows: int) -> int:
    """A side of chunks near the usual one: a divisor or multiple of `rows`, so that few bands lie in two chunks."""
    if rows <= CHUNK:
        return rows * (CHUNK // rows)
    for parts in range(1, rows // LEAST + 1):
        if rows % parts == 0 and rows // parts <= MOST:
            return rows // parts
    return CHUNK


def zarr3() -> Any:
    """The package zarr in a version that has shards.

    Raises:
        ImportError: it is missing or too old. The message says how to install it.
    """
    zarr = require("zarr")
    if int(zarr.__version__.split(".")[0]) < 3:
        raise ImportError(
            f"arrays with shards need zarr 3, and {zarr.__version__} is installed: with Python 3.11 or newer, {remedy('large')}"
        )
    return zarr


def create(folder: Path, layout: Layout) -> None:
    """Make the empty array, or the image with its first level, in the new folder `folder`."""
    zarr = zarr3()
    if layout.ome:
        zarr.create_group(str(folder), attributes={"ome": ome_metadata(layout)})
        _create_level(folder, layout, 0)
        return
    channels, height, width = layout.shape
    side, across = layout.chunk, _across(layout, width)
    zarr.create_array(
        str(folder), shape=(height, width, channels), chunks=(side, side, channels), shards=(side, across, channels),
        dtype=layout.dtype, dimension_names=("y", "x", "c"), fill_value=0,
    )  # fmt: skip


def _create_level(folder: Path, layout: Layout, level: int) -> Any:
    channels, height, width = layout.levels[level]
    side = layout.chunk
    return zarr3().create_array(
        str(folder), name=str(level), shape=(channels, height, width), chunks=(1, side, side),
        shards=(channels, side, _across(layout, width)), dtype=layout.dtype, dimension_names=("c", "y", "x"), fill_value=0,
        overwrite=True,
    )  # fmt: skip


def _across(layout: Layout, width: int) -> int:
    """The columns of a shard: no more than needed."""
    return layout.chunk * min(PER_SHARD, -(-width // layout.chunk))


def ome_metadata(layout: Layout) -> dict[str, Any]:
    """The attribute "ome" of an image: its axes, the levels and where they lie, and how its channels are shown."""
    datasets = []
    for level in range(len(layout.levels)):
        factor = 2.0**level
        # The centre of a pixel of a level is that of the pixels it is the mean of.
        moves = {"type": "translation", "translation": [0.0, (factor - 1) / 2, (factor - 1) / 2]}
        scales = {"type": "scale", "scale": [1.0, factor, factor]}
        datasets.append({"path": str(level), "coordinateTransformations": [scales, moves]})
    axes = [{"name": "c", "type": "channel"}, {"name": "y", "type": "space"}, {"name": "x", "type": "space"}]
    kind = np.dtype(layout.dtype)
    most = 1.0 if kind.kind == "f" else float(np.iinfo(kind).max)
    window = {"min": 0.0, "max": most, "start": 0.0, "end": most}
    # An alpha channel is there, but not shown as a colour.
    colours = COLOURS if layout.shape[0] > 2 else ("FFFFFF",)
    colours = (*colours, *["FFFFFF"] * (layout.shape[0] - len(colours)))
    shown = 3 if layout.shape[0] > 2 else 1
    channels = [{"color": colour, "window": window, "active": n < shown} for n, colour in enumerate(colours)]
    return {
        "version": OME_VERSION,
        "multiscales": [{"axes": axes, "datasets": datasets, "type": "mean"}],
        "omero": {"channels": channels},
    }


class ArrayRows:
    """Writes rows of whole shards, each durably.

    Args:
        folder: the folder in which `create` has made the array.
        layout: its layout.
        done: is called with the numbers of bands whose shards, of the columns that are written, have been stored.
    """

    def __init__(self, folder: Path, layout: Layout, done: Callable[[Sequence[int]], object] = lambda numbers: None) -> None:
        self.layout, self.done, self.row_step = layout, done, layout.chunk
        self.folder = folder / "0" if layout.ome else folder
        self.array = zarr3().open_array(str(self.folder), mode="r+")

    def write(self, y: int, x: int, pixels: Tensor) -> None:  # [C, h, w]
        """See :class:`fastroute.Writer`."""
        side, across = self.row_step, _across(self.layout, self.layout.shape[2])
        for top in range(0, pixels.shape[1], side):
            part, number = pixels[:, top : top + side].numpy(), (y + top) // side
            row = self.folder / "c" / ("0" if self.layout.ome else "") / str(number)
            for left in range(0, pixels.shape[2], across):
                # Shard by shard, so that only one is encoded at a time.
                shard = row / str((x + left) // across)
                # A process that was killed may have left half of it, under a name of zarr's own.
                for file in (*row.glob(f"{shard.name}.*"), shard):
                    shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
                write_shard(self.array, y + top, x + left, part[:, :, left : left + across], self.layout)
                # A part counts as done only once the disk has it.
                _flush(shard)
            self.done([number])


def write_shard(array: Any, y: int, x: int, pixels: np.ndarray, layout: Layout) -> None:  # [C, h, w]
    """Write some pixels at their place."""
    here = slice(y, y + pixels.shape[1]), slice(x, x + pixels.shape[2])
    if layout.ome:
        array[:, here[0], here[1]] = pixels
    else:
        array[here] = np.moveaxis(pixels, 0, 2)


def _flush(path: Path) -> None:
    """Wait until the disk has a file, or the files below a folder. Shards of nothing but zeros have none."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


class ArrayPixels:
    """Rows of an array that `create` has made, as (C, h, W).

    Args:
        folder, layout: see :class:`ArrayRows`.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.layout = layout
        self.array = zarr3().open_array(str(folder / "0" if layout.ome else folder), mode="r")

    def read(self, first: int, end: int) -> np.ndarray:  # [C, end - first, W]
        """Rows `first` to `end`, excluding `end`.

        Raises:
            ValueError: they are damaged.
        """
        try:
            pixels = np.asarray(self.array[:, first:end] if self.layout.ome else self.array[first:end])
        except ValueError as error:
            where = f"rows {first} to {end - 1} of {self.array.store_path}"
            raise ValueError(f"{where} are damaged ({error}); run the shards again without --resume") from error
        return pixels if self.layout.ome else np.ascontiguousarray(np.moveaxis(pixels, 2, 0))


def add_levels(folder: Path, layout: Layout) -> None:
    """Add the smaller levels of the pyramid to the image in `folder`, each from the one before, a row of shards at a time."""
    larger, side = zarr3().open_array(str(folder / "0"), mode="r"), layout.chunk
    for level, (_, height, width) in enumerate(layout.levels[1:], start=1):
        array, across = _create_level(folder, layout, level), _across(layout, width)
        for top in range(0, height, side):
            for left in range(0, width, across):
                bottom, right = min(top + side, height), min(left + across, width)
                array[:, top:bottom, left:right] = halved(np.asarray(larger[:, 2 * top : 2 * bottom, 2 * left : 2 * right]))
        larger = array


def halved(pixels: np.ndarray) -> np.ndarray:  # [C, H, W] -> [C, H / 2, W / 2], rounded up
    """The means of 2 x 2 pixels, rounded for integers; the last row and column of an odd size count twice."""
    pixels = np.pad(pixels, ((0, 0), (0, pixels.shape[1] % 2), (0, pixels.shape[2] % 2)), mode="edge")
    work = np.float32 if pixels.dtype.kind == "f" else np.uint32
    rows = pixels[:, 0::2].astype(work) + pixels[:, 1::2]
    total = rows[:, :, 0::2] + rows[:, :, 1::2]
    return ((total / 4) if work is np.float32 else ((total + 2) >> 2)).astype(pixels.dtype)


def is_zarr(path: Path) -> bool:
    """Whether a path names an array."""
    return path.suffix.lower() == ZARR
