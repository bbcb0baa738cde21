"""Calibration of a cascade on images of one's own: no reference is needed but the most expensive network's results."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastroute import io
from fastroute.cascades.cells import CELL, Cells, Rectangle, cell_means, edge_scores
from fastroute.cascades.measured import REGION, Measured, Seen, parted, region_of
from fastroute.cascades.output_score import strengths
from fastroute.cascades.promise import Calibration, learnt_from
from fastroute.cascades.router import CascadeRouter
from fastroute.cascades.run import cut, scaled, within
from fastroute.cascades.samples import TAUGHT, measure_samples, places_of, samples_of
from fastroute.cascades.score import EDGE, LEARNED, OUTPUT, fit_score
from fastroute.degradation import downscale, to_uint8
from fastroute.runtime.progress import Progress, shown

CONTEXTS = (8, 12, 16, 24)
# Each picture is used as it is and reduced: what people enlarge is the one or the other.
SHRINKS = (1, 4)
# Side of what is cut out of a picture, in cells.
SIDE = 8
# Another score than edges is kept where pictures held out take no more than this share of the time with it. Margins hang on the
# few pictures that are furthest off, so smaller differences are chance.
WORTH = 0.9
# Side and number of the runs by which times are taken.
TIMED, RUNS = 96, 3


def calibrate(
    router: CascadeRouter,
    paths: Sequence[Path],
    fidelity: float = 40.0,
    contexts: Sequence[int] = CONTEXTS,
    crops: int = 1,
    seed: int = 0,
    progress: Progress = False,
) -> Calibration:
    """Run all networks on crops of `paths` and learn what errors to expect.

    Args:
        router: a cascade, calibrated or not.
        paths: of images, at least two.
        fidelity: in dB, for which the margin is learnt; the default of the calibrated router.
        contexts: from which calls choose, rising.
        crops: of each image at each of its sizes.
        seed: of the places.
        progress: see :meth:`fastroute.CascadeRouter.upscale`; in crops, then in cascades that are tried.

    Raises:
        ValueError: fewer than two images, a cascade of one network, or networks of other images than those of three channels.
    """
    if router.num_classes < 2:
        raise ValueError("calibrate: a cascade has at least two networks; give a cheaper one, such as bicubic")
    if router.channels != 3:
        raise ValueError(f"calibrate: networks must read 3 channels, those of image files; these read {router.channels}")
    if len(paths) < 2:
        raise ValueError(f"calibrate: at least two images are needed, one of which tests the other; got {len(paths)}")
    cells: list[Measured] = []
    with shown(progress, len(paths) * len(SHRINKS) * crops, "crop", "calibrate") as bar:
        for number, path in enumerate(paths):
            rng = np.random.default_rng([seed, number])
            for crop in crops_of(io.read_image(path), crops, rng):
                cells.append(measure(router, crop, number, contexts))
                bar.update()
    return best_of_classes(cells, measured_costs(router), fidelity, contexts, progress, wide_of(router, contexts))


def wide_of(router: CascadeRouter, contexts: Sequence[int]) -> list[bool]:
    """Which of the cheaper networks see farther than every context."""
    return [facts.reach is None or facts.reach > max(contexts) for facts in router.facts[:-1]]


def best_of_classes(
    cells: Sequence[Measured],
    costs: Sequence[float],
    fidelity: float,
    contexts: Sequence[int] = CONTEXTS,
    progress: Progress = False,
    wide: Sequence[bool] = (),
) -> Calibration:
    """That of the networks which pay: without a cheaper one, pictures held out may take less of the dense cost.

    A network that costs next to nothing is chosen wherever its error is thought to be small, and so wherever that is thought
    wrongly; the margin that covers this can be worth more than the network saves.
    """
    classes, wide = tuple(range(len(costs))), list(wide) or [False] * (len(costs) - 1)
    left_out: dict[int, float] = {}
    # All of them, all but one, and so on down to two.
    most = 1 + sum(range(2, len(classes)))
    with shown(progress, most, "cascade", "calibrate") as bar:

        def tried(chosen: tuple[int, ...]) -> Calibration:
            own = [c.of(chosen[:-1]) for c in cells]
            found = best_of_scores(own, [costs[k] for k in chosen], fidelity, contexts, [wide[k] for k in chosen[:-1]])
            bar.update()
            return replace(found, classes=chosen)

        best = tried(classes)
        while len(classes) > 2:
            fewer = {left: tried(tuple(k for k in classes if k != left)) for left in classes[:-1]}
            least = min(fewer, key=lambda left: fewer[left].spent)
            # A network that is never chosen changes nothing.
            if fewer[least].spent > best.spent:
                break
            left_out[least] = best.spent
            best = fewer[least]
            classes = best.classes
    return replace(best, left_out=left_out)


def best_of_scores(
    cells: Sequence[Measured],
    costs: Sequence[float],
    fidelity: float,
    contexts: Sequence[int] = CONTEXTS,
    wide: Sequence[bool] = (),
) -> Calibration:
    """The best of several scores on pictures held out: the strength of edges, one that is learnt, and results of networks."""
    tried = {EDGE: learnt_from(cells, costs, fidelity, contexts, None, wide)}
    if not any(c.image is None for c in cells):
        tried[LEARNED] = learnt_from(cells, costs, fidelity, contexts, fit_score, wide)
    for k in range(len(costs) - 1):
        if all(c.outputs and c.outputs[k] is not None for c in cells):
            found = learnt_from([c.by_output(k) for c in cells], costs, fidelity, contexts, None, wide, k)
            if OUTPUT not in tried or found.spent < tried[OUTPUT].spent:
                tried[OUTPUT] = found
    best = min(tried, key=lambda name: tried[name].spent * (WORTH if name == EDGE else 1.0))
    return replace(tried[best], tried={name: found.spent for name, found in tried.items()})


def crops_of(image: Tensor, count: int, rng: np.random.Generator) -> list[Tensor]:  # uint8 [C, H, W]
    """Squares of the image as it is and reduced, at random places."""
    found = []
    for shrink in SHRINKS:
        smaller = image if shrink == 1 else to_uint8(downscale(image[None].float() / 255, shrink)[0])
        for _ in range(count):
            y, x = (int(rng.integers(0, max(length - SIDE * CELL, 0) + 1)) for length in smaller.shape[-2:])
            found.append(smaller[:, y : y + SIDE * CELL, x : x + SIDE * CELL])
    return found


@torch.inference_mode()
def measure(router: CascadeRouter, crop: Tensor, picture: int, contexts: Sequence[int]) -> Measured:  # uint8 [C, h, w]
    """Scores and errors of the cells of a crop, whose own dense result is the target."""
    image = crop[None].to(router.device).float() / 255
    cells = Cells(*image.shape[2:])
    side, last = CELL * router.scale, router.num_classes - 1
    dense = router.networks.run(last, image).clamp(0, 1)

    def error(result: Tensor, target: Tensor) -> Tensor:  # [1, C, H, W], [1, C, H, W] -> [rows, cols]
        squares = (result.clamp(0, 1) - target).square().mean(dim=1, keepdim=True)
        return cell_means(squares, side)[0, 0].double().cpu()

    scores = edge_scores(image)[0].double().cpu()
    results = [router.networks.run(k, image) for k in range(last)]
    errors = torch.stack([error(result, dense) for result in results])
    border, inner = [], []
    region = region_of(cells)
    if region is not None:
        own = cells.pixels(region)
        target = cut(dense, scaled(own, router.scale))
        at_border, further_in = parted(scores, region)
        for context in contexts:
            outer = cells.pixels(region, context)
            result = router.networks.run(last, cut(image, outer))
            found = error(cut(result, within(own, outer, router.scale)), target)
            found_border, found_within = parted(found, Rectangle(0, 0, REGION, REGION))
            border.append((context, at_border, found_border))
            inner.append((context, further_in, found_within))
    seen: list[Seen | None] = []
    for told in [scores, *(strengths(result, side)[0].double().cpu() for result in results)]:
        if seen and router.networks.weightless(len(seen) - 1):
            seen.append(None)
            continue
        places = places_of(told, min(TAUGHT, told.numel()))
        pieces = samples_of(cells, places, contexts[0])
        samples = measure_samples(pieces, router.runs(), lambda where: cut(image[0], where), router.scale)
        seen.append(Seen(told, tuple(places), samples))
    first, *outputs = seen
    assert first is not None
    # A copy: the crop is part of a picture, all of which would be held.
    pixels = crop.cpu().clone()
    return Measured(
        picture, cells, scores, errors, tuple(border), tuple(inner), pixels, first.places, first.samples, tuple(outputs)
    )


def measured_costs(router: CascadeRouter) -> tuple[float, ...]:
    """Seconds of a pixel in each network, relative to the last: the least of some runs, taken in turn.

    Those of a cheaper network are never above those of a more expensive one.
    """
    image = torch.rand(1, router.channels, TIMED, TIMED, device=router.device)
    seconds = [math.inf] * router.num_classes
    with torch.inference_mode():
        for turn in range(RUNS + 1):
            for k in range(router.num_classes):
                begin = time.perf_counter()
                router.networks.run(k, image)
                if router.device.type == "cuda":
                    torch.cuda.synchronize(router.device)
                if turn:
                    seconds[k] = min(seconds[k], time.perf_counter() - begin)
    costs = [taken / seconds[-1] for taken in seconds]
    for k in reversed(range(len(costs) - 1)):
        costs[k] = min(costs[k], 0.95 * costs[k + 1])
    return tuple(costs)
