"""Pictures of every kind: read, super-resolved and written with all that belongs to them."""

from __future__ import annotations

import io as streams
import os
import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
from mixed_files import DPI, SRGB, XMP, absurd_png, exif, ramp, write_bad, write_kinds
from networks import random_classsr
from PIL import Image, ImageCms
from torch.nn import functional as F

from fastroute import PatchRouter
from fastroute.files.pictures import upscale_picture
from fastroute.io import ImageError, Metadata, Picture, check_holds, read_image, read_picture, write_image, write_picture
from fastroute.io.hidden import fill_hidden

pytestmark = pytest.mark.usefixtures("quick_tuning")

# Name: kind, bits, whether it has alpha.
KINDS = {
    "gray.png": ("gray", 8, False), "gray.jpg": ("gray", 8, False), "gray-alpha.png": ("gray", 8, True),
    "bilevel.png": ("gray", 8, False), "rgb.png": ("rgb", 8, False), "rgb.jpg": ("rgb", 8, False),
    "rgb.webp": ("rgb", 8, False), "rgb.tif": ("rgb", 8, False), "rgb.bmp": ("rgb", 8, False), "rgba.png": ("rgb", 8, True),
    "rgba.webp": ("rgb", 8, True), "rgba.tif": ("rgb", 8, True), "key.png": ("rgb", 8, True),
    "palette.png": ("palette", 8, False), "palette-alpha.png": ("palette", 8, True), "cmyk.jpg": ("cmyk", 8, False),
    "cmyk.tif": ("cmyk", 8, False), "gray16.png": ("gray", 16, False), "rgb16.png": ("rgb", 16, False),
    "rgba16.png": ("rgb", 16, True), "gray-alpha16.png": ("gray", 16, True), "gray16.tif": ("gray", 16, False),
    "rgb16.tif": ("rgb", 16, False), "rgba16.tif": ("rgb", 16, True), "planar16.tif": ("rgb", 16, False),
    "float.tif": ("rgb", 32, False), "float-gray.tif": ("gray", 32, False),
    **{f"turned{n}.jpg": ("rgb", 8, False) for n in range(2, 9)},
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_kinds(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="module")
def router():
    system = random_classsr((3, 5, 9), 2, 8)
    return PatchRouter(system.branches, system.classifier, patch=8, stride=6, scale=2)


def planes(pixels: np.ndarray) -> torch.Tensor:  # [H, W, C] -> [C, H, W]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def close(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def test_every_kind_is_listed(files):
    assert set(files) == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_reading(files, name):
    picture, (kind, bits, alpha) = read_picture(files[name]), KINDS[name]
    assert (picture.kind, picture.bits, picture.alpha is not None) == (kind, bits, alpha), str(picture)
    turned = name[6:7] in "5678" if name.startswith("turned") else name in ("rgb.png", "rgb.jpg", "rgb.webp")
    assert (picture.height, picture.width) == ((13, 9) if turned else (9, 13)) and picture.color.shape[0] == 3
    truth = ramp(peak=65535 if bits > 8 else 255)
    if kind == "gray":
        truth = truth[:, :, 2:] if alpha and bits == 16 else truth[:, :, :1]
        assert torch.equal(picture.color[0], picture.color[2])
    expected = planes(truth).expand(3, -1, -1)
    if turned:
        return  # compared with Pillow below
    if name.startswith(("palette", "bilevel", "cmyk", "turned")) or name.endswith(".jpg"):
        expected = read_image(files[name])
    if bits == 32:
        assert close(picture.color, expected.double() / 65535) < 1e-6
    else:
        assert torch.equal(picture.color, expected) or (name.startswith("planar") and torch.equal(picture.color, expected))


@pytest.mark.parametrize("name", ["rgb.png", "rgb.jpg", "rgb.webp", *(f"turned{n}.jpg" for n in range(2, 9))])
def test_orientation_is_applied(files, name):
    from PIL import ImageOps

    with Image.open(files[name]) as image:
        expected = np.array(ImageOps.exif_transpose(image))
        assert image.getexif()[0x0112] != 1
    assert torch.equal(read_picture(files[name]).color, planes(expected))


@pytest.mark.parametrize("peak", [255, 65535])
@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_orientation_of_a_tiff(tmp_path, turn, peak):
    tags = [(0x0112, 3, 1, turn, True)]
    tifffile.imwrite(tmp_path / "a.tif", ramp(peak=peak), photometric="rgb", metadata=None, extratags=tags)
    expected = np.rot90(ramp(peak=peak), {1: 0, 3: 2, 6: 3, 8: 1}[turn])
    assert torch.equal(read_picture(tmp_path / "a.tif").color, planes(expected))


def test_transparency(files):
    ramp_alpha = torch.linspace(0, 255, 9 * 13).to(torch.uint8).view(9, 13)
    for name in ("rgba.png", "rgba.tif", "rgba.webp", "gray-alpha.png"):
        assert torch.equal(read_picture(files[name]).alpha, ramp_alpha), name
    key = read_picture(files["key.png"]).alpha
    assert key[3, 2] == 0 and (key == 255).sum() == key.numel() - 1
    palette = read_picture(files["palette-alpha.png"]).alpha
    assert set(palette.unique().tolist()) == {0, 128, 255}
    deep = read_picture(files["rgba16.png"])
    assert torch.equal(deep.alpha, planes(ramp(peak=65535)[:, :, :1][::-1])[0])
    assert torch.equal(read_picture(files["rgba16.tif"]).alpha, deep.alpha)
    assert torch.equal(read_picture(files["gray-alpha16.png"]).alpha, deep.alpha)


def test_cmyk_goes_through_its_profile(tmp_path):
    # No profile of CMYK comes with Pillow; what matters is that one which cannot be used does not stop the reading.
    image = Image.fromarray(ramp()).convert("CMYK")
    image.save(tmp_path / "plain.tif")
    image.save(tmp_path / "broken.tif", icc_profile=b"no profile at all" * 10)
    plain, broken = read_picture(tmp_path / "plain.tif"), read_picture(tmp_path / "broken.tif")
    assert torch.equal(plain.color, planes(np.array(image.convert("RGB")))) and torch.equal(plain.color, broken.color)
    assert broken.metadata.icc is None


def test_cmyk_profile_is_used(tmp_path, monkeypatch):
    image = Image.fromarray(ramp()).convert("CMYK")
    image.save(tmp_path / "a.tif", icc_profile=SRGB)
    seen = []

    def convert(picture, source, target, intent, mode, flags):
        seen.append((picture.mode, source.tobytes() == SRGB, mode))
        return Image.new("RGB", picture.size, (1, 2, 3))

    monkeypatch.setattr(ImageCms, "profileToProfile", convert)
    picture = read_picture(tmp_path / "a.tif")
    assert seen == [("CMYK", True, "RGB")] and picture.color[:, 0, 0].tolist() == [1, 2, 3] and picture.metadata.icc is None


UPRIGHT = XMP.replace(b'"6"', b'"1"')
FULL = Metadata(SRGB, exif(), UPRIGHT, DPI, {"Title": "ümlaut"})


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("kind", ["gray", "rgb"])
@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_round_trip(tmp_path, ending, kind, alpha, bits):
    color = planes(ramp(peak=65535))
    color = color[:1].expand(3, -1, -1) if kind == "gray" else color
    picture = Picture(color, color[1].flip(0) if alpha else None, kind, FULL).as_bits(bits)
    write_picture(tmp_path / f"a{ending}", picture)
    back = read_picture(tmp_path / f"a{ending}")
    expected = picture.as_bits(16) if bits == 32 and ending == ".png" else picture
    assert back.kind == kind and back.bits == expected.bits and torch.equal(back.color, expected.color)
    assert alpha == (back.alpha is not None) and (not alpha or torch.equal(back.alpha, expected.alpha))
    kept(back.metadata, ending)


def kept(metadata: Metadata, ending: str, size: tuple[int, int] = (13, 9)) -> None:
    """All of `FULL` that a file of this ending holds, upright and of the right size."""
    assert (metadata.icc, metadata.xmp) == (SRGB, UPRIGHT)
    if ending != ".webp":
        assert metadata.dpi == pytest.approx(DPI, rel=1e-4)
    block = Image.Exif()
    block.load(metadata.exif)
    assert (block[0x010F], block[0x8298], 0x0112 in block) == ("Maker", "(c) Somebody", False)
    exposure, place = block.get_ifd(0x8769), block.get_ifd(0x8825)
    assert (exposure[0x829A], exposure[0xA002], exposure[0xA003]) == ((1, 250), *size)
    assert place[1] == "N" and tuple(map(float, place[2])) == (47.0, 22.0, 3.5)
    if ending == ".png":
        assert metadata.text["Title"] in ("ümlaut", "A ramp")


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("name", ["rgb.png", "rgb.jpg", "rgb.webp"])
def test_metadata_between_formats(files, tmp_path, name, ending):
    picture = read_picture(files[name])
    if name == "rgb.webp":
        picture = Picture(picture.color, None, "rgb", Metadata(**{**vars(picture.metadata), "dpi": DPI}))
    write_picture(tmp_path / f"a{ending}", picture)
    metadata = read_picture(tmp_path / f"a{ending}").metadata
    assert metadata.xmp == UPRIGHT
    if ending != ".png" or name == "rgb.png":
        kept(metadata, ending, (9, 13))
    with Image.open(tmp_path / f"a{ending}") as image:
        assert image.getexif().get(0x0112, 1) == 1 and image.info["icc_profile"] == SRGB


def test_a_profile_of_another_colour_space_is_left_out(tmp_path):
    gray = SRGB[:16] + b"GRAY" + SRGB[20:]
    for kind, ending, held in (
        ("gray", ".png", True),
        ("gray", ".tif", True),
        ("rgb", ".png", False),
        ("gray", ".webp", False),
    ):
        color = planes(ramp())[:1].expand(3, -1, -1)
        write_picture(tmp_path / f"a{ending}", Picture(color, None, kind, Metadata(icc=gray)))
        assert (read_picture(tmp_path / f"a{ending}").metadata.icc == gray) == held, (kind, ending)


def test_what_a_format_cannot_hold(tmp_path):
    color, clear = planes(ramp()), torch.full((9, 13), 254, dtype=torch.uint8)
    for ending in (".jpg", ".bmp"):
        with pytest.raises(ImageError, match=rf"cannot write .*a\{ending}: (JPEG|BMP) holds no transparency; choose PNG"):
            write_picture(tmp_path / f"a{ending}", Picture(color, clear))
        write_picture(tmp_path / f"a{ending}", Picture(color, torch.full_like(clear, 255)))
        assert read_picture(tmp_path / f"a{ending}").alpha is None
    for name, limit in (("a.webp", 16383), ("a.jpg", 65500)):
        check_holds(tmp_path / name, limit, 1)
        with pytest.raises(ImageError, match=f"holds at most {limit:,} pixels a side; it has 1 x {limit + 1}"):
            check_holds(tmp_path / name, limit + 1, 1)
    write_picture(tmp_path / "b.jpg", Picture(planes(ramp(peak=65535))))
    assert close(read_image(tmp_path / "b.jpg"), color) < 12


def test_write_image_of_any_depth(tmp_path):
    deep = planes(ramp(peak=65535))
    write_image(tmp_path / "a.png", deep)
    assert torch.equal(read_picture(tmp_path / "a.png").color, deep)
    write_image(tmp_path / "b.png", torch.cat([deep.float() / 65535, torch.rand(1, 9, 13)]))
    assert torch.equal(read_picture(tmp_path / "b.png").color, deep) and read_picture(tmp_path / "b.png").alpha is not None
    write_image(tmp_path / "c.tif", torch.full((1, 3, 3), 0.1, dtype=torch.float64))
    assert read_picture(tmp_path / "c.tif").color.unique().tolist() == [pytest.approx(0.1)]
    for image in (torch.zeros(5, 4, 4), torch.zeros(4, 4), torch.zeros(3, 4, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="write_image: image must be"):
            write_image(tmp_path / "d.png", image)


def test_bad_files(tmp_path):
    for name, words in write_bad(tmp_path).items():
        with pytest.raises(ImageError, match=rf"cannot read .*{name}.*{words}"):
            read_picture(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="not a regular file"):
        read_picture(tmp_path / "pipe.png")


@pytest.mark.parametrize(("width", "height"), [(2**31 - 1, 2**31 - 1), (10**6, 10**6), (20000, 20000)])
def test_an_absurd_header_allocates_nothing(tmp_path, width, height):
    (tmp_path / "a.png").write_bytes(absurd_png(width, height))
    bitmap = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    (tmp_path / "a.bmp").write_bytes(bitmap)
    for name in ("a.png", "a.bmp"):
        with pytest.raises(ImageError, match=f"cannot read .*{name}: .*(limit of|more than the file can hold)"):
            read_picture(tmp_path / name)


def test_a_deep_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((20, 20, 3), np.uint16), photometric="rgb", compression="zlib")
    with pytest.raises(ImageError, match="20 x 20 pixels are more than the limit of 100"):
        read_picture(tmp_path / "a.tif")


@pytest.mark.parametrize(("values", "words"), [([0, 200], "they are 0 to 200: scale them first"), ([0, np.nan], "about")])
def test_floats_beyond_one(tmp_path, values, words):
    tifffile.imwrite(tmp_path / "a.tif", np.tile(np.array(values, np.float32), (4, 4)), photometric="minisblack")
    with pytest.raises(ImageError, match=words):
        read_picture(tmp_path / "a.tif")


def test_other_tiffs(tmp_path):
    rgba = np.dstack([ramp(peak=65535) // 2, np.full((9, 13), 32768, np.uint16)])
    tifffile.imwrite(tmp_path / "a.tif", rgba, photometric="rgb", extrasamples=["assocalpha"])
    straight = read_picture(tmp_path / "a.tif").color
    assert close(straight, planes(rgba[:, :, :3]).double() * 65535 / 32768) <= 1
    tifffile.imwrite(tmp_path / "b.tif", ramp(peak=65535)[:, :, 0], photometric="miniswhite")
    assert torch.equal(read_picture(tmp_path / "b.tif").color[0].int(), 65535 - planes(ramp(peak=65535))[0].int())
    tifffile.imwrite(tmp_path / "c.tif", np.zeros((4, 4), np.uint32))
    with pytest.raises(ImageError, match="1 channels of uint32, MINISBLACK, is not supported"):
        read_picture(tmp_path / "c.tif")


def test_a_deep_colour_that_stands_for_transparency(tmp_path):
    pixels = ramp(peak=65535)
    stream = streams.BytesIO()
    Image.new("RGB", (1, 1)).save(stream, format="PNG")

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    content = chunk(b"IHDR", struct.pack(">IIBBBBB", 13, 9, 16, 2, 0, 0, 0))
    content += chunk(b"tRNS", pixels[3, 2].astype(">u2").tobytes()) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(stream.getvalue()[:8] + content)
    picture = read_picture(tmp_path / "a.png")
    assert picture.alpha[3, 2] == 0 and (picture.alpha == 65535).sum() == 9 * 13 - 1
    assert torch.equal(picture.color, planes(pixels))


@pytest.mark.parametrize("name", ["gray16.png", "rgba16.tif", "gray-alpha.png", "palette-alpha.png", "rgb.jpg", "float.tif"])
def test_upscaling(files, router, name):
    picture = read_picture(files[name])
    result, upscaled = upscale_picture(router, picture, budget=0.8)
    plain = router.upscale(fill_hidden(picture.color, picture.alpha).contiguous(), budget=0.8).image
    assert (result.kind, result.bits, result.metadata) == (picture.kind, picture.bits, picture.metadata)
    assert (result.height, result.width) == (2 * picture.height, 2 * picture.width) and sum(upscaled.stats.counts_per_class)
    if picture.kind == "gray":
        assert close(result.color[0], plain.double().mean(dim=0).round()) <= 0.5 and torch.equal(
            result.color[0], result.color[2]
        )
    else:
        assert torch.equal(result.color, plain)
    assert (result.alpha is None) == (picture.alpha is None)
    if picture.alpha is not None:
        smooth = F.interpolate(picture.alpha[None, None].double(), scale_factor=2, mode="bicubic")[0, 0]
        peak = 255 if picture.bits == 8 else 65535
        assert result.alpha.dtype == picture.alpha.dtype and close(result.alpha, smooth.clamp(0, peak)) <= 0.51


def test_an_opaque_picture_stays_opaque(router):
    for dtype, peak in ((torch.uint8, 255), (torch.uint16, 65535)):
        alpha = torch.full((9, 13), peak, dtype=torch.int32).to(dtype)
        result, _ = upscale_picture(router, Picture(alpha.expand(3, -1, -1).contiguous(), alpha))
        assert (result.alpha.int() == peak).all()
