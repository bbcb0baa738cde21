"""What goes from file to file in bands is what reading, upscaling and writing give: pixels, transparency, metadata, errors."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import tifffile
import torch
import zarr
from every_format import make_all, samples
from mixed_files import SRGB, XMP, exif, ramp
from networks import random_classsr
from PIL import Image, PngImagePlugin

from fastroute import PatchRouter, io
from fastroute.files import writers
from fastroute.files.alpha import enlarge_rows
from fastroute.files.file_to_file import upscale_file
from fastroute.files.pictures import upscale_picture

pytestmark = pytest.mark.usefixtures("quick_tuning")
CASES = make_all()
SOME = [
    "png-graya16-interlaced", "png-palette4-alpha", "png-rgb8-key", "tiff-gray12", "tiff-gray6-white", "tiff-rgb10",
    "tiff-rgbpremultiplied16", "tiff-graypremultiplied8", "tiff-rgbx16", "tiff-rgb16-planes-tiles-lzw-predictor",
    "tiff-turned6", "tiff-float", "tiff-jpeg-tables", "tiff-cmyk16", "tiff-thumbnail-and-pages", "jpeg-rgb12", "jpeg-cmyk",
    "webp-lossless-alpha", "gif-clear", "jp2-rgba12", "avif-rgb10", "pnm-rgb1023",
]  # fmt: skip


@pytest.fixture(scope="module")
def router():
    system = random_classsr((3, 5, 9), 2, 8)
    return PatchRouter(system.branches, system.classifier, patch=8, stride=6, scale=2)


def both(router, source, folder, ending, **options):
    """The result as a whole, and in bands."""
    picture = io.read_picture(source, **{key: value for key, value in options.items() if key in ("white", "max_pixels")})
    whole, _ = upscale_picture(router, picture)
    io.write_picture(folder / f"whole{ending}", whole)
    upscale_file(source, folder / f"bands{ending}", router, memory_limit=20_000_000, **options)
    return folder / f"whole{ending}", folder / f"bands{ending}"


def same(a, b):
    first, second = io.read_picture(a, max_pixels=None, white=8), io.read_picture(b, white=8)
    assert str(first) == str(second) and torch.equal(first.color, second.color)
    assert (first.alpha is None) == (second.alpha is None)
    assert first.alpha is None or torch.equal(first.alpha, second.alpha)
    assert first.metadata == second.metadata


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("ending", [".tif", ".png"])
def test_every_kind(router, tmp_path, name, ending):
    source = tmp_path / f"in{CASES[name].suffix}"
    source.write_bytes(CASES[name].data)
    same(*both(router, source, tmp_path, ending))


@pytest.mark.parametrize("ending", [".tif", ".png", ".jpg", ".webp", ".bmp"])
def test_metadata(router, tmp_path, ending):
    text = PngImagePlugin.PngInfo()
    text.add_itxt("Title", "ümlaut")
    text.add_itxt("XML:com.adobe.xmp", XMP.decode())
    options = {"icc_profile": SRGB, "dpi": (300, 300), "exif": exif(6), "pnginfo": text}
    Image.fromarray(ramp(40, 50)).save(tmp_path / "in.png", **options)
    whole, bands = both(router, tmp_path / "in.png", tmp_path, ending)
    same(whole, bands)
    assert ending == ".bmp" or io.read_picture(bands).metadata.icc == SRGB
    if ending in (".jpg", ".webp", ".bmp"):
        assert whole.read_bytes() == bands.read_bytes()


@pytest.mark.slow
def test_transparency_in_bands():
    for dtype in (torch.uint8, torch.uint16, torch.float32):
        peak = {torch.uint8: 255, torch.uint16: 65535, torch.float32: 1}[dtype]
        alpha = (torch.rand(90, 40, generator=torch.Generator().manual_seed(0)) * peak).to(dtype)
        for size in ((180, 80), (270, 120), (225, 97), (90, 40)):
            whole = enlarge_rows(lambda a, b, alpha=alpha: alpha[a:b], (90, 40), size, (0, size[0]))
            parts = [enlarge_rows(lambda a, b, alpha=alpha: alpha[a:b], (90, 40), size, (y, min(y + 7, size[0])))
                     for y in range(0, size[0], 7)]  # fmt: skip
            assert torch.equal(torch.cat(parts), whole)
            smooth = torch.nn.functional.interpolate(alpha[None, None].double(), size=size, mode="bicubic")[0, 0]
            assert (whole.double() - smooth.clamp(0, peak)).abs().max() <= (0.51 if peak > 1 else 1e-5)
        assert torch.equal(whole, alpha)


def test_hidden_colours_do_not_bleed(router, tmp_path):
    y, x = np.mgrid[0:64, 0:64]
    alpha = np.clip((24.5 - np.hypot(y - 31.5, x - 31.5)) * 255, 0, 255).astype(np.uint8)
    results = []
    for name, hidden in (("black", (0, 0, 0)), ("same", (230, 210, 60)), ("noise", None)):
        pixels = np.full((64, 64, 4), (230, 210, 60, 0), np.uint8)
        pixels[..., 3] = alpha
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
        pixels[alpha == 0, :3] = noise[alpha == 0] if hidden is None else hidden
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        whole, bands = both(router, tmp_path / f"{name}.png", tmp_path, ".png")
        same(whole, bands)
        results.append(io.read_picture(bands))
    assert all(torch.equal(result.color, results[0].color) for result in results)


def test_from_and_to_zarr(router, tmp_path):
    pixels = samples(4, 16)
    zarr.open_array(str(tmp_path / "in.zarr"), mode="w", shape=pixels.shape, chunks=(7, 9, 4), dtype="uint16")[:] = pixels
    tifffile.imwrite(tmp_path / "in.tif", pixels, photometric="rgb", extrasamples=["unassalpha"])
    upscale_file(tmp_path / "in.zarr", tmp_path / "a.tif", router)
    upscale_file(tmp_path / "in.tif", tmp_path / "b.zarr", router)
    array = zarr.open_array(str(tmp_path / "b.zarr"), mode="r")[:]
    assert np.array_equal(array, tifffile.imread(tmp_path / "a.tif")) and array.shape == (36, 52, 4)
    for shape, dtype, words in (((4, 4, 5), "uint8", "its shape is"), ((4, 4), "int16", "it is of int16")):
        zarr.open_array(str(tmp_path / "odd.zarr"), mode="w", shape=shape, dtype=dtype)
        with pytest.raises(io.ImageError, match=f"cannot read .*odd.zarr: .*{words}"):
            upscale_file(tmp_path / "odd.zarr", tmp_path / "c.tif", router)


def test_floats_of_another_white(router, tmp_path):
    tifffile.imwrite(tmp_path / "in.tif", (ramp() / np.float32(1)).astype(np.float32), photometric="rgb")
    with pytest.raises(io.ImageError, match=r"in.tif: floating-point values must lie in about"):
        upscale_file(tmp_path / "in.tif", tmp_path / "out.tif", router)
    assert not (tmp_path / "out.tif").exists()
    same(*both(router, tmp_path / "in.tif", tmp_path, ".png", white=255))


def test_what_a_result_cannot_hold(router, tmp_path):
    Image.fromarray(samples(4, 8)).save(tmp_path / "in.png")
    with pytest.raises(io.ImageError, match=r"out.jpg: JPEG holds no transparency"):
        upscale_file(tmp_path / "in.png", tmp_path / "out.jpg", router)
    done = upscale_file(tmp_path / "in.png", tmp_path / "out.jpg", router, drop_alpha=True)
    assert Image.open(tmp_path / "out.jpg").size == done.size[::-1]
    Image.fromarray(ramp(600, 400)).save(tmp_path / "large.png")
    for ending, words in ((".jpg", "encoded whole.*choose .png, .tif or .zarr"), (".webp", "encoded whole")):
        with pytest.raises(io.ImageError, match=f"out2{ending}: .*{words}"):
            upscale_file(tmp_path / "large.png", tmp_path / f"out2{ending}", router, memory_limit=3_000_000)
    with pytest.raises(io.ImageError, match=r"large.png: its format is decoded whole.* store the picture as TIFF"):
        upscale_file(tmp_path / "large.png", tmp_path / "out2.tif", router, memory_limit=1_000_000)
    with pytest.raises(ValueError, match=r"must be at least .* of which .* MB hold what is decoded.*got 3000000"):
        upscale_file(tmp_path / "large.png", tmp_path / "out2.tif", router, memory_limit=3_000_000)
    assert not list(tmp_path.glob("out2*")) and not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("ending", [".tif", ".png", ".zarr", ".jpg"])
def test_a_full_disk(router, tmp_path, monkeypatch, ending):
    Image.fromarray(ramp(40, 50)).save(tmp_path / "in.png")

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for kind in (writers.TiffWriter, writers.PngWriter, writers.ArrayWriter):
        monkeypatch.setattr(kind, "write", full)
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(io.ImageError, match=f"cannot write .*out{ending}: No space left on device"):
        upscale_file(tmp_path / "in.png", tmp_path / f"out{ending}", router)
    assert sorted(os.listdir(tmp_path)) == ["in.png"]


def test_what_killed_processes_left_is_removed(router, tmp_path):
    Image.fromarray(ramp()).save(tmp_path / "in.png")
    (tmp_path / ".out.zarr.0123.part").mkdir()
    (tmp_path / ".out.zarr.0123.part" / "c").write_bytes(b"x")
    (tmp_path / ".out.tif.0123.part").write_bytes(b"x")
    for ending in (".tif", ".zarr"):
        upscale_file(tmp_path / "in.png", tmp_path / f"out{ending}", router)
    assert sorted(os.listdir(tmp_path)) == ["in.png", "out.tif", "out.zarr"]


def test_a_folder_is_not_an_array(router, tmp_path):
    Image.fromarray(ramp()).save(tmp_path / "in.png")
    (tmp_path / "z.zarr").mkdir()
    (tmp_path / "z.zarr" / "photo.png").write_bytes(b"mine")
    with pytest.raises(io.ImageError, match="holds something else than an array"):
        upscale_file(tmp_path / "in.png", tmp_path / "z.zarr", router)
    assert (tmp_path / "z.zarr" / "photo.png").read_bytes() == b"mine"
