"""assign_classes: the class of largest score · scale[k]; with a budget, of log2(score) - penalty · log2(cost) at the smallest
penalty whose mean cost fits.

The penalty is searched on the device, in a fixed number of passes over the items. Doubles, taken as integers, are in order;
a pass cuts the interval of integers into equal parts, counts the classes at every cut, and the next pass begins by keeping
the one part in which the mean cost passes the budget. Counts are integers, so atomic additions give the same on every run.
Classes are chosen in float32, and in float64 only where two of them are nearer than float32 can tell apart: on many GPUs a
double takes 64 times as long."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastroute.ops._checks import ID_TYPES
from fastroute.reference.assign_classes import BUDGET_SLACK, logarithms_, penalty_range
from fastroute.triton._common import (
    FLOATING,
    INTERPRETED,
    NAMES,
    WIDER,
    Variant,
    ceil_div,
    launch,
    next_power,
    product,
    to_work,
    work_type,
)

# Costs are values of the host: the launcher cannot run on the symbols of a trace.
OPAQUE = ("assign_classes", "assign_classes.budget")

# A pass leaves 1 / CUTS of the interval, and a little for rounding: so many passes leave two neighbouring doubles of any.
BITS, PASSES = (8, 10) if INTERPRETED else (4, 18)
CUTS = 1 << BITS
# Items compared at once, and steps of so many items per program.
ITEMS, STEPS = (256, 64) if INTERPRETED else (64, 32)
BLOCK = 512 * WIDER
# Values of float32 that are nearer to each other than this share of what they were made of may be rounded the wrong way round.
UNSURE = tl.constexpr(2.0**-20)
# Values that one launch writes.
PACK = 8


# Bits of doubles are 64 bits wide whatever their value: Triton would make one kernel for each mixture of widths.
@triton.jit(do_not_specialize=["first", "count", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7"])
def assign_classes_pack_kernel(
    out,
    first,
    count,
    v0: tl.int64,
    v1: tl.int64,
    v2: tl.int64,
    v3: tl.int64,
    v4: tl.int64,
    v5: tl.int64,
    v6: tl.int64,
    v7: tl.int64,
    PACK: tl.constexpr,
):
    """Doubles of the host, given as their bits, into memory of the device: a copy from the host would wait for it."""
    lane = tl.arange(0, PACK)
    bits = tl.where(lane == 0, v0, v1)
    bits = tl.where(lane == 2, v2, bits)
    bits = tl.where(lane == 3, v3, bits)
    bits = tl.where(lane == 4, v4, bits)
    bits = tl.where(lane == 5, v5, bits)
    bits = tl.where(lane == 6, v6, bits)
    bits = tl.where(lane == 7, v7, bits)
    tl.store(out + first + lane, bits.to(tl.float64, bitcast=True), mask=first + lane < count)


@triton.jit(do_not_specialize=["length", "classes"])
def assign_classes_kernel(
    score,  # [B, K, L]
    scale,  # [K] or None
    out,  # [B, L]
    length,
    classes,
    score_b,
    score_k,
    score_l,
    WORK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program chooses for a run of one image; the lowest class wins a tie."""
    pieces = (length + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    image = (program // pieces).to(tl.int64)
    item = (program % pieces).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), 0, tl.int32)
    most = tl.full((BLOCK,), 0, WORK)
    # The number of a class times its stride may not fit into 32 bits.
    at = image * score_b
    for k in range(classes):
        value = to_work(tl.load(score + at + item * score_l, mask=item < length, other=0), WORK)
        at += score_k
        if scale is not None:
            value = product(value, tl.load(scale + k).to(WORK))
        better = (value > most) | (k == 0)
        best = tl.where(better, k, best)
        most = tl.where(better, value, most)
    tl.store(out + image * length + item, best.to(out.dtype.element_ty), mask=item < length)


@triton.jit
def cut_at(low, high, number, BITS: tl.constexpr):
    """The integer that stands for one of the penalties that a pass tries; `number` 0 is the lower end."""
    return tl.minimum(low + number * tl.maximum((high >> BITS) - (low >> BITS), 1), high)


@triton.jit
def penalty_of(place):
    """The double that an integer stands for."""
    bits = tl.where(place >= 0, place, -place)
    value = bits.to(tl.float64, bitcast=True)
    return tl.where(place >= 0, value, -value)


@triton.jit
def interval(state, totals, share, low, high, threshold, total, classes, step, K2: tl.constexpr, BITS: tl.constexpr):
    """Ends of the interval at pass `step`, from what the pass before has counted: the lower does not fit, the upper does."""
    CUTS: tl.constexpr = 1 << BITS
    if step > 0:
        low = tl.load(state + 2 * step - 2)
        high = tl.load(state + 2 * step - 1)
        cut = tl.arange(0, CUTS)
        spent = tl.full((CUTS,), 0, tl.float64)
        for k in range(classes):
            count = tl.load(totals + ((step - 1) * CUTS + cut) * K2 + k).to(tl.float64)
            spent += product(count, tl.load(share + k))
        fits = spent / total.to(tl.float64) <= threshold.to(tl.float64, bitcast=True)
        first = tl.min(tl.where(fits, cut, CUTS))
        below = cut_at(low, high, tl.maximum(first - 1, 0), BITS)
        high = tl.where(first < CUTS, cut_at(low, high, first, BITS), high)
        low = below
    return low, high


@triton.jit
def choose(logs, prices, penalty, item, total, classes, CUTS: tl.constexpr, ITEMS: tl.constexpr):
    """The classes of `item` [ITEMS] at every `penalty` [CUTS], as float64 chooses them."""
    known = (item < total)[None, :]
    best = tl.full((CUTS, ITEMS), 0, tl.int32)
    most = tl.full((CUTS, ITEMS), -float("inf"), tl.float32)
    second = most
    reach = tl.full((CUTS, ITEMS), 0, tl.float32)
    rough = penalty.to(tl.float32)
    for k in range(classes):
        log = tl.load(logs + k * total.to(tl.int64) + item, mask=item < total, other=0).to(tl.float32)[None, :]
        price = (rough * tl.load(prices + k).to(tl.float32))[:, None]
        value = log - price
        reach = tl.maximum(reach, tl.abs(log) + tl.abs(price))
        better = value > most
        second = tl.where(better, most, tl.maximum(second, value))
        best = tl.where(better, k, best)
        most = tl.where(better, value, most)
    # Rounded are the logarithm, the penalty, the price, their product and the difference: less than 5 units in the last place
    # of `reach`, for each of the two.
    unsure = known & (most - second <= reach * UNSURE)
    if tl.max(tl.max(unsure.to(tl.int32), 1), 0) > 0:
        best = tl.full((CUTS, ITEMS), 0, tl.int32)
        exact = tl.full((CUTS, ITEMS), 0, tl.float64)
        for k in range(classes):
            log = tl.load(logs + k * total.to(tl.int64) + item, mask=item < total, other=0)
            value = log[None, :] - product(penalty, tl.load(prices + k))[:, None]
            better = (value > exact) | (k == 0)
            best = tl.where(better, k, best)
            exact = tl.where(better, value, exact)
    return best


@triton.jit(do_not_specialize=["low", "high", "threshold", "total", "classes", "step"])
def assign_classes_count_kernel(
    logs,  # [K, N]
    prices,  # [2, K] log2 of the costs, and the costs as fractions of the most expensive
    state,  # [PASSES + 1, 2]
    totals,  # [PASSES, CUTS, K2], zeros
    low: tl.int64,
    high: tl.int64,
    threshold: tl.int64,
    total,
    classes,
    step,
    K2: tl.constexpr,
    BITS: tl.constexpr,
    ITEMS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Pass `step`: how many items are of each class at each cut. One program counts STEPS times ITEMS items."""
    CUTS: tl.constexpr = 1 << BITS
    program = tl.program_id(0).to(tl.int64)
    low, high = interval(state, totals, prices + classes, low, high, threshold, total, classes, step, K2, BITS)
    if program == 0:
        tl.store(state + 2 * step, low)
        tl.store(state + 2 * step + 1, high)
    cut = tl.arange(0, CUTS)
    penalty = penalty_of(cut_at(low, high, cut.to(tl.int64), BITS))
    counts = tl.full((CUTS * K2,), 0, tl.int32)
    begin = program * STEPS * ITEMS
    for part in range(tl.minimum(STEPS, (total - begin + ITEMS - 1) // ITEMS)):
        item = begin + part * ITEMS + tl.arange(0, ITEMS)
        best = choose(logs, prices, penalty, item, total, classes, CUTS, ITEMS)
        known = (item < total)[None, :] & (best >= 0)
        place = tl.reshape(cut[:, None] * K2 + best, (CUTS * ITEMS,))
        counts += tl.histogram(place, CUTS * K2, mask=tl.reshape(known, (CUTS * ITEMS,)))
    place = step.to(tl.int64) * CUTS * K2 + tl.arange(0, CUTS * K2)
    tl.atomic_add(totals + place, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=["low", "high", "threshold", "total", "classes", "step"])
def assign_classes_choose_kernel(
    logs,  # [K, N]
    prices,  # [2, K]
    state,  # [PASSES + 1, 2]
    totals,  # [PASSES, CUTS, K2]
    out,  # [N]
    solved,  # []
    low: tl.int64,
    high: tl.int64,
    threshold: tl.int64,
    total,
    classes,
    step,
    K2: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The classes at the upper end of what the passes have left, and this penalty."""
    low, high = interval(state, totals, prices + classes, low, high, threshold, total, classes, step, K2, BITS)
    penalty = penalty_of(high)
    if tl.program_id(0) == 0:
        tl.store(solved, penalty)
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    best = tl.reshape(choose(logs, prices, tl.full((1,), 0, tl.float64) + penalty, item, total, classes, 1, BLOCK), (BLOCK,))
    tl.store(out + item, best.to(out.dtype.element_ty), mask=item < total)


def assign_classes_triton(
    score: Tensor,  # [N, K, ...]
    cost: Tensor,  # [K]
    penalty: float,
    id_bytes: int,
) -> Tensor:  # [N, ...]
    """See :func:`fastroute.assign_classes`."""
    out = _empty_classes(score, id_bytes)
    if out.numel() == 0:
        return out
    batch, classes = score.shape[:2]
    scale = None
    if penalty != 0:
        # Relative to the class that gains most, so that no unit of cost overflows.
        gain = -penalty * cost.double().log()
        scale = _on_device((gain - gain.max()).exp(), score.device)
    length = out.numel() // batch
    if length == 1:
        # Items along the batch: one program takes many of them.
        flat = score.reshape(batch, classes).t().unsqueeze(0)
        batch, length = 1, batch
    else:
        flat = score.reshape(batch, classes, length)
    constants = {"WORK": work_type(score.dtype), "BLOCK": BLOCK}
    launch(
        assign_classes_kernel, batch * ceil_div(length, BLOCK), flat, scale, out, length, classes, *flat.stride(), **constants
    )
    return out


def assign_classes_budget_triton(
    score: Tensor,  # [N, K, ...]
    cost: Tensor,  # [K]
    budget: float,
    penalty: float | None,
    logits: bool,
    id_bytes: int,
) -> tuple[Tensor, Tensor]:  # [], [N, ...]
    """See :func:`fastroute.ops.assign_classes.solve_classes`."""
    out, (low, high) = _empty_classes(score, id_bytes), penalty_range(cost, penalty)
    device, classes, total = score.device, score.shape[1], out.numel()
    solved = torch.full((), low, dtype=torch.float64, device=device)
    if total == 0:
        return solved, out
    logs = torch.empty((classes, total), dtype=torch.float64, device=device)
    logs.view(classes, *out.shape).copy_(score.movedim(1, 0))
    logarithms_(logs, 0, logits)
    costs = cost.double()
    prices = _on_device(torch.cat([costs.log2(), costs / costs.max()]), device)
    k2 = next_power(classes)
    state = torch.empty((PASSES + 1, 2), dtype=torch.int64, device=device)
    totals = torch.zeros((PASSES, CUTS, k2), dtype=torch.int64, device=device)
    ends = (_place(low), _place(high), _bits(budget + BUDGET_SLACK))
    for step in range(PASSES):
        arguments = (logs, prices, state, totals, *ends, total, classes, step)
        programs = ceil_div(total, ITEMS * STEPS)
        launch(assign_classes_count_kernel, programs, *arguments, **_count_constants(k2), num_warps=_count_warps(k2))
    found = (logs, prices, state, totals, out, solved, *ends, total, classes, PASSES)
    launch(assign_classes_choose_kernel, ceil_div(total, BLOCK), *found, K2=k2, BITS=BITS, BLOCK=BLOCK)
    return solved, out


def _empty_classes(score: Tensor, id_bytes: int) -> Tensor:  # [N, K, ...] -> [N, ...]
    if score.device.type == "cpu" and bool(score.isnan().any()):
        raise ValueError("assign_classes: score must not be NaN")
    return torch.empty((score.shape[0], *score.shape[2:]), dtype=ID_TYPES[id_bytes], device=score.device)


def _count_constants(k2: int) -> dict:
    return {"K2": k2, "BITS": BITS, "ITEMS": ITEMS, "STEPS": STEPS}


def _count_warps(k2: int) -> int:
    # The counts of all cuts and classes lie in registers.
    return 4 if k2 <= 32 else 8


def _bits(value: float) -> int:
    """The bits of a double as an integer."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


def _place(value: float) -> int:
    """The integer that stands for a penalty: of a negative one, that of its absolute value, negated."""
    return _bits(value) if value >= 0 else -_bits(-value)


def _on_device(values: Tensor, device: torch.device) -> Tensor:  # [K]
    """Doubles of the CPU on `device`, without a wait."""
    if device.type == "cpu":
        return values.contiguous()
    bits = [_bits(value) for value in values.tolist()]
    out = torch.empty((len(bits),), dtype=torch.float64, device=device)
    for first in range(0, len(bits), PACK):
        some = bits[first : first + PACK]
        launch(assign_classes_pack_kernel, 1, out, first, len(bits), *some, *[0] * (PACK - len(some)), PACK=PACK)
    return out


def unsupported_reasons(device: torch.device) -> list[str]:
    """Why these kernels cannot run on `device`."""
    return []


def variants() -> Iterator[Variant]:
    """The kernels as the launchers call them."""
    outputs = [torch.int64, torch.int32, torch.uint8]
    sizes = dict.fromkeys(("length", "classes", "score_b", "score_k", "score_l", "total", "step", "first", "count"), "i32")
    wide = dict.fromkeys(("low", "high", "threshold", *(f"v{n}" for n in range(PACK))), "i64")
    buffers = {"logs": "*fp64", "prices": "*fp64", "state": "*i64", "totals": "*i64", "scale": "*fp64", "solved": "*fp64"}
    rest = {**sizes, **wide, **buffers, "out": "*fp64"}
    for dtype in FLOATING:
        for scale in ({}, {"scale": None}):
            types = {**rest, "score": f"*{NAMES[dtype]}", "out": "*i64"}
            yield Variant(assign_classes_kernel, types, {"WORK": work_type(dtype), "BLOCK": BLOCK, **scale})
    for output in outputs[1:]:
        types = {**rest, "score": "*fp32", "out": f"*{NAMES[output]}"}
        yield Variant(assign_classes_kernel, types, {"WORK": tl.float32, "BLOCK": BLOCK})
    yield Variant(assign_classes_pack_kernel, rest, {"PACK": PACK})
    for k2 in (1, 2, 4, 16, 256):
        yield Variant(assign_classes_count_kernel, rest, _count_constants(k2), {"num_warps": _count_warps(k2)})
    for output in outputs:
        constants = {"K2": 4, "BITS": BITS, "BLOCK": BLOCK}
        yield Variant(assign_classes_choose_kernel, {**rest, "out": f"*{NAMES[output]}"}, constants)
