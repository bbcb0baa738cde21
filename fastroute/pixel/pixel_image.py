"""The upscaling of one image on the pixel path, from its rows to the rows of the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastroute import buffers
from fastroute._levels import to_float
from fastroute.models.pcsr import features_read
from fastroute.models.precision import sums_of
from fastroute.ops import _checks as check
from fastroute.ops.adaptive_threshold import adaptive_threshold
from fastroute.ops.assign_classes import assign_classes
from fastroute.ops.pixel_mlp import Layers, pixel_mlp
from fastroute.ops.refine_boundaries import refine_boundaries
from fastroute.pixel import pixel_rows
from fastroute.pixel.pixel_budget import Sample, count_classes
from fastroute.pixel.pixel_networks import PixelNetworks
from fastroute.pixel.pixel_rows import Window, budget_sample, sampled_rows
from fastroute.pixel.pixel_stats import Work
from fastroute.pixel.request import Request
from fastroute.rewrite.row_stages import MIN_ROWS, rows_in_bands
from fastroute.runtime.results import Stopwatch
from fastroute.runtime.rows import RowStream, Source, TensorSource
from fastroute.runtime.sinks import Sink

# The column of a first layer that reads the height of a pixel. The last ones read its position and its size, y before x.
CELL_Y = -2


class PixelImage:
    """One image on its way through encoder, classifier, upsamplers and refinement.

    Args:
        networks: networks of the router.
        source: where rows come from.
        number: number of the image among those of the source.
        request: the validated arguments of the call.
        keep: whether all features are kept, so that the image is encoded once.
        watch: measures the time of each stage.

    Attributes:
        passes: how often the image was encoded.
    """

    def __init__(
        self, networks: PixelNetworks, source: Source, number: int, request: Request, keep: bool, watch: Stopwatch
    ) -> None:
        self.networks, self.source, self.images = networks, source, (number, number + 1)
        self.grid, self.rule, self.budget = request.grid, request.rule, request.budget
        self.refine, self.keep, self.watch, self.passes = request.refine, keep, watch, 0
        self.turn = request.first + number
        self.started: tuple[RowStream, RowStream] | None = None
        self.place = networks.memory.place(self.grid)
        self.odds = odds(networks.classifier) if request.rule.adaptive else []
        self.relative = relative_to_first(networks.classifier) if request.rule.budgeted else []

    def look(self, pixels: int, hold: bool) -> Sample:
        """The scores of about `pixels` pixels, computed before the turn of this image.

        Args:
            pixels: about how many pixels.
            hold: whether its features will still be held when its turn comes.
        """
        lr, features = self._start()
        sample = self._sample(lr, features, pixels)
        if hold:
            self.started = lr, features
        return sample

    def run(
        self,
        class_map: Tensor | None,  # [1, H, W]
        sink: Sink,
        counts: list[Tensor],  # [K] each
        done: Callable[[int], object],
    ) -> None:
        """Write the result into `sink` and its classes into `class_map`, if given; add the pixels of each class to `counts`."""
        refine = self.refine
        seen = None if self.budget is None else self.budget.begin(self.turn)
        # Whether the image is encoded once more after its classes are known.
        again = self.started is None if seen is not None else self.rule.solved and not self.keep
        lr, features = self.started or self._start()
        self.started = None
        solved = self._solved(lr, features, seen, again)
        if again and seen is None:
            lr, features = self._start()
        classes = RowStream(self._classes(features, solved), class_map)
        height = self.grid.size[0]
        bands = self.grid.bands()
        # The refinement reads one row more on either side.
        spans = [(max(begin - 1, 0), min(end + 1, height)) if refine else (begin, end) for begin, end in bands]
        for n, ((begin, end), (top, bottom)) in enumerate(zip(bands, spans, strict=True)):
            window = self.grid.window(top, bottom)
            near = classes.rows(top, bottom)
            with self.watch.stage("assign"):
                counts.append(count_classes(near[:, begin - top : end - top], self.networks.num_classes))
            held = features.rows(*window.features)  # encodes, outside of the time of what follows
            with self.watch.stage("upsample"):
                chosen = near
                if window.output != (top, bottom):
                    chosen = near.new_zeros(1, window.height, near.shape[2])
                    chosen[:, slice(*window.within(top, bottom))] = near
                residual = to_float(lr.rows(*window.features), sums_of(self.networks.dtype))
                band = self._mlp(held, window, self.networks.mlps, (top, bottom), chosen, residual)
            with self.watch.stage("refine"):
                target = sink.band(self.images, (begin, end))
                inner = (begin - top, end - top)
                if target.dtype in (band.dtype, *check.INTEGER_IMAGE):
                    refine_boundaries(band, near if refine else torch.zeros_like(near), inner, out=target)
                else:
                    target.copy_(refine_boundaries(band, near if refine else torch.zeros_like(near), inner))
                sink.done()
            # Otherwise memory that only this band needs would be held while the next one is classified.
            del held, near, chosen, residual, band, target
            after = spans[min(n + 1, len(spans) - 1)][0]
            for rows in (lr, features):
                rows.release(self.grid.window(after, after + 1).features[0])
            classes.release(after)
            done(1)

    def _start(self) -> tuple[RowStream, RowStream]:
        """The rows of the image and of its features, beginning with the first."""
        height = self.grid.lr[0]
        self.passes += 1
        if isinstance(self.source, TensorSource):
            lr = RowStream((), self.source.get(self.images, (0, height)), height)
        else:
            lr = RowStream(self._read())
        networks = self.networks
        if not networks.memory.in_bands:
            with self.watch.stage("encode"):
                features = networks.encoder(self._normalised(lr.rows(0, height)))
            return lr, RowStream((), features, height)
        whole, (h, w) = None, self.grid.lr
        # Where the encoder makes all rows at once, they are kept as they come.
        if self.keep and networks.memory.encoder_band(self.grid)[0] < h * w:
            size = (1, *self.grid.lr, networks.memory.depth)
            whole = buffers.empty(size, networks.dtype, networks.device).permute(0, 3, 1, 2)
        return lr, RowStream(self._encode(lr), whole, room=networks.memory.rows_held(self.grid))

    def _read(self) -> Iterator[list[Tensor]]:
        height = self.grid.lr[0]
        for top in range(0, height, self.source.step):
            yield [self.source.get(self.images, (top, min(top + self.source.step, height)))]

    def _encode(self, lr: RowStream) -> Iterator[list[Tensor]]:
        def read(rows: slice, columns: slice) -> Tensor:  # [1, C, n, m]
            return self._normalised(lr.rows(rows.start, rows.stop)[:, :, :, columns])

        pixels, columns = self.networks.memory.encoder_band(self.grid)
        bands = rows_in_bands(self.networks.encoder, read, *self.grid.lr, pixels, MIN_ROWS, columns)
        while True:
            with self.watch.stage("encode"):
                band = next(bands, None)
            if band is None:
                return
            yield band

    def _normalised(self, lr: Tensor) -> Tensor:  # [1, C, n, m]
        work = sums_of(self.networks.dtype)
        centred = to_float(lr, work) - self.networks.mean.to(work)
        return centred.to(self.networks.dtype, memory_format=torch.channels_last)

    def _mlp(
        self,
        features: Tensor,  # [1, D, window, w]
        window: Window,
        mlps: Sequence[Layers],
        rows: tuple[int, int],
        classes: Tensor | None = None,  # [1, window, W]
        residual: Tensor | None = None,  # [1, C, window, w]
    ) -> Tensor:  # [1, C, rows, W]
        """`pixel_mlp` on the features of a window, with the same numbers as on the whole."""
        height, width = self.grid.size
        place, size = self.place, (window.height, width)
        if window.output != (0, height):
            place = torch.cat([place[slice(*window.output)], place[height:]])
        return upsample(features, mlps, size, classes, residual, window.within(*rows), place)

    def _logits(self, features: RowStream, layers: Layers, begin: int, end: int) -> Tensor:  # [1, K, rows, W]
        window = self.grid.window(begin, end)
        held = features.rows(*window.features)  # encodes, outside of the time of what follows
        with self.watch.stage("classify"):
            return self._mlp(held, window, [layers], (begin, end))

    def _logits_of(self, features: RowStream, layers: Layers, rows: range) -> Tensor:  # [1, K, rows, W]
        """The logits of some rows, which lie side by side or at equal distances."""
        if rows.step == 1:
            return self._logits(features, layers, rows.start, rows.stop)
        (h, _), (height, width) = self.grid.lr, self.grid.size
        spread = slice(rows.start, rows.stop, rows.step)
        # As in `pixel_mlp`: where rows lie half way between two features, their coordinates decide which one they read.
        read = features_read(h, self.place[:height])[spread]
        parts, gathered = ([rows] if self.keep else [rows[n : n + 1] for n in range(len(rows))]), []
        for part in parts:
            first, last = self.grid.window(part[0], part[-1] + 1).features
            held = features.rows(first, last).permute(0, 2, 3, 1)  # encodes, outside of the time of what follows
            with self.watch.stage("classify"):
                gathered.append(held.index_select(1, read[: len(part)] - first))
            read = read[len(part) :]
            if not self.keep:
                features.release(first)
        with self.watch.stage("classify"):
            own = (gathered[0] if len(gathered) == 1 else torch.cat(gathered, dim=1)).permute(0, 3, 1, 2)
            # Every row has a feature row of its own here, but a pixel keeps its height.
            weight = layers[0][0].clone()
            weight[:, CELL_Y] *= h / height
            place = torch.cat([self.place[:height][spread].clamp(-1, 1), self.place[height:]])
            return upsample(own, [[(weight, layers[0][1]), *layers[1:]]], (len(rows), width), None, None, None, place)

    def _classes(self, features: RowStream, solved: Tensor | float) -> Iterator[list[Tensor]]:  # [1, H, W]
        """The classes of all rows, band by band: uint8 [1, rows, W]."""
        device = self.place.device
        if isinstance(solved, Tensor) and solved.ndim:
            yield [solved]
            return
        if self.rule.only is not None:
            for begin, end in self.grid.bands():
                yield [torch.full((1, end - begin, self.grid.size[1]), self.rule.only, dtype=torch.uint8, device=device)]
            return
        layers = self.networks.classifier
        if isinstance(solved, Tensor):
            layers = self.odds
        elif any(shifts := [solved * math.log(c) for c in self.rule.cost]):
            # argmax of softmax(z) / cost^k is argmax of z - k · log(cost): a change of the last bias.
            layers = last_layer(layers, lambda w, b: (w, shifted(b, shifts)))
        for begin, end in self.grid.bands():
            pixels = (end - begin) * self.grid.size[1]
            if self.budget is not None and isinstance(solved, float) and self.budget.tight(pixels):
                scores = self._logits(features, self.relative, begin, end)
                with self.watch.stage("assign"):
                    ids = self.budget.take(scores.flatten(2), solved, self.budget.mean)
                yield [ids.view(1, end - begin, -1)]
                continue
            logits = self._logits(features, layers, begin, end)
            with self.watch.stage("assign"):
                if isinstance(solved, Tensor):
                    chosen = (torch.sigmoid(logits[:, 0]) >= solved).to(torch.uint8)
                else:
                    chosen = assign_classes(logits, [1.0] * self.networks.num_classes, dtype=torch.uint8)
                if self.budget is not None:
                    self.budget.spend(chosen)
            yield [chosen]

    def _solved(self, lr: RowStream, features: RowStream, seen: Sample | None, again: bool) -> Tensor | float:
        """The decision: the exponent of the cost, all classes [1, H, W], or for 2-means the score from which class 1 begins."""
        if self.rule.adaptive:
            return self._two_means(lr, features)
        if self.budget is None:
            return self.rule.penalty
        (h, w), (height, width) = self.grid.lr, self.grid.size
        pixels = budget_sample(self.grid)
        whole = height * width <= pixels or seen is not None
        sample = seen or self._sample(lr, features, pixels)
        with self.watch.stage("solve"):
            todo = Work(
                pixels=height * width,
                classified=0 if whole else height * width,
                encoded=h * w if again else 0,
            )
            # Only budgets in milliseconds need the elapsed time, and wait for it.
            elapsed = 0.0 if self.budget.speed is None else 1e3 * self.watch.elapsed()
            if whole:
                return self.budget.classes(sample, todo, elapsed).view(1, height, width)
            return self.budget.solve(sample, todo, elapsed)

    def _sample(self, lr: RowStream, features: RowStream, pixels: int) -> Sample:
        """The scores of about `pixels` pixels, in rows spread over the image, or of all pixels if there are no more."""
        parts = sampled_rows(self.grid, pixels)
        (height, width), rows, top = self.grid.size, sum(map(len, parts)), 0
        scores = torch.empty(0)
        for part in parts:
            own = self._logits_of(features, self.relative, part)
            if len(parts) == 1:
                scores = own
            elif top == 0:
                scores = own.new_empty(1, own.shape[1], rows, width)
            if len(parts) > 1:
                scores[:, :, top : top + len(part)] = own
            top += len(part)
            self._release(lr, features, part[0])
        return Sample(scores.flatten(2), height / rows)

    def _two_means(self, lr: RowStream, features: RowStream) -> Tensor:
        samples = []
        for part in sampled_rows(self.grid, pixel_rows.ADAPTIVE_SAMPLE):
            samples.append(torch.sigmoid(self._logits_of(features, self.odds, part)[:, 0]))
            self._release(lr, features, part[0])
        with self.watch.stage("assign"):
            score = samples[0] if len(samples) == 1 else torch.cat(samples, dim=1)
            labels = adaptive_threshold(score, torch.uint8)
            if score.shape[1] == self.grid.size[0]:
                return labels
            # A higher score means a higher class.
            upper = torch.where(labels == 1, score, math.inf)
            return upper.amin()

    def _release(self, lr: RowStream, features: RowStream, begin: int) -> None:
        if not self.keep:
            for rows in (lr, features):
                rows.release(self.grid.window(begin, begin + 1).features[0])


def upsample(
    features: Tensor,  # [B, D, h, w]
    mlps: Sequence[Layers],
    size: tuple[int, int],
    class_map: Tensor | None,  # [B, H, W]
    residual: Tensor | None,  # [B, C, h, w]
    rows: tuple[int, int] | None,
    place: Tensor,  # [H + W]
) -> Tensor:  # [B, C, rows, W]
    """:func:`fastroute.pixel_mlp`, but outputs in a half type are added to a `residual` in float32, which gives float32."""
    if residual is None or residual.dtype == features.dtype:
        return pixel_mlp(features, mlps, size, class_map, residual, rows, place)
    image = pixel_mlp(residual, [[]], size, None, residual, rows, place)
    # Without a layer in any class there is nothing to add, and the number of channels is unknown.
    return image.add_(pixel_mlp(features, mlps, size, class_map, None, rows, place)) if any(mlps) else image


def shifted(bias: Tensor, shifts: Sequence[float]) -> Tensor:  # [K]
    """`bias` minus `shifts`, in float64. Each shift is an argument of a kernel, so nothing is copied to the device."""
    return torch.stack([b - shift for b, shift in zip(bias.double(), shifts, strict=True)]).to(bias.dtype)


def odds(layers: Layers) -> list[tuple[Tensor, Tensor]]:
    """The logits of all classes but the first, relative to the first one's."""
    return last_layer(layers, lambda w, b: (w[1:] - w[:1], b[1:] - b[:1]))


def relative_to_first(layers: Layers) -> list[tuple[Tensor, Tensor]]:
    """The logits of all classes relative to the first one's, whose own are 0."""
    return last_layer(layers, lambda w, b: (w - w[:1], b - b[:1]))


def last_layer(layers: Layers, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """`layers` with the last one changed by `change`."""
    return [*layers[:-1], change(*layers[-1])]
