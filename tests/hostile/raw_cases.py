"""Hostile calls of the registered operators, past the checks of Python: every argument of a good call replaced, one by one.

    python tests/hostile/raw_cases.py [PART OF A NAME ...]

runs them in processes that it forks, so that one that crashes is seen and the others go on; one line for each. A call must
end in an error that names its operator, or in the numbers of the reference.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastroute import buffers
from fastroute.ops._library import OPERATORS, public_name
from fastroute.reference.conv3x3 import paired_weight, transformed_weight

BIG = (2**31 - 1, 2**31, 2**31 + 1, 2**32, 2**62, 2**63 - 1)
INTS = (0, -1, -(2**63), 1, 2, 3, 5, 7, *BIG)
FLOATS = (math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-300, 1e308)
# What an error may be.
ERRORS = (ValueError, TypeError, RuntimeError, MemoryError)
# Arguments that a call writes.
WRITTEN = ("out", "spent")
# Bytes that a process may map beyond those of torch; sizes of hostile calls lie far above or far below.
ROOM = 3 << 30
# A library of kernels that is loaded over those of the package.
SANITIZED = os.environ.get("FASTROUTE_SANITIZED", "")


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def half(*shape: int) -> Tensor:
    return rand(*shape).bfloat16()


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def classes(*shape: int) -> Tensor:
    return (rand(*shape) * 2).to(torch.uint8)


LAYERS = [rand(2, 3), rand(2), rand(2), rand(16, 2, 3, 3), rand(16)]
COST = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
GEOMETRY = {"height": 8, "width": 8, "patch": 4, "stride": 3, "scale": 1, "crop": False}
NINE = rand(9, 2, 4, 4)
KERNEL, GROUPED = transformed_weight(rand(8, 3, 3, 3), 1, 2), transformed_weight(rand(6, 2, 3, 3), 2, 1)
# A good call of every operator, by the names of its arguments. The second and third calls are of other paths.
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("extract_patches", dict(image=rand(2, 3, 8, 9), order=ints(3, 0, 17), mean=rand(3), std=rand(3), patch=4, stride=3,
                             crop=False, dtype=None, channels_last=False, rows=4, cols=4)),
    ("extract_patches", dict(image=(rand(1, 2, 5, 6) * 255).byte(), order=None, mean=None, std=None, patch=3, stride=2,
                             crop=True, dtype=None, channels_last=True, rows=5, cols=3)),
    ("_extract_patches_backward", dict(grad=rand(3, 2, 4, 4), order=ints(3, 0, 3), batch=1, height=8, width=8, patch=4,
                                       stride=3, crop=False)),
    ("_extract_patches_backward", dict(grad=rand(3, 2, 4, 4), order=None, batch=1, height=3, width=8, patch=4, stride=2,
                                       crop=False)) ,
    ("stitch_patches", dict(patches=NINE, inverse=None, window=rand(4) + 1, **GEOMETRY, shuffle=1, dtype=None, row_begin=0,
                            row_end=8)),
    ("stitch_patches", dict(patches=rand(9, 8, 2, 2), inverse=ints(*range(8), 0), window=rand(4) + 1, **GEOMETRY, shuffle=2,
                            dtype=torch.uint8, row_begin=1, row_end=7)),
    ("stitch_patches.out", dict(patches=NINE, inverse=None, window=rand(4) + 1, **GEOMETRY, shuffle=1, row_begin=0, row_end=8,
                                out=rand(1, 2, 8, 8))),
    ("stitch_patches.batches_out", dict(batches=[NINE[:4], NINE[4:]], inverse=ints(*range(9)), region=None,
                                        window=rand(4) + 1, **GEOMETRY, shuffle=1, row_begin=0, row_end=8,
                                        out=rand(1, 2, 8, 8))),
    ("stitch_patches.batches_out", dict(batches=[rand(1, 2, 8, 8), rand(1, 2, 4, 5)], inverse=ints(*[0] * 9),
                                        region=ints(*[0] * 9), window=rand(4) + 1, **GEOMETRY, shuffle=1, row_begin=0,
                                        row_end=8, out=rand(1, 2, 8, 8))),
    ("stitch_patches.upsampled_out", dict(batches=[rand(1, 3, 8, 8)], kinds=[0], layers=LAYERS, inverse=ints(0, 0, 0, 0),
                                          region=ints(0, 0, 0, 0), window=rand(16) + 1, height=8, width=8, patch=4,
                                          stride=4, scale=4, crop=False, shuffle=4, row_begin=0, row_end=32,
                                          out=rand(1, 1, 32, 32), spent=torch.zeros(2, dtype=torch.float64))),
    ("stitch_patches.upsampled_out", dict(batches=[rand(4, 3, 4, 4)], kinds=[0], layers=LAYERS, inverse=ints(0, 1, 2, 3),
                                          region=None, window=rand(16) + 1,
                                          height=8, width=8, patch=4, stride=4, scale=4, crop=False,
                                          shuffle=4, row_begin=0, row_end=32, out=rand(1, 1, 32, 32),
                                          spent=torch.zeros(2, dtype=torch.float64))),
    ("_stitch_patches_backward", dict(grad=rand(1, 2, 8, 8), inverse=ints(*range(8), 0), window=rand(4) + 1, **GEOMETRY,
                                      num_patches=9)),
    ("gather_groups", dict(x=rand(4, 3), order=ints(2, 0, 3, 1), inverse=ints(1, 3, 0, 2))),
    ("scatter_groups", dict(y=rand(4, 3), order=ints(2, 0, 3, 1), inverse=ints(1, 3, 0, 2))),
    ("group_by_class", dict(class_ids=ints(2, 0, 1, 2, 0), num_classes=3)),
    ("merge_regions", dict(class_ids=ints(2, 0, 1, 2, 0, 0, 1, 1, 0), costs=rand(3, 16), height=8, width=8, patch=4, stride=3,
                           crop=False, merge=2, promote=True)),
    ("assign_classes", dict(score=rand(70, 3), cost=COST, penalty=0.5, id_bytes=8)),
    ("assign_classes.budget", dict(score=rand(2, 3, 5, 6), cost=COST, budget=0.6, penalty=None, logits=False, id_bytes=1)),
    ("assign_classes.budget", dict(score=rand(70, 3), cost=COST, budget=0.6, penalty=0.5, logits=True, id_bytes=8)),
    ("adaptive_threshold", dict(score=rand(2, 40), id_bytes=8)),
    ("cell_mlp", dict(image=rand(1, 2, 4, 12), weights=[rand(5, 8), rand(3, 5)], biases=[rand(5), rand(3)], slope=0.1, cell=2,
                      span=3, step=2)),
    ("_cell_mlp_backward", dict(grad=rand(1, 2, 3, 3), image=rand(1, 2, 4, 12), weights=[rand(5, 8), rand(3, 5)],
                                biases=[rand(5), rand(3)], slope=0.1, cell=2, span=3, step=2)),
    ("conv1x1", dict(images=[rand(2, 2, 3, 5), rand(2, 1, 3, 5)], weight=rand(4, 3), bias=rand(4), slope=rand(4),
                     residual=rand(2, 4, 3, 5))),
    ("conv1x1.out", dict(images=[rand(2, 2, 3, 5), rand(2, 1, 3, 5)], weight=rand(4, 3), bias=rand(4), slope=None,
                         residual=rand(2, 4, 3, 5), out=rand(2, 3, 5, 4).permute(0, 3, 1, 2))),
    ("conv1x1", dict(images=[rand(1, 19, 2, 7)], weight=rand(17, 19), bias=None, slope=None, residual=None)),
    ("conv3x3", dict(image=rand(2, 3, 5, 6), weight=KERNEL, bias=rand(8), slope=rand(8), residual=rand(2, 2, 10, 12),
                     channels=8, shuffle=2, context=0)),
    ("conv3x3", dict(image=rand(1, 4, 9, 3), weight=GROUPED, bias=None, slope=None, residual=None, channels=6, shuffle=1,
                     context=1)),
    ("conv3x3.out", dict(image=rand(2, 3, 5, 6), weight=KERNEL, bias=rand(8), slope=None, residual=rand(2, 2, 10, 12),
                         channels=8, shuffle=2, context=0, out=rand(2, 10, 12, 2).permute(0, 3, 1, 2))),
    ("conv1x1", dict(images=[half(2, 2, 3, 5), half(2, 1, 3, 5)], weight=half(4, 3), bias=rand(4), slope=half(4),
                     residual=half(2, 4, 3, 5))),
    ("conv3x3", dict(image=half(2, 3, 5, 6), weight=paired_weight(half(8, 3, 3, 3), 1, 2), bias=rand(8), slope=half(8),
                     residual=half(2, 2, 10, 12), channels=8, shuffle=2, context=0)),
    ("conv3x3", dict(image=half(1, 6, 9, 3), weight=paired_weight(half(3, 6, 3, 3), 1, 1), bias=None, slope=None,
                     residual=None, channels=3, shuffle=1, context=1)),
    ("pixel_mlp", dict(features=rand(1, 3, 2, 2), weights=[rand(5, 7), rand(2, 5)], biases=[rand(5), rand(2)], depths=[2, 0],
                       height=5, width=6, class_map=classes(1, 5, 6), residual=rand(1, 2, 2, 2), relative=rand(11) - 0.5,
                       row_begin=1, row_end=5)),
    ("_pixel_mlp_backward", dict(grad=rand(1, 2, 4, 6), features=rand(1, 3, 2, 2), weights=[rand(5, 7), rand(2, 5)],
                                 biases=[rand(5), rand(2)], depths=[2, 0], height=5, width=6, class_map=classes(1, 5, 6),
                                 residual=rand(1, 2, 2, 2), relative=rand(11) - 0.5, row_begin=1, row_end=5)),
    ("refine_boundaries", dict(image=rand(2, 2, 6, 7), class_map=classes(2, 6, 7), row_begin=1, row_end=5)),
    ("refine_boundaries.out", dict(image=rand(2, 2, 6, 7), class_map=classes(2, 6, 7), row_begin=1, row_end=5,
                                   out=rand(2, 2, 4, 7))),
    ("_refine_boundaries_backward", dict(grad=rand(2, 2, 4, 7), class_map=classes(2, 6, 7), row_begin=1, row_end=5)),
]  # fmt: skip


def of_tensor(x: Tensor) -> Iterator[tuple[str, Any]]:
    """Tensors in the place of `x`."""
    yield "meta", x.to("meta")
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float16, torch.float64, torch.uint16):
        if dtype != x.dtype:
            yield str(dtype).removeprefix("torch."), x.to(dtype)
    yield "scalar", x.new_zeros(())
    yield "deeper", x[None]
    yield "flat", x.flatten()
    yield "empty", x.new_zeros(0)
    yield "none", x.new_zeros([0] * x.ndim)
    for d in range(x.ndim):
        yield f"longer_{d}", torch.cat([x, x], d)
        yield f"shorter_{d}", x.narrow(d, 0, x.shape[d] - 1)
        yield f"nothing_{d}", x.narrow(d, 0, 0)
        yield f"endless_{d}", x.narrow(d, 0, 1).expand([2**40 if e == d else n for e, n in enumerate(x.shape)])
    yield "one_pixel", x.new_ones(()).expand(x.shape)
    yield "reversed", x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))
    yield "every_other", torch.stack([x, x], -1)[..., 0]
    yield "sparse", x.to_sparse()
    if x.is_floating_point():
        yield "nan", torch.full_like(x, math.nan)
        yield "inf", torch.full_like(x, math.inf)
        yield "zeros", torch.zeros_like(x)
    else:
        info = torch.iinfo(x.dtype)
        yield "largest", torch.full_like(x, info.max)
        yield "smallest", torch.full_like(x, info.min)


def of_list(values: list[Any]) -> Iterator[tuple[str, Any]]:
    """Lists in the place of `values`."""
    yield "empty", []
    yield "twice", values + values
    yield "shorter", values[:-1]
    for at, value in enumerate(values):
        for name, other in of_tensor(value) if isinstance(value, Tensor) else ((str(n), n) for n in INTS):
            yield f"{at}_{name}", [*values[:at], other, *values[at + 1 :]]
    if values and isinstance(values[0], int):
        # Sums that wrap to the number of layers.
        yield "wraps", [2**62, 2**62, 2**62, 2**62 + len(values)]


def others(value: Any) -> Iterator[tuple[str, Any]]:
    """What may stand in the place of `value`."""
    if isinstance(value, Tensor):
        yield from of_tensor(value)
    elif isinstance(value, list):
        yield from of_list(value)
    elif isinstance(value, bool):
        yield "not", not value
    elif isinstance(value, int):
        yield from ((str(n), n) for n in INTS if n != value)
    elif isinstance(value, float):
        yield from ((str(x), x) for x in FLOATS)


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Operator and arguments of every call, by a name."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for number, (op, good) in enumerate(GOOD):
        found[f"{number}-{op}-good"] = (op, good)
        for argument, value in good.items():
            for name, other in others(value):
                found[f"{number}-{op}-{argument}-{name}"] = (op, {**good, argument: other})
        for argument in ("order", "inverse", "class_map", "residual", "relative", "mean", "std", "budget"):
            if good.get(argument) is not None:
                found[f"{number}-{op}-{argument}-left_out"] = (op, {**good, argument: None})
        if good.get("budget") is not None:
            for budget in FLOATS:
                found[f"{number}-{op}-budget-{budget}"] = (op, {**good, "budget": budget})
        if "out" in good:
            for argument, value in good.items():
                if isinstance(value, Tensor) and argument != "out" and value.numel() >= good["out"].numel():
                    alias = value.clone(memory_format=torch.contiguous_format)
                    into = alias.as_strided(good["out"].shape, good["out"].stride())
                    found[f"{number}-{op}-{argument}-is_out"] = (op, {**good, argument: alias, "out": into})
    return found


def overload(name: str) -> torch._ops.OpOverload:
    packet, _, rest = name.partition(".")
    return getattr(getattr(torch.ops.fastroute, packet), rest or "default")


def own(given: dict[str, Any]) -> dict[str, Any]:
    """`given`, with what a call may write of its own; what is an input too stays so."""
    read = {place(x) for key, x in given.items() if key not in WRITTEN}
    return {key: fresh(x) if key in WRITTEN and place(x) not in read - {0} else x for key, x in given.items()}


def place(value: Any) -> int:
    """The address of a tensor, 0 of all else."""
    held = isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"
    return value.data_ptr() if held else 0


def fresh(value: Any) -> Any:
    """A copy of `value` where it is dense."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return value
    dense = value.is_contiguous() or (value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last))
    return value.clone() if dense else value


def compare(op: str, given: dict[str, Any], result: Any, wrote: dict[str, Any]) -> str:
    """Empty where `result` is that of the reference, else what differs."""
    # Times are times; and what is infinite may be added in another order, or to a tap that is 0.
    wrote = {key: value for key, value in wrote.items() if key != "spent"}
    if op == "stitch_patches.upsampled_out" and not all(
        bool(x.isfinite().all()) for x in (*given["batches"], *given["layers"])
    ):
        return ""
    args = own(given)
    tensors = [x for x in args.values() if isinstance(x, Tensor)]
    if any(x.device.type == "meta" for x in tensors):
        return ""
    positional = [value for key, value in args.items() if key not in WRITTEN]
    keywords = {key: value for key, value in args.items() if key in WRITTEN}
    try:
        expected = OPERATORS[op].reference(*positional, **keywords)
    except ERRORS as error:
        # It holds more at a time.
        return "" if buffers.is_exhausted(error) else f"the reference refuses: {type(error).__name__} {error}"
    pairs = [(result, expected)] if isinstance(result, Tensor) else list(zip(result or (), expected or (), strict=True))
    pairs += [(wrote[key], keywords[key]) for key in wrote]
    for actual, wanted in pairs:
        if actual.shape != wanted.shape or actual.dtype != wanted.dtype:
            return f"{tuple(actual.shape)} {actual.dtype}, not {tuple(wanted.shape)} {wanted.dtype}"
        if actual.is_floating_point() or actual.is_complex():
            tolerance = 2e-2 if actual.dtype in (torch.float16, torch.bfloat16) else 1e-4
            if not torch.allclose(actual, wanted, rtol=tolerance, atol=tolerance, equal_nan=True):
                return f"differs by {(actual - wanted).abs().max()}"
        elif (
            (actual.long() - wanted.long()).abs().max() > (1 if "stitch" in op or "refine" in op else 0)
            if actual.numel()
            else False
        ):
            return "other integers than those of the reference"
    return ""


def outcome(op: str, given: dict[str, Any]) -> str:
    """One line: "error …", "right", or, beginning with "WRONG", what is wrong."""
    args = own(given)
    try:
        result = overload(op)(**args)
        wrote = {key: args[key] for key in WRITTEN if key in args}
        if any(isinstance(x, Tensor) and x.device.type == "meta" for x in (result, *wrote.values())):
            return "right: on meta"
        # Under a sanitizer, whose processes have no limit of memory, the reference would take all there is.
        difference = "" if SANITIZED else compare(op, given, result, wrote)
        return f"WRONG {difference}" if difference else "right"
    except ERRORS as error:
        named = public_name(op) in str(error)
        return f"{'error' if named else 'WRONG unnamed'} {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"


def run(names: list[str], limit_memory: bool = True) -> Iterator[tuple[str, str]]:
    """Name and outcome of each case, in forked processes: "CRASH …" where one ended."""
    every = cases()
    while names:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            torch.set_num_threads(1)
            warnings.simplefilter("ignore")
            if limit_memory:
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
            torch.use_deterministic_algorithms(True, warn_only=True)
            try:
                with os.fdopen(writer, "w", buffering=1) as lines:
                    for name in names:
                        signal.alarm(100)
                        lines.write(f"{name}\t{outcome(*every[name])}\n")
            finally:
                os._exit(1)
        os.close(writer)
        with os.fdopen(reader) as lines:
            for line in lines:
                name, _, told = line.rstrip("\n").partition("\t")
                names = names[1:]
                yield name, told
        _, status = os.waitpid(child, 0)
        if names:
            crashed, names = names[0], names[1:]
            yield crashed, f"CRASH {status}"


def main(parts: list[str]) -> int:
    """Run the cases whose names hold one of `parts`; returns how many are wrong."""
    if SANITIZED:
        warnings.simplefilter("ignore")
        torch.ops.load_library(SANITIZED)
    names = [name for name in cases() if not parts or any(part in name for part in parts)]
    wrong = 0
    for name, told in run(names, limit_memory=not SANITIZED):
        wrong += told.startswith(("WRONG", "CRASH"))
        print(f"{name}\t{told}", flush=True)
    print(f"{len(names)} calls, {wrong} wrong")
    return wrong


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(min(main(sys.argv[1:]), 1))
