"""group_by_class: a stable counting sort in two passes over the ids.

One program counts a stretch of items, class by class; a scan over (class, stretch) turns counts into places; one program
places a stretch. Within a stretch the items are taken some at a time: an item's rank is the number of items of its class
before it, found by comparing all with all, and the last item of a class moves the class's counter. So no two lanes write one
counter and nothing is atomic, and memory is one counter per class and stretch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastroute.ops import _checks as check
from fastroute.triton._common import INTERPRETED, NAMES, Variant, ceil_div, launch

# torch's analysis of compiled kernels takes class_ids for written: addresses of stores come from a function that reads them.
OPAQUE = ("group_by_class",)

# Items compared with each other, how many of them at once, and stretches at most: more keep more programs busy, until they
# all are; fewer need fewer counters. The interpreter's time goes by steps, not by lanes.
ITEMS, CHUNK, STRETCHES = (1024, 1024, 16) if INTERPRETED else (256, 16, 4096)
# One thread per item.
WARPS = 8


@triton.jit
def ids_at(class_ids, item, count, step, classes):
    """Class ids as int32; one out of range counts as the nearest class, so that no address is wrong. -1 past the end."""
    ids = tl.load(class_ids + item * step, mask=item < count, other=0).to(tl.int64)
    ids = tl.minimum(tl.maximum(ids, 0), classes - 1)
    return tl.where(item < count, ids, -1).to(tl.int32)


@triton.jit
def ranks(class_ids, first, count, step, classes, ITEMS: tl.constexpr, CHUNK: tl.constexpr):
    """Ids of the ITEMS items from `first` on, how many of the same class come before and how many after each."""
    lane = tl.arange(0, ITEMS)
    ids = ids_at(class_ids, first + lane, count, step, classes)
    before = tl.zeros((ITEMS,), tl.int32)
    after = tl.zeros((ITEMS,), tl.int32)
    for start in range(0, ITEMS, CHUNK):
        other = start + tl.arange(0, CHUNK)
        # Lanes lie along the last axis, so that each thread sums for its own item.
        equal = ids_at(class_ids, first + other, count, step, classes)[:, None] == ids[None, :]
        before += tl.sum((equal & (other[:, None] < lane[None, :])).to(tl.int32), axis=0)
        after += tl.sum((equal & (other[:, None] > lane[None, :])).to(tl.int32), axis=0)
    return ids, before, after


@triton.jit(do_not_specialize=["count", "step", "classes", "stretches", "steps"])
def group_by_class_count_kernel(
    class_ids,  # [N]
    counts,  # [1 + K · stretches], zeros
    count,
    step,
    classes,
    stretches,
    steps,
    ITEMS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """counts[1 + c · stretches + s] = items of class c in stretch s, for one stretch."""
    stretch = tl.program_id(0).to(tl.int64)
    for part in range(tl.minimum(steps, (count - stretch * steps * ITEMS + ITEMS - 1) // ITEMS)):
        first = (stretch * steps + part) * ITEMS
        ids, before, after = ranks(class_ids, first, count, step, classes, ITEMS, CHUNK)
        last = (ids >= 0) & (after == 0)
        counter = counts + 1 + ids.to(tl.int64) * stretches + stretch
        seen = tl.load(counter, mask=last, other=0)
        tl.store(counter, seen + before + 1, mask=last)
        # The next step reads counters that other threads of this program have written.
        tl.debug_barrier()


@triton.jit(do_not_specialize=["count", "step", "classes", "stretches", "steps"])
def group_by_class_kernel(
    class_ids,  # [N]
    counts,  # [1 + K · stretches], items not yet placed
    ends,  # [1 + K · stretches], place after the last of a class and stretch
    order,  # [N]
    inverse,  # [N]
    count,
    step,
    classes,
    stretches,
    steps,
    ITEMS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Places the items of one stretch."""
    stretch = tl.program_id(0).to(tl.int64)
    for part in range(tl.minimum(steps, (count - stretch * steps * ITEMS + ITEMS - 1) // ITEMS)):
        first = (stretch * steps + part) * ITEMS
        item = first + tl.arange(0, ITEMS)
        ids, before, after = ranks(class_ids, first, count, step, classes, ITEMS, CHUNK)
        known = ids >= 0
        counter = 1 + ids.to(tl.int64) * stretches + stretch
        left = tl.load(counts + counter, mask=known, other=0)
        place = tl.load(ends + counter, mask=known, other=0) - left + before
        tl.store(order + place, item, mask=known)
        tl.store(inverse + item, place, mask=known)
        # All have read the counters before the last of each class moves its own.
        tl.debug_barrier()
        tl.store(counts + counter, left - before - 1, mask=known & (after == 0))
        tl.debug_barrier()


def group_by_class_triton(class_ids: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:  # [N]
    """See :func:`fastroute.group_by_class`."""
    check.in_range("group_by_class", "class_ids", class_ids, num_classes)
    count, device = class_ids.shape[0], class_ids.device
    order = torch.empty((count,), dtype=torch.int64, device=device)
    inverse = torch.empty((count,), dtype=torch.int64, device=device)
    steps = ceil_div(count, ITEMS * STRETCHES)
    stretches = ceil_div(count, ITEMS * max(steps, 1))
    counts = torch.zeros((1 + num_classes * stretches,), dtype=torch.int64, device=device)
    block = {"ITEMS": ITEMS, "CHUNK": CHUNK, "num_warps": WARPS}
    sizes = (count, class_ids.stride(0), num_classes, stretches, steps)
    launch(group_by_class_count_kernel, stretches, class_ids, counts, *sizes, **block)
    ends = counts.cumsum(0)
    launch(group_by_class_kernel, stretches, class_ids, counts, ends, order, inverse, *sizes, **block)
    if count == 0:
        return order, inverse, torch.zeros((num_classes + 1,), dtype=torch.int64, device=device)
    # The end of class c - 1 in its last stretch is where class c begins.
    return order, inverse, ends[::stretches].contiguous()


def unsupported_reasons(device: torch.device) -> list[str]:
    """Why these kernels cannot run on `device`."""
    return []


def variants() -> Iterator[Variant]:
    """The kernels as the launcher calls them."""
    block = {"ITEMS": ITEMS, "CHUNK": CHUNK}
    sizes = {"count": "i32", "step": "i32", "classes": "i32", "stretches": "i32", "steps": "i32"}
    pointers = dict.fromkeys(("counts", "ends", "order", "inverse"), "*i64")
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        types = {"class_ids": f"*{NAMES[dtype]}", **pointers, **sizes}
        yield Variant(group_by_class_count_kernel, types, block, {"num_warps": WARPS})
        yield Variant(group_by_class_kernel, types, block, {"num_warps": WARPS})
    yield Variant(
        group_by_class_kernel, {"class_ids": "*i64", **pointers, **sizes, "count": "i64"}, block, {"num_warps": WARPS}
    )
