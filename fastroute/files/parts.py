"""The folder beside a result in which several processes collect its parts, without knowing of each other."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from fastroute.io.files import new_part, published_folder, remove_parts, target_of, write_atomically

# What every such folder begins with. It names what its results depend on.
FACTS = "facts.json"


class Parts:
    """The folder ``NAME.parts`` beside the result ``NAME``.

    It appears complete, with its facts, and is the same for all processes. Files in it are written under another name and then
    renamed, so that what is there is complete, whenever a process is killed.

    Args:
        target: path of the result.
    """

    def __init__(self, target: str | Path) -> None:
        # A folder may be called ".".
        self.target = Path(os.path.abspath(target_of(target)))
        self.folder = self.target.with_name(f"{self.target.name}.parts")

    @property
    def begun(self) -> bool:
        """Whether the folder is there."""
        return (self.folder / FACTS).is_file()

    def begin(self, facts: Mapping[str, Any], fill: Callable[[Path], object] = lambda folder: None) -> None:
        """Make the folder, unless another process has.

        Args:
            facts: what the result depends on, by name, with values as in JSON.
            fill: is called with the new folder before others see it.

        Raises:
            ValueError: it was begun with other facts. The message names both.
        """
        if not self.begun:
            with published_folder(self.folder) as new:
                fill(new)
                (new / FACTS).write_text(json.dumps(dict(facts), indent=1))
        before, now = self.facts(), json.loads(json.dumps(dict(facts)))
        changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if changed:
            told = ", ".join(f"{name} was {_told(before.get(name))} and is {_told(now.get(name))}" for name in changed)
            raise ValueError(
                f"cannot work on {self.target} with others: it was begun with other settings ({told}); give the same, or "
                f"remove {self.folder} to begin anew"
            )

    def facts(self) -> dict[str, Any]:
        """What the folder was begun with.

        Raises:
            ValueError: it does not say so; it is damaged, or something else.
        """
        return self._read(FACTS)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads(self.path(name).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(self.damaged(f"{name}: {getattr(error, 'strerror', None) or error}")) from error
        if not isinstance(found, dict):
            raise ValueError(self.damaged(f"{name} is no record"))
        return found

    def damaged(self, what: str) -> str:
        """The words for a folder that cannot be used, and what to do about it."""
        return f"{self.folder} is damaged or something else ({what}); remove it, and run all shards anew"

    @staticmethod
    def note(folder: Path, name: str, values: Mapping[str, Any]) -> None:
        """Store values, as in JSON, in the new folder that `begin` fills; other processes may have other ones."""
        (folder / f"{name}.json").write_text(json.dumps(dict(values)))

    def noted(self, name: str) -> dict[str, Any]:
        """The values that the process which made the folder has stored under `name`."""
        return self._read(f"{name}.json")

    def path(self, *names: str) -> Path:
        """The path of something in the folder."""
        return self.folder.joinpath(*names)

    def put(self, name: str, array: np.ndarray) -> None:  # [...]
        """Store an array under `name`, as a whole."""
        path = self.path(f"{name}.npy")
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, lambda file: np.save(file, array), follow=False)

    def has(self, name: str) -> bool:
        """Whether an array has been stored under `name`."""
        return self.path(f"{name}.npy").is_file()

    def get(self, name: str) -> np.ndarray:  # [...]
        """The array under `name`."""
        return self._load(f"{name}.npy")

    def _load(self, name: str, mmap_mode: Literal["r"] | None = None) -> np.ndarray:  # [...]
        try:
            found: np.ndarray = np.load(self.path(name), mmap_mode=mmap_mode)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(self.damaged(f"{name}: {error}")) from error
        return found

    def agreed(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:  # [...]
        """The array under `name` that all processes use: what `make` returns in the process that stores it first."""
        if not self.path(name).is_dir():
            array = make()
            with published_folder(self.path(name)) as new:
                np.save(new / "array.npy", array)
        # A process of many needs only some of it.
        return self._load(f"{name}/array.npy", mmap_mode="r")

    def mark(self, numbers: Sequence[int]) -> None:
        """Note that the parts `numbers` are complete and stored."""
        self.path("done").mkdir(exist_ok=True)
        for number in numbers:
            self.path("done", str(number)).touch()

    def forget(self, numbers: Sequence[int]) -> None:
        """Note that the parts `numbers` are to be done again."""
        for number in numbers:
            self.path("done", str(number)).unlink(missing_ok=True)

    def done(self) -> set[int]:
        """The numbers of the parts that are complete."""
        folder = self.path("done")
        return {int(name) for name in os.listdir(folder) if name.isdecimal()} if folder.is_dir() else set()

    @contextmanager
    def claimed(self, first: int, end: int, what: str) -> Iterator[None]:
        """Be the only process on this and other machines that works on parts `first` to `end`, excluding `end`.

        The claim ends with the block or with the process, however that ends.

        Args:
            first, end: numbers of the parts.
            what: what they are called in a message.

        Raises:
            ValueError: another process works on one of them.
        """
        import fcntl  # not on Windows

        with self._lock() as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, end - first, first)
            except OSError as error:
                # Some file systems have no locks. Shards do not overlap, so nothing else is lost with them.
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise ValueError(
                        f"{self.target}: another process is working on {what} {first} to {end - 1}; is the same shard running "
                        "twice?"
                    ) from error
            yield

    def _lock(self) -> BinaryIO:
        try:
            return open(self.path("lock"), "a+b")
        except FileNotFoundError as error:
            raise ValueError(f"{self.target}: {self.folder} is gone; another process has joined or removed it") from error

    def remove(self) -> None:
        """Remove the folder, and what killed processes have left of it, and of the result, beside them."""
        if self.folder.exists():
            # A folder of which half is gone would be taken for one that others have begun.
            self.folder.rename(new_part(self.folder))
        self.tidy()

    def tidy(self) -> None:
        """Remove what killed processes have left of the folder and of the result beside them."""
        remove_parts([self.folder, self.target])


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Rising numbers as runs without a gap: the first of each and one past the last."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        first = found.pop()[0] if found and number == found[-1][1] else number
        found.append((first, number + 1))
    return found


def spans(numbers: Sequence[int]) -> str:
    """Rising numbers as text, such as "0 to 3, 7"."""
    return ", ".join(str(first) if end == first + 1 else f"{first} to {end - 1}" for first, end in runs(numbers))


def _told(value: object) -> str:
    return "not given" if value is None else str(value)
