"""Files that went wrong for users, through every way in which a file is read."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from networks import random_classsr
from PIL import ImageCms

import fastroute
from fastroute import io
from fastroute.cli import main
from fastroute.files.file_to_file import upscale_file
from fastroute.io.colour import profile_of_chunks
from fastroute.io.read import open_picture
from fastroute.models.checkpoints import save_checkpoint

DATA = os.environ.get("FASTROUTE_DATA")
CASES = Path(DATA or "") / "cases"
pytestmark = [
    pytest.mark.usefixtures("quick_tuning"),
    pytest.mark.skipif(not DATA or not CASES.is_dir(), reason="FASTROUTE_DATA names no folder with cases"),
]
# What is read: bits, mean of the colours, mean of alpha, both as a share of white.
READ = {
    "tiff/gray10-black.tif": (16, 0.5, None),
    "tiff/gray12-black.tif": (16, 0.5, None),
    "tiff/gray14-black.tif": (16, 0.5, None),
    "tiff/rgb12.tif": (16, 0.5, None),
    "tiff/gray4-black.tif": (8, 0.5, None),
    "tiff/gray6-white.tif": (8, 0.5, None),
    "tiff/rgba-as-uint8.tif": (8, 0.5, 191.5 / 255),
    "tiff/rgba-as-uint16.tif": (16, 0.5, 49215.5 / 65535),
    "tiff/ga-as-uint8.tif": (8, 0.5, 191.5 / 255),
    "tiff/rgba-none-uint8.tif": (8, 0.5, None),
    "tiff/rgba-none-uint16.tif": (16, 0.5, None),
    "tiff/bigbe-uint8.tif": (8, 0.5, None),
    "tiff/c-webp-rgb.tif": (8, 0.5, None),
    "tiff/c-jpeg2000-rgb.tif": (8, 0.5, None),
    "tiff/pil-jpeg-RGB.tif": (8, 0.5, None),
    "png/trns-4bit.png": (8, None, 0.5),
    "png/trns8.png": (8, None, 0.5),
    "png/flat-linear.png": (8, 55 / 255, None),
    "png/flat-pq.png": (16, 38000 / 65535, None),
    "jp2/white.jp2": (16, 1.0, None),
    "alpha/disc.png": (8, None, 78.21484375 / 255),
    "alpha/disc-full.png": (8, None, 78.21484375 / 255),
    "exif/text.jpg": (8, None, None),
    "exif/iptc.jpg": (8, None, None),
    "jpeg/ultrahdr.jpg": (8, None, None),
    "meta/ztxt2M.png": (8, None, None),
    "left/a.jpg": (8, None, None),
    "left/a.png": (16, None, None),
    "left/b.jfif": (8, None, None),
    "left/c.jpe": (8, None, None),
    "left/d.gif": (8, None, None),
    "left/e.avif": (8, None, None),
    "left/f.jp2": (8, None, None),
    "left/g.ppm": (16, None, None),
    "left/noext": (8, None, None),
}
REFUSED = {
    "tiff/f255.tif": "they are 0.0484504 to 254.889",
    "tiff/s-i1.tif": "signed samples",
    "cut/cut-on-strip.tif": "cut short",
    "left/h.heic": "cannot read",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "random.safetensors"
    save_checkpoint(path, random_classsr((3, 5, 9), 2, 8), {"scale": 2, "patch": 8, "stride": 6})
    return path


@pytest.fixture(scope="module")
def router(model):
    return fastroute.load(model, tune=False)


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch, router):
    """Files are read a hundred times here, the model once."""
    monkeypatch.setattr(fastroute, "load", lambda *args, **options: router)


def upscale(source, target, model, *options):
    return CliRunner().invoke(main, ["upscale", str(source), str(target), "--model", str(model), "--quiet", *options])


@pytest.mark.slow
def test_every_case_is_listed():
    found = {path.relative_to(CASES).as_posix() for path in CASES.glob("*/*") if path.suffix != ".py"}
    assert found == {*READ, *REFUSED}


@pytest.mark.parametrize("name", READ)
def test_reading_and_streaming(name):
    picture, (bits, mean, alpha) = io.read_picture(CASES / name), READ[name]
    peak = (1 << bits) - 1
    assert picture.bits == bits and (alpha is None) == (picture.alpha is None)
    assert mean is None or picture.color.double().mean() / peak == pytest.approx(mean, abs=1e-4)
    assert alpha is None or picture.alpha.double().mean() / peak == pytest.approx(alpha, abs=1e-4)
    with open_picture(CASES / name) as opened:
        bands = [opened.read(y, min(y + 7, opened.height), 0, opened.width) for y in range(0, opened.height, 7)]
        whole = torch.cat(bands, dim=1)
    assert torch.equal(whole[: 3 if whole.shape[0] > 2 else 1].expand(3, -1, -1), picture.color)
    assert picture.alpha is None or torch.equal(whole[-1], picture.alpha)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, model, router, tmp_path):
    with pytest.raises(io.ImageError, match=f"{name}.*" if name.endswith("heic") else f"{name}: .*{REFUSED[name]}"):
        io.read_picture(CASES / name)
    with pytest.raises(io.ImageError, match="cannot read"):
        upscale_file(CASES / name, tmp_path / "out.tif", router)
    for limit in ((), ("--memory-limit", "500")):
        result = upscale(CASES / name, tmp_path / "out.tif", model, *limit)
        assert result.exit_code != 0 and "cannot read" in result.output and isinstance(result.exception, SystemExit)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("group", sorted({name.split("/")[0] for name in READ}))
def test_folder_jobs(model, tmp_path, group):
    """A folder job takes every file that can be read, and names the others."""
    result = upscale(CASES / group, tmp_path / "many", model, "--format", "png")
    good = [name for name in READ if name.startswith(f"{group}/")]
    stems = [Path(name).stem for name in good]
    if len(set(stems)) < len(stems):
        # Results of one name are refused before anything is written.
        assert result.exit_code != 0 and "would both be written to" in result.output
        result = upscale(CASES / group, tmp_path / "many", model)
    expected_failures = [name for name in REFUSED if name.startswith(f"{group}/")]
    assert (result.exit_code != 0) == bool(expected_failures), result.output
    for name in expected_failures:
        assert Path(name).name in result.output
    written = {path.stem: path for path in (tmp_path / "many").rglob("*") if path.is_file()}
    for name in good:
        assert Path(name).stem in written, f"{name} was left out"


@pytest.mark.parametrize("name", READ)
def test_single_files(model, router, tmp_path, name):
    """A file on the command line, with and without a memory limit, and `upscale_file` give the same picture."""
    upscale_file(CASES / name, tmp_path / "one.tif", router)
    assert upscale(CASES / name, tmp_path / "two.tif", model).exit_code == 0
    assert upscale(CASES / name, tmp_path / "three.tif", model, "--memory-limit", "500").exit_code == 0
    pictures = [io.read_picture(tmp_path / f"{which}.tif") for which in ("one", "two", "three")]
    for other in pictures[1:]:
        assert str(other) == str(pictures[0]) and np.array_equal(other.color.numpy(), pictures[0].color.numpy())
        assert other.metadata == pictures[0].metadata


def test_visible_edges_do_not_depend_on_hidden_colours(router, tmp_path):
    for name in ("disc", "disc-full"):
        upscale_file(CASES / "alpha" / f"{name}.png", tmp_path / f"{name}.png", router)
    one, other = io.read_picture(tmp_path / "disc.png"), io.read_picture(tmp_path / "disc-full.png")
    assert torch.equal(one.color, other.color) and torch.equal(one.alpha, other.alpha)


def test_profiles_made_of_chunks_have_no_date():
    chunks = {"gAMA": (100000).to_bytes(4, "big")}
    made = profile_of_chunks(chunks)
    assert made[24:36] == bytes.fromhex("07d0 0001 0001 0000 0000 0000") and made[36:40] == b"acsp" and not any(made[84:100])
    assert ImageCms.getProfileName(ImageCms.ImageCmsProfile(BytesIO(made)))
