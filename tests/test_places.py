"""Names and places of files: long names, links, permissions, folders that are linked in circles, homes that are not there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from mixed_files import ramp
from PIL import Image

from fastroute import io
from fastroute.io.files import ImageError, part_prefix, remove_parts, why_not_writable
from fastroute.io.walk import walk
from fastroute.runtime.json_cache import cache_folder


def write(path: Path, data: bytes = b"new") -> None:
    io.write_atomically(path, lambda file: file.write(data))


# In bytes these are as long as file systems take.
@pytest.mark.parametrize(
    "name", ["a" * 251 + ".png", "ä" * 125 + "a.png", "\U0001f600" * 62 + "abc.png", "\udcff" * 251 + ".png"]
)
@pytest.mark.parametrize("named", [False, True])
def test_long_names(tmp_path, monkeypatch, name, named):
    if named:
        monkeypatch.setattr("fastroute.io.files.OPEN_FILES", "/nowhere")
    assert len(os.fsencode(name)) == 255
    path = tmp_path / name
    for data in (b"one", b"two"):
        write(path, data)
        assert path.read_bytes() == data and os.listdir(tmp_path) == [name]
    (tmp_path / f"{part_prefix(path)}x1.part").write_bytes(b"of a killed process")
    remove_parts([path])
    assert os.listdir(tmp_path) == [name]
    with pytest.raises(ImageError, match="File name too long"):
        io.check_writable(tmp_path / f"a{name}")


def test_permissions_are_kept(tmp_path):
    path = tmp_path / "a.png"
    old = os.umask(0o027)
    try:
        write(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        for mode in (0o600, 0o664, 0o444):
            path.chmod(mode)
            write(path)
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(old)


def test_links_are_followed(tmp_path):
    (tmp_path / "there").mkdir()
    link, real = tmp_path / "link.png", tmp_path / "there" / "real.png"
    link.symlink_to("there/real.png")
    for _ in range(2):
        write(link)
        assert link.is_symlink() and real.read_bytes() == b"new" and os.listdir(tmp_path / "there") == ["real.png"]
    (tmp_path / "lost.png").symlink_to("nowhere/real.png")
    with pytest.raises(ImageError, match="does not exist"):
        io.check_writable(tmp_path / "lost.png")


def test_what_is_no_file_is_not_replaced(tmp_path):
    """Neither by its own name nor through a link; a device is made here, where it does no harm."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    (tmp_path / "round.png").symlink_to("round.png")
    for name in ("pipe.png", "link.png", "round.png"):
        with pytest.raises(OSError, match="not a regular file"):
            write(tmp_path / name)
        with pytest.raises(ImageError, match=r"not a regular file|symbolic links"):
            io.check_writable(tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / "pipe.png").stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["link.png", "pipe.png", "round.png"]


def test_why_not_writable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe.png")
    assert why_not_writable(tmp_path / "new.png") == ""
    assert why_not_writable(tmp_path / "new" / "er" / "a.png", folders=True) == ""
    assert "new does not exist" in why_not_writable(tmp_path / "new" / "a.png")
    assert "file is a file" in why_not_writable(tmp_path / "file" / "a.png", folders=True)
    assert why_not_writable(tmp_path / "pipe.png") == "it is not a regular file"
    assert why_not_writable(tmp_path) == "it is a folder"
    # Root may write anywhere, so that permissions are told, not set.
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert why_not_writable(tmp_path / "new" / "a.png", folders=True) == "permission denied"


def test_a_walk_takes_linked_folders_once(tmp_path):
    root, far = tmp_path / "root", tmp_path / "far"
    for folder in (root / "deep", far):
        folder.mkdir(parents=True)
    for path in (root / "a.png", root / "deep" / "b.jpe", far / "c.jfif"):
        Image.fromarray(ramp()).save(path, format="PNG")
    (root / "noext").write_bytes((root / "a.png").read_bytes())
    (root / "notes.txt").write_text("no image")
    (root / ".a.png.12.part").write_bytes((root / "a.png").read_bytes())
    for name, goal in (
        ("circle", "."),
        ("deep/up", ".."),
        ("far", far),
        ("again", far),
        ("0-deep", "deep"),
        ("lost", "nowhere"),
    ):
        (root / name).symlink_to(goal)
    (root / "lost.png").symlink_to("nowhere")
    found = walk(root)
    assert [path.relative_to(root).as_posix() for path in found.images] == [
        "a.png", "again/c.jfif", "deep/b.jpe", "lost.png", "noext",
    ]  # fmt: skip
    others = {path.relative_to(root).as_posix(): reason for path, reason in found.others}
    assert set(others) == {".a.png.12.part", "0-deep", "circle", "deep/up", "far", "lost", "notes.txt"}
    assert (
        "looked at already" in others["circle"] and "looked at already" in others["far"] and "no image" in others["notes.txt"]
    )
    assert "temporary" in others[".a.png.12.part"]
    assert walk(root, (root.resolve() / "deep",)).images == [
        root / "a.png",
        root / "again/c.jfif",
        root / "lost.png",
        root / "noext",
    ]
    assert io.list_images(root) == [path for path in found.images if path.name != "lost.png"]


def test_the_cache_lies_in_an_absolute_place(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTROUTE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "here/there", "~/x"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == tmp_path / ".cache" / "fastroute"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "fastroute"
    monkeypatch.delenv("XDG_CACHE_HOME")
    # A user whom the system does not know.
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cache_folder().is_absolute() and "~" not in str(cache_folder())
