"""Some rows of a result, computed from as much of the image as they need, with the bits of a run over the whole image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fastroute._arguments import LARGEST_IMAGE, whole
from fastroute.grid import TileGrid
from fastroute.ops import _checks as check
from fastroute.patch.bands import Band, first_covering
from fastroute.runtime.protocols import Reader, Writer
from fastroute.runtime.row_ranges import RowsReader, RowsWriter
from fastroute.runtime.rows import Span


@dataclass(frozen=True)
class Section:
    """Consecutive bands of one image, as an image of their own.

    Batches never hold patches of two bands, and regions never lie in two. So a band that is computed as a part of a section has
    the bits that it has in the whole image. Patches of the band before the first also cover rows of it, so it is computed too.

    Attributes:
        tiles: first tile row and one past the last.
        pixels: the rows of the image that these tile rows cover.
        bands: the bands, with tile rows counted from the first of the section.
        shift: the row of the whole result that the first row of the section's own result is.
    """

    tiles: Span
    pixels: Span
    bands: list[Band]
    shift: int


def section_of(bands: Sequence[Band], grid: TileGrid, rows: Span) -> Section:
    """The smallest section from which `rows` of the result follow, excluding the last.

    Args:
        bands: all bands of one image.
        grid: the grid of the image.
        rows: first row of the result and one past the last.
    """
    outputs = [band.output(grid) for band in bands]
    needed = [n for n, (top, bottom) in enumerate(outputs) if top < rows[1] and rows[0] < bottom]
    first, last = needed[0], needed[-1]
    above = first_covering(grid, bands[first].rows[0])
    while bands[first].rows[0] > above:
        first -= 1
    top, bottom = bands[first].rows[0], bands[last].rows[1]
    pixels = Band((0, 1), (top, bottom)).pixels(grid)
    own = [replace(band, rows=(band.rows[0] - top, band.rows[1] - top)) for band in bands[first : last + 1]]
    return Section((top, bottom), pixels, own, pixels[0] * grid.scale)


@dataclass(frozen=True)
class SectionCall:
    """What a call for some rows of a result reads, writes and runs.

    Attributes:
        reader, writer: of the section.
        class_map: its classes, (rows, cols).
        bands: its bands.
    """

    reader: Reader
    writer: Writer
    class_map: Tensor
    bands: list[Band]


def sectioned(
    op: str,
    reader: Reader,
    writer: Writer,
    rows: Sequence[int],
    class_map: Tensor | None,  # [1, rows, cols] or [rows, cols]
    grid: TileGrid,
    bands: Sequence[Band],
) -> SectionCall:
    """The call for `rows` of the result of a whole image.

    Raises:
        ValueError: `rows` are not rows of the result in whole steps of the writer, or there is no class map of the whole image.
    """
    height, step = grid.output_size[0], int(getattr(writer, "row_step", 1))
    first, end = (whole(op, "rows", row, LARGEST_IMAGE, least=0) for row in rows)
    if not first < end <= height:
        raise ValueError(f"{op}: rows must be two rows of the result, the first and one past the last of {height}; got {rows}")
    if first % step or (end % step and end != height):
        raise ValueError(f"{op}: rows must be multiples of the writer's row_step, {step}, or end with the result; got {rows}")
    if class_map is None:
        raise ValueError(f"{op}: rows must come with the class_map of the whole image, so that all rows agree")
    check.tensor(op, "class_map", class_map)
    shape = (grid.rows, grid.cols)
    if tuple(class_map.shape) not in (shape, (1, *shape)):
        raise ValueError(f"{op}: class_map must be {shape} for this image; got {tuple(class_map.shape)}")
    section = section_of(bands, grid, (first, end))
    part = RowsWriter(writer, section.shift, (first, end))
    begins = [section.shift + band.output(grid)[0] for band in section.bands[1:]]
    if any(row % step for row in begins):
        part.held = step * reader.shape[0] * grid.output_size[1] * reader.dtype.itemsize
    tiles = class_map.view(shape)[section.tiles[0] : section.tiles[1]]
    return SectionCall(RowsReader(reader, *section.pixels), part, tiles, section.bands)
