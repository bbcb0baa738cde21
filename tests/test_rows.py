"""Rows that pass from the top to the bottom in one buffer."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from fastroute.runtime.rows import RowStream


def chunks_of(whole, draw, strips):
    """The rows of `whole`, some at a time, in strips side by side."""
    top = 0
    while top < whole.shape[-2]:
        bottom = min(top + draw.randint(1, 9), whole.shape[-2])
        edges = sorted({0, whole.shape[-1], *(draw.randrange(whole.shape[-1]) for _ in range(strips - 1))})
        yield [whole[..., top:bottom, a:b] for a, b in pairwise(edges)]
        top = bottom


@pytest.mark.parametrize("layout", ["planes", "channels_last", "classes"])
@pytest.mark.parametrize("seed", range(20))
def test_rows_are_those_of_the_whole(seed, layout):
    draw = random.Random(seed)
    whole = torch.randint(0, 200, (1, 90, 12) if layout == "classes" else (1, 3, 90, 12), dtype=torch.uint8)
    if layout == "channels_last":
        whole = whole.contiguous(memory_format=torch.channels_last)
    untouched = whole.clone()
    kept = torch.empty_like(whole) if seed % 5 == 4 else None
    stream = RowStream(chunks_of(whole, draw, seed % 3 + 1), kept, room=draw.choice([0, 20, 40]))
    begin = end = 0
    while end < 90:
        end = min(end + draw.randint(1, 12), 90)
        rows = stream.rows(begin, end)
        assert torch.equal(rows, whole[..., begin:end, :])
        if layout == "channels_last" and rows.numel() and stream.owned and kept is None:
            assert rows.stride(1) == 1
        begin = draw.randint(begin, end)
        stream.release(begin)
    # What chunks were cut from is theirs.
    assert torch.equal(whole, untouched)


def test_a_buffer_of_enough_room_is_never_replaced():
    whole = torch.rand(1, 4, 600, 8)
    # Of 20 rows that are asked for together, and 5 that come at a time.
    stream = RowStream(([whole[:, :, n : n + 5, :3], whole[:, :, n : n + 5, 3:]] for n in range(0, 600, 5)), room=25)
    stream.rows(0, 20)
    place = stream.buffer.data_ptr()
    for top in range(0, 580, 3):
        stream.release(top)
        assert torch.equal(stream.rows(top, top + 20), whole[:, :, top : top + 20])
    assert stream.buffer.data_ptr() == place and stream.buffer.shape[2] == 25
