"""The content of a folder: its images, and everything else, so that nothing is left out silently."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from fastroute.io.recognise import is_image

NO_IMAGE = "no image, neither by its content nor by its ending"


@dataclass
class Found:
    """The content of a folder.

    Attributes:
        images: files that are or were meant to be images, sorted by path, under the names by which they were reached.
        others: what was left out, with reasons.
        unreadable: folders that could not be read, with reasons.
    """

    images: list[Path] = field(default_factory=list)
    others: list[tuple[Path, str]] = field(default_factory=list)
    unreadable: list[tuple[Path, str]] = field(default_factory=list)


def walk(folder: str | Path, without: tuple[Path, ...] = ()) -> Found:
    """Search `folder` and the folders below, including linked ones. Each folder is searched once, however often it is linked.

    Args:
        folder: the folder.
        without: folders (resolved) that are skipped with all their content, because results go there.
    """
    found = Found()
    seen: set[str] = set()
    # Links come last, so that a folder that also lies below `folder` is found under its own name.
    rest, linked = deque([Path(folder)]), deque[Path]()
    while rest or linked:
        path = rest.popleft() if rest else linked.popleft()
        real = os.path.realpath(path)
        if any(Path(real).is_relative_to(other) for other in without):
            continue
        if real in seen:
            found.others.append((path, f"a link to {real}, which is looked at already"))
            continue
        seen.add(real)
        try:
            with os.scandir(path) as entries:
                content = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            found.unreadable.append((path, error.strerror or str(error)))
            continue
        for entry in content:
            child = Path(entry.path)
            try:
                below = entry.is_dir()
            except OSError:
                below = False
            if below:
                (linked if entry.is_symlink() else rest).append(child)
            elif entry.name.startswith(".") and entry.name.endswith(".part"):
                found.others.append((child, "a temporary file of a run that was killed or still goes on"))
            elif is_image(child):
                found.images.append(child)
            else:
                found.others.append((child, NO_IMAGE))
    found.images.sort()
    found.others.sort()
    return found
