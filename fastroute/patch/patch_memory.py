"""The memory that the patch path needs beside its input and output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from fastroute.grid import TileGrid
from fastroute.patch.bands import Band, first_covering
from fastroute.patch.branches import Branches
from fastroute.patch.classify import classifying_bytes
from fastroute.patch.regions import Merging
from fastroute.runtime.endpoints import Endpoints
from fastroute.runtime.memory_plan import WorkingSet
from fastroute.runtime.rows import Source

# Bytes per patch for its scores, its class, and its place in two orders.
INDEX = 96


def plan_memory(
    networks: Branches,
    classifier: nn.Module | None,
    rounded: bool,
    endpoints: Endpoints,
    merging: Merging,
    bands: list[Band],
    in_bands: bool,
) -> WorkingSet:
    """The working set of a call.

    Args:
        networks, classifier: of the router.
        rounded: patches are rounded before they are merged.
        endpoints: where rows come from and where they go.
        merging: the grid, and how its patches merge.
        bands: what is routed together.
        in_bands: rows are read and written in bands of their own, not in place.
    """
    grid, device, channels = merging.grid, endpoints.source.device, endpoints.source.shape[1]
    extracted = channels * grid.patch**2 * networks.taken.itemsize
    classifying = 0 if classifier is None else classifying_bytes(classifier, endpoints.source, grid)
    batch, produced = networks.batch_bytes(device, max(merging.sizes)), networks.produced_bytes(device)
    plan = plan_patches(grid, bands, endpoints.source, extracted, produced, batch, classifying, in_bands, endpoints.step)
    plan = replace(plan, fixed=plan.fixed + endpoints.held)
    if not rounded:
        return plan
    # Rounded patches are merged in a band of their own, in float32.
    rows = max((end - begin for begin, end in (band.output(grid) for band in bands)), default=0)
    images = max((band.images[1] - band.images[0] for band in bands), default=1)
    return replace(plan, fixed=plan.fixed + 4 * images * channels * rows * grid.output_size[1])


def plan_patches(
    grid: TileGrid,
    bands: Sequence[Band],
    source: Source,
    extracted: int,
    produced: int,
    batch_bytes: int,
    classifying: int,
    streamed: bool,
    step: int = 1,
) -> WorkingSet:
    """The working set of the patch path.

    Args:
        grid, bands: the grid, and the bands that are routed together.
        source: source of the rows.
        extracted, produced: bytes of a patch before and after its branch.
        batch_bytes: bytes of the largest pass through a branch.
        classifying: bytes needed for classifying, before anything else is allocated.
        streamed: whether rows are read and written in bands of their own, not in place.
        step: number of rows that are written together.
    """
    held = most = 0
    waiting: list[Band] = []
    for band in bands:
        waiting.append(band)
        held += band.num_patches(grid)
        most = max(most, held)
        needed = first_covering(grid, band.rows[1])
        while waiting and waiting[0].rows[1] <= needed:
            held -= waiting.pop(0).num_patches(grid)
    largest = max((band.num_patches(grid) for band in bands), default=0)
    index = INDEX * source.shape[0] * grid.num_patches
    fixed = index + max(most * produced + largest * extracted + batch_bytes, classifying)
    if not streamed:
        return WorkingSet(fixed)
    images = max((band.images[1] - band.images[0] for band in bands), default=1)
    pixel = images * source.shape[1] * source.dtype.itemsize
    out_row, row = pixel * grid.output_size[1], pixel * grid.width
    outputs = [band.output(grid) for band in bands]
    block = max((end - begin for begin, end in outputs), default=1)
    read = max((end - begin for begin, end in (band.pixels(grid) for band in bands)), default=1)
    # New rows are joined to those held, and a band is written, in the writer's order, while the next one is computed.
    return WorkingSet(
        fixed + 2 * read * row + 3 * step * out_row, 3 * out_row + 2 * row // grid.scale, block, grid.output_size[0]
    )
