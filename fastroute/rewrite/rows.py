"""Rows of activations on their way through the stages of a network, in memory that their readers have asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Consecutive new rows of an image of activations, with rows before them and beyond them in the same memory.

    Attributes:
        memory: (B, C, n, w), channels_last.
        top: number of its first row in the image, negative for zeros above the image.
        begin, end: the new rows, from `begin` up to `end`.
    """

    memory: Tensor
    top: int
    begin: int
    end: int

    def between(self, begin: int, end: int) -> Tensor:  # -> [B, C, end - begin, w]
        """Rows `begin` up to `end` of the image."""
        return self.memory[:, :, begin - self.top : end - self.top]

    @property
    def new(self) -> Tensor:  # -> [B, C, n, w]
        """The new rows."""
        return self.between(self.begin, self.end)


class Room:
    """Makes the memory in which a stage writes its rows, so that its reader finds all that it reads side by side.

    Args:
        before: rows before the new ones that the reader wants to see again.
        beyond: rows of zeros that it reads above and below the image.
    """

    def __init__(self, before: int, beyond: int) -> None:
        self.before, self.beyond = before, beyond
        self.next = 0  # the next row of the image

    def fill(
        self,
        size: Sequence[int],
        like: Tensor,  # [...]
        last: bool,
        make: Callable[[Tensor | None], Tensor],
    ) -> Rows:
        """The next rows, (B, C, n, w), of the type and on the device of `like`.

        `make` writes them into the tensor that it is given. Where no reader wants more, it is given none and returns them.
        """
        batch, channels, count, width = size
        # There is nothing before the first row but zeros.
        front, tail = self.before if self.next else self.beyond, self.beyond if last else 0
        begin, self.next = self.next, self.next + count
        if count and not front and not tail:
            return Rows(make(None), begin, begin, self.next)
        shape = (batch, channels, front + count + tail, width)
        memory = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
        made = Rows(memory, begin - front, begin, self.next)
        if count:
            make(made.new)
        return made


class History:
    """Keeps the last rows that a reader has seen, and puts them before the next ones.

    Args:
        before: number of them.
    """

    def __init__(self, before: int) -> None:
        self.before = before
        self.held: Tensor | None = None

    def complete(self, rows: Rows, last: bool) -> Rows:
        """`rows`, whose memory also holds the rows before them, and zeros above and below the image."""
        front, end = rows.begin - rows.top, rows.end - rows.top
        if front:
            if self.held is None:
                rows.memory[:, :, :front] = 0
            else:
                count = min(front, self.held.shape[2])
                rows.memory[:, :, front - count : front] = self.held[:, :, self.held.shape[2] - count :]
        if last:
            rows.memory[:, :, end:] = 0
        elif self.before:
            # A copy, because a view would keep the whole band in memory.
            self.held = rows.memory[:, :, max(end - self.before, 0) : end].clone()
        return rows
