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

# A file of more bytes was not written here; the oldest entries beyond this number go.
LARGEST_FILE, MOST_ENTRIES = 16 << 20, 16384
# Levels of lists and dictionaries within an entry.
DEEPEST = 8
# Seconds to wait for other processes, each of which holds the lock for milliseconds, and between two tries.
PATIENCE, PAUSE = 10.0, 0.005

# Files that were complained of.
_warned: set[Path] = set()


class JsonCache:
    """The file `name` in the cache folder: entries, dictionaries, by key.

    A cache can always be measured again, so nothing that is wrong with it is an error. A file that cannot be read, that is
    no regular file or holds something else is taken for an empty one, with one warning in a process. A file is only ever
    replaced as a whole, so readers need no lock; writers take one, since each adds to what the others have written.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def path(self) -> Path:
        """Where the file lies now: in FASTROUTE_CACHE, or the user's cache folder."""
        return cache_folder() / self.name

    def read(self) -> dict[str, dict[str, Any]]:
        """All entries; their content is whatever the file says."""
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
        """Add `entry`, or replace the one of that key; whether the file holds it now."""
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
            # A read-only home costs a second of measuring next time, nothing else.
            logger.info("not remembered in %s: %s", path, error)
            return False
        return True

    @staticmethod
    def _ignored(path: Path, reason: str) -> dict[str, dict[str, Any]]:
        if path not in _warned:
            _warned.add(path)
            logger.warning("ignoring the measurements in %s, which are made anew: %s", path, reason)
        return {}


def cache_folder() -> Path:
    """Where measurements are remembered: FASTROUTE_CACHE, or the user's cache folder, or without a home a temporary one."""
    if folder := os.environ.get("FASTROUTE_CACHE"):
        return Path(folder)
    # As its specification says, what is no absolute path counts for nothing.
    for folder in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
        if os.path.isabs(folder):
            return Path(folder) / "fastroute"
    return Path(tempfile.gettempdir()) / f"fastroute-cache-{os.getuid() if hasattr(os, 'getuid') else 0}"


def _text(path: Path) -> str:
    """The text of a regular file.

    Raises:
        OSError: there is none, it cannot be read, or something else has its name: a pipe or a device may have no end.
        ValueError: too large, or no text.
    """
    # Opening a pipe would otherwise wait for its other end.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no regular file")
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"it has more than {LARGEST_FILE >> 20} MiB")
    return content.decode()


def _is_shallow(value: object, levels: int) -> bool:
    """Whether lists and dictionaries lie at most `levels` deep: what can be read must also be writable."""
    if not isinstance(value, (list, dict)):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_shallow(item, levels - 1) for item in inner)
