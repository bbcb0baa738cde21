"""merge_regions on class maps of a photograph, beside the same search in whole tensors of PyTorch."""

from __future__ import annotations

import torch

import fastroute
from benchmarks import images
from benchmarks.measure import device
from benchmarks.ops._common import MIDDLE, OURS, PATCH, STRIDE, Case, Variant, cases, compare, compiled, known, same
from benchmarks.setting import Setting
from fastroute import TileGrid
from fastroute.models.arm import edge_score
from fastroute.reference.merge_regions import merge_regions_reference

# FLOPs of the branches of FSRCNN, in thousands per pixel; each class has a third of the patches.
COSTS = (22.0, 36.0, 50.0)
MERGE, OTHERS = 4, (2, 8)


def class_map(grid: TileGrid, batch: int) -> torch.Tensor:  # [N]
    """Thirds of a photograph by the strength of its edges: classes lie together as those of a classifier do."""
    photograph = images.low_resolution(images.photographs("test4k")[0], (grid.height, grid.width)).float() / 255
    score = edge_score(fastroute.extract_patches(photograph, grid))
    bounds = score.quantile(torch.tensor([1 / 3, 2 / 3]))
    return torch.bucketize(score, bounds).repeat(batch).to(device())


def run_case(case: Case, merge: int, setting: Setting) -> dict:
    """One class map, or several, with a table of costs as a router keeps it."""
    grid = TileGrid(case.height, case.width, PATCH, STRIDE)
    ids = class_map(grid, case.batch)
    pixels = torch.tensor([float(h * w) for h, w in grid.region_shapes(merge)])
    costs = (torch.tensor(COSTS)[:, None] * pixels).to(device())
    args = (ids, costs, grid.height, grid.width, PATCH, STRIDE, False, merge, True)
    expected, reference = known(lambda: merge_regions_reference(*args))
    check = same(expected)
    variants: dict[str, Variant | str] = {
        OURS: Variant(lambda: fastroute.merge_regions(ids, grid, costs, merge), check),
        "reference": reference,
        "reference, compiled": compiled(merge_regions_reference, *args, check=check, setting=setting, case=case),
    }
    moved = ids.nbytes + sum(part.nbytes for part in expected)
    batch = f", batch {case.batch}" if case.batch > 1 else ""
    label = f"merge_regions, {case.width} x {case.height}, blocks of {merge}{batch}"
    facts = {**case.facts, "dtype": "int64", "merge": merge, "patches": len(ids), "regions": len(expected[1].unique())}
    return compare(label, variants, moved, "reference", setting, **facts)


def test_merge_regions(setting: Setting) -> None:
    """All sizes in blocks of 4, and the middle one in blocks of 2 and 8."""
    rows = []
    for case in cases(setting, (torch.float32,), formats=False):
        merges = (MERGE, *OTHERS) if case.plain and case.name in MIDDLE else (MERGE,)
        rows += [run_case(case, merge, setting) for merge in merges]
    note = f"thirds of {images.source('test4k')} by their edges, costs per class and shape; medians of alternating runs, warm"
    setting.save("merge_regions", rows, note)
