"""Progress of a call: a bar on the terminal, or a function of the caller's, which can also end the call by raising."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm

# True shows a bar. A function is called with how much is done and how much there is, in patches, bands or files. If it raises,
# the call ends and leaves nothing half done.
Progress = bool | Callable[[int, int], object]


class Bar(Protocol):
    """The object that is notified of every step."""

    def update(self, n: int = 1) -> object:
        """Report that `n` more steps are done."""


class Calls:
    """Calls a function with the number of steps done so far and the total."""

    def __init__(self, function: Callable[[int, int], object], total: int) -> None:
        self.function, self.total, self.done = function, total, 0

    def update(self, n: int = 1) -> None:
        """See :class:`Bar`."""
        self.done += n
        self.function(self.done, self.total)


@contextmanager
def shown(progress: Progress, total: int, unit: str, desc: str = "upscale") -> Iterator[Bar]:
    """A bar for `total` steps or, if `progress` is a function, an object that calls it."""
    if callable(progress):
        yield Calls(progress, total)
        return
    with tqdm(total=total, unit=unit, desc=desc, disable=not progress) as bar:
        yield bar
