"""The grid of the patches of an image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

COVERAGES = ("full", "crop")
# The overlap of neighbouring patches in LR pixels. ClassSR's patches are 32 pixels wide and 28 apart.
OVERLAP = 4


def usual_stride(patch: int) -> int:
    """The stride of patches that overlap by 4 pixels, or by a quarter if they are narrower than 16: 28 for 32."""
    return patch - min(OVERLAP, patch // 4)


@dataclass(frozen=True)
class TileGrid:
    """Overlapping square patches over an image, rows before columns.

    The origin of tile row i is ``min(i * stride, max(height - patch, 0))``: the last row and column are shifted inward, so that
    every pixel is covered and no patch reaches outside the image unless the image is smaller than a patch.

    Args:
        height, width: size of the LR image in pixels.
        patch: side of a patch in LR pixels.
        stride: distance of two patches in LR pixels, at most `patch`.
        scale: factor between input and output patches: an output patch is ``patch * scale`` wide.
        coverage: "full" covers every pixel; "crop" drops the remainder below and to the right of the last whole stride, as the
            published ClassSR code does.

    Raises:
        ValueError: a size below 1, a stride above the patch, an unknown coverage, or "crop" on an image smaller than one
            patch.

    Example:
        >>> grid = TileGrid(540, 960, patch=32, stride=28, scale=4)
        >>> grid.rows, grid.cols, grid.num_patches
        (20, 35, 700)
    """

    height: int
    width: int
    patch: int = 32
    stride: int = 28
    scale: int = 1
    coverage: str = "full"

    def __post_init__(self) -> None:
        for name in ("height", "width", "patch", "stride", "scale"):
            value = getattr(self, name)
            if isinstance(value, (bool, float, str)) or value is None:
                raise TypeError(f"TileGrid: {name} must be an integer; got {value!r}")
            if value < 1:
                raise ValueError(f"TileGrid: {name} must be at least 1; got {value}")
        if self.stride > self.patch:
            raise ValueError(
                f"TileGrid: stride must be at most patch ({self.patch}), or pixels between patches are lost; got {self.stride}"
            )
        if self.coverage not in COVERAGES:
            raise ValueError(f"TileGrid: coverage must be one of {COVERAGES}; got {self.coverage!r}")
        if self.crop and (self.height < self.patch or self.width < self.patch):
            raise ValueError(
                f"TileGrid: coverage='crop' needs an image of at least {self.patch} x {self.patch} pixels; "
                f"got {self.height} x {self.width}; use coverage='full'"
            )

    @property
    def crop(self) -> bool:
        """Whether the remainder is dropped."""
        return self.coverage == "crop"

    @property
    def rows(self) -> int:
        """The number of tile rows."""
        return tile_count(self.height, self.patch, self.stride, self.crop)

    @property
    def cols(self) -> int:
        """The number of tile columns."""
        return tile_count(self.width, self.patch, self.stride, self.crop)

    @property
    def num_patches(self) -> int:
        """The number of patches per image."""
        return self.rows * self.cols

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the stitched image in output pixels."""
        return (
            covered_size(self.height, self.patch, self.stride, self.crop) * self.scale,
            covered_size(self.width, self.patch, self.stride, self.crop) * self.scale,
        )

    @property
    def row_origins(self) -> list[int]:
        """The first LR row of each tile row."""
        return _origins(self.height, self.patch, self.stride, self.crop)

    @property
    def col_origins(self) -> list[int]:
        """The first LR column of each tile column."""
        return _origins(self.width, self.patch, self.stride, self.crop)

    def region_shapes(self, merge: int) -> list[tuple[int, int]]:
        """Height and width in LR pixels of every shape of region that :func:`fastroute.merge_regions` makes.

        Shapes are numbered by row side first, then by column side, each in the order of :func:`region_sides`. A shape that does
        not occur in this grid is (0, 0).

        Args:
            merge: side of a block in patches: 1, 2, 4 or 8.
        """
        heights = region_sides(self.height, self.patch, self.stride, self.crop, merge)
        widths = region_sides(self.width, self.patch, self.stride, self.crop, merge)
        return [(h, w) if h and w else (0, 0) for h in heights for w in widths]

    def origins(self) -> Tensor:
        """The top left corner of every patch: int64 (num_patches, 2), row and column in LR pixels."""
        rows, cols = torch.tensor(self.row_origins), torch.tensor(self.col_origins)
        return torch.cartesian_prod(rows, cols).view(-1, 2)


def tile_count(size: int, patch: int, stride: int, crop: bool) -> int:
    """The number of tiles along one axis."""
    if size <= patch:
        return 1
    return (size - patch) // stride + 1 if crop else (size - patch + stride - 1) // stride + 1


def tile_origins(size: int, patch: int, stride: int, crop: bool) -> list[int]:
    """The first pixel of each tile along one axis."""
    last = max(size - patch, 0)
    return [min(i * stride, last) for i in range(tile_count(size, patch, stride, crop))]


def region_sides(size: int, patch: int, stride: int, crop: bool, merge: int) -> list[int]:
    """The pixels that a region spans along one axis, by its side code; 0 for a code that does not occur.

    Code 2 l is a side of 2^l whole tiles. Code 2 l + 1 is a shorter side at the end of the axis: it has fewer tiles, but more
    than 2^(l - 1), or its last tile is shifted inward.
    """
    origins = _origins(size, patch, stride, crop)
    count, sides = len(origins), []
    for level in range(merge.bit_length()):
        first = (count - 1) >> level << level
        whole, last = patch + (2**level - 1) * stride, origins[-1] + patch - origins[first]
        short = last < whole and 2 * (count - first) > 2**level
        sides += [whole if count >= 2**level and not (short and first == 0) else 0, last if short else 0]
    return sides


# Cached, because it is needed again and again while an image is routed band by band.
_kept_origins = lru_cache(maxsize=64)(tile_origins)


def _origins(size: int, patch: int, stride: int, crop: bool) -> list[int]:
    # The compiler ignores the cache, and would warn about that.
    found = tile_origins if torch.compiler.is_compiling() else _kept_origins
    return list(found(size, patch, stride, crop))


def covered_size(size: int, patch: int, stride: int, crop: bool) -> int:
    """The pixels that the stitched output spans along one axis."""
    return (tile_count(size, patch, stride, crop) - 1) * stride + patch if crop else size
