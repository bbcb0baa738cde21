"""extract_patches and stitch_patches at full frame size, beside a plain copy of the same bytes and beside unfold and fold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastroute
from benchmarks.measure import alternate, clone_bandwidth, copy_bandwidth, save
from fastroute import TileGrid

PATCH, STRIDE = 32, 28
SIZES = {"smoke": (144, 256), "full": (1080, 1920)}


def unfold_patches(image: Tensor, grid: TileGrid) -> Tensor:
    """All patches by unfold; where the stride leaves a remainder, the image is padded with its edge, as pipelines do."""
    down = (grid.rows - 1) * grid.stride + grid.patch - image.shape[2]
    right = (grid.cols - 1) * grid.stride + grid.patch - image.shape[3]
    padded = F.pad(image, (0, right, 0, down), mode="replicate")
    columns = F.unfold(padded, grid.patch, stride=grid.stride)
    return columns.transpose(1, 2).reshape(-1, image.shape[1], grid.patch, grid.patch).contiguous()


def fold_patches(patches: Tensor, grid: TileGrid, count: Tensor) -> Tensor:
    """Merge by fold and divide by how often each pixel was covered."""
    span, step = grid.patch * grid.scale, grid.stride * grid.scale
    height, width = (grid.rows - 1) * step + span, (grid.cols - 1) * step + span
    columns = patches.reshape(-1, grid.num_patches, patches[0].numel()).transpose(1, 2)
    merged = F.fold(columns, (height, width), span, stride=step) / count
    return merged[:, :, : grid.output_size[0], : grid.output_size[1]]


def fold_count(grid: TileGrid, channels: int) -> Tensor:
    """How often fold covers each pixel; made once, outside the timing."""
    span, step = grid.patch * grid.scale, grid.stride * grid.scale
    height, width = (grid.rows - 1) * step + span, (grid.cols - 1) * step + span
    return F.fold(torch.ones(1, channels * span * span, grid.num_patches), (height, width), span, stride=step)


def report(op: str, times: dict, floor: str, ours: str, peer: str) -> dict:
    """One row, printed as a stranger would read it."""
    print(f"\n{op}")
    for name, timing in times.items():
        ratio = timing.median / times[ours].median
        print(f"  {name:<34} {timing}   {ratio:6.2f} x fastroute")
    achieved = times[ours].median / times[floor].median
    print(
        f"  time / copy of the same bytes: {achieved:.2f};  {peer} / fastroute: {times[peer].median / times[ours].median:.1f}"
    )
    return {
        "op": op,
        "times": times,
        "time_over_copy": achieved,
        "speedup": times[peer].median / times[ours].median,
        "peer": peer,
    }


@pytest.mark.parametrize("kind", ["extract_patches", "stitch_patches"])
def test_movement(kind: str, smoke: bool, saving: bool) -> None:
    """Correct first, then timed. Every call allocates its result, as in use; the copy does not, which favours the copy."""
    height, width = SIZES["smoke" if smoke else "full"]
    rounds = 3 if smoke else 9
    torch.manual_seed(0)
    if kind == "extract_patches":
        grid = TileGrid(height, width, PATCH, STRIDE)
        image = torch.rand(1, 3, height, width)
        expected = fastroute.extract_patches(image, grid)
        # The shifted last row and column differ by design: compare what both cut alike.
        inner = expected.view(grid.rows, grid.cols, 3, PATCH, PATCH)[:-1, :-1]
        assert torch.equal(inner, unfold_patches(image, grid).view(grid.rows, grid.cols, 3, PATCH, PATCH)[:-1, :-1])
        bytes_moved = 4 * (image.numel() + expected.numel())
        times = alternate(
            {
                "fastroute": lambda: fastroute.extract_patches(image, grid),
                "copy of the same bytes": copy_bandwidth(bytes_moved),
                "copy to a new tensor": clone_bandwidth(bytes_moved),
                "unfold": lambda: unfold_patches(image, grid),
            },
            rounds,
        )
        row = report(f"extract_patches, {width} x {height}", times, "copy of the same bytes", "fastroute", "unfold")
    else:
        grid = TileGrid(height, width, PATCH, STRIDE, scale=4)
        patches = torch.rand(grid.num_patches, 3, PATCH * 4, PATCH * 4)
        stitched = fastroute.stitch_patches(patches, grid)
        count = fold_count(grid, 3)
        edge = grid.row_origins[-2] * 4, grid.col_origins[-2] * 4
        folded = fold_patches(patches, grid, count)
        torch.testing.assert_close(stitched[:, :, : edge[0], : edge[1]], folded[:, :, : edge[0], : edge[1]])
        out = torch.empty_like(stitched)
        bytes_moved = 4 * (patches.numel() + stitched.numel())
        times = alternate(
            {
                "fastroute": lambda: fastroute.stitch_patches(patches, grid),
                "fastroute, out=": lambda: fastroute.stitch_patches(patches, grid, out=out),
                "copy of the same bytes": copy_bandwidth(bytes_moved),
                "copy to a new tensor": clone_bandwidth(bytes_moved),
                "fold": lambda: fold_patches(patches, grid, count),
            },
            rounds,
        )
        name = f"stitch_patches, {width} x {height} -> {width * 4} x {height * 4}"
        row = report(name, times, "copy of the same bytes", "fastroute", "fold")
    if saving and not smoke:
        save(kind, [row], "float32; medians of alternating runs, warm; every call allocates its result, the copy does not")


def test_group_by_class(smoke: bool, saving: bool) -> None:
    """group_by_class beside a stable argsort with bincount and the inverse permutation, the usual way."""
    rows = []
    for count in (10**4, 10**5) if smoke else (10**4, 10**5, 10**6, 10**7):
        ids = torch.randint(0, 3, (count,))

        def sort(ids: Tensor = ids, count: int = count) -> tuple[Tensor, Tensor, Tensor]:
            order = torch.argsort(ids, stable=True)
            inverse = torch.empty_like(order)
            inverse[order] = torch.arange(count)
            return order, inverse, torch.bincount(ids, minlength=3).cumsum(0)

        groups = fastroute.group_by_class(ids, 3)
        assert torch.equal(groups.order, sort()[0]) and torch.equal(groups.inverse, sort()[1])
        times = alternate({"fastroute": lambda ids=ids: fastroute.group_by_class(ids, 3), "argsort": sort}, 3 if smoke else 15)
        rows.append({"items": count, "times": times, "speedup": times["argsort"].median / times["fastroute"].median})
        print(f"\ngroup_by_class, {count} items: {times['fastroute']}, argsort {times['argsort']}: {rows[-1]['speedup']:.1f} x")
    if saving and not smoke:
        save("group_by_class", rows, "int64 ids, 3 classes; medians of alternating runs")
