"""EXIF as bytes: read and corrected in place, so that text of any encoding and makers' notes are preserved."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

HEADER = b"Exif\0\0"
ORIENTATION, EXIF_IFD, GPS_IFD, INTEROP_IFD = 0x0112, 0x8769, 0x8825, 0xA005
POINTERS = (EXIF_IFD, GPS_IFD, INTEROP_IFD)
SHORT, LONG, LONG8 = 3, 4, 16
# The tags with the size of the picture, in its own directory and in that of EXIF.
WIDTHS, HEIGHTS = (0x0100, 0xA002), (0x0101, 0xA003)
THUMBNAIL, THUMBNAIL_BYTES = 0x0201, 0x0202
# The bytes of a value by its type, and of the numbers that it consists of.
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
UNITS = {**SIZES, 5: 4, 10: 4}
# The tags of a TIFF that describe the picture, not the storage of its pixels.
DESCRIPTIVE = (269, 270, 271, 272, 285, 305, 306, 315, 316, 33432, 0x4746, 0x4749, *range(0x9C9B, 0x9CA0))
MOST_ENTRIES, MOST_BYTES = 4096, 1 << 26


class Entry(NamedTuple):
    """A tag, its type, its value as bytes in the order of the file, and their place in the file."""

    tag: int
    kind: int
    value: bytes
    at: int


class Directory(NamedTuple):
    """A directory of tags, and the directories that some of them point to."""

    entries: list[Entry]
    children: dict[int, Directory]


def read_directory(file: BinaryIO, at: int, order: str, big: bool = False, depth: int = 0) -> Directory:
    """Read the directory at a place of a file, and those below it.

    Args:
        file: the file; places count from its beginning.
        at: place of the directory.
        order: byte order, "<" or ">".
        big: whether the file is a BigTIFF.
        depth: number of directories above this one.

    Raises:
        ValueError: the directory is damaged.
    """
    file.seek(at)
    head, form, inline = (8, "HHQ", 8) if big else (2, "HHI", 4)
    (count,) = struct.unpack(order + ("Q" if big else "H"), _exactly(file, head))
    if count > MOST_ENTRIES:
        raise ValueError("a directory of EXIF has too many entries")
    size = struct.calcsize(order + form) + inline
    table = _exactly(file, count * size)
    found = Directory([], {})
    for i in range(count):
        tag, kind, number = struct.unpack_from(order + form, table, i * size)
        length = SIZES.get(kind, 0) * number
        place = at + head + i * size + size - inline
        if length > inline:
            (place,) = struct.unpack_from(order + ("Q" if big else "I"), table, i * size + size - inline)
        if length == 0 or length > MOST_BYTES:
            continue
        file.seek(place)
        value = file.read(length)
        if len(value) < length:
            raise ValueError("a value of EXIF lies beyond the end")
        found.entries.append(Entry(tag, kind, value, place))
        if tag in POINTERS and depth < 2 and (pointer := number_of(found.entries[-1], order)):
            found.children[tag] = read_directory(file, pointer, order, big, depth + 1)
    return found


def number_of(entry: Entry, order: str) -> int:
    """The first number of an entry of integers; 0 for other entries."""
    codes = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
    if entry.kind not in codes:
        return 0
    return int(struct.unpack_from(order + codes[entry.kind], entry.value)[0])


def parse(block: bytes) -> tuple[Directory, str]:
    """The directories of a block, and its byte order.

    Raises:
        ValueError: it is damaged.
    """
    body = block.removeprefix(HEADER)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(body[:4])
    if order is None or len(body) < 8:
        raise ValueError("a block of EXIF has no header")
    try:
        return read_directory(io.BytesIO(body), struct.unpack_from(order + "I", body, 4)[0], order), order
    except struct.error as error:
        raise ValueError("a block of EXIF is damaged") from error


def orientation(block: bytes) -> int:
    """The orientation, 1 to 8; 1 if the block has none."""
    directory, order = parse(block)
    values = [number_of(entry, order) for entry in directory.entries if entry.tag == ORIENTATION]
    return values[0] if values and 1 <= values[0] <= 8 else 1


def upright(block: bytes) -> bytes | None:
    """The block without orientation and thumbnail, with nothing else moved; None if nothing else is in it.

    Raises:
        ValueError: it is damaged.
    """
    directory, order = parse(block)
    body = bytearray(block.removeprefix(HEADER))
    (at,) = struct.unpack_from(order + "I", body, 4)
    (count,) = struct.unpack_from(order + "H", body, at)
    body = _without_thumbnail(body, at + 2 + 12 * count, order)
    places = [at + 2 + 12 * i for i in range(count)]
    kept = [bytes(body[p : p + 12]) for p in places if struct.unpack_from(order + "H", body, p)[0] != ORIENTATION]
    table = struct.pack(order + "H", len(kept)) + b"".join(kept) + bytes(4)
    body[at : at + 6 + 12 * count] = table.ljust(6 + 12 * count, b"\0")
    return HEADER + bytes(body) if any(entry.tag != ORIENTATION for entry in directory.entries) else None


def _without_thumbnail(body: bytearray, link: int, order: str) -> bytearray:
    """The block after removing the thumbnail to which the number at `link` points."""
    if link + 4 > len(body):
        return body + bytes(link + 4 - len(body))
    (second,) = struct.unpack_from(order + "I", body, link)
    body[link : link + 4] = bytes(4)
    if not second:
        return body
    try:
        entries = {e.tag: number_of(e, order) for e in read_directory(io.BytesIO(body), second, order, depth=2).entries}
    except (ValueError, struct.error):
        return body
    begin, length = entries.get(THUMBNAIL, 0), entries.get(THUMBNAIL_BYTES, 0)
    if begin > second and 0 < length <= len(body) - begin:
        body[begin : begin + length] = bytes(length)
        if begin + length >= len(body) - 1:
            del body[begin:]
    return body


def sized(block: bytes, width: int, height: int) -> bytes:
    """The block with the size of the picture corrected, if it has one."""
    try:
        directory, order = parse(block)
    except ValueError:
        return block
    head = len(block) - len(block.removeprefix(HEADER))
    body = bytearray(block[head:])
    for tags, value in ((WIDTHS, width), (HEIGHTS, height)):
        for entries in (directory.entries, *(child.entries for child in directory.children.values())):
            for entry in entries:
                if entry.tag in tags and entry.kind in (SHORT, LONG) and len(entry.value) == SIZES[entry.kind]:
                    # The value is stored in the entry itself, which has room for the longer type.
                    struct.pack_into(order + "HII", body, entry.at - 6, LONG, 1, value)
    return block[:head] + bytes(body)


def block_of(directory: Directory, order: str) -> bytes | None:
    """A block of directories that were read from a file with this byte order; None if they are empty."""
    if not directory.entries and not directory.children:
        return None
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return HEADER + head + write_directory(directory, 8, order, order)


def write_directory(directory: Directory, at: int, source: str, order: str, big: bool = False) -> bytes:
    """The bytes of a directory, its values and the directories below it, for a place of a file.

    Args:
        directory: the directory.
        at: place at which it will be stored.
        source: byte order of its values.
        order: byte order of the file.
        big: whether the file is a BigTIFF.
    """
    entries = sorted({e.tag: e for e in directory.entries if e.tag not in POINTERS and (big or e.kind < LONG8)}.values())
    tags = sorted([*(e.tag for e in entries), *directory.children])
    count_form, form, inline = ("Q", "HHQ", 8) if big else ("H", "HHI", 4)
    number = "Q" if big else "I"
    size = struct.calcsize(order + form) + inline
    begin = struct.calcsize(order + count_form) + size * len(tags) + inline
    table, tail = struct.pack(order + count_form, len(tags)), b""
    by_tag = {e.tag: e for e in entries}
    for tag in tags:
        place = at + begin + len(tail)
        if tag in directory.children:
            table += struct.pack(order + form + number, tag, LONG8 if big else LONG, 1, place)
            tail += _even(write_directory(directory.children[tag], place, source, order, big))
            continue
        _, kind, value, _ = by_tag[tag]
        value = value if source == order else swapped(kind, value)
        table += struct.pack(order + form, tag, kind, len(value) // SIZES[kind])
        if len(value) <= inline:
            table += value.ljust(inline, b"\0")
        else:
            table += struct.pack(order + number, place)
            tail += _even(value)
    return table + bytes(inline) + tail


def swapped(kind: int, value: bytes) -> bytes:
    """A value, converted to the other byte order."""
    unit = UNITS[kind]
    return b"".join(value[i : i + unit][::-1] for i in range(0, len(value), unit))


def chosen(directory: Directory, tags: Iterable[int]) -> Directory:
    """The given entries of a directory, and all directories below it."""
    return Directory([entry for entry in directory.entries if entry.tag in set(tags)], directory.children)


def _even(data: bytes) -> bytes:
    return data + bytes(len(data) % 2)


def _exactly(file: BinaryIO, length: int) -> bytes:
    data = file.read(length)
    if len(data) < length:
        raise ValueError("a block of EXIF is cut short")
    return data
