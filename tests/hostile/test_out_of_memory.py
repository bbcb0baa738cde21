"""Memory that runs out inside an operator is a MemoryError that names it and says what to do."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastroute
from fastroute import TileGrid, buffers

SIDE = 12_000


@pytest.fixture(autouse=True)
def limited_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def large(channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """An image that takes no memory itself."""
    return torch.zeros(1, 1, 1, 1, dtype=dtype).expand(1, channels, SIDE, SIDE)


GRID = TileGrid(SIDE, SIDE, 32, 28)
CALLS: dict[str, Callable[[], object]] = {
    "extract_patches": lambda: fastroute.extract_patches(large(dtype=torch.uint8), GRID),
    "stitch_patches": lambda: fastroute.stitch_patches(torch.zeros(1).expand(GRID.num_patches, 3, 32, 32), GRID),
    "group_by_class": lambda: fastroute.group_by_class(torch.zeros(3, dtype=torch.int64), 2**31),
    "assign_classes": lambda: fastroute.assign_classes(large(2), [1.0, 2.0], budget=0.7),
    # Of these scores nothing is copied: it is what the threads keep of their parts that does not fit.
    "assign_classes, parts": lambda: fastroute.assign_classes(
        torch.zeros(1, 2, 1).expand(1, 2, 1 << 25), [1.0, 2.0], budget=0.7, dtype=torch.uint8
    ),
    "adaptive_threshold": lambda: fastroute.adaptive_threshold(large()),
    "cell_mlp": lambda: fastroute.cell_mlp(large(1), [(torch.zeros(64, 16), torch.zeros(64))], 4, 1, 1),
    "conv1x1": lambda: fastroute.conv1x1(large(), torch.zeros(3, 3)),
    "conv3x3": lambda: fastroute.conv3x3(large(), torch.zeros(3, 3, 3, 3)),
    "pixel_mlp": lambda: fastroute.pixel_mlp(torch.rand(1, 3, 8, 8), [[(torch.rand(3, 7), torch.rand(3))]], (SIDE, SIDE)),
    "refine_boundaries": lambda: fastroute.refine_boundaries(large(), large(1, torch.uint8)[:, 0]),
    "gather_groups": lambda: fastroute.gather_groups(
        torch.zeros(1).expand(4, 2**28), fastroute.group_by_class(torch.tensor([0, 1, 0, 1]), 2)
    ),
}


@pytest.mark.parametrize("asked", [None, "reference"])
@pytest.mark.parametrize("op", CALLS)
def test_is_named_and_says_what_to_do(op, asked):
    with (
        fastroute.use_backend(asked),
        pytest.raises(MemoryError, match=rf"^{op.split(',')[0]}: out of memory: .*; work on fewer") as error,
    ):
        CALLS[op]()
    assert buffers.is_exhausted(error.value)
