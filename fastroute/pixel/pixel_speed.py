"""The speed of the pixel path on this machine: measured on a picture of noise, and corrected by the times of later calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

from fastroute.budget.speed import RUNS, Speed, noise
from fastroute.pixel.pixel_budget import PixelBudget
from fastroute.pixel.pixel_networks import PixelNetworks
from fastroute.pixel.pixel_stats import Work
from fastroute.pixel.request import ClassRule, Request, make_grid
from fastroute.runtime.devices import on_device

# Height and width of the picture on which the speed is measured. On a CPU it is a whole band of the output at scale 4, on a GPU
# the largest image that is classified as a whole under a budget.
PICTURE = {"cpu": (256, 256), "cuda": (512, 512)}


@torch.inference_mode()
def measure_pixel_speed(
    networks: PixelNetworks, dtype: torch.dtype, factor: float, run: Callable[[Tensor, Request], dict[str, float]]
) -> Speed:
    """The speed of every part of a router.

    Args:
        networks: networks of the router.
        dtype: type of the images.
        factor: upscaling factor.
        run: processes a request for an image and returns the seconds of each stage.
    """
    lr = on_device(PICTURE, networks.device)
    image = noise((1, networks.channels, *lr), dtype, networks.device)
    grid = make_grid(lr, factor, None, networks.device)[0]
    cost, pixels = networks.costs.at(factor), grid.size[0] * grid.size[1]
    runs: list[list[dict[str, float]]] = [[] for _ in range(networks.num_classes + 1)]
    # The parts take turns, so that whatever slows the machine for a while slows all of them. The first round maps memory, which
    # the others use again.
    for _ in range(RUNS + 1):
        for c in range(networks.num_classes):
            runs[c].append(run(image, Request(grid, ClassRule([1.0], only=c))))
        budget = PixelBudget(cost, left=pixels * sum(cost) / len(cost))
        shares = ClassRule([c / max(cost) for c in cost], budgeted=True)
        request = Request(grid, shares, budget) if len(cost) > 1 else Request(grid, ClassRule([1.0]))
        runs[-1].append(run(image, request))
    runs = [times[1:] for times in runs]
    encode = median(seconds["encode"] for times in runs for seconds in times)
    upsample = [max(median(seconds["upsample"] for seconds in times), 1e-9) for times in runs[:-1]]
    classify = median(seconds["classify"] for seconds in runs[-1])
    rest = median(s["total"] - s["encode"] - s["classify"] - s["solve"] - s["upsample"] for s in runs[-1])
    solve = median(seconds["solve"] for seconds in runs[-1]) / max(budget.searched, 1)
    each = 1e3 / pixels
    upsamplers = [seconds * each for seconds in upsample]
    return Speed(upsamplers, classify * each, rest * each, 1e3 * encode / (lr[0] * lr[1]), 1e3 * solve)


def learn_pixel_speed(
    speed: Speed, request: Request, searched: int, work: Work, counts: Sequence[int], seconds: dict[str, float]
) -> None:
    """Correct `speed` by the times of a run.

    Args:
        speed: the speed to correct.
        request: the validated arguments of the run.
        searched: number of pixels on which exponents were found.
        work: the work that was done.
        counts: pixels per class.
        seconds: seconds of each stage.
    """
    known = ("encode", "classify", "solve", "upsample")
    rest = seconds["total"] - sum(seconds[name] for name in known)
    # The rows of a sample take longer than those of a band, but count towards the same stage.
    plain = request.rule.only is None and work.classified == work.pixels and not request.looked
    classify = seconds["classify"] if plain else None
    encode, solve = (seconds["encode"], work.encoded), (seconds["solve"], searched)
    speed.learn(counts, seconds["upsample"], classify, rest, *encode, *solve)
