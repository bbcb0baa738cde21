"""How far a call is: a bar on the terminal, or a function of the caller's, which may also end the call by raising."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm

# True shows a bar. A function is given how much is done and how much there is, in patches, bands or files; what it raises
# ends the call, which leaves nothing half done.
Progress = bool | Callable[[int, int], object]


class Bar(Protocol):
    """What is told of every step."""

    def update(self, n: int = 1) -> object:
        """`n` more are done."""


class Calls:
    """Calls a function with what is done so far and the total."""

    def __init__(self, function: Callable[[int, int], object], total: int) -> None:
        self.function, self.total, self.done = function, total, 0

    def update(self, n: int = 1) -> None:
        """See :class:`Bar`."""
        self.done += n
        self.function(self.done, self.total)


@contextmanager
def shown(progress: Progress, total: int, unit: str, desc: str = "upscale") -> Iterator[Bar]:
    """A bar for `total` steps, or calls of the function that `progress` is."""
    if callable(progress):
        yield Calls(progress, total)
        return
    with tqdm(total=total, unit=unit, desc=desc, disable=not progress) as bar:
        yield bar
