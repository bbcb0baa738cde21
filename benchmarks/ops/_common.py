"""What the benchmarks of single operators share: agreement first, then alternating times beside the least possible time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import (
    First,
    Timing,
    alternate,
    clone_bandwidth,
    copy_bandwidth,
    first,
    peak_memory,
    summary,
    sweep_caches,
)
from benchmarks.setting import Setting

PATCH, STRIDE, SCALE = 32, 28, 4
# LR height and width of what becomes a 2K, 4K and 8K image at x4.
SIZES = {"2K": (270, 480), "4K": (540, 960), "8K": (1080, 1920)}
SMOKE_SIZES = {"smoke": (64, 96)}
# The size at which every type is measured and compiled.
MIDDLE = ("4K", "smoke")
BATCH, SMOKE_BATCH = 8, 2
# A batch of larger images in all is left to GPUs and to --full: plain PyTorch takes half a minute for one on a CPU.
MOST_PIXELS_OF_A_BATCH = 8 * 1920 * 1080
ROUNDS, COLD_ROUNDS, SMOKE_ROUNDS = 31, 5, 1
# Seconds for the runs of a case, an equal share for each variant; each has five runs all the same, or three of long ones.
CASE_SECONDS = 1.0
# A variant that is quick is run once more before its memory is looked at, so that what a first call sets up does not count.
QUICK_SECONDS = 0.5
# One that takes longer than this is timed once, as it is checked: it is far behind, and its quartiles would take minutes.
SLOW_SECONDS = 1.0
# Others that take longer than this are timed once after the check; with the caches swept all are: they sweep them themselves.
LONG_SECONDS = 0.5
# Rows of an image that are compared at a time: what that needs stays in the caches.
ROWS = 32
FLOOR = "copy of the same bytes"
CLONE = "copy to a new tensor"
OURS = "fastroute"


@dataclass(frozen=True)
class Case:
    """One input: an LR size by name, a type, a number of images and a memory format."""

    name: str
    height: int
    width: int
    dtype: torch.dtype
    batch: int = 1
    channels_last: bool = False

    @property
    def plain(self) -> bool:
        """One contiguous image."""
        return self.batch == 1 and not self.channels_last

    @property
    def kind(self) -> str:
        """The type as people write it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def memory_format(self) -> torch.memory_format:
        """`channels_last` as torch names it."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def suffix(self) -> str:
        """What a label says beside operator and size."""
        parts = [self.kind, f"batch {self.batch}" if self.batch > 1 else "", "channels_last" if self.channels_last else ""]
        return ", ".join(part for part in parts if part)

    @property
    def facts(self) -> dict[str, object]:
        """Entries of the row."""
        pixels = self.batch * self.height * self.width * SCALE**2
        facts = {"size": self.name, "dtype": self.kind, "batch": self.batch, "channels_last": self.channels_last}
        return {**facts, "output_pixels": pixels}


def complete(setting: Setting) -> bool:
    """Whether everything is measured at the largest sizes: on a GPU, and on a CPU with --full."""
    return setting.full or measure.device().type == "cuda"


def cases(
    setting: Setting,
    dtypes: Sequence[torch.dtype],
    others: Sequence[torch.dtype] = (),
    formats: bool = True,
    alike: bool = False,
) -> list[Case]:
    """All sizes in `dtypes`; `others` at the middle size; the first of `dtypes` also in batches and in channels_last.

    Unless everything is measured, only the smallest size comes in batches of 8, and the largest is contiguous. Where the types
    are `alike`, all but the first are then at the middle size alone.
    """
    sizes = SMOKE_SIZES if setting.smoke else SIZES
    made = []
    for name, (height, width) in sizes.items():
        some = alike and name not in MIDDLE and not complete(setting)
        made += [Case(name, height, width, dtype) for dtype in (dtypes[:1] if some else dtypes)]
        if name in MIDDLE:
            made += [Case(name, height, width, dtype) for dtype in others]
        if formats and (complete(setting) or name != "8K"):
            made.append(Case(name, height, width, dtypes[0], channels_last=True))
        batch = SMOKE_BATCH if setting.smoke else BATCH
        if complete(setting) or batch * height * width * SCALE**2 <= MOST_PIXELS_OF_A_BATCH:
            made.append(Case(name, height, width, dtypes[0], batch))
    return made


@dataclass(frozen=True)
class Variant:
    """One way to do the job.

    Attributes:
        run: does it once and returns the result.
        check: raises AssertionError when that result is not the job's.
        foreign: not ours to mend: disagreement is reported and the variant not timed, where else it would be an error.
        known: its first run, where the others are compared with that: it is not repeated.
    """

    run: Callable[[], Any]
    check: Callable[[Any], object]
    foreign: bool = False
    known: First | None = None


def known(run: Callable[[], Any]) -> tuple[Any, Variant]:
    """The result that all others are compared with, and the variant that gave it."""
    begun = first(run)
    return begun.result, Variant(run, lambda result: None, known=begun)


def same(expected: Any) -> Callable[[Any], None]:
    """A check for equality, bit for bit; of several tensors one by one."""

    def check(result: Any) -> None:
        pairs = [(result, expected)] if isinstance(expected, Tensor) else zip(result, expected, strict=True)
        for got, wanted in pairs:
            assert torch.equal(got, wanted), "another result"

    return check


def close(expected: Tensor, bound: float) -> Callable[[Tensor], None]:  # [B, C, H, W]
    """A check for values equal within `bound`, relative to those above 1; 8-bit ones, which may lie at a half, within 1."""

    def check(result: Tensor) -> None:
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype), "another shape or type"
        kind, most = (torch.int32, 1.0) if expected.dtype == torch.uint8 else (torch.float32, bound)
        for got, wanted in zip(result.split(ROWS, dim=2), expected.split(ROWS, dim=2), strict=True):
            got, wanted = got.to(kind), wanted.to(kind)
            error = (got - wanted).abs()
            allowed = most if kind == torch.int32 else most * (1 + wanted.abs())
            assert (error <= allowed).all(), f"values differ by up to {error.max().item():.1e}"

    return check


def same_classes(expected: Tensor, share: float = 1e-5) -> Callable[[Tensor], None]:
    """A check for equal classes but for a share of items whose class is a matter of rounding."""

    def check(result: Tensor) -> None:
        other = (result != expected).count_nonzero().item() / expected.numel()
        assert other <= share, f"{other:.1e} of the items are of another class"

    return check


def compiled(
    function: Callable[..., Any], *args: Any, check: Callable[[Any], object], setting: Setting, case: Case | None = None
) -> Variant | str:
    """`torch.compile(function)` on these arguments, or why it does not run."""
    if case is not None and not case.plain:
        return "compiled for single contiguous images only"
    if case is not None and case.dtype != torch.float32 and case.name not in MIDDLE and not setting.full:
        return "of the sizes in this type one is compiled; --full compiles all"
    run = setting.compiled(function, *args)
    return run if isinstance(run, str) else Variant(run, check, foreign=True)


def checked(
    variants: Mapping[str, Variant | str],
) -> tuple[dict[str, Callable[[], Any]], dict[str, Timing], dict[str, str], dict[str, int]]:
    """Run every variant once and compare: what may be timed, what is slow and took how long, why the rest is not, peak
    memory by name."""
    timed: dict[str, Callable[[], Any]] = {}
    slow: dict[str, Timing] = {}
    missing: dict[str, str] = {}
    memory: dict[str, int] = {}
    for name, variant in variants.items():
        if isinstance(variant, str):
            missing[name] = variant
            continue
        try:
            begun = variant.known or first(variant.run)
            variant.check(begun.result)
        except (AssertionError, RuntimeError, TypeError) as error:
            if not variant.foreign:
                raise
            kinds = {AssertionError: "disagrees", torch.OutOfMemoryError: "out of memory"}
            reason = next((text for kind, text in kinds.items() if isinstance(error, kind)), "does not run")
            missing[name] = f"{reason}: {str(error).splitlines()[0]}"
            continue
        seconds, most = begun.seconds, begun.peak
        # Its result would be held beside the next one's.
        del begun
        if seconds < QUICK_SECONDS:
            most = peak_memory(variant.run)
        if seconds > SLOW_SECONDS and name != OURS:
            slow[name] = summary([seconds])
        else:
            timed[name] = variant.run
        if most is not None:
            memory[name] = most
    return timed, slow, missing, memory


def compare(
    label: str,
    variants: Mapping[str, Variant | str],
    bytes_moved: int,
    peer: str,
    setting: Setting,
    flops: int = 0,
    products: torch.dtype = torch.float32,
    **facts: object,
) -> dict[str, Any]:
    """Check all variants, time those that agree in turn with a copy of `bytes_moved` bytes, print and return a row.

    Args:
        label: operator, size and type.
        variants: ways to do the job by name, `OURS` among them; in place of one, the reason why it is missing.
        bytes_moved: what must be read and written at least, each byte once.
        peer: the variant that the speed-up refers to.
        setting: with few rounds for a smoke run.
        flops: what must be computed at least.
        products: type of the matrix products that show how fast the device computes.
        facts: further entries of the row.
    """
    timed, slow, missing, memory = checked(variants)
    timed[FLOOR], timed[CLONE] = copy_bandwidth(bytes_moved), clone_bandwidth(bytes_moved)
    # The check has run the others once.
    timed[FLOOR]()
    timed[CLONE]()
    rounds, cold_rounds = (SMOKE_ROUNDS, SMOKE_ROUNDS) if setting.smoke else (ROUNDS, COLD_ROUNDS)
    times = alternate(timed, rounds, warm_up=0, limit=CASE_SECONDS, slow=LONG_SECONDS, kept=(OURS,)) | slow
    some = {name: timed[name] for name in (OURS, peer, FLOOR) if name in timed}
    cold = alternate(some, cold_rounds, warm_up=0, limit=CASE_SECONDS, slow=LONG_SECONDS, before=sweep_caches)
    ours, copied = times[OURS].median, times[FLOOR].median
    peak = measure.peak_flops(products)
    floor = max(copied, flops / peak)
    row = {
        "op": label,
        **facts,
        "times": times,
        "cold": cold,
        "peak_bytes": memory,
        "bytes": bytes_moved,
        "flops": flops,
        "floor_seconds": floor,
        "copy_bytes_per_second": bytes_moved / copied,
        "peak_flops_per_second": peak,
        "time_over_floor": ours / floor,
        "peer": peer,
        "speedup": times[peer].median / ours,
        "missing": missing,
    }
    print(f"\n{label}: {bytes_moved / 1e6:.1f} MB, {flops / 1e9:.2f} GFLOP")
    for name, timing in times.items():
        held = f"{memory[name] / 1e6:8.1f} MB" if name in memory else " " * 11
        print(f"  {name:<34} {timing}   {timing.median / ours:6.2f} x fastroute, {floor / timing.median:5.0%} of floor {held}")
    print("  caches swept: " + ", ".join(f"{name} {1e3 * timing.median:.2f} ms" for name, timing in cold.items()))
    for name, reason in missing.items():
        print(f"  {name:<34} not timed: {reason}")
    print(
        f"  copy {bytes_moved / copied / 1e9:.1f} GB/s, products {peak / 1e9:.0f} GFLOP/s; time / floor: {ours / floor:.2f};  "
        f"{peer} / fastroute: {row['speedup']:.1f}",
        flush=True,
    )
    return row
