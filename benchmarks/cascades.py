"""What routing an existing network saves on pictures that it has not seen, and how near it stays to the dense result.

    python -m benchmarks.cascades --model realesrgan-x4plus.pth --student student.safetensors \
        --train DIR --images DIR --minutes 90 --save

Cascades with interpolation, with the student and with both are calibrated on the pictures of --train. Then every picture of
--images is enlarged, a crop of 640 x 400 from its middle as it is and reduced four times: in full by fastroute and by the
fastest other engine, and routed at each --fidelity; all of them take turns in one process. Reported are the PSNR to fastroute's
dense result, the time relative to the faster dense run of the same precision, and the differences of gradients across borders
of classes. Before that, the ways to run the network in full are compared on one crop. --save writes
benchmarks/results/<device>/cascades.json, from which ``python -m benchmarks.report`` makes the tables of the README and of
docs/pretrained.md.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

import fastroute
from benchmarks import measure
from benchmarks.baselines.engines import Engines, Run, by_onnxruntime
from benchmarks.cascade_tables import FASTROUTE, TODAY, savings_table
from fastroute import io
from fastroute.cascades.calibrate import CONTEXTS, best_of_classes, crops_of, measured_costs, wide_of
from fastroute.cascades.calibrate import measure as measured
from fastroute.cascades.cells import CELL, Cells, Rectangle, edge_scores
from fastroute.cascades.decision import Decision
from fastroute.cascades.measured import Measured, Seen
from fastroute.cascades.router import CascadeRouter
from fastroute.cascades.run import FADE
from fastroute.degradation import downscale, to_uint8
from fastroute.models import rrdbnet
from fastroute.models.mixed import MIXED
from fastroute.models.precision import PRECISIONS

HEIGHT, WIDTH = 400, 640
# Of the crop on which the ways to run the network in full are compared, at most.
COMPARED = 200, 320
SIZES = {"native": 1, "reduced": 4}
# Which of interpolation and the student a cascade has beside the network itself.
CHEAP = {"bicubic": (0,), "student": (1,), "both": (0, 1)}
# For which the tables are learnt.
PROMISED = 40.0
# Real-ESRGAN's own tiles: their side, and the pixels around them that are computed and cropped.
TILE, PAD = 256, 10
# A way that takes so much longer in full than fastroute is not timed on every picture.
SLOWER = 1.2
# Of the time, the share that calibration may take.
CALIBRATION = 0.4
T = TypeVar("T")


def crops(paths: Sequence[Path], height: int = HEIGHT, width: int = WIDTH) -> Iterator[tuple[str, str, Tensor]]:
    """Name, size and crop of every picture."""
    for path in paths:
        image = io.read_image(path)
        for size, shrink in SIZES.items():
            smaller = image if shrink == 1 else to_uint8(downscale(image[None].float() / 255, shrink)[0])
            y, x = max(smaller.shape[1] - height, 0) // 2, max(smaller.shape[2] - width, 0) // 2
            yield path.stem, size, smaller[:, y : y + height, x : x + width]


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What `call` gives, and its seconds."""
    begin = time.perf_counter()
    result = call()
    return result, time.perf_counter() - begin


def psnr(a: Tensor, b: Tensor) -> float:
    """In dB, of values in [0, 1]."""
    return -10 * math.log10(max(float((a.clamp(0, 1) - b.clamp(0, 1)).square().mean()), 1e-12))


def borders(routed: Tensor, dense: Tensor, class_map: Tensor, scale: int) -> float:  # [C, H, W] twice, [rows, cols]
    """How much faster the difference to the dense result changes where classes meet than it does next to it.

    A class fades out over `FADE` pixels of the cell of a cheaper one. Along every side of such a cell the difference is
    averaged, which leaves what the eye would follow: gradients of these means over the pixels that fade, relative to those
    further inside the cheaper cell. 0 where no classes meet.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    side, fade = CELL * scale, FADE * scale
    for turned in (False, True):
        apart, ids = routed.clamp(0, 1) - dense.clamp(0, 1), class_map
        if turned:
            apart, ids = apart.transpose(1, 2), ids.t()
        for row, col in (ids[:, 1:] != ids[:, :-1]).nonzero().tolist():
            at = (col + 1) * side
            slopes = apart[:, row * side : (row + 1) * side].mean(dim=1).diff(dim=1).abs().mean(dim=0)
            if ids[row, col] > ids[row, col + 1]:
                parts = slopes[at - 1 : at + fade], slopes[at + fade : at + 3 * fade]
            else:
                parts = slopes[at - fade - 1 : at], slopes[at - 3 * fade - 1 : at - fade - 1]
            sums += torch.tensor([value for part in parts for value in (float(part.sum()), part.numel())])
    across, inside = (float(sums[n] / sums[n + 1].clamp(min=1)) for n in (0, 2))
    return across / max(inside, 1e-9)


def tiles_of_today(network: nn.Module, image: Tensor) -> Tensor:  # [1, C, H, W]
    """As Real-ESRGAN's own code runs large images: tiles of `TILE` pixels with `PAD` more around them."""
    height, width = image.shape[2:]
    scale = network(image[:, :, :8, :8]).shape[2] // 8
    output = image.new_empty(1, image.shape[1], height * scale, width * scale)
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            y, x = max(top - PAD, 0), max(left - PAD, 0)
            bottom, right = min(top + TILE, height), min(left + TILE, width)
            tile = network(image[:, :, y : bottom + PAD, x : right + PAD])
            own = slice(scale * (top - y), scale * (bottom - y)), slice(scale * (left - x), scale * (right - x))
            output[:, :, scale * top : scale * bottom, scale * left : scale * right] = tile[:, :, own[0], own[1]]
    return output


@contextmanager
def plain() -> Iterator[None]:
    """Networks as others run them: by PyTorch's own convolutions, and RRDBNet without the tiles of its last layers."""
    before, rrdbnet.TILE = rrdbnet.TILE, 1 << 20
    try:
        with fastroute.use_backend("reference"):
            yield
    finally:
        rrdbnet.TILE = before


class Dense:
    """The network in full, by fastroute and by others.

    Args:
        router: of the network alone, float32.
        precision: in which the pictures are enlarged.
    """

    def __init__(self, router: CascadeRouter, precision: torch.dtype) -> None:
        self.network, self.precision = router.networks.members[0], precision
        self.rows: list[dict] = []
        self.fastest, self.slower = "", 1.0

    def ways(self, image: Tensor, precision: torch.dtype) -> dict[str, Callable[[], Run | str]]:  # [1, C, H, W]
        """All but fastroute, by name: what makes a call, or says why there is none."""
        engines = Engines(self.network, image)
        found: dict[str, Callable[[], Run | str]] = {
            "OpenVINO": lambda: engines.by_openvino(precision, "LATENCY"),
            "ONNX Runtime": lambda: by_onnxruntime(self.network, image, precision),
            "PyTorch, channels_last": lambda: self._channels_last(image, precision),
        }
        if precision == torch.float32:
            today = copy.deepcopy(self.network).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            found[TODAY] = lambda: partial(today, image)
            found[f"PyTorch, tiles of {TILE}"] = lambda: partial(tiles_of_today, today, image)
        return found

    def _channels_last(self, image: Tensor, precision: torch.dtype) -> Run:  # [1, C, H, W]
        network = copy.deepcopy(self.network).to(precision).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        arranged = image.contiguous(memory_format=torch.channels_last)
        own = isinstance(getattr(network, "network", network), MIXED)
        return lambda: network(arranged if own else arranged.to(precision))

    def compare(self, image: Tensor, routers: dict[str, CascadeRouter], turns: int) -> None:  # [1, C, H, W]
        """Time all ways in both precisions on one crop; the first run of each may be a slow one."""
        for name, router in routers.items():
            seconds: dict[str, float] = {}
            missing: dict[str, str] = {}
            own: dict[str, Callable[[], Run | str]] = {FASTROUTE: lambda r=router: lambda: r.upscale(image, budget=1).image}
            for way, make in {**own, **self.ways(image, PRECISIONS[name])}.items():
                with plain() if way != FASTROUTE else nullcontext():
                    run = make()
                    if isinstance(run, str):
                        missing[way] = run
                        continue
                    with torch.inference_mode():
                        seconds[way] = min(timed(run)[1] for _ in range(turns + 1))
                print(f"  {name}, {way}: {seconds[way]:.1f} s", flush=True)
            peers = {way: taken for way, taken in seconds.items() if way != FASTROUTE}
            if PRECISIONS[name] == self.precision:
                self.fastest = min(peers, key=peers.__getitem__)
                self.slower = peers[self.fastest] / seconds[FASTROUTE]
            times = {way: measure.summary([taken]) for way, taken in seconds.items()}
            self.rows.append({"op": f"dense, {name}", "kind": "dense", "precision": name, "size": list(image.shape[2:]),
                              "fastest": min(peers, key=peers.__getitem__), "times": times, "missing": missing})  # fmt: skip

    def peer(self, image: Tensor) -> Run:  # [1, C, H, W]
        """The fastest other way."""
        with plain():
            run = self.ways(image, self.precision)[self.fastest]()
        assert not isinstance(run, str)  # it has run before

        def call() -> Tensor:
            with torch.inference_mode(), plain():
                return run()

        return call


def calibrated(
    router: CascadeRouter, paths: Sequence[Path], cache: Path | None, until: float, contexts: Sequence[int]
) -> list[Measured]:
    """The cells of the pictures that fit into the time, four at least; kept in `cache`."""
    key = [str(router), sorted(path.name for path in paths), list(contexts), sorted(field.name for field in fields(Measured))]
    if cache is not None and cache.exists():
        with torch.serialization.safe_globals([Measured, Seen, Cells, Rectangle]):
            held = torch.load(cache)
        if held["key"] == key:
            return held["cells"]
    cells: list[Measured] = []
    for number, path in enumerate(paths):
        if number >= 4 and time.perf_counter() > until:
            break
        for crop in crops_of(io.read_image(path), 1, np.random.default_rng([0, number])):
            cells.append(measured(router, crop, number, contexts))
        print(f"  calibration: {number + 1} of {len(paths)} pictures", flush=True)
    if cache is not None:
        io.write_atomically(cache, lambda file: torch.save({"key": key, "cells": cells}, file))
    return cells


def cascades_of(
    router: CascadeRouter,
    sources: Sequence[str | Path],
    cells: Sequence[Measured],
    dtype: torch.dtype,
    contexts: Sequence[int],
    cheap: Sequence[str],
) -> dict[str, CascadeRouter]:
    """A calibrated cascade for each of `cheap`, see `CHEAP`, of those of the first two of `sources` that pay and the last."""
    costs, wide = measured_costs(router), wide_of(router, contexts)
    found: dict[str, CascadeRouter] = {}
    made_of: dict[tuple[int, ...], CascadeRouter] = {}
    for name, numbers in ((name, CHEAP[name]) for name in cheap):
        own = (*numbers, 2)
        learnt = best_of_classes(
            [c.of(numbers) for c in cells], [costs[n] for n in own], PROMISED, contexts, wide=[wide[n] for n in numbers]
        )
        kept = tuple(own[k] for k in learnt.classes)
        if kept in made_of:
            print(f"  {name}: it keeps {', '.join(made_of[kept].names)}, as another one does", flush=True)
            found[name] = made_of[kept]
            continue
        made = fastroute.cascade([sources[n] for n in kept], costs=learnt.costs).to("cpu", dtype)
        if learnt.left_out:
            print(f"  {name}: it keeps {', '.join(made.names)}; before, of the dense cost: {learnt.left_out}")
        print(f"  {name}: of the dense cost by score {learnt.tried}, margin {learnt.table.margin:.2f}, {learnt.table.sampling}",
              flush=True)  # fmt: skip
        made.decision = Decision(learnt.table, score=learnt.score, base=learnt.base)
        found[name] = made_of[kept] = made
    return found


def routed_rows(
    name: str,
    size: str,
    crop: Tensor,
    dense: Dense,
    cascades: dict[str, CascadeRouter],
    fidelities: Sequence[float],
    turns: int,
) -> Iterator[dict]:
    """One crop, all ways in turn."""
    image = crop[None].float() / 255
    calls: dict[str, Callable[[], Any]] = {} if dense.slower > SLOWER else {dense.fastest: dense.peer(image)}
    full = next(iter(cascades.values()))
    calls[FASTROUTE] = partial(full.upscale, image, budget=1)
    # Cascades that a calibration made the same run once.
    first = {name: next(other for other in cascades if cascades[other] is router) for name, router in cascades.items()}
    for cheap in dict.fromkeys(first.values()):
        for fidelity in fidelities:
            calls[f"{cheap}, {fidelity:g}"] = partial(cascades[cheap].upscale, image, fidelity=fidelity)
    seconds, results = dict.fromkeys(calls, math.inf), {}
    for _ in range(turns):
        for label, call in calls.items():
            results[label], taken = timed(call)
            seconds[label] = min(seconds[label], taken)
    expected = results[FASTROUTE].image[0]
    ways = [way for way in (dense.fastest, FASTROUTE) if way in seconds]
    base = min(seconds[way] for way in ways)
    strength = float(edge_scores(image).mean())
    for cheap in cascades:
        for fidelity in fidelities:
            label, ran = f"{cheap}, {fidelity:g}", f"{first[cheap]}, {fidelity:g}"
            found = results[ran]
            seen = borders(found.image[0], expected, found.class_map[0], full.scale)
            times = {way: measure.summary([seconds[way]]) for way in ways}
            yield {
                "op": f"{name}, {size}, {label} dB", "kind": "picture", "picture": name, "size": size, "cheap": cheap,
                "fidelity": fidelity, "psnr": psnr(found.image[0], expected), "time": seconds[ran] / base,
                "flops": found.stats.flops.of_one_pass, "border": seen,
                "edges": strength, "times": {**times, f"fastroute {cheap}": measure.summary([seconds[ran]])},
            }  # fmt: skip


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the network")
    parser.add_argument("--student", type=Path, required=True, help="a cheaper one, see `fastroute distill`")
    parser.add_argument("--train", type=Path, required=True, help="folder of the pictures to calibrate on")
    parser.add_argument("--images", type=Path, required=True, help="folder of the pictures to enlarge")
    parser.add_argument("--fidelity", type=float, nargs="+", default=[36.0, 40.0])
    parser.add_argument("--cheap", choices=CHEAP, nargs="+", default=list(CHEAP), help="what stands beside the network")
    parser.add_argument("--precision", choices=PRECISIONS, default="bfloat16")
    parser.add_argument("--turns", type=int, default=1, help="runs of each, of which the fastest counts")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no further picture is begun after so long")
    parser.add_argument("--cache", type=Path, help="file in which the measurements of the calibration are kept")
    parser.add_argument("--size", type=int, nargs=2, default=[HEIGHT, WIDTH], metavar=("HEIGHT", "WIDTH"), help="of the crops")
    parser.add_argument("--pictures", type=int, help="so many of each folder only")
    parser.add_argument("--dense", action="store_true", help="only compare the ways to run the network in full")
    parser.add_argument("--save", action="store_true", help="keep the results, for the tables")
    return parser.parse_args(given)


def run(asked: argparse.Namespace) -> list[dict]:
    """All rows."""
    begin, dtype = time.perf_counter(), PRECISIONS[asked.precision]
    until = begin + 60 * asked.minutes
    train, test = (io.list_images(folder)[: asked.pictures] for folder in (asked.train, asked.images))
    sources: list[str | Path] = ["bicubic", asked.student, asked.model]
    whole = fastroute.load(asked.model)
    assert isinstance(whole, CascadeRouter)
    dense = Dense(whole, dtype)
    first = next(crops(test[:1], *map(min, asked.size, COMPARED)))[2][None].float() / 255
    halves = {} if dtype == torch.float32 else {asked.precision: fastroute.load(asked.model, dtype=dtype)}
    dense.compare(first, {"float32": whole, **halves}, asked.turns)  # type: ignore[dict-item]
    if asked.dense:
        return dense.rows
    every = fastroute.cascade(sources).to("cpu", dtype)
    limit = begin + CALIBRATION * 60 * asked.minutes
    cells = calibrated(every, train, asked.cache, limit, CONTEXTS)
    cascades = cascades_of(every, sources, cells, dtype, CONTEXTS, asked.cheap)
    margins = {name: router.decision.table.margin for name, router in cascades.items() if router.decision.table}
    used = {"op": "calibration", "kind": "calibration", "times": {}, "pictures": len({c.picture for c in cells})}
    rows: list[dict] = [*dense.rows, {**used, "margins": margins}]
    for name, size, crop in crops(test, *asked.size):
        if time.perf_counter() > until:
            print(f"stopped after {asked.minutes:g} minutes, before {name}, {size}")
            break
        for row in routed_rows(name, size, crop, dense, cascades, asked.fidelity, asked.turns):
            rows.append(row)
            print(f"  {row['op']}: {row['psnr']:.1f} dB, time {row['time']:.2f}, FLOPs {row['flops'] or 0:.2f}, borders "
                  f"{row['border']:.2f}", flush=True)  # fmt: skip
    return rows


def main() -> None:
    """See the module."""
    asked = arguments()
    rows = run(asked)
    print(f"\n{savings_table(rows)}")
    if asked.save:
        height, width = asked.size
        small = f"{min(width, COMPARED[1])} x {min(height, COMPARED[0])}"
        fastest = next(row["fastest"] for row in rows if row.get("precision") == asked.precision)
        notes = (
            f"{asked.model.stem} in {asked.precision}; dense: one crop of {small}; routed: crops of {width} x {height}, native "
            f"and reduced four times, calibrated for {PROMISED:g} dB on other pictures, relative to the fastest dense run, "
            f"{fastest} or fastroute's own"
        )
        if asked.dense:
            notes = f"{asked.model.stem}, one crop of {width} x {height}; the fastest of {asked.turns + 1} runs each"
        shown = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
        command = " ".join(["python", "-m", "benchmarks.cascades", *shown])
        print(measure.save("cascades", rows, notes, command=command))


if __name__ == "__main__":
    main()
