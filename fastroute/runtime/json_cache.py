"""Measurements of this machine that outlive a process: one JSON file of entries, shared by all processes of a user."""

from __future__ import annotations

import json
import logging
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from fastroute import io

logger = logging.getLogger("fastroute")

# A file of more bytes was not written by this package. The oldest entries beyond this number are dropped.
LARGEST_FILE, MOST_ENTRIES = 16 << 20, 16384
# Levels of nested lists and dictionaries in an entry.
DEEPEST = 8
# Seconds to wait for other processes, each of which holds the lock for milliseconds, and seconds between two attempts.
PATIENCE, PAUSE = 10.0, 0.005

# Files that a warning has named already.
_warned: set[Path] = set()


class JsonCache:
    """The file `name` in the cache folder, which maps keys to entries, each a dictionary.

    The content of a cache can always be measured again, so nothing that is wrong with it is an error. A file that cannot be
    read, is not a regular file or holds something else counts as empty, with one warning per process. A file is only ever
    replaced as a whole, so readers need no lock. Writers take one, because each adds to what the others have written.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def path(self) -> Path:
        """The path of the file now: in FASTROUTE_CACHE, or in the user's cache folder."""
        return cache_folder() / self.name

    def read(self) -> dict[str, dict[str, Any]]:
        """All entries. Their content has not been checked."""
        path = self.path
        try:
            table = json.loads(_text(path))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            return self._ignored(path, str(error) or type(error).__name__)
        if not isinstance(table, dict):
            return self._ignored(path, f"it holds a {type(table).__name__} instead of an object")
        return {key: entry for key, entry in table.items() if isinstance(entry, dict) and _is_shallow(entry, DEEPEST)}

    def remember(self, key: str, entry: Mapping[str, Any]) -> bool:
        """Add `entry` or replace the one under `key`. Returns whether the file holds it now."""
        path = self.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f"{self.name}.lock"), timeout=PATIENCE, poll_interval=PAUSE):
                table = self.read()
                table.pop(key, None)
                table[key] = dict(entry)
                latest = dict(list(table.items())[-MOST_ENTRIES:])
                text = json.dumps(latest, indent=1)
                io.write_atomically(path, lambda file: file.write(text.encode()), follow=False)
        except (OSError, NotImplementedError) as error:
            # A read-only home only costs a second of measuring next time.
            logger.info("not remembered in %s: %s", path, error)
            return False
        return True

    @staticmethod
    def _ignored(path: Path, reason: str) -> dict[str, dict[str, Any]]:
        if path not in _warned:
            _warned.add(path)
            logger.warning("ignoring the measurements in %s, which will be repeated: %s", path, reason)
        return {}


def cache_folder() -> Path:
    """The folder for measurements: FASTROUTE_CACHE, the user's cache folder or, without a home, a temporary folder."""
    if folder := os.environ.get("FASTROUTE_CACHE"):
        return Path(folder)
    # Its specification says that a relative path is to be ignored.
    for folder in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
        if os.path.isabs(folder):
            return Path(folder) / "fastroute"
    return Path(tempfile.gettempdir()) / f"fastroute-cache-{os.getuid() if hasattr(os, 'getuid') else 0}"


def _text(path: Path) -> str:
    """The text of a regular file.

    Raises:
        OSError: the file does not exist, cannot be read, or is not a regular file: a pipe or a device may never end.
        ValueError: the file is too large or is not text.
    """
    # Opening a pipe would otherwise wait for its other end.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is not a regular file")
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"it has more than {LARGEST_FILE >> 20} MiB")
    return content.decode()


def _is_shallow(value: object, levels: int) -> bool:
    """Whether lists and dictionaries are nested at most `levels` deep, so that what was read can also be written."""
    if not isinstance(value, (list, dict)):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_shallow(item, levels - 1) for item in inner)
