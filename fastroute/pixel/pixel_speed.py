"""How fast the pixel path is here: measured on a picture of noise, remembered, and corrected by what later runs take."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

import torch

from fastroute.budget.limits import RUNS, Pace, Paces, noise
from fastroute.pixel.pixel_budget import Purse
from fastroute.pixel.pixel_stats import Work
from fastroute.pixel.request import Choice, Request, factor_of, make_grid
from fastroute.runtime.devices import on_device
from fastroute.runtime.tuning import tuning_key

if TYPE_CHECKING:
    from fastroute.pixel.pixel_router import PixelRouter

# Height and width of the picture on which the speed is measured: at scale 4 a whole band of the output on a CPU, and on a GPU
# the largest one that a budget classifies once.
PICTURE = {"cpu": (256, 256), "cuda": (512, 512)}


class PixelPaces(Paces):
    """The speed of a router of pixels for every type of image, device, number of threads and factor."""

    def of(self, router: PixelRouter, dtype: torch.dtype, factor: float) -> Pace:
        """What the pixels of an image of `dtype` take now; measured on the first call, and remembered."""

        def facts() -> list[object]:
            example = torch.empty(1, router.channels, 1, 1, dtype=router.dtype, device=router.device)
            return [tuning_key(router.model, example), tuning_key(router.encoder, example), dtype, factor]

        place = (dtype, router.device, torch.get_num_threads(), factor)
        return self.find(place, router.num_classes, facts, lambda: measure_pace(router, dtype, factor))

    def learn(
        self,
        router: PixelRouter,
        dtype: torch.dtype,
        request: Request,
        searched: int,
        work: Work,
        counts: Sequence[int],
        seconds: dict[str, float],
    ) -> None:
        """What a run says about the speed, once anybody has asked for it.

        Args:
            request: what was asked for.
            searched: pixels on which exponents were found.
            work: what was done.
            counts: pixels per class.
            seconds: by stage.
        """
        pace = self.known.get((dtype, router.device, torch.get_num_threads(), factor_of(work)))
        if pace is not None:
            known = ("encode", "classify", "solve", "upsample")
            rest = seconds["total"] - sum(seconds[name] for name in known)
            # Rows of a sample take longer than those of a band, and are counted in the same stage.
            plain = request.choice.only is None and work.classified == work.pixels and not request.looked
            classify = seconds["classify"] if plain else None
            encode, solve = (seconds["encode"], work.encoded), (seconds["solve"], searched)
            pace.learn(counts, seconds["upsample"], classify, rest, *encode, *solve)


@torch.inference_mode()
def measure_pace(router: PixelRouter, dtype: torch.dtype, factor: float) -> Pace:
    """The speed of every part of `router` on images of `dtype`, enlarged by `factor`."""
    lr = on_device(PICTURE, router.device)
    image = noise((1, router.channels, *lr), dtype, router.device)
    grid = make_grid(lr, factor, None, router.device)[0]
    cost, pixels = router.model.class_cost(factor), grid.size[0] * grid.size[1]
    runs: list[list[dict[str, float]]] = [[] for _ in range(router.num_classes + 1)]
    # In turn, so that what slows the machine for a while slows all; the first round maps memory, which the others use again.
    for _ in range(RUNS + 1):
        for c in range(router.num_classes):
            runs[c].append(router.answer(image, Request(grid, Choice([1.0], only=c))).stats.seconds)
        purse = Purse(cost, left=pixels * sum(cost) / len(cost))
        shares = Choice([c / max(cost) for c in cost], budgeted=True)
        request = Request(grid, shares, purse) if len(cost) > 1 else Request(grid, Choice([1.0]))
        runs[-1].append(router.answer(image, request).stats.seconds)
    runs = [times[1:] for times in runs]
    encode = median(seconds["encode"] for times in runs for seconds in times)
    upsample = [max(median(seconds["upsample"] for seconds in times), 1e-9) for times in runs[:-1]]
    classify = median(seconds["classify"] for seconds in runs[-1])
    rest = median(s["total"] - s["encode"] - s["classify"] - s["solve"] - s["upsample"] for s in runs[-1])
    solve = median(seconds["solve"] for seconds in runs[-1]) / max(purse.searched, 1)
    each = 1e3 / pixels
    upsamplers = [seconds * each for seconds in upsample]
    return Pace(upsamplers, classify * each, rest * each, 1e3 * encode / (lr[0] * lr[1]), 1e3 * solve)
