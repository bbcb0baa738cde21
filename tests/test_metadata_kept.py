"""What files say beside their pixels: carried byte for byte, converted, or told; never stale."""

from __future__ import annotations

import io as streams
import struct

import numpy as np
import pytest
import tifffile
import torch
from every_format import samples
from mixed_files import SRGB, ramp
from PIL import Image, ImageCms, TiffImagePlugin

from fastroute import io
from fastroute.io import exif as blocks
from fastroute.io import png, xmp
from fastroute.io.picture import Metadata, Picture

# Text that is not ASCII, in both of EXIF's ways, and tags that few programs know.
NAME, TITLE = "Jörg 日本".encode(), "タイトル".encode("utf-16-le") + b"\0\0"


def entry(tag: int, kind: int, value: bytes) -> blocks.Entry:
    return blocks.Entry(tag, kind, value, 0)


def rich(order: str, turn: int = 6) -> bytes:
    """A block with an orientation, the picture's size, a maker's note, an interoperability directory and a place."""
    number = lambda form, *values: struct.pack(order + form, *values)  # noqa: E731
    interop = blocks.Directory([entry(1, 2, b"R03\0"), entry(2, 7, b"0100")], {})
    exposure = [entry(0x9000, 7, b"0232"), entry(0x927C, 7, bytes(range(60))), entry(0xA002, 3, number("H", 13)),
                entry(0xA003, 3, number("H", 9)), entry(0x829A, 5, number("II", 1, 250))]  # fmt: skip
    place = blocks.Directory([entry(1, 2, b"N\0"), entry(2, 5, number("6I", 47, 1, 22, 1, 7, 2))], {})
    top = [entry(0x013B, 2, NAME + b"\0"), entry(0x0112, 3, number("H", turn)), entry(0x9C9B, 1, TITLE),
           entry(0x010F, 2, b"Maker\0"), entry(0x0100, 4, number("I", 13))]  # fmt: skip
    inner = blocks.Directory(exposure, {blocks.INTEROP_IFD: interop})
    return blocks.block_of(blocks.Directory(top, {blocks.EXIF_IFD: inner, blocks.GPS_IFD: place}), order)


def flat(directory: blocks.Directory, order: str, path: tuple[int, ...] = ()) -> dict[tuple[int, ...], bytes]:
    """Every value by the tags that lead to it, little-endian."""
    found = {}
    for e in directory.entries:
        if e.tag not in blocks.POINTERS:
            found[(*path, e.tag)] = e.value if order == "<" else blocks.swapped(e.kind, e.value)
    for tag, child in directory.children.items():
        found.update(flat(child, order, (*path, tag)))
    return found


def values(block: bytes) -> dict[tuple[int, ...], bytes]:
    return flat(*blocks.parse(block))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("ending", [".jpg", ".png", ".webp", ".tif"])
def test_exif(tmp_path, order, ending):
    Image.fromarray(ramp()).save(tmp_path / "in.jpg", exif=rich(order))
    picture = io.read_picture(tmp_path / "in.jpg")
    assert (picture.height, picture.width) == (13, 9)
    write = tmp_path / f"out{ending}"
    # More than the 16 bits that the block has for it.
    height = 70000 if ending in (".png", ".tif") else 50
    large = Picture(torch.zeros(3, height, 18, dtype=torch.uint8), metadata=picture.metadata)
    io.write_picture(write, large)
    again = io.read_picture(write)
    expected = values(rich(order))
    del expected[(0x0112,)]
    if ending == ".tif":
        # There it is the file's own.
        del expected[(0x0100,)]
    else:
        expected[(0x0100,)] = struct.pack("<I", large.width)
    expected[(blocks.EXIF_IFD, 0xA002)] = struct.pack("<I", large.width)
    expected[(blocks.EXIF_IFD, 0xA003)] = struct.pack("<I", large.height)
    assert values(again.metadata.exif) == expected
    if ending != ".tif":
        # Nothing is moved: a maker's note may point into itself.
        assert len(again.metadata.exif) == len(rich(order))


def test_a_thumbnail_is_not_kept():
    body = bytearray(rich("<").removeprefix(blocks.HEADER))
    small = struct.pack("<HHHIIHHII", 2, 0x0201, 4, 1, len(body) + 30, 0x0202, 4, 1, 8) + bytes(4)
    (at,) = struct.unpack_from("<I", body, 4)
    (count,) = struct.unpack_from("<H", body, at)
    struct.pack_into("<I", body, at + 2 + 12 * count, len(body))
    block = blocks.upright(blocks.HEADER + bytes(body) + small + b"SECRETJP")
    assert b"SECRET" not in block and (0x0201,) not in values(block) and values(block)[(0x010F,)] == b"Maker\0"


@pytest.mark.parametrize("cut", range(8, 200, 7))
def test_damaged_exif_is_told(tmp_path, cut):
    Image.fromarray(ramp()).save(tmp_path / "in.jpg", exif=rich("<")[:cut])
    picture = io.read_picture(tmp_path / "in.jpg")
    assert picture.metadata.exif is not None or any("EXIF" in note for note in picture.origin.notes)


def test_chunks_of_a_png(tmp_path):
    white, primaries = (31270, 32900), (70800, 29200, 17000, 79700, 13100, 4600)
    chunks = [("gAMA", struct.pack(">I", 100000)), ("cHRM", struct.pack(">8I", *white, *primaries)),
              ("cICP", bytes([9, 16, 0, 1])), ("mDCV", bytes(24)), ("cLLI", bytes(8)),
              ("iTXt", "Title\0\0\0de\0Titel\0Grüße".encode()), ("tEXt", b"Author\0J\xf6rg")]  # fmt: skip
    with open(tmp_path / "in.png", "wb") as file:
        png.encode(file, samples(3, 16), chunks)
    picture = io.read_picture(tmp_path / "in.png")
    assert picture.metadata.text == {"Title": "Grüße", "Author": "Jörg"} and not picture.origin.notes
    io.write_picture(tmp_path / "out.png", picture)
    written = [(name, bytes(content)) for name, content, *_ in png._chunks((tmp_path / "out.png").read_bytes())]
    assert all(chunk in written for chunk in chunks)
    told = io.not_kept(tmp_path / "out.jpg", picture)
    assert any("cICP" in line and "not" in line for line in told) and any("Title" in line for line in told)


@pytest.mark.parametrize("ending", [".jpg", ".webp", ".tif"])
def test_gamma_becomes_a_profile(tmp_path, ending):
    with open(tmp_path / "in.png", "wb") as file:
        png.encode(file, np.full((24, 24, 3), 55, np.uint8), [("gAMA", struct.pack(">I", 100000))])
    picture = io.read_picture(tmp_path / "in.png")
    io.write_picture(tmp_path / f"out{ending}", picture)
    image = Image.open(tmp_path / f"out{ending}")
    profile = ImageCms.ImageCmsProfile(streams.BytesIO(image.info["icc_profile"]))
    shown = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB")).getpixel((5, 5))
    # Linear light of 55 / 255 is 128 in sRGB.
    assert all(abs(value - 128) <= 2 for value in shown)
    assert "described by a profile" in " ".join(io.not_kept(tmp_path / f"out{ending}", picture))
    with open(tmp_path / "plain.png", "wb") as file:
        png.encode(file, np.full((24, 24, 3), 55, np.uint8), [("gAMA", struct.pack(">I", 45455)), ("sRGB", b"\0")])
    assert not io.not_kept(tmp_path / f"out{ending}", io.read_picture(tmp_path / "plain.png"))


def test_large_texts_and_profiles(tmp_path):
    profile = SRGB + bytes(3 << 20)
    text = "x" * (2 << 20)
    import zlib

    with open(tmp_path / "in.png", "wb") as file:
        chunks = [("iCCP", b"big\0\0" + zlib.compress(profile)), ("zTXt", b"Comment\0\0" + zlib.compress(text.encode()))]
        png.encode(file, samples(3, 8), chunks)
    picture = io.read_picture(tmp_path / "in.png")
    assert picture.metadata.icc == profile and picture.metadata.text["Comment"] == text
    io.write_picture(tmp_path / "out.png", picture)
    assert io.read_picture(tmp_path / "out.png").metadata == picture.metadata


@pytest.mark.parametrize("ending", [".jpg", ".tif"])
def test_iptc_and_comments(tmp_path, ending):
    block = b"\x1c\x02\x78\x00\x09A caption\x1c\x02\x19\x00\x01a"
    metadata = Metadata(iptc=block, comment="grüß".encode())
    picture = Picture(torch.from_numpy(ramp().transpose(2, 0, 1).copy()), metadata=metadata)
    io.write_picture(tmp_path / f"a{ending}", picture)
    back = io.read_picture(tmp_path / f"a{ending}").metadata
    assert back.iptc == block and (back.comment == metadata.comment) == (ending == ".jpg")
    assert any("IPTC" in line for line in io.not_kept("a.webp", picture))
    assert any("comment" in line for line in io.not_kept("a.tif", picture))
    assert not any("comment" in line for line in io.not_kept("a.png", picture))


CLAIM = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description
 xmlns:hdrgm="http://ns.adobe.com/hdr-gain-map/1.0/" xmlns:GCamera="http://ns.google.com/photos/1.0/camera/"
 xmlns:C="http://ns.google.com/photos/1.0/container/" xmlns:Item="http://ns.google.com/photos/1.0/container/item/"
 xmlns:dc="http://purl.org/dc/elements/1.1/" hdrgm:Version="1.0" GCamera:MotionPhoto="1" GCamera:SpecialTypeID="x"
 dc:title="kept">
 <C:Directory><rdf:Seq><rdf:li><C:Item Item:Semantic='GainMap' Item:Length="636"/></rdf:li></rdf:Seq></C:Directory>
 <hdrgm:GainMapMax>2.5</hdrgm:GainMapMax></rdf:Description></rdf:RDF></x:xmpmeta>"""


def test_xmp_without_claims(tmp_path):
    mended, claims = xmp.without_claims(CLAIM)
    assert claims == ["a gain map", "a motion photo", "further pictures in the file"] and xmp.is_well_formed(mended)
    assert b'dc:title="kept"' in mended and b'GCamera:SpecialTypeID="x"' in mended
    assert not any(word in mended for word in (b"hdrgm", b"MotionPhoto", b"Directory", b"GainMap"))
    assert xmp.without_claims(mended) == (mended, [])
    Image.fromarray(ramp()).save(tmp_path / "in.jpg", xmp=CLAIM)
    picture = io.read_picture(tmp_path / "in.jpg")
    assert picture.metadata.xmp == mended and any("gain map" in note for note in picture.origin.notes)


def test_xmp_of_another_size():
    packet = b"<r exif:PixelXDimension=\"13\" tiff:ImageLength = '9'><exif:PixelYDimension> 9</exif:PixelYDimension></r>"
    expected = b"<r exif:PixelXDimension=\"52\" tiff:ImageLength = '36'><exif:PixelYDimension> 36</exif:PixelYDimension></r>"
    assert xmp.sized(packet, 52, 36) == expected


def test_stale_descriptions(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", ramp(), photometric="rgb")
    assert "shape" in tifffile.TiffFile(tmp_path / "a.tif").pages[0].description
    tifffile.imwrite(tmp_path / "b.tif", ramp()[:, :, 0], imagej=True)
    tifffile.imwrite(tmp_path / "c.ome.tif", ramp(), photometric="rgb", metadata={"axes": "YXS"})
    tifffile.imwrite(tmp_path / "d.tif", ramp(), photometric="rgb", metadata=None, description="my dog")
    expected = {"a.tif": (False, False), "b.tif": (True, False), "c.ome.tif": (True, False), "d.tif": (False, True)}
    for name, (told, kept) in expected.items():
        picture = io.read_picture(tmp_path / name)
        io.write_picture(tmp_path / "out.tif", picture)
        description = tifffile.TiffFile(tmp_path / "out.tif").pages[0].description
        assert (any("description" in note for note in picture.origin.notes), description == "my dog") == (told, kept), name
        assert kept or not description


def test_lossless_stays_lossless(tmp_path):
    Image.fromarray(samples(3, 8)).save(tmp_path / "in.webp", lossless=True)
    Image.fromarray(samples(3, 8)).save(tmp_path / "lossy.webp", quality=90)
    for name, lossless in (("in.webp", True), ("lossy.webp", False)):
        picture = io.read_picture(tmp_path / name)
        assert picture.origin.lossless == lossless
        io.write_picture(tmp_path / "out.webp", picture)
        assert torch.equal(io.read_picture(tmp_path / "out.webp").color, picture.color) == lossless
    io.write_picture(tmp_path / "small.webp", io.read_picture(tmp_path / "in.webp"), quality=50)
    assert not io.read_picture(tmp_path / "small.webp").origin.lossless


def test_formats_within_tiff(tmp_path):
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[315], info[33432] = "Jörg", "(c) someone"
    Image.fromarray(ramp()).save(tmp_path / "a.tif", tiffinfo=info, dpi=(300, 150))
    metadata = io.read_picture(tmp_path / "a.tif").metadata
    assert metadata.dpi == (300, 150) and values(metadata.exif)[(33432,)] == b"(c) someone\0"
    io.write_picture(tmp_path / "b.jpg", io.read_picture(tmp_path / "a.tif"))
    assert values(io.read_picture(tmp_path / "b.jpg").metadata.exif)[(315,)] == values(metadata.exif)[(315,)]


def test_more_pixels_on_request(tmp_path, monkeypatch):
    io.write_image(tmp_path / "a.png", torch.zeros(3, 20, 20, dtype=torch.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for options in ({}, {"max_pixels": 399}):
        with pytest.raises(io.ImageError, match=r"20 x 20 pixels are more than the limit of .*; raise max_pixels"):
            io.read_picture(tmp_path / "a.png", **options)
    for limit in (400, None):
        assert io.read_picture(tmp_path / "a.png", max_pixels=limit).width == 20


def test_numbers_of_pictures(tmp_path):
    frames = [Image.fromarray(np.rot90(ramp(20, 20), turn).copy()) for turn in range(3)]
    for name in ("a.png", "a.webp", "a.gif", "a.tif", "a.avif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        picture = io.read_picture(tmp_path / name)
        assert io.count_pictures(tmp_path / name) == picture.origin.pictures == 3, name
        assert any(note.startswith("of 3 ") for note in picture.origin.notes)
    frames[0].save(tmp_path / "b.jpg")
    assert io.count_pictures(tmp_path / "b.jpg") == 1
