"""What the benchmarks of single operators share: agreement first, then alternating times beside a copy of the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import alternate, clone_bandwidth, copy_bandwidth

PATCH, STRIDE, SCALE = 32, 28, 4
# LR height and width of what becomes a 2K, 4K and 8K image at x4.
SIZES = {"2K": (270, 480), "4K": (540, 960), "8K": (1080, 1920)}
SMOKE_SIZES = {"smoke": (96, 160)}
ROUNDS, SMOKE_ROUNDS = 9, 2
# A case with slow variants ends after this many seconds, though not before it has ROUNDS // 2 rounds.
CASE_SECONDS = 20.0
FLOOR = "copy of the same bytes"
OURS = "fastroute"


@dataclass(frozen=True)
class Variant:
    """One way to do the job.

    Attributes:
        run: does it once and returns the result.
        check: raises AssertionError when that result is not the job's.
        foreign: not ours to mend: disagreement is reported and the variant not timed, where else it would be an error.
    """

    run: Callable[[], Any]
    check: Callable[[Any], object]
    foreign: bool = False


def sizes(smoke: bool) -> dict[str, tuple[int, int]]:
    """LR sizes by name."""
    return SMOKE_SIZES if smoke else SIZES


def same(expected: Any) -> Callable[[Any], None]:
    """A check for equality, bit for bit; of several tensors one by one."""

    def check(result: Any) -> None:
        pairs = [(result, expected)] if isinstance(expected, Tensor) else zip(result, expected, strict=True)
        for got, wanted in pairs:
            assert torch.equal(got, wanted), "another result"

    return check


def same_classes(expected: Tensor, share: float = 1e-5) -> Callable[[Tensor], None]:
    """A check for equal classes but for a share of items whose class is a matter of rounding."""

    def check(result: Tensor) -> None:
        other = (result != expected).double().mean().item()
        assert other <= share, f"{other:.1e} of the items are of another class"

    return check


def compiled(function: Callable[..., Any], *args: Any, check: Callable[[Any], object], smoke: bool) -> Variant | str:
    """`torch.compile(function)` on these arguments, or why it does not run."""
    if smoke:
        return "compilation takes too long for a smoke run"
    torch.compiler.reset()
    quick = torch.compile(function, dynamic=False)
    try:
        quick(*args)
    except RuntimeError as error:
        return f"does not compile: {str(error).splitlines()[0]}"
    return Variant(lambda: quick(*args), check, foreign=True)


def compare(
    label: str, variants: Mapping[str, Variant | str], bytes_moved: int, peer: str, smoke: bool, **facts: object
) -> dict[str, Any]:
    """Check all variants, time those that agree in turn with a copy of `bytes_moved` bytes, print and return a row.

    Args:
        label: operator, size and type.
        variants: ways to do the job by name, `OURS` among them; in place of one, the reason why it is missing.
        bytes_moved: what must be read and written at least, each byte once.
        peer: the variant that the speed-up refers to.
        smoke: few rounds.
        facts: further entries of the row.
    """
    missing: dict[str, str] = {}
    timed: dict[str, Callable[[], object]] = {}
    for name, variant in variants.items():
        if isinstance(variant, str):
            missing[name] = variant
            continue
        try:
            variant.check(variant.run())
        except AssertionError as error:
            if not variant.foreign:
                raise
            missing[name] = f"disagrees: {str(error).splitlines()[0]}"
            continue
        timed[name] = variant.run
    timed[FLOOR] = copy_bandwidth(bytes_moved)
    timed["copy to a new tensor"] = clone_bandwidth(bytes_moved)
    times = alternate(timed, SMOKE_ROUNDS if smoke else ROUNDS, limit=CASE_SECONDS)
    ours, floor = times[OURS].median, times[FLOOR].median
    row = {
        "op": label,
        **facts,
        "times": times,
        "bytes": bytes_moved,
        "floor_seconds": floor,
        "copy_bytes_per_second": bytes_moved / floor,
        "time_over_copy": ours / floor,
        "peer": peer,
        "speedup": times[peer].median / ours,
        "missing": missing,
    }
    print(f"\n{label}: {bytes_moved / 1e6:.1f} MB")
    for name, timing in times.items():
        print(f"  {name:<34} {timing}   {timing.median / ours:6.2f} x fastroute")
    for name, reason in missing.items():
        print(f"  {name:<34} not timed: {reason}")
    print(
        f"  copy {bytes_moved / floor / 1e9:.1f} GB/s; time / copy of the same bytes: {ours / floor:.2f};  "
        f"{peer} / fastroute: {row['speedup']:.1f}",
        flush=True,
    )
    return row
