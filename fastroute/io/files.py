"""Files and folders: finding images, checking what can be written, and writing files completely or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

from fastroute.io.recognise import READ_SUFFIXES
from fastroute.io.walk import walk

# The endings of files that can be written.
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".bmp")
# The folder in which Linux shows the open files of a process. A nameless file gets its name through it.
OPEN_FILES = "/proc/self/fd"


class ImageError(ValueError):
    """An image file cannot be read or written. The message names the file and the reason."""


class ImageMemoryError(ImageError, MemoryError):
    """An image file for which memory ran out; the message says what to do."""


def list_images(folder: str | Path, exclude: Sequence[str] = ()) -> list[Path]:
    """The image files below `folder`, sorted by path; see :func:`is_image`.

    Args:
        folder: where to look.
        exclude: patterns of file names to leave out, such as "*-x4.png".

    Raises:
        ValueError: `folder` is not a folder, contains no image, or all of them are left out.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"images: {folder} is not a folder")
    paths = [path for path in walk(folder).images if path.is_file()]
    if not paths:
        raise ValueError(f"images: {folder} holds no image file ({', '.join(READ_SUFFIXES)})")
    found = [path for path in paths if not any(fnmatch(path.name, pattern) for pattern in exclude)]
    if not found:
        raise ValueError(f"images: every image in {folder} is excluded by {', '.join(exclude)}")
    return found


def check_writable(path: str | Path) -> None:
    """Check before the work that a picture can be written to `path`.

    Raises:
        ImageError: the folder is missing or not writable, `path` is a folder, or its ending names no known format.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ImageError(f"cannot write {path}: its ending must be one of {', '.join(SUFFIXES)}")
    if reason := why_not_writable(path):
        raise ImageError(f"cannot write {path}: {reason}")


def why_not_writable(path: str | Path, folders: bool = False) -> str:
    """Why a file `path` cannot be written; "" if it can. Nothing is changed.

    Args:
        path: path of the file. Links are followed.
        folders: whether missing folders above `path` will be created.
    """
    real = Path(os.path.realpath(path))
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        # A name that is too long, for example.
        return error.strerror or str(error)
    if os.path.isdir(real):
        return "it is a folder"
    if os.path.lexists(real) and not os.path.isfile(real):
        return "it is not a regular file"
    parent = real.parent
    while folders and not os.path.lexists(parent):
        parent = parent.parent
    if not os.path.isdir(parent):
        why = f": {parent} is a file" if os.path.lexists(parent) else ""
        return f"the folder {Path(path).parent} does not exist{why}"
    if not (os.access(parent, os.W_OK) and os.access(parent, os.X_OK)) or (
        os.path.exists(real) and not os.access(real, os.W_OK)
    ):
        return "permission denied"
    return ""


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object], follow: bool = True) -> None:
    """Call `write` on a new file and give it the name `path` when it is complete; see :func:`written_atomically`."""
    with written_atomically(path, follow) as file:
        write(file)


@contextmanager
def written_atomically(path: str | Path, follow: bool = True) -> Iterator[BinaryIO]:
    """A new file that gets the name `path` when the block ends. An interrupted run leaves `path` as it was.

    Links are followed, unless `follow` is False, and the permissions of a replaced file are kept.

    Until the end of the block the file has no name, if the system allows this, so that even a killed process leaves nothing
    behind. On other systems it is called ``.NAME.….part``, and a failure removes it.
    """
    path = target_of(path) if follow else Path(path)
    if follow and os.path.lexists(path) and not path.is_file():
        # A device or a pipe would be lost, not written.
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    handle, part = _open_nameless(path.parent), None
    if handle is None:
        handle, part = _open_part(path)
    try:
        # Some libraries read the name of a file.
        with open(path, "w+b", opener=lambda *_: handle) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            # Temporary files are private.
            os.chmod(file.fileno(), permissions_of(path))
            if part is None:
                part = _name(file, path)
        # Giving a file a name cannot replace another file in one step, but renaming can.
        os.replace(part, path)
    except BaseException:
        if part is not None:
            Path(part).unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A new folder that gets the name `path` when the block ends, after which an old folder of that name is removed.

    Until then it is called ``.NAME.….part``. A failure removes it.
    """
    path = target_of(path)
    part = new_part(path)
    try:
        yield part
        replace_folder(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def replace_folder(part: Path, path: Path) -> None:
    """Give the folder `part` the name `path`, after which an old folder of that name is removed."""
    old = new_part(path)
    if path.exists():
        path.rename(old)
    try:
        part.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def published_folder(path: str | Path) -> Iterator[Path]:
    """A new folder that gets the name `path` when the block ends, unless another process has been first: then that one stays.

    All processes find the same folder afterwards, and find it complete.
    """
    path = Path(path)
    part = new_part(path)
    try:
        part.mkdir()
        yield part
        try:
            part.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def target_of(path: str | Path) -> Path:
    """The path at which a file of that name is written: the target of a link."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


def permissions_of(path: Path) -> int:
    """The permissions of the existing file, or those of a new file."""
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except OSError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask


def remove_parts(paths: Iterable[str | Path]) -> None:
    """Remove temporary files that a killed process may have left while writing `paths`."""
    prefixes: dict[Path, set[str]] = {}
    for path in map(target_of, paths):
        prefixes.setdefault(path.parent, set()).add(part_prefix(path))
    for folder, starts in prefixes.items():
        for part in folder.glob(".*.part"):
            # The part after the prefix is random and has no dot.
            if part.name.removesuffix(".part").rpartition(".")[0] + "." in starts:
                # For an array it is a folder.
                if part.is_dir() and not part.is_symlink():
                    shutil.rmtree(part, ignore_errors=True)
                else:
                    part.unlink(missing_ok=True)


def _open_nameless(folder: Path) -> int | None:
    """A file in `folder` that has no name yet; None if the system or the file system does not support this."""
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir(OPEN_FILES):
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
            return None
        raise


def _name(file: BinaryIO, path: Path) -> str:
    """Give the nameless `file` a temporary name next to `path` and return it."""
    part = str(new_part(path))
    links = os.open(OPEN_FILES, os.O_RDONLY)
    try:
        os.link(str(file.fileno()), part, src_dir_fd=links, follow_symlinks=True)
    except OSError:
        # Some sandboxes forbid this. Then the bytes are copied to a file that had a name from the start.
        handle, part = _open_part(path)
        with os.fdopen(handle, "wb") as copy:
            file.seek(0)
            shutil.copyfileobj(file, copy)
            copy.flush()
            os.fsync(copy.fileno())
        os.chmod(part, os.fstat(file.fileno()).st_mode & 0o777)
    finally:
        os.close(links)
    return part


def _open_part(path: Path) -> tuple[int, str]:
    return tempfile.mkstemp(dir=path.parent, prefix=part_prefix(path), suffix=".part")


def new_part(path: Path) -> Path:
    """A temporary name beside `path`, which `remove_parts` finds."""
    return path.parent / f"{part_prefix(path)}{secrets.token_hex(6)}.part"


def part_prefix(path: Path) -> str:
    """A part of the target's name, short enough for file systems, which count bytes, and never ending in half a character."""
    return f".{os.fsencode(path.name)[:80].decode(errors='ignore')}."
