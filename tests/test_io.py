"""Image files in and out, and pictures of classes."""

from __future__ import annotations

import os
import stat

import numpy as np
import pytest
import torch
from networks import picture
from PIL import Image

from fastroute import TileGrid, io
from fastroute.io import ImageError, check_writable, list_images, png, read_image, write_atomically, write_image
from fastroute.io.files import remove_parts
from fastroute.visualize import GREEN, RED, YELLOW, class_colours, class_overlay, colour_names


def random_image(height: int = 9, width: int = 13, channels: int = 3) -> torch.Tensor:
    return (picture(1, channels, height, width)[0] * 255).to(torch.uint8)


@pytest.mark.parametrize("ending", [".png", ".PNG", ".tif", ".tiff", ".bmp"])
def test_lossless_round_trip(tmp_path, ending):
    image = random_image()
    write_image(tmp_path / f"a{ending}", image)
    back = read_image(tmp_path / f"a{ending}")
    assert torch.equal(back, image) and back.is_contiguous() and back.dtype == torch.uint8
    write_image(str(tmp_path / f"gray{ending}"), image[:1])
    assert torch.equal(read_image(str(tmp_path / f"gray{ending}")), image[:1].expand(3, -1, -1))


@pytest.mark.parametrize("ending", [".jpg", ".jpeg", ".webp"])
def test_lossy_round_trip(tmp_path, ending):
    image = torch.arange(0, 256, 4, dtype=torch.uint8).expand(3, 32, 64)
    write_image(tmp_path / f"a{ending}", image)
    assert Image.open(tmp_path / f"a{ending}").format == ("WEBP" if ending == ".webp" else "JPEG")
    assert (read_image(tmp_path / f"a{ending}").int() - image.int()).abs().max() <= 12


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "LA"])
def test_other_modes_become_rgb(tmp_path, mode):
    path = tmp_path / "a.tif"
    Image.fromarray(random_image().permute(1, 2, 0).numpy()).convert(mode).save(path)
    assert read_image(path).shape == (3, 9, 13)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 128, 255, 256, 30000, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    expected = np.round(values / 257)
    assert np.abs(read_image(tmp_path / "a.png")[0].numpy().astype(int) - expected).max() <= 1


def test_damaged_images(tmp_path):
    write_image(tmp_path / "whole.png", random_image(200, 200))
    data = (tmp_path / "whole.png").read_bytes()
    for length, ending in ((0, ".png"), (7, ".jpg"), (100, ".png"), (len(data) // 2, ".png")):
        path = tmp_path / f"cut{length}{ending}"
        path.write_bytes(data[:length])
        with pytest.raises(ImageError, match=f"cannot read {path}"):
            read_image(path)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ImageError, match=r"text\.png: not an image of a known format"):
        read_image(tmp_path / "text.png")


def test_missing_images(tmp_path):
    for path in (tmp_path / "absent.png", tmp_path, tmp_path / "absent" / "a.png"):
        with pytest.raises(ImageError, match=f"cannot read {path}: (No such file|Is a directory)"):
            read_image(path)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", random_image(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"cannot read .*a\.png"):
        read_image(tmp_path / "a.png")


def test_list_images(tmp_path):
    with pytest.raises(ValueError, match=r"holds no image file \(\.png"):
        list_images(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        list_images(tmp_path / "absent")
    (tmp_path / "b" / "c.png").mkdir(parents=True)
    for name in ("z.JPG", "b/a.webp", "b/notes.txt", "a.tiff"):
        (tmp_path / name).write_bytes(b"")
    assert list_images(tmp_path) == [tmp_path / name for name in ("a.tiff", "b/a.webp", "z.JPG")]


@pytest.mark.parametrize("name", ["a", "a.xyz", "a.gif.part", ".png"])
def test_unknown_endings(tmp_path, name):
    for act in (check_writable, lambda path: write_image(path, random_image())):
        with pytest.raises(ImageError, match=r"its ending must be one of \.png, \.jpg"):
            act(tmp_path / name)


def test_unwritable_places(tmp_path, monkeypatch):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path / "folder.png", "it is a folder"),
        (tmp_path / "absent" / "a.png", "does not exist"),
        (tmp_path / "file" / "a.png", "does not exist"),
    ):
        with pytest.raises(ImageError, match=reason):
            check_writable(path)
    # Root may write anywhere, so that permissions are told, not set.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ImageError, match="permission denied"):
        check_writable(tmp_path / "a.png")


def test_an_encoder_that_fails_leaves_no_trace(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_image(path, random_image())
    before = path.read_bytes()

    def encode(file, *arguments):
        file.write(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(png, "encode", encode)
    with pytest.raises(ImageError, match=r"cannot write .*a\.png: no space left"):
        write_image(path, random_image())
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit])
def test_an_interrupted_write_leaves_no_trace(tmp_path, error):
    path = tmp_path / "a.bin"

    def write(file):
        file.write(b"half")
        raise error

    with pytest.raises(error):
        write_atomically(path, write)
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"old")
    with pytest.raises(error):
        write_atomically(path, write)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_file_without_a_name_leaves_nothing_behind(tmp_path):
    seen = []
    write_atomically(tmp_path / "a", lambda file: (file.write(b"x"), seen.append(os.listdir(tmp_path))))
    assert (tmp_path / "a").read_bytes() == b"x"
    if not hasattr(os, "O_TMPFILE") or seen != [[]]:
        pytest.skip("this file system has no files without names")


@pytest.mark.parametrize("missing", ["names", "links"])
def test_systems_without_nameless_files(tmp_path, monkeypatch, missing):
    if missing == "names":
        monkeypatch.setattr("fastroute.io.files._open_nameless", lambda folder: None)
    else:
        monkeypatch.setattr(os, "link", lambda *args, **kwargs: (_ for _ in ()).throw(PermissionError(1, "no")))
    for content in (b"old", b"new"):
        write_atomically(tmp_path / "a", lambda file, content=content: file.write(content))
        assert (tmp_path / "a").read_bytes() == content and os.listdir(tmp_path) == ["a"]


def test_parts_are_removed(tmp_path):
    for name in (".a.png.k3_x.part", ".b.png.k3.part", "a.png.part", ".a.png.x.y.part", "a.png"):
        (tmp_path / name).write_bytes(b"")
    remove_parts([tmp_path / "a.png", tmp_path / "c.png"])
    assert sorted(os.listdir(tmp_path)) == [".a.png.x.y.part", ".b.png.k3.part", "a.png", "a.png.part"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "other").write_bytes(b"")
    write_atomically(tmp_path / "mine", lambda file: file.write(b""))
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_class_colours():
    assert class_colours(1).tolist() == [list(GREEN)]
    assert class_colours(2).tolist() == [list(GREEN), list(RED)]
    assert class_colours(3).tolist() == [list(GREEN), list(YELLOW), list(RED)]
    assert class_colours(5)[[0, 2, 4]].tolist() == [list(GREEN), list(YELLOW), list(RED)]
    assert len({tuple(colour) for colour in class_colours(9).tolist()}) == 9
    assert (
        colour_names(3) == ["green", "yellow", "red"] and colour_names(1) == ["green"] and colour_names(2) == ["green", "red"]
    )
    assert colour_names(5) == ["green", "yellow-green", "yellow", "orange", "red"]


def hue(pixel: torch.Tensor) -> str:
    red, green, _ = pixel.tolist()
    if abs(red - green) < 30:
        return "yellow"
    return "red" if red > green else "green"


def test_class_overlay_of_a_literal_map():
    # Origins 0, 3, 6 along both axes, 4 output pixels per LR pixel: tiles begin at output pixels 0, 12 and 24.
    grid = TileGrid(10, 10, patch=4, stride=3, scale=4)
    class_map = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 2, 0]])
    image = torch.full((3, 40, 40), 100, dtype=torch.uint8)
    overlay = class_overlay(image, class_map, grid, 3)
    assert (overlay.shape, overlay.dtype) == ((3, 40, 40), torch.uint8)
    names = ("green", "yellow", "red")
    for i, y in enumerate((2, 14, 30)):
        for j, x in enumerate((2, 14, 30)):
            assert hue(overlay[:, y, x]) == names[class_map[i, j]], (i, j)
    # Where tiles overlap, output pixels 12 to 15, the later one is seen; a dark line marks where it begins.
    assert hue(overlay[:, 2, 11]) == "green" and hue(overlay[:, 2, 12]) == hue(overlay[:, 2, 13]) == "yellow"
    for edge in (12, 24):
        assert overlay[:, 2, edge].float().mean() < 0.8 * overlay[:, 2, edge + 1].float().mean()
        assert overlay[:, edge, 2].float().mean() < 0.8 * overlay[:, edge + 1, 2].float().mean()
    expected = (0.58 * 100 + 0.42 * torch.tensor(GREEN)).round()
    assert overlay[:, 2, 2].tolist() == expected.tolist()


def test_a_tile_before_a_shifted_one_keeps_its_share():
    # The last origin is 4: only one pixel after the one before, 3, whose own share is three pixels wide.
    grid = TileGrid(4, 8, patch=4, stride=3)
    assert grid.col_origins == [0, 3, 4]
    image = torch.full((3, 4, 8), 100, dtype=torch.uint8)
    overlay = class_overlay(image, torch.tensor([[0, 2, 0]]), grid, 3)
    # Without 3 and 6, where the dark lines are.
    assert [hue(overlay[:, 1, x]) for x in (0, 1, 2, 4, 5, 7)] == ["green", "green", "green", "red", "red", "green"]
    assert all(overlay[:, 1, x].float().mean() < 0.8 * overlay[:, 1, x + 1].float().mean() for x in (3, 6))


def test_class_overlay_shows_the_image_below():
    grid = TileGrid(8, 8, 8, 8)
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    image[0, 2, 3] = 255
    overlay = class_overlay(image, torch.zeros(1, 1, dtype=torch.uint8), grid, 3).float().mean(dim=0)
    assert overlay[2, 3] - overlay[2, 2] == pytest.approx(0.58 * 255, abs=1)


def test_class_overlay_refuses_other_sizes():
    grid = TileGrid(10, 10, patch=4, stride=3, scale=2)
    for image, class_map in (((3, 20, 20), (3, 2)), ((3, 20, 21), (3, 3)), ((3, 10, 10), (3, 3))):
        with pytest.raises(ValueError, match=r"class_overlay: class_map must be \(3, 3\) and image \(C, 20, 20\)"):
            class_overlay(torch.zeros(image, dtype=torch.uint8), torch.zeros(class_map, dtype=torch.int64), grid, 3)


def test_suffixes_are_known_to_the_encoder():
    assert {io.SUFFIXES[0], ".jpg", ".webp"} <= set(io.SUFFIXES) <= set(Image.registered_extensions())
