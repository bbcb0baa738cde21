"""How large the pieces of a cascade may be within a limit of memory, and how high the bands that are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastroute.cascades.cells import CELL
from fastroute.cascades.run import FADE, TOGETHER, Limits, Piece
from fastroute.models.network import Facts
from fastroute.runtime.memory_plan import ACTIVATIONS, BAND_BYTES, REARRANGED, Preferred, pass_bytes

# Sides of inputs on which memory is counted: the larger ones take what does not grow with the image as well.
MEASURED = (128, 512)
# LR pixels of an image below which nobody asks what it takes.
SMALL = 256 * 256
# Bytes of a value of a result before it is stored, and buffers of its size that a band takes: itself, what is blended into it,
# and what is written meanwhile.
VALUE, BUFFERS = 4, 4
# Rows of a band at least.
LEAST_ROWS = 4
# What a dense run may cost more for less memory: the rows that strips of the image compute twice, as a share.
TWICE = 0.05


@dataclass(frozen=True)
class Footprint:
    """Bytes that a network takes.

    Attributes:
        fixed: whatever the size of its input.
        pixel: more for every pixel of it.
    """

    fixed: int
    pixel: int


def footprint(module: nn.Module, facts: Facts, dtype: torch.dtype) -> Footprint:
    """What a pass of a network takes, found without running it."""
    sizes = [(1, facts.channels, *facts.padded(side, side)) for side in MEASURED]
    small, large = (pass_bytes(module, size, dtype) for size in sizes)
    areas = [size[2] * size[3] for size in sizes]
    pixel = max(large - small, 0) / (areas[1] - areas[0]) if areas[1] > areas[0] else 0.0
    pixel = pixel or large / areas[1]
    return Footprint(round(max(large - pixel * areas[1], 0)), math.ceil(pixel))


@dataclass(frozen=True)
class Memory:
    """What a call may hold.

    Attributes:
        limits: of its pieces.
        rows: LR rows of a band.
        networks: what a pass takes.
        row: bytes of a LR row of the result before it is stored.
    """

    limits: Limits
    rows: int
    networks: Footprint
    row: int

    def held(self, pieces: Sequence[Sequence[Piece]], height: int) -> int:
        """Bytes at most beside the image and its result."""
        every = [piece for own in pieces for piece in own]
        area = max([TOGETHER, *(piece.outer.area for piece in every)])
        tall = max((piece.fading.bottom - piece.fading.top for piece in every), default=0)
        return (
            self.networks.fixed + area * self.networks.pixel + self.row * (min(tall, height) + BUFFERS * min(self.rows, height))
        )


def memory_within(op: str, limit: int | None, networks: Sequence[Footprint], values: int, context: int) -> Memory:
    """The plan of one image.

    Args:
        op: what the user called.
        limit: bytes beside the image and its result; None for no limit.
        networks: what each takes.
        values: of a LR row of the result.
        context: pixels around a piece.

    Raises:
        ValueError: no single cell fits. The message says which limit would.
    """
    most = Footprint(max(n.fixed for n in networks), max(n.pixel for n in networks))
    row = VALUE * values
    if limit is None:
        return Memory(Limits(), max(BAND_BYTES // row, LEAST_ROWS), most, row)
    # Libraries rearrange tensors for their kernels.
    most = Footprint(REARRANGED * most.fixed, REARRANGED * most.pixel)
    cell = max((CELL + 2 * context) ** 2, TOGETHER)
    least = most.fixed + most.pixel * cell + row * (CELL + 2 * FADE + BUFFERS * LEAST_ROWS)
    if limit < least and not isinstance(limit, Preferred):
        raise ValueError(f"{op}: memory_limit must be at least {least} bytes ({least / 1e6:.0f} MB) here; got {limit}")
    spare = max(limit, least) - most.fixed
    rows = max(min(spare // 8, BAND_BYTES) // (BUFFERS * row), LEAST_ROWS)
    rows = min(rows, ((spare - most.pixel * cell) // row - CELL - 2 * FADE) // BUFFERS)
    rest = spare - BUFFERS * row * rows
    tallest = max((min(rest // 2, rest - most.pixel * cell) // row - 2 * FADE) // CELL * CELL, CELL)
    largest = max((rest - row * (tallest + 2 * FADE)) // most.pixel, cell)
    return Memory(Limits(largest, tallest), rows, most, row)


def strips(height: int, width: int, reach: int, network: Footprint, device: torch.device) -> int | None:
    """Rows of the strips in which a network that sees `reach` pixels far runs over a whole image; None for all rows at once.

    There are as few as activations of a usual size need, and no more than cost little.
    """
    wanted = network.pixel * height * width / (2 * ACTIVATIONS.get(device.type, ACTIVATIONS["cpu"]))
    allowed = 1 + TWICE * height / (2 * reach) if reach else wanted
    count = 2 ** max(int(math.log2(max(min(wanted, allowed), 1))), 0)
    return None if count == 1 else -(-height // count // CELL) * CELL
