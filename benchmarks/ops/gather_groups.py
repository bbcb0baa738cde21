"""gather_groups and scatter_groups on the patches of an image, beside indexing."""

from __future__ import annotations

import pytest
import torch

import fastroute
from benchmarks.measure import device
from benchmarks.ops._common import OURS, PATCH, STRIDE, Case, Variant, cases, compare, compiled, known, same
from benchmarks.setting import Setting
from fastroute import TileGrid
from fastroute.reference.gather_groups import gather_groups_reference
from fastroute.reference.scatter_groups import scatter_groups_reference

CLASSES = 3
DTYPES = (torch.float32, torch.uint8)
HALF = (torch.float16, torch.bfloat16)


def run_case(op: str, case: Case, setting: Setting) -> dict:
    """All patches of an image, or of a batch, into class order, or back from it."""
    torch.manual_seed(0)
    count = case.batch * TileGrid(case.height, case.width, PATCH, STRIDE).num_patches
    rows = torch.randint(0, 256, (count, 3, PATCH, PATCH), device=device()).to(case.dtype)
    rows = rows.contiguous(memory_format=case.memory_format)
    groups = fastroute.group_by_class(torch.randint(0, CLASSES, (count,), device=device()), CLASSES)
    order, inverse = groups.order, groups.inverse
    if op == "gather_groups":
        ours, reference, opposite = fastroute.gather_groups, gather_groups_reference, inverse
        usual = {"indexing": lambda: rows[order], "index_select": lambda: rows.index_select(0, order)}
    else:
        ours, reference, opposite = fastroute.scatter_groups, scatter_groups_reference, order
        usual = {
            "indexing": lambda: torch.empty_like(rows).index_put_((order,), rows),
            "index_copy": lambda: torch.empty_like(rows).index_copy_(0, order, rows),
        }
    expected, plain = known(lambda: reference(rows, order, inverse))
    assert torch.equal(expected[opposite], rows), "the reference is no permutation"
    check = same(expected)
    variants: dict[str, Variant | str] = {
        OURS: Variant(lambda: ours(rows, groups), check),
        "reference": plain,
        "reference, compiled": compiled(reference, rows, order, inverse, check=check, setting=setting, case=case),
        **{way: Variant(run, check) for way, run in usual.items()},
    }
    label = f"{op}, {count:,} patches of {case.width} x {case.height}, {case.suffix}"
    return compare(label, variants, 2 * rows.nbytes + order.nbytes, "indexing", setting, **case.facts)


@pytest.mark.parametrize("op", ["gather_groups", "scatter_groups"])
def test_gather_groups(op: str, setting: Setting) -> None:
    """Every call allocates its result, as in use; the copy does not, which favours the copy."""
    rows = [run_case(op, case, setting) for case in cases(setting, DTYPES, HALF)]
    setting.save(op, rows, f"patches of 3 x {PATCH} x {PATCH}, {CLASSES} classes; medians of alternating runs, warm")
