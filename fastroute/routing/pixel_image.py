"""One image on the pixel path, from its rows to those of the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastroute import memory
from fastroute.models.pcsr import relative_coordinates
from fastroute.models.streaming import rows_in_bands
from fastroute.ops import _checks as check
from fastroute.ops.adaptive_threshold import adaptive_threshold
from fastroute.ops.assign_classes import assign_classes
from fastroute.ops.pixel_mlp import Layers, pixel_mlp
from fastroute.ops.refine_boundaries import refine_boundaries
from fastroute.routing import pixel_rows
from fastroute.routing.classify import to_float
from fastroute.routing.pixel_rows import PixelGrid, Window, sampled_rows
from fastroute.routing.result import Stopwatch
from fastroute.streaming.ends import Ends
from fastroute.streaming.rows import RowStream, TensorSource
from fastroute.streaming.sinks import Sink

if TYPE_CHECKING:
    from fastroute.routing.pixel_router import PixelRouter


@dataclass(frozen=True)
class Choice:
    """How classes are chosen: by the exponent `k` of their cost, which `budget` solves for, or by 2-means.

    Attributes:
        cost: of each class.
    """

    cost: list[float]
    k: float = 0.0
    adaptive: bool = False
    budget: float | None = None

    @property
    def solved(self) -> bool:
        """Whether pixels of the image are looked at first."""
        return self.adaptive or self.budget is not None

    def sampled(self, grid: PixelGrid) -> int:
        """Bytes of what it is solved on."""
        pixels = grid.size[0] * grid.size[1]
        if self.adaptive:
            return pixel_rows.ADAPTIVE_BYTES * min(pixels, pixel_rows.ADAPTIVE_SAMPLE + grid.size[1])
        if self.budget is not None:
            return pixel_rows.BUDGET_BYTES * len(self.cost) * min(pixels, pixel_rows.BUDGET_SAMPLE + grid.size[1])
        return 0


class PixelImage:
    """See the module.

    Args:
        router: its networks.
        ends: where rows come from.
        number: which of the images.
        grid: rows of image and output.
        choice: how classes are chosen.
        keep: all features are kept, so that the image is encoded once.
        watch: what takes the times.
    """

    def __init__(
        self, router: PixelRouter, ends: Ends, number: int, grid: PixelGrid, choice: Choice, keep: bool, watch: Stopwatch
    ) -> None:
        self.router, self.source, self.images = router, ends.source, (number, number + 1)
        self.grid, self.choice, self.keep, self.watch = grid, choice, keep, watch
        like = torch.empty(1, dtype=router.dtype, device=router.device).expand(1, 1, *grid.lr)
        self.place = relative_coordinates(like, grid.size)

    def run(
        self,
        class_map: Tensor | None,  # [1, H, W]
        refine: bool,
        sink: Sink,
        counts: Tensor,  # [K]
        done: Callable[[int], object],
    ) -> None:
        """Write the result into `sink`, its classes into `class_map` where it is given, and add their numbers to `counts`."""
        lr, features = self._start()
        solved = self._solved(features)
        if self.choice.solved and not self.keep:
            lr, features = self._start()
        classes = RowStream(self._classes(features, solved), class_map)
        height = self.grid.size[0]
        for begin, end in self.grid.bands():
            # The refinement looks one row further.
            top, bottom = (max(begin - 1, 0), min(end + 1, height)) if refine else (begin, end)
            window = self.grid.window(top, bottom)
            near = classes.rows(top, bottom)
            with self.watch.stage("assign"):
                counts += torch.bincount(near[:, begin - top : end - top].flatten(), minlength=len(counts))
            with self.watch.stage("upsample"):
                chosen = near.new_zeros(1, window.height, near.shape[2])
                chosen[:, slice(*window.within(top, bottom))] = near
                residual = to_float(lr.rows(*window.features), self.router.dtype)
                band = self._mlp(features.rows(*window.features), window, self.router.mlps, (top, bottom), chosen, residual)
            with self.watch.stage("refine"):
                target = sink.band(self.images, (begin, end))
                inner = (begin - top, end - top)
                if target.dtype in (self.router.dtype, *check.INTEGER_IMAGE):
                    refine_boundaries(band, near if refine else torch.zeros_like(near), inner, out=target)
                else:
                    target.copy_(refine_boundaries(band, near if refine else torch.zeros_like(near), inner))
                sink.done()
            for rows in (lr, features):
                rows.release(window.features[0])
            classes.release(top)
            done(1)

    def _start(self) -> tuple[RowStream, RowStream]:
        """The rows of the image and of its features, from the first one on."""
        height = self.grid.lr[0]
        if isinstance(self.source, TensorSource):
            lr = RowStream((), self.source.get(self.images, (0, height)), height)
        else:
            lr = RowStream(self._read())
        router = self.router
        if not router.footprint.in_bands:
            with self.watch.stage("encode"):
                features = router.encoder(self._normalised(lr.rows(0, height)))
            return lr, RowStream((), features, height)
        whole = None
        if self.keep:
            size = (1, *self.grid.lr, router.footprint.depth)
            whole = memory.empty(size, router.dtype, router.device).permute(0, 3, 1, 2)
        return lr, RowStream(self._encode(lr), whole)

    def _read(self) -> Iterator[list[Tensor]]:
        height = self.grid.lr[0]
        for top in range(0, height, self.source.step):
            yield [self.source.get(self.images, (top, min(top + self.source.step, height)))]

    def _encode(self, lr: RowStream) -> Iterator[list[Tensor]]:
        def read(rows: slice, columns: slice) -> Tensor:  # [1, C, n, m]
            return self._normalised(lr.rows(rows.start, rows.stop)[:, :, :, columns])

        bands = rows_in_bands(self.router.encoder, read, *self.grid.lr, pixel_rows.ENCODER_BAND)
        while True:
            with self.watch.stage("encode"):
                band = next(bands, None)
            if band is None:
                return
            yield band

    def _normalised(self, lr: Tensor) -> Tensor:  # [1, C, n, m]
        mean = self.router.model.get_buffer("mean").to(self.router.dtype)
        return (to_float(lr, self.router.dtype) - mean).contiguous(memory_format=torch.channels_last)

    def _mlp(
        self,
        features: Tensor,  # [1, D, window, w]
        window: Window,
        mlps: Sequence[Layers],
        rows: tuple[int, int],
        classes: Tensor | None = None,  # [1, window, W]
        residual: Tensor | None = None,  # [1, C, window, w]
    ) -> Tensor:  # [1, C, rows, W]
        """`pixel_mlp` on the features of a window: the numbers are those of the whole."""
        height, width = self.grid.size
        place = torch.cat([self.place[slice(*window.output)], self.place[height:]])
        size = (window.height, width)
        return pixel_mlp(features, mlps, size, classes, residual, window.within(*rows), place)

    def _logits(self, features: RowStream, layers: Layers, begin: int, end: int) -> Tensor:  # [1, K, rows, W]
        window = self.grid.window(begin, end)
        held = features.rows(*window.features)  # encodes, outside of the time of what follows
        with self.watch.stage("classify"):
            return self._mlp(held, window, [layers], (begin, end))

    def _classes(self, features: RowStream, solved: Tensor | float) -> Iterator[list[Tensor]]:
        """The classes of all rows, band by band: uint8 [1, rows, W]."""
        if isinstance(solved, Tensor) and solved.ndim:
            yield [solved]
            return
        layers = self.router.classifier
        if isinstance(solved, Tensor):
            layers = odds(layers)
        else:
            # argmax of softmax(z) / cost^k is argmax of z - k · log(cost): a change of the last bias.
            shift = torch.tensor([solved * math.log(c) for c in self.choice.cost], dtype=torch.float64).to(self.place.device)
            layers = last_layer(layers, lambda w, b: (w, (b.double() - shift).to(b.dtype)))
        for begin, end in self.grid.bands():
            logits = self._logits(features, layers, begin, end)
            with self.watch.stage("assign"):
                if isinstance(solved, Tensor):
                    chosen = (torch.sigmoid(logits[:, 0]) >= solved).to(torch.uint8)
                else:
                    chosen = assign_classes(logits, [1.0] * self.router.num_classes, dtype=torch.uint8)
            yield [chosen]

    def _solved(self, features: RowStream) -> Tensor | float:
        """The exponent of the cost; or for 2-means all classes [1, H, W], or from which score on a pixel is of class 1."""
        if self.choice.adaptive:
            return self._two_means(features)
        if self.choice.budget is None:
            return self.choice.k
        samples = []
        for begin, end in sampled_rows(self.grid, pixel_rows.BUDGET_SAMPLE):
            samples.append(self._logits(features, self.router.classifier, begin, end).flatten(2))
            self._release(features, begin)
        with self.watch.stage("assign"):
            return solve(torch.cat(samples, dim=2)[0].t().double(), self.choice.cost, self.choice.budget)

    def _two_means(self, features: RowStream) -> Tensor:
        samples = []
        for begin, end in sampled_rows(self.grid, pixel_rows.ADAPTIVE_SAMPLE):
            samples.append(torch.sigmoid(self._logits(features, odds(self.router.classifier), begin, end)[:, 0]))
            self._release(features, begin)
        with self.watch.stage("assign"):
            score = torch.cat(samples, dim=1)
            labels = adaptive_threshold(score, torch.uint8)
            if score.shape[1] == self.grid.size[0]:
                return labels
            # Classes rise with the score.
            upper = torch.where(labels == 1, score, math.inf)
            return upper.amin()

    def _release(self, features: RowStream, begin: int) -> None:
        if not self.keep:
            features.release(self.grid.window(begin, begin + 1).features[0])


def odds(layers: Layers) -> list[tuple[Tensor, Tensor]]:
    """Of two classes, the logit of the second one."""
    return last_layer(layers, lambda w, b: (w[1:] - w[:1], b[1:] - b[:1]))


def last_layer(layers: Layers, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """`layers` with another last one."""
    return [*layers[:-1], change(*layers[-1])]


def solve(logits: Tensor, cost: list[float], budget: float) -> float:  # [n, K] float64
    """The smallest penalty at which the mean cost of the pixels is within the budget."""
    log_cost = torch.tensor(cost, dtype=torch.float64, device=logits.device).log()
    share = torch.tensor([c / max(cost) for c in cost], dtype=torch.float64, device=logits.device)

    # Penalties at which no score counts any more.
    gaps = log_cost.unique().diff()
    spread = (logits.amax() - logits.amin()).item() + 1
    bound = spread / gaps.min().item() if len(gaps) else 1.0
    low, high = -bound, bound
    at_low, at_high = ((logits - p * log_cost).argmax(dim=1) for p in (low, high))
    left = budget * len(logits)
    if share[at_low].sum().item() <= left:
        return low
    while (middle := 0.5 * (low + high)) not in (low, high) and high - low > 1e-9 * bound:
        # The cost of a pixel falls as the penalty grows: where both ends agree, it is settled.
        unsettled = at_low != at_high
        left -= share[at_low[~unsettled]].sum().item()
        logits, at_low, at_high = logits[unsettled], at_low[unsettled], at_high[unsettled]
        between = (logits - middle * log_cost).argmax(dim=1)
        if share[between].sum().item() <= left:
            high, at_high = middle, between
        else:
            low, at_low = middle, between
    return high
