"""A rectangle of a result, computed from as much of the image as it needs, with the bits of a run over the whole image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fastroute._arguments import LARGEST_IMAGE, whole
from fastroute.ops import _checks as check
from fastroute.patch.bands import Band, first_covering
from fastroute.patch.regions import Merging
from fastroute.runtime.protocols import Reader, Writer
from fastroute.runtime.rectangles import RectangleReader, RectangleWriter
from fastroute.runtime.rows import Span


@dataclass(frozen=True)
class Section:
    """Consecutive bands of one image, or some columns of them, as an image of their own.

    Regions never lie in two bands, nor in two blocks of patches, and the result of a patch does not depend on those that run
    with it, but for the last bits of some of PyTorch's own convolutions. So bands and blocks that are computed as a part of a
    section have the bits that they have in the whole image. Patches of the band above and of the block to the left also cover
    some of the result, so they are computed too.

    Attributes:
        tiles, across: the first tile row and one past the last, and the tile columns likewise.
        rows, columns: the pixels of the image that they cover.
        bands: the bands, with tile rows counted from the first of the section.
        shift: the row and the column of the whole result at which the section's own result begins.
    """

    tiles: Span
    across: Span
    rows: Span
    columns: Span
    bands: list[Band]
    shift: tuple[int, int]


def section_of(bands: Sequence[Band], merging: Merging, rows: Span, columns: Span) -> Section:
    """The smallest section from which a rectangle of the result follows.

    Args:
        bands: all bands of one image.
        merging: the grid of the image, and how its patches merge.
        rows, columns: of the result, the first and one past the last.
    """
    grid = merging.grid
    outputs = [band.output(grid) for band in bands]
    needed = [n for n, (top, bottom) in enumerate(outputs) if top < rows[1] and rows[0] < bottom]
    first, last = needed[0], needed[-1]
    above = first_covering(grid, bands[first].rows[0])
    while bands[first].rows[0] > above:
        first -= 1
    top, bottom = bands[first].rows[0], bands[last].rows[1]
    own = [replace(band, rows=(band.rows[0] - top, band.rows[1] - top)) for band in bands[first : last + 1]]
    tall = Band((0, 1), (top, bottom)).pixels(grid)
    left, right = _blocks_of(merging, columns)
    wide = grid.col_origins[left], min(grid.col_origins[right - 1] + grid.patch, grid.width)
    return Section((top, bottom), (left, right), tall, wide, own, (tall[0] * grid.scale, wide[0] * grid.scale))


def _blocks_of(merging: Merging, columns: Span) -> Span:
    """The tile columns of the blocks of patches that cover some columns of the result: the first and one past the last."""
    grid, merge = merging.grid, merging.merge
    covering = [
        n for n, x in enumerate(grid.col_origins) if x * grid.scale < columns[1] and columns[0] < (x + grid.patch) * grid.scale
    ]
    return covering[0] // merge * merge, min((covering[-1] // merge + 1) * merge, grid.cols)


@dataclass(frozen=True)
class SectionCall:
    """What a call for a rectangle of a result reads, writes and runs.

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
    rows: Sequence[int] | None,
    columns: Sequence[int] | None,
    class_map: Tensor | None,  # [1, rows, cols] or [rows, cols]
    merging: Merging,
    bands: Sequence[Band],
) -> SectionCall:
    """The call for `rows` and `columns` of the result of a whole image, by default all of them.

    Raises:
        ValueError: they are not those of a rectangle of the result in whole steps of the writer, or there is no class map of
            the whole image.
    """
    grid = merging.grid
    (height, width), step = grid.output_size, int(getattr(writer, "row_step", 1))
    tall, wide = _span(op, "rows", rows, height), _span(op, "columns", columns, width)
    if tall[0] % step or (tall[1] % step and tall[1] != height):
        raise ValueError(f"{op}: rows must be multiples of the writer's row_step, {step}, or end with the result; got {rows}")
    if class_map is None:
        asked = "rows" if rows is not None else "columns"
        raise ValueError(f"{op}: {asked} must come with the class_map of the whole image, so that all {asked} agree")
    check.tensor(op, "class_map", class_map)
    shape = (grid.rows, grid.cols)
    if tuple(class_map.shape) not in (shape, (1, *shape)):
        raise ValueError(f"{op}: class_map must be {shape} for this image; got {tuple(class_map.shape)}")
    section = section_of(bands, merging, tall, wide)
    part = RectangleWriter(writer, section.shift, tall, wide)
    begins = [section.shift[0] + band.output(grid)[0] for band in section.bands[1:]]
    if any(row % step for row in begins):
        part.held = step * reader.shape[0] * (wide[1] - wide[0]) * reader.dtype.itemsize
    tiles = class_map.view(shape)[slice(*section.tiles), slice(*section.across)]
    return SectionCall(RectangleReader(reader, section.rows, section.columns), part, tiles, section.bands)


def _span(op: str, name: str, given: Sequence[int] | None, size: int) -> Span:
    """Rows or columns of a result of `size` of them, by default all."""
    wrong = f"{op}: {name} must be two {name} of the result, the first and one past the last of {size}; got {given}"
    if given is not None and (not isinstance(given, Sequence) or len(given) != 2):
        raise ValueError(wrong)
    first, end = (0, size) if given is None else (whole(op, name, at, LARGEST_IMAGE, least=0) for at in given)
    if not first < end <= size:
        raise ValueError(wrong)
    return first, end
