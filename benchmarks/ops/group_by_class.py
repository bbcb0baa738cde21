"""group_by_class beside a stable argsort with the inverse permutation and counts, and beside a mask per class."""

from __future__ import annotations

import torch
from torch import Tensor

import fastroute
from benchmarks.measure import device
from benchmarks.ops._common import OURS, Variant, compare, compiled, known, same
from benchmarks.setting import Setting
from fastroute.reference.group_by_class import group_by_class_reference

CLASSES = 3
# From the patches of one image to the pixels of a small one.
COUNTS = (10**4, 10**5, 10**6, 10**7)
DTYPES = (torch.int64, torch.uint8)


def invert(order: Tensor) -> Tensor:  # [N] -> [N]
    """The inverse permutation."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


def offsets_of(counts: Tensor) -> Tensor:  # [K] -> [K + 1]
    """Where each class begins, and the end."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def by_argsort(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [N]
    """The usual way."""
    order = torch.argsort(ids, stable=True)
    return order, invert(order), offsets_of(torch.bincount(ids, minlength=CLASSES))


def by_masks(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [N]
    """One pass over the ids per class."""
    places = [(ids == c).nonzero().squeeze(1) for c in range(CLASSES)]
    order = torch.cat(places)
    return order, invert(order), offsets_of(torch.tensor([len(p) for p in places], device=ids.device))


def run_case(count: int, dtype: torch.dtype, setting: Setting) -> dict:
    """`count` random ids."""
    torch.manual_seed(0)
    ids = torch.randint(0, CLASSES, (count,), dtype=dtype, device=device())
    expected, reference = known(lambda: group_by_class_reference(ids, CLASSES))
    check = same(expected)
    variants: dict[str, Variant | str] = {
        OURS: Variant(lambda: fastroute.group_by_class(ids, CLASSES), check),
        "reference": reference,
        "reference, compiled": compiled(group_by_class_reference, ids, CLASSES, check=check, setting=setting),
        "argsort": Variant(lambda: by_argsort(ids), check),
        "a mask per class": Variant(lambda: by_masks(ids), check),
    }
    bytes_moved = ids.nbytes + sum(part.nbytes for part in expected)
    kind = str(dtype).removeprefix("torch.")
    label = f"group_by_class, {count:,} items, {kind}"
    return compare(label, variants, bytes_moved, "argsort", setting, items=count, dtype=kind)


def test_group_by_class(setting: Setting) -> None:
    """Ids as classifiers leave them and as small as they can be kept."""
    rows = [run_case(count, dtype, setting) for count in (COUNTS[:1] if setting.smoke else COUNTS) for dtype in DTYPES]
    setting.save("group_by_class", rows, f"{CLASSES} classes; medians of alternating runs, warm")
