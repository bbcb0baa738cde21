"""`merge_regions`: neighbouring patches of one class become rectangles that run as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastroute.grid import TileGrid, tile_count
from fastroute.ops import _checks as check
from fastroute.ops._library import call, register
from fastroute.reference.merge_regions import merge_regions_reference

SCHEMAS = [
    "merge_regions(Tensor class_ids, Tensor costs, SymInt height, SymInt width, int patch, int stride, bool crop, int merge, "
    "bool promote) -> (Tensor, Tensor, Tensor)"
]

# Sides of a block in patches.
MERGES = (1, 2, 4, 8)


class Regions(NamedTuple):
    """What :func:`merge_regions` gives. N patches, K classes, S shapes as ``grid.region_shapes(merge)`` lists them.

    Attributes:
        class_ids: int64 (N,), the class in which every patch runs.
        region: int64 (N,), the number of the patch at the top left of the region that holds patch n.
        group: int64 (N,), class * S + shape for a patch that begins a region, K * S for the others: what
            ``group_by_class(group, K * S + 1)`` sorts.
    """

    class_ids: Tensor
    region: Tensor
    group: Tensor


def merge_regions(
    class_ids: Tensor,  # [N]
    grid: TileGrid,
    costs: Tensor | Sequence[float],  # [K] or [K, S]
    merge: int = 4,
    promote: bool = True,
) -> Regions:
    """Cut the class map into rectangles of one class, at the least cost.

    Neighbouring patches overlap; patches that run as one rectangle compute their overlaps once. The map is cut into aligned
    blocks of `merge` x `merge` patches. A block runs whole, at the highest class of its patches, or is halved between rows or
    columns, and so are its halves, down to single patches: whatever costs least. So a patch may run in a higher class than its
    own where that is cheaper than another cut, and never in a lower one. Of cuts that cost the same the fewest are made, rows
    before columns.

    Args:
        class_ids: (N,), N = B * grid.num_patches; int64, int32, int16 or uint8, each in [0, K). Higher classes are better.
        grid: where the patches lie.
        costs: (K,), cost of each class per LR pixel of a region; or (K, S), of each class and shape, S as
            ``grid.region_shapes(merge)`` lists them, where shapes run at different speeds. Finite and at least 0.
        merge: side of a block in patches: 1, 2, 4 or 8. With 1 every patch is a region.
        promote: let patches run in a higher class where that costs less. False keeps all classes as they are.

    Returns:
        :class:`Regions`.

    Raises:
        ValueError: shapes that do not match, another `merge`, a class out of range, or costs that are negative or not finite.
        TypeError: an unsupported dtype.

    Differentiable: no, its outputs are indices.
    Deterministic: yes; costs are added in float32, in one order.
    Synchronises: no, with `costs` on the device of `class_ids`.
    CUDA-graph safe: yes, with `costs` on the device of `class_ids`.
    Memory layout: any strides; contiguous outputs.
    """
    op = "merge_regions"
    check.rank(op, "class_ids", class_ids, "(N,)", 1)
    check.dtype(op, "class_ids", class_ids.dtype, check.INDEX)
    if isinstance(merge, bool) or merge not in MERGES:
        raise ValueError(f"{op}: merge must be one of {MERGES}; got {merge!r}")
    if class_ids.shape[0] % grid.num_patches:
        raise ValueError(f"{op}: class_ids must hold a multiple of {grid.num_patches}, whole images; got {class_ids.shape[0]}")
    table = _table(costs, grid, merge, class_ids.device)
    geometry = (grid.height, grid.width, grid.patch, grid.stride, grid.crop)
    return Regions(*call(op, _checked_reference, class_ids.device, class_ids, table, *geometry, merge, promote))


def _table(costs: Tensor | Sequence[float], grid: TileGrid, merge: int, device: torch.device) -> Tensor:  # [K, S]
    op = "merge_regions"
    number = 4 * merge.bit_length() ** 2
    table = costs if isinstance(costs, Tensor) else torch.tensor([float(c) for c in costs], dtype=torch.float64)
    if table.ndim not in (1, 2) or table.shape[0] < 1 or (table.ndim == 2 and table.shape[1] != number):
        raise ValueError(f"{op}: costs must be (K,) or (K, {number}), K at least 1; got {tuple(table.shape)}")
    check.dtype(op, "costs", table.dtype, check.FLOATING)
    if table.device not in (device, torch.device("cpu")):
        raise ValueError(f"{op}: costs must be on the CPU or on {device} as class_ids is; got {table.device}")
    if table.ndim == 1:
        table = table.double()[:, None] * region_pixels(grid, merge, table.device)
    return table.to(device, torch.float32)


def region_pixels(grid: TileGrid, merge: int, device: torch.device) -> Tensor:  # [S]
    """LR pixels of every shape of region, float64; anything for a shape that no region has."""
    heights, widths = (_sides(size, grid, merge, device) for size in (grid.height, grid.width))
    return (heights[:, None] * widths).flatten()


def _sides(size: int, grid: TileGrid, merge: int, device: torch.device) -> Tensor:  # [2 * levels]
    """Pixels that a region spans along one axis by its side code, see :func:`fastroute.grid.region_sides`; anything for a code
    that no region has. It is arithmetic on the device, so that nothing waits and one compilation serves all sizes."""
    last = tile_count(size, grid.patch, grid.stride, grid.crop) - 1
    end = torch.sym_min(last * grid.stride, torch.sym_max(size - grid.patch, 0))
    tiles = 2 ** torch.arange(merge.bit_length(), device=device)
    first = (last // tiles * tiles * grid.stride).clamp(max=end)
    return (grid.patch + torch.stack([(tiles - 1) * grid.stride, end - first], dim=1)).flatten().double()


def check_costs(costs: Tensor) -> None:  # [K, S]
    """Costs are finite and at least 0; looked at on the CPU alone, where looking costs no wait."""
    looked_at = costs.device.type == "cpu" and type(costs) is Tensor and not torch.compiler.is_compiling()
    if looked_at and not all(0 <= c < math.inf for c in costs.flatten().tolist()):
        raise ValueError(f"merge_regions: costs must be finite and at least 0; got {costs.tolist()}")


def _checked_reference(class_ids: Tensor, costs: Tensor, *rest: int) -> tuple[Tensor, Tensor, Tensor]:  # [N], [K] or [K, S]
    check.in_range("merge_regions", "class_ids", class_ids, len(costs))
    check_costs(costs)
    return merge_regions_reference(class_ids, costs, *rest)  # type: ignore[arg-type]


def _fake(class_ids: Tensor, costs: Tensor, *rest: int) -> tuple[Tensor, Tensor, Tensor]:  # [N], [K] or [K, S]
    result = class_ids.new_empty(class_ids.shape, dtype=torch.int64)
    return result, torch.empty_like(result), torch.empty_like(result)


register("merge_regions", _checked_reference, _fake)
