"""TIFF: strips and tiles through tifffile, with any compression, some or all of them at a time."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import tifffile

from fastroute.io import exif as exif_blocks
from fastroute.io.count import is_picture
from fastroute.io.decoded import UNDONE, Limits, check_size, take_xmp
from fastroute.io.metadata import resolution
from fastroute.io.picture import Metadata, Origin
from fastroute.io.plain import eight_bits, open_plugin
from fastroute.io.samples import COLOURS, Meaning

XMP, IPTC, ORIENTATION, RESOLUTION_UNIT, DESCRIPTION = 700, 33723, 274, 296, 270
INCH, CENTIMETRE = 2, 3
SHAPED = (b'{"shape"', b"shape=(")
# Programs that store the sizes of a stack of pictures in the description.
STACKS = {b"ImageJ=": "ImageJ", b"<?xml": "OME", b"<OME": "OME", b"SCANIMAGE": "ScanImage"}
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, SEPARATED, YCBCR, CIELAB = 0, 1, 2, 3, 5, 6, 8
KINDS = {WHITE_IS_ZERO: "gray", BLACK_IS_ZERO: "gray", RGB: "rgb", PALETTE: "palette", SEPARATED: "cmyk"}
JPEG = (6, 7, 33007, 34892)
UNSPECIFIED, ASSOCIATED, UNASSOCIATED = 0, 1, 2
LOSSY = (*JPEG, 50001, 50002, 52546, 34712, 33003, 33004, 33005, 34887, 34925)
# No compression reduces anything that is not a single colour by more than this factor.
MOST_RATIO, MUCH = 8192, 1 << 29
MOST_PAGES = 1 << 16
# The number of pixels of a strip or tile up to which it is not suspicious, however small the picture is.
LARGE_PART = 1 << 24


class TiffSource:
    """The first picture of a TIFF file, of which only the strips or tiles under a rectangle are decoded.

    Args:
        file: the open file.
        limit: limits beyond which the file is refused.
        white: value of white in floating-point samples.

    Attributes:
        height, width: size of the pixels as they are stored.
        meaning: meaning of a pixel's samples.
        metadata, orientation, origin: statements of the file.
        held: bytes of decoded pixels that are kept from one rectangle to the next.
    """

    def __init__(self, file: tifffile.TiffFile, limit: Limits, white: float) -> None:
        check_chain(file)
        pages = list(file.pages)
        pictures = [page for page in pages if is_picture(page)] or pages[:1]
        if not pictures:
            raise ValueError("it is damaged: it has no page")
        size = file.filehandle.size
        if any(begin + n > size for p in pictures for begin, n in zip(p.dataoffsets, p.databytecounts, strict=False)):
            raise ValueError("it is cut short")
        page: Any = pictures[0].aspage()
        self.page = page
        self.height, self.width = int(page.imagelength), int(page.imagewidth)
        check_size(self.width, self.height, Limits(limit.pixels))
        if page.imagedepth > 1:
            raise ValueError("volumes are not supported")
        notes = [] if len(pictures) == 1 else [f"of {len(pictures)} pages, the first was read"]
        self.metadata, self.orientation = _metadata(file, page, notes)
        self.whole: np.ndarray | None = None
        if int(page.photometric) in (YCBCR, CIELAB) and int(page.compression) not in JPEG:
            check_size(self.width, self.height, limit)
            self._decode_whole(file, pages.index(pictures[0]))
        else:
            self.meaning = _meaning(page, white, self.metadata.icc, notes)
            self._lay_out()
        if self.meaning.kind == "cmyk":
            self.metadata = Metadata(**{**vars(self.metadata), "icc": None})
            notes.append("CMYK was converted to sRGB")
        lossless = int(page.compression) not in LOSSY
        self.origin = Origin("TIFF", lossless, len(pictures), tuple(notes))

    def read(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:  # [y1 - y0, x1 - x0, C]
        """The pixels of rows y0 to y1 and columns x0 to x1, excluding y1 and x1."""
        if self.whole is not None:
            return self.whole[y0:y1, x0:x1]
        samples = np.empty((y1 - y0, x1 - x0, self.samples), self.dtype)
        for plane in range(self.planes):
            part = samples if self.planes == 1 else samples[:, :, plane : plane + 1]
            for row in range(y0 // self.rows, -(-y1 // self.rows)):
                top, bottom = max(y0, row * self.rows), min(y1, (row + 1) * self.rows)
                for column in range(x0 // self.columns, -(-x1 // self.columns)):
                    left, right = max(x0, column * self.columns), min(x1, (column + 1) * self.columns)
                    number = (plane * self.down + row) * self.across + column
                    ours = slice(top - row * self.rows, bottom - row * self.rows)
                    found = self._segment(number, ours)[:, left - column * self.columns : right - column * self.columns]
                    part[top - y0 : bottom - y0, left - x0 : right - x0] = found
        return self.meaning.pixels(samples)

    def check_whole(self) -> None:
        """Refuse to hold all pixels of a damaged file that seems to have very many."""
        size = self.height * self.width * self.samples * self.dtype.itemsize if self.whole is None else 0
        if size > MUCH and size > MOST_RATIO * self.page.parent.filehandle.size:
            raise ValueError(UNDONE.format(self.width, self.height))

    def _lay_out(self) -> None:
        page = self.page
        self.planes = page.samplesperpixel if int(page.planarconfig) == 2 and page.samplesperpixel > 1 else 1
        self.samples = page.samplesperpixel
        self.dtype = np.dtype(np.uint8) if page.dtype.kind == "b" else page.dtype
        if page.is_tiled:
            self.rows, self.columns = int(page.tilelength), int(page.tilewidth)
        else:
            self.rows, self.columns = min(int(page.rowsperstrip), self.height), self.width
        if self.rows < 1 or self.columns < 1 or self.rows * self.columns > max(4 * self.height * self.width, LARGE_PART):
            raise ValueError(f"it is damaged: its parts are {self.columns} x {self.rows} pixels")
        self.down, self.across = -(-self.height // self.rows), -(-self.width // self.columns)
        count = self.planes * self.down * self.across
        if min(len(page.dataoffsets), len(page.databytecounts)) < count:
            raise ValueError(f"it is damaged: of {count} strips or tiles it names {len(page.dataoffsets)}")
        # Read now, because reading them later would move the position in the file.
        self.decode = page.decode
        self.tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
        bits = page.bitspersample
        self.plain = (
            not page.is_tiled and int(page.compression) == 1 and int(page.predictor) == 1 and int(page.fillorder) == 1
            and isinstance(bits, int) and bits == 8 * page.dtype.itemsize and page.dtype.kind in "uf"
        )  # fmt: skip
        self.row_bytes = self.width * (self.samples if self.planes == 1 else 1) * self.dtype.itemsize
        self.kept: tuple[int, np.ndarray] | None = None
        self.held = 0 if self.plain or page.is_tiled else self.rows * self.width * self.samples * self.dtype.itemsize

    def _segment(self, number: int, rows: slice) -> np.ndarray:  # -> [rows, columns, samples of a plane]
        """The given rows of a strip or tile."""
        channels = self.samples if self.planes == 1 else 1
        if self.kept is not None and self.kept[0] == number:
            return self.kept[1][rows]
        file, page = self.page.parent.filehandle, self.page
        offset, length = page.dataoffsets[number], page.databytecounts[number]
        if length == 0:
            # Sparse files leave out strips and tiles of a single colour.
            return np.full((rows.stop - rows.start, self.columns, channels), page.nodata, dtype=self.dtype)
        if self.plain:
            size = (rows.stop - rows.start) * self.row_bytes
            if rows.stop * self.row_bytes > length:
                raise ValueError("it is cut short")
            file.seek(offset + rows.start * self.row_bytes)
            data = np.frombuffer(_exactly(file, size), self.dtype.newbyteorder(page.parent.byteorder))
            return data.reshape(rows.stop - rows.start, self.width, channels)
        file.seek(offset)
        decoded = self.decode(_exactly(file, length), number, **self.tables)[0]
        if decoded is None or decoded.shape[0] != 1 or decoded.shape[3] != channels or decoded.shape[1] < rows.stop:
            raise ValueError("it is damaged: a strip or tile has another size than it should")
        segment: np.ndarray = decoded[0]
        if not page.is_tiled and self.planes == 1:
            self.kept = (number, segment)
        return segment[rows]

    def _decode_whole(self, file: tifffile.TiffFile, index: int) -> None:
        """Convert kinds of colours that tifffile leaves unchanged, at 8 bits."""
        if self.page.bitspersample != 8:
            raise ValueError(f"{self.page.photometric.name} of {self.page.bitspersample} bits is not supported; 8 are")
        handle = file.filehandle
        handle.seek(0)
        with open_plugin(handle.read(), "TIFF") as image:
            image.seek(index)
            if image.mode not in ("RGB", "RGBA", "RGBX", "YCbCr", "LAB", "L", "LA"):
                raise ValueError(f"{self.page.photometric.name} as {image.mode} is not supported")
            image.load()
            self.whole = eight_bits(image)
        if self.whole.size != self.height * self.width * self.whole.shape[2]:
            raise ValueError("it is damaged: its pixels have another size than it says")
        # Pillow turns TIFFs upright by itself.
        self.height, self.width, self.orientation = *self.whole.shape[:2], 1
        channels = self.whole.shape[2]
        self.meaning = Meaning("gray" if channels < 3 else "rgb", 8, alpha=channels - 1 if channels in (2, 4) else None)
        self.samples, self.dtype, self.held = channels, np.dtype(np.uint8), self.whole.nbytes


def check_chain(file: tifffile.TiffFile) -> None:
    """Refuse a file whose directories point beyond its end: it was cut, and tifffile would ignore the rest."""
    handle: Any = file.filehandle
    head, step, link = ("Q", 20, "Q") if file.is_bigtiff else ("H", 12, "I")
    size, seen = handle.size, set[int]()
    handle.seek(8 if file.is_bigtiff else 4)
    (at,) = struct.unpack(file.byteorder + link, _exactly(handle, struct.calcsize(link)))
    while at and len(seen) < MOST_PAGES:
        if at in seen or at + step > size:
            raise ValueError("it is damaged or cut short: a directory lies beyond its end")
        seen.add(at)
        handle.seek(at)
        (count,) = struct.unpack(file.byteorder + head, _exactly(handle, struct.calcsize(head)))
        handle.seek(at + struct.calcsize(head) + count * step)
        (at,) = struct.unpack(file.byteorder + link, _exactly(handle, struct.calcsize(link)))


def _meaning(page: Any, white: float, icc: bytes | None, notes: list[str]) -> Meaning:
    photometric, count, kind = int(page.photometric), int(page.samplesperpixel), page.dtype.kind if page.dtype else "?"
    if photometric == YCBCR:
        photometric = RGB
    colours = KINDS.get(photometric)
    bits = page.bitspersample
    if isinstance(bits, tuple):
        # Such as 5, 6 and 5, which tifffile scales to 8.
        bits = 8 if page.dtype == np.uint8 and len(bits) == 3 else 0 if kind == "f" else 99
    what = f"a TIFF of {count} channels of {page.dtype or 'no known type'}, {getattr(page.photometric, 'name', photometric)},"
    if kind == "i":
        raise ValueError(f"{what} has signed samples, which are not supported; unsigned ones and floating point are")
    if kind == "f":
        bits = 0
    if colours is None or kind not in "ubf" or not (kind == "f" or 1 <= bits <= 16) or count < COLOURS[colours]:
        raise ValueError(f"{what} is not supported; gray, RGB, palettes and CMYK are, of 1 to 16 bits or floating point")
    extra = [int(sample) for sample in page.extrasamples][: count - COLOURS[colours]]
    alpha = next((i for i, sample in enumerate(extra) if sample in (ASSOCIATED, UNASSOCIATED)), None)
    left = count - COLOURS[colours] - (alpha is not None)
    if colours == "gray" and alpha is None and left > 1:
        raise ValueError(f"{what} is not supported: it does not say what its channels are")
    if left:
        notes.append(f"channels that the file calls neither colour nor transparency were left out: {left}")
    palette = _palette(page) if colours == "palette" else None
    if colours == "palette" and kind == "f":
        raise ValueError(f"{what} is not supported: a palette needs integers")
    return Meaning(
        colours, bits, photometric == WHITE_IS_ZERO,
        None if alpha is None else COLOURS[colours] + alpha, alpha is not None and extra[alpha] == ASSOCIATED, palette,
        icc if colours == "cmyk" else None, white,
    )  # fmt: skip


def _palette(page: Any) -> np.ndarray:  # -> [n, 3] uint8 or uint16
    if page.colormap is None:
        raise ValueError("it is damaged: its palette is missing")
    colours = np.asarray(page.colormap).reshape(3, -1).T.astype(np.uint16)
    if colours.max(initial=0) < 256:
        # Some programs store 8 bits as they are.
        return colours.astype(np.uint8)
    if not (colours % 257).any():
        return (colours // 257).astype(np.uint8)
    if not (colours % 256).any():
        return (colours // 256).astype(np.uint8)
    return colours


def _metadata(file: tifffile.TiffFile, page: Any, notes: list[str]) -> tuple[Metadata, int]:
    order = file.byteorder
    handle: Any = file.filehandle
    raw: dict[int, exif_blocks.Entry] = {}
    exif = None
    try:
        directory = exif_blocks.read_directory(handle, page.offset, order, file.is_bigtiff)
        raw = {entry.tag: entry for entry in directory.entries}
        described = exif_blocks.chosen(directory, exif_blocks.DESCRIPTIVE)
        described = described._replace(entries=[e for e in described.entries if _lasting(e, notes)])
        exif = exif_blocks.block_of(described, order)
    except Exception:  # damaged metadata may raise anything
        notes.append("damaged metadata were left out")
    turn = exif_blocks.number_of(raw[ORIENTATION], order) if ORIENTATION in raw else 1
    # Without a unit, the numbers are an aspect ratio.
    unit = exif_blocks.number_of(raw[RESOLUTION_UNIT], order) if RESOLUTION_UNIT in raw else None
    dpi = None
    if unit in (INCH, CENTIMETRE):
        try:
            dpi = resolution(page.get_resolution("INCH"))
        except Exception:  # such as a division by zero
            notes.append("a resolution that makes no sense was left out")
    value = {tag: raw[tag].value for tag in (XMP, IPTC, 34675) if tag in raw}
    icc = value.get(34675)
    metadata = Metadata(
        icc=icc if icc and len(icc) > 128 else None,
        exif=exif,
        xmp=take_xmp(value.get(XMP), notes),
        dpi=dpi,
        iptc=value.get(IPTC),
    )
    return metadata, turn if 1 <= turn <= 8 else 1


def _lasting(entry: exif_blocks.Entry, notes: list[str]) -> bool:
    """Whether a description is still true for an enlarged picture."""
    if entry.tag != DESCRIPTION:
        return True
    if entry.value.startswith(SHAPED):
        return False
    for start, program in STACKS.items():
        if entry.value.startswith(start) and (program != "OME" or b"OME" in entry.value[:2000]):
            notes.append(f"the description by {program}, which tells of other sizes, was left out")
            return False
    return True


def _exactly(file: Any, length: int) -> bytes:
    data: bytes = file.read(length)
    if len(data) < length:
        raise ValueError("it is cut short")
    return data
