"""The memory that the patch path needs beside its input and output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from fastroute.grid import TileGrid
from fastroute.patch.bands import Band, first_covering, plan_bands
from fastroute.patch.branches import Branches
from fastroute.patch.classify import classifying_bytes
from fastroute.patch.regions import Merging
from fastroute.runtime.devices import on_device
from fastroute.runtime.endpoints import Endpoints
from fastroute.runtime.memory_plan import WorkingSet, spare
from fastroute.runtime.rows import Source

# The most patches whose outputs are held at a time: enough for full batches of every class. Of large patches fewer are held,
# but always a whole row of tiles. A GPU takes as many as memory allows.
PATCHES_PER_BAND = {"cpu": 1024, "cuda": 1 << 20}
HELD_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
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


# From bands to the working set with them.
PlanOf = Callable[[list[Band]], WorkingSet]


def patches_per_band(networks: Branches, device: torch.device) -> list[int]:
    """The most patches of a band. A GPU has fewer where less memory is allowed, the last number in any case."""
    most = max(1, min(on_device(PATCHES_PER_BAND, device), on_device(HELD_BYTES, device) // networks.produced_bytes(device)))
    numbers = [most]
    while device.type != "cpu" and numbers[-1] > PATCHES_PER_BAND["cpu"]:
        numbers.append(max(numbers[-1] // 2, PATCHES_PER_BAND["cpu"]))
    return numbers


def fewest_bands(
    sizes: Sequence[int], source: Source, merging: Merging, plan_of: PlanOf, limit: int | None
) -> tuple[list[Band], WorkingSet]:
    """The fewest bands whose working set fits, and the working set. The result does not depend on the bands.

    Args:
        sizes: numbers of patches of a band that are tried, the last one in any case.
        source: the images.
        merging: the grid, and how its patches merge.
        plan_of: gives the working set with some bands.
        limit: the largest number of bytes to hold, or None for no limit.
    """
    allowed = spare(source.device) if limit is None else limit
    for patches in sizes:
        bands = plan_bands(source.shape[0], merging.grid, patches, merging.merge)
        plan = plan_of(bands)
        if plan.bytes(1) <= allowed:
            break
    return bands, plan


def least_memory(sizes: Sequence[int], source: Source, merging: Merging, plan_of: PlanOf) -> WorkingSet:
    """The working set with the smallest of :func:`fewest_bands`."""
    return fewest_bands(sizes[-1:], source, merging, plan_of, None)[1]


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
