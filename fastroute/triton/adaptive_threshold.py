"""adaptive_threshold: Lloyd's iteration with two centres on one score per pixel, without a word to the host.

An image is cut into at most PARTS chunks. Launch n adds up every chunk on either side of the n-th threshold. That threshold
follows from the sums of launch n - 1, which every program adds up for itself, in one order: no atomic, no wait. When the
centres rest, the remaining launches do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastroute.ops._checks import ID_TYPES
from fastroute.ops.adaptive_threshold import check_finite
from fastroute.reference.adaptive_threshold import MAX_ASSIGNMENTS, TOLERANCE
from fastroute.triton._common import FLOATING, NAMES, WIDER, Variant, ceil_div, check_on_host, launch, product, to_work

BLOCK = 1024 * WIDER
PARTS = 512
# What a launch knows of the sums before it: nothing, those of the whole image, those of both classes.
MEAN, FIRST, LATER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
RELATIVE_TOLERANCE = tl.constexpr(TOLERANCE)


@triton.jit
def load_scores(score, image, at, end, count):
    """Scores of an image as float64, and which of them lie before `end`."""
    inside = at < end
    return to_work(tl.load(score + image * count + at, mask=inside, other=0.0), tl.float64), inside


@triton.jit(do_not_specialize=["count", "chunks", "length"])
def adaptive_threshold_range_kernel(
    score,  # [B, count]
    ranges,  # [B, 2, chunks] float64
    count,
    chunks,
    length,
    BLOCK: tl.constexpr,
):
    """Smallest and largest score of each chunk of `length` pixels. One program per chunk."""
    program = tl.program_id(0)
    image, chunk = (program // chunks).to(tl.int64), (program % chunks).to(tl.int64)
    smallest = tl.full((BLOCK,), float("inf"), tl.float64)
    largest = tl.full((BLOCK,), float("-inf"), tl.float64)
    at = chunk * length
    end = tl.minimum(at + length, count)
    while at < end:
        value, inside = load_scores(score, image, at + tl.arange(0, BLOCK), end, count)
        smallest = tl.where(inside, tl.minimum(smallest, value), smallest)
        largest = tl.where(inside, tl.maximum(largest, value), largest)
        at += BLOCK
    tl.store(ranges + image * 2 * chunks + chunk, tl.min(smallest, axis=0))
    tl.store(ranges + (image * 2 + 1) * chunks + chunk, tl.max(largest, axis=0))


@triton.jit
def decide(ranges, sums, state, image, count, chunks, ROUND: tl.constexpr, PARTS: tl.constexpr):
    """Offset of the scores and, from what the launch before has written, centres, threshold and whether they rest.

    mean = sum / max(number, 1) of each class; the centres rest when their squared moves sum to at most
    TOLERANCE · spread²; the threshold is then that of the last assignment. A flat image never reaches its own.
    """
    part = tl.arange(0, PARTS)
    known = part < chunks
    offset = tl.min(tl.load(ranges + image * 2 * chunks + part, mask=known, other=float("inf")), axis=0)
    spread = tl.max(tl.load(ranges + (image * 2 + 1) * chunks + part, mask=known, other=float("-inf")), axis=0) - offset
    zero = tl.full((), 0.0, tl.float64)
    upper, lower, threshold, rests = zero, zero, zero, spread <= 0.0
    if ROUND != MEAN:
        sums += image * 3 * chunks + part
        upper_sum = tl.sum(tl.load(sums, mask=known, other=0.0), axis=0)
        lower_sum = tl.sum(tl.load(sums + chunks, mask=known, other=0.0), axis=0)
        number = tl.sum(tl.load(sums + 2 * chunks, mask=known, other=0.0), axis=0)
        upper = upper_sum / tl.maximum(number, 1.0)
        if ROUND == LATER:
            state += image * 4
            lower = lower_sum / tl.maximum(count - number, 1.0)
            before_upper, before_lower = tl.load(state), tl.load(state + 1)
            by_upper, by_lower = upper - before_upper, lower - before_lower
            # Rounded as in the reference, so that as many launches move the centres.
            moved = product(by_upper, by_upper) + product(by_lower, by_lower)
            rests = (tl.load(state + 3) != 0.0) | (moved <= RELATIVE_TOLERANCE * spread * spread)
            threshold = tl.where(rests, tl.load(state + 2), 0.5 * (upper + lower))
        else:
            threshold = tl.where(rests, float("inf"), 0.5 * (upper + lower))
    return offset, upper, lower, threshold, rests


@triton.jit(do_not_specialize=["count", "chunks", "length"])
def adaptive_threshold_sum_kernel(
    score,  # [B, count]
    ranges,  # [B, 2, chunks] float64
    sums_before,  # [B, 3, chunks] float64, of the launch before
    state_before,  # [B, 4] float64
    sums,  # [B, 3, chunks] float64: sum of the upper class, of the lower one, number in the upper one
    state,  # [B, 4] float64: centres, threshold, whether they rest
    count,
    chunks,
    length,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Sums of score - offset over both sides of the threshold, chunk by chunk. One program per chunk."""
    program = tl.program_id(0)
    image, chunk = (program // chunks).to(tl.int64), (program % chunks).to(tl.int64)
    offset, upper, lower, threshold, rests = decide(
        ranges, sums_before, state_before, image, count, chunks, ROUND, PARTS
    )  # fmt: skip
    if chunk == 0:
        state += image * 4
        tl.store(state, upper)
        tl.store(state + 1, lower)
        tl.store(state + 2, threshold)
        tl.store(state + 3, rests.to(tl.float64))
    at = chunk * length
    end = tl.where(rests, at, tl.minimum(at + length, count))
    above, below = tl.full((BLOCK,), 0.0, tl.float64), tl.full((BLOCK,), 0.0, tl.float64)
    number = tl.full((BLOCK,), 0.0, tl.float64)
    while at < end:
        value, inside = load_scores(score, image, at + tl.arange(0, BLOCK), end, count)
        value -= offset
        is_upper = value >= threshold
        above += tl.where(inside & is_upper, value, 0.0)
        below += tl.where(inside & (value < threshold), value, 0.0)
        number += (inside & is_upper).to(tl.float64)
        at += BLOCK
    sums += image * 3 * chunks + chunk
    tl.store(sums, tl.sum(above, axis=0))
    tl.store(sums + chunks, tl.sum(below, axis=0))
    tl.store(sums + 2 * chunks, tl.sum(number, axis=0))


@triton.jit(do_not_specialize=["count", "chunks", "length"])
def adaptive_threshold_kernel(
    score,  # [B, count]
    ranges,  # [B, 2, chunks] float64
    sums,  # [B, 3, chunks] float64
    state,  # [B, 4] float64
    out,  # [B, count]
    count,
    chunks,
    length,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """out = score - offset >= the last threshold. One program per chunk."""
    program = tl.program_id(0)
    image, chunk = (program // chunks).to(tl.int64), (program % chunks).to(tl.int64)
    offset, _, _, threshold, _ = decide(ranges, sums, state, image, count, chunks, LATER, PARTS)
    at = chunk * length
    end = tl.minimum(at + length, count)
    while at < end:
        places = at + tl.arange(0, BLOCK)
        value, inside = load_scores(score, image, places, end, count)
        tl.store(out + image * count + places, (value - offset >= threshold).to(out.dtype.element_ty), mask=inside)
        at += BLOCK


def adaptive_threshold_triton(score: Tensor, id_bytes: int) -> Tensor:  # [B, ...] -> [B, ...]
    """See :func:`fastroute.adaptive_threshold`."""
    if check_on_host(score):
        check_finite(score)
    dense = score.contiguous()
    out = torch.empty(dense.shape, dtype=ID_TYPES[id_bytes], device=dense.device)
    batch = dense.shape[0]
    if dense.numel() == 0:
        return out
    count = dense.numel() // batch
    length = ceil_div(ceil_div(count, PARTS), BLOCK) * BLOCK
    chunks = ceil_div(count, length)

    def doubles(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=dense.device)

    ranges = doubles(batch, 2, chunks)
    sums, states = (doubles(batch, 3, chunks), doubles(batch, 3, chunks)), (doubles(batch, 4), doubles(batch, 4))
    programs, sizes = batch * chunks, (count, chunks, length)
    launch(adaptive_threshold_range_kernel, programs, dense, ranges, *sizes, BLOCK=BLOCK)
    for n in range(MAX_ASSIGNMENTS):
        now, before = n % 2, (n + 1) % 2
        args = (sums[before], states[before], sums[now], states[now])
        known = min(n, LATER.value)
        launch(
            adaptive_threshold_sum_kernel, programs, dense, ranges, *args, *sizes, ROUND=known, BLOCK=BLOCK, PARTS=PARTS
        )  # fmt: skip
    last = (MAX_ASSIGNMENTS - 1) % 2
    launch(
        adaptive_threshold_kernel, programs, dense, ranges, sums[last], states[last], out, *sizes, BLOCK=BLOCK, PARTS=PARTS
    )  # fmt: skip
    return out


def unsupported_reasons(device: torch.device) -> list[str]:
    """Why these kernels cannot run on `device`."""
    return []


def variants() -> Iterator[Variant]:
    """The kernels as the launcher calls them: all types of scores, and all rounds and outputs for float32."""
    doubles = ("ranges", "sums_before", "state_before", "sums", "state")
    types = {name: "*fp64" for name in doubles} | {"count": "i32", "chunks": "i32", "length": "i32"}
    for dtype in FLOATING:
        own = types | {"score": f"*{NAMES[dtype]}"}
        yield Variant(adaptive_threshold_range_kernel, own, {"BLOCK": BLOCK})
        for known in (MEAN, FIRST, LATER) if dtype == torch.float32 else (LATER,):
            yield Variant(adaptive_threshold_sum_kernel, own, {"ROUND": known.value, "BLOCK": BLOCK, "PARTS": PARTS})
        for target in (torch.int64, torch.int32, torch.uint8) if dtype == torch.float32 else (torch.int64,):
            yield Variant(adaptive_threshold_kernel, own | {"out": f"*{NAMES[target]}"}, {"BLOCK": BLOCK, "PARTS": PARTS})
