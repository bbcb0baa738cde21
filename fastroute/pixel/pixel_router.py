"""The pixel path: encode, classify every output pixel, upsample each by its class, and smooth the seams, band by band."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fastroute import buffers
from fastroute._arguments import LARGEST_IMAGE, real, whole
from fastroute._contexts import ordinarily
from fastroute._copies import evaluating, inference_copy
from fastroute.budget.limits import Budget
from fastroute.budget.speed import Speed, Speeds
from fastroute.engines import ANY, TORCH, engine_of
from fastroute.models.pcsr import PCSR
from fastroute.ops import _checks as check
from fastroute.ops.pixel_mlp import Layers
from fastroute.pixel.pixel_budget import WaitingImage
from fastroute.pixel.pixel_image import PixelImage
from fastroute.pixel.pixel_networks import PixelNetworks, layers_of
from fastroute.pixel.pixel_rows import BUDGET_BYTES, PixelMemory, waiting_sample
from fastroute.pixel.pixel_speed import learn_pixel_speed, measure_pixel_speed
from fastroute.pixel.pixel_stats import PixelFlops, PixelStats, Work
from fastroute.pixel.request import PixelOptions, Request, factor_of, looking_ahead, make_grid, make_request
from fastroute.rewrite.optimize import optimize, parameter_dtype
from fastroute.runtime.border import EDGE, ZERO, check_border, continued, cut, refuse_edge
from fastroute.runtime.endpoints import Endpoints, home, in_memory, output_like, streamed
from fastroute.runtime.memory_plan import AUTO, Limit, WorkingSet, advised, limit_on, spare
from fastroute.runtime.progress import Progress, shown
from fastroute.runtime.protocols import Reader, Writer, check_reader
from fastroute.runtime.results import Stopwatch, Streamed, Upscaled
from fastroute.runtime.router import Router
from fastroute.runtime.threads import patiently
from fastroute.runtime.tuning import tuning_key


@dataclass(frozen=True)
class PixelPlan:
    """The memory plan of a run.

    Attributes:
        request: the request, with bands as large as memory allows.
        waiting: images that are sampled before their turn.
        keep: whether all features of an image are kept, so that it is encoded once.
        held: images whose features are kept from the sampling to their turn.
        rows: output rows that are written together.
        used: total bytes.
    """

    request: Request
    waiting: int
    keep: bool
    held: int
    rows: int
    used: int


class PixelRouter(Router):
    """Super-resolution of whole images by PCSR, where every output pixel runs through the upsampler of its class.

    Args:
        model: the model whose networks are copied. The copies are in evaluation mode.
        optimized: whether the encoder runs in its fastest exact form, see :func:`fastroute.rewrite.optimize.optimize`, and in
            bands of rows.
        scale: upscaling factor of calls that give neither a scale nor a size.
        border: what the encoder sees beyond the edge, see :class:`fastroute.PatchRouter`; "edge" needs whole factors.

    Example:
        >>> router = PixelRouter(PCSR.from_published(torch.load("pcsr-carn-x4.pth", map_location="cpu", weights_only=True)))
        >>> result = router.upscale(image, scale=4)
        >>> result.image.shape, result.stats.counts_per_class
    """

    mean: Tensor  # [1, C or 1, 1, 1]

    @ordinarily
    def __init__(self, model: PCSR, *, optimized: bool = True, scale: float = 4.0, border: str = ZERO) -> None:
        super().__init__()
        if not (math.isfinite(real("PixelRouter", "scale", scale)) and scale > 0):
            raise ValueError(f"PixelRouter: scale must be positive and finite; got {scale}")
        if not layers_of(model.classifier):
            raise ValueError("PixelRouter: model must have a classifier of at least one layer; got an empty one")
        self.scale, self.border = scale, check_border("PixelRouter", border)
        self.num_classes, self.channels = model.num_classes, int(model.encoder.channels)  # type: ignore[arg-type]
        self.depth, self._encoder_name = int(model.encoder.width), type(model.encoder).__name__  # type: ignore[arg-type]
        self.dtype, self.class_costs = parameter_dtype(model), model.costs
        self.encoder: nn.Module = inference_copy(model.encoder)
        if optimized:
            self.encoder = optimize(model.encoder).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.upsamplers = nn.ModuleList(map(inference_copy, model.upsamplers))
        evaluating(self.upsamplers)
        self.classifier = inference_copy(model.classifier)
        self.register_buffer("mean", model.get_buffer("mean").clone(), persistent=False)
        self.register_buffer("_place", torch.empty(0, device=self.mean.device), persistent=False)
        self.flops = PixelFlops(model.encoder, self.channels, *self._layers())
        self.speeds = Speeds()
        self._moved()

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"PixelRouter({self.num_classes} upsamplers over {self._encoder_name}, {dtype} on {self.device})"

    def _layers(self) -> tuple[list[Layers], Layers]:
        """The present layers of the upsamplers and of the classifier."""
        return [layers_of(mlp) for mlp in self.upsamplers], layers_of(self.classifier)

    def _moved(self) -> None:
        mlps, classifier = self._layers()
        self.memory = PixelMemory(self.encoder, [*mlps, classifier], self.channels, self.depth, self.num_classes, self.dtype)

    @property
    def networks(self) -> PixelNetworks:
        """The present networks."""
        parts = (self.encoder, *self._layers(), self.mean, self.dtype, self.channels)
        return PixelNetworks(*parts, self.class_costs, self.memory, self.flops)

    def class_cost(self, scale: float) -> list[float]:
        """The cost of every class at a factor as PCSR counts it: FLOPs of encoder and MLP, normalised to a sum of 1."""
        return self.class_costs.at(scale)

    @ordinarily
    def compile(self, engine: str = ANY) -> PixelRouter:  # type: ignore[override]
        """Accept "torch" and "auto", which both mean PyTorch: no other engine runs the encoder in bands of rows.

        Raises:
            ValueError: any other engine.
        """
        if engine not in (TORCH, ANY):
            engine_of(engine)  # refuses unknown names
            raise ValueError(
                f"compile: engine {engine!r} cannot run a PixelRouter, whose encoder runs in bands of rows; use 'torch'"
            )
        return self

    @ordinarily
    @torch.inference_mode()
    def upscale(  # type: ignore[override]
        self,
        image: Tensor,  # [B, C, h, w] or [C, h, w]
        *,
        scale: float | None = None,
        size: tuple[int, int] | None = None,
        budget: float | None = None,
        budget_flops: float | None = None,
        budget_ms: float | None = None,
        penalty: float = 0.0,
        adaptive: bool = False,
        refine: bool = True,
        progress: Progress = False,
        memory_limit: int | None = None,
    ) -> Upscaled:
        """Super-resolve an image or a batch of images.

        Args:
            image: (B, C, h, w) or (C, h, w), floating in [0, 1], uint8 or uint16. It lies on the device of the networks, or on
                the CPU: then bands of it are copied there and back, and the result is on the CPU.
            scale: upscaling factor, an integer or a fraction; the size is rounded. Default: the router's, unless `size` is
                given.
            size: (H, W) instead of `scale`.
            penalty: exponent k of the cost in the decision, argmax of probability / cost^k.
            adaptive: decide by the 2-means of each image's second probability instead; two classes only. For an output of more
                than 33 million pixels, a sample of rows is used.
            refine: smooth cheap pixels beside more expensive ones.
            budget: mean cost of the chosen classes as a fraction of that of the most expensive one, encoder included. The
                penalty is then solved for; for an output of more than 4 million pixels, or 67 million on a GPU, on a sample of
                rows, but the budget is still kept. 1 sends every pixel to the most expensive class. Images of a batch share
                one budget, as images of a folder do under :func:`fastroute.upscale_many`: it is spent where it helps most.
            progress: show a progress bar, or call this function with the number of bands done and the number of all bands. If
                it raises, the call ends.
            memory_limit: the largest number of bytes to hold beside `image`, the result and its class map. It does not change
                the result: with a budget or `adaptive`, the image is encoded twice if not all of its features fit. With one
                budget for a batch, as many features are kept as fit, by default into 512 MiB, or 8 GiB on a GPU; the other
                images are encoded twice.
            budget_flops: instead of `budget`, FLOPs of the whole call, as `stats.flops` counts them.
            budget_ms: instead of `budget`, milliseconds of the whole call on this device, estimated from what a pixel takes in
                the encoder, the classifier, each upsampler and around them. These times are measured before the first such
                call, remembered, and updated by later calls. Other load on the machine is not foreseen. The classes, and so
                the result, depend on the times.

        Returns:
            :class:`Upscaled`, with a class map uint8 (B, H, W) or (H, W). A floating result is not clamped; an integer one is
            clamped and rounded half to even.

        Raises:
            ValueError: a wrong rank, number of channels or device, an empty image or size, arguments that exclude each other,
                an impossible budget, a limit below the least that is needed, which the message names, or, on the CPU, a
                floating image with a value above 2. Nothing has been computed then.
            TypeError: an unsupported dtype.
        """
        images = check.images("upscale", image, self.channels, home(image, self.device), "h, w")
        if self.border == EDGE:
            factor = self.scale if scale is None else scale
            if size is not None or factor != int(factor):
                raise ValueError(f"upscale: border='edge' needs a whole factor; got scale={factor:g} and size={size}")
            images = continued(images)
        options = PixelOptions(scale, size, penalty, adaptive, refine, progress, memory_limit)
        request = self._request(images.shape, images.dtype, Budget(budget, budget_flops, budget_ms), options)
        result = self.answer(images, request)
        if self.border == EDGE:
            result = cut(result, int(factor), per_pixel=True)
        if image.ndim == 3:
            return dataclasses.replace(result, image=result.image[0], class_map=result.class_map[0])
        return result

    @ordinarily
    @torch.inference_mode()
    def stream(  # type: ignore[override]
        self,
        reader: Reader,
        writer: Writer,
        *,
        scale: float | None = None,
        size: tuple[int, int] | None = None,
        budget: float | None = None,
        budget_flops: float | None = None,
        budget_ms: float | None = None,
        penalty: float = 0.0,
        adaptive: bool = False,
        refine: bool = True,
        progress: Progress = False,
        memory_limit: Limit = AUTO,
    ) -> Streamed:
        """Super-resolve an image without holding it or its result in memory as a whole.

        Args:
            reader: source of the image, see :class:`fastroute.Reader`. It is read once, and a second time for a budget or
                `adaptive` if not all features fit.
            writer: destination of the result, see :class:`fastroute.Writer`. Pixels have the type that the reader returns.
            scale, size, penalty, adaptive, refine, budget, progress, budget_flops, budget_ms: see :meth:`upscale`. At an
                integer scale few rows are held. If the ratio of the sizes has no small denominator, all features are held.
                Reading and writing count towards the time where the computation waits for them.
            memory_limit: the largest number of bytes to hold, or None for no limit. By default, "auto", it is 512 MiB, or 8 GiB
                on a GPU, whose bands are larger, or the least that is possible where that is more. It does not change the
                result, which is that of :meth:`upscale`.

        Raises:
            ValueError, TypeError: see :meth:`upscale`. Nothing has been read or written then.
            MemoryError, torch.OutOfMemoryError: memory ran out. The message names a limit that would fit.
        """
        refuse_edge("stream", self)
        check_reader("stream", reader, self.channels, check.FLOATING + check.INTEGER_IMAGE)
        most = limit_on(self.device, memory_limit)
        options = PixelOptions(scale, size, penalty, adaptive, refine, progress, most)
        request = self._request((1, *reader.shape), reader.dtype, Budget(budget, budget_flops, budget_ms), options)
        if most is not None:
            buffers.give_back()
        endpoints = streamed(reader, writer, request.grid.size, self.device)
        return Streamed(None, self._run(endpoints, request, None))

    def output_size(  # type: ignore[override]
        self, height: int, width: int, *, scale: float | None = None, size: tuple[int, int] | None = None
    ) -> tuple[int, int]:
        """Height and width of the result for an image of the given size, see :meth:`upscale`."""
        sides = [whole("output_size", name, side, LARGEST_IMAGE) for name, side in (("height", height), ("width", width))]
        return make_grid(sides, scale, size, self.device, self.scale)[0].size

    def _request(self, shape: tuple[int, ...], dtype: torch.dtype, limit: Budget, options: PixelOptions) -> Request:
        return make_request(self.networks, shape, limit, options, self.scale, partial(self.speeds_at, dtype))

    def speeds_at(self, dtype: torch.dtype, factor: float) -> tuple[Speed, Speed]:
        """The time that pixels of an image of type `dtype` take at a factor, as estimated now and as measured."""
        facts, measure = partial(self._speed_facts, dtype, factor), partial(self._measured_speed, dtype, factor)
        speed = self.speeds.find(self._place_of(dtype, factor), self.num_classes, facts, measure)
        return speed, self.speeds.measured(speed)

    def _place_of(self, dtype: torch.dtype, factor: float) -> tuple[object, ...]:
        return dtype, self.device, torch.get_num_threads(), factor

    def _speed_facts(self, dtype: torch.dtype, factor: float) -> list[object]:
        example = torch.empty(1, self.channels, 1, 1, dtype=self.dtype, device=self.device)
        return [*(tuning_key(part, example) for part in (self.encoder, self.upsamplers, self.classifier)), dtype, factor]

    def _measured_speed(self, dtype: torch.dtype, factor: float) -> Speed:
        return measure_pixel_speed(
            self.networks, dtype, factor, lambda image, request: self.answer(image, request).stats.seconds
        )

    @ordinarily
    @torch.inference_mode()
    def answer(self, images: Tensor, request: Request) -> Upscaled:  # [B, C, h, w]
        """The result of `upscale` for a validated request."""
        grid = request.grid
        output = output_like("upscale", images, (*images.shape[:2], *grid.size))
        # An ordinary tensor, as the image is.
        with torch.inference_mode(False):
            class_map = buffers.empty((images.shape[0], *grid.size), torch.uint8, self.device)
        stats = self._run(in_memory(images, output, self.device), request, class_map)
        return Upscaled(output, class_map.to(images.device), stats)

    def _run(self, endpoints: Endpoints, request: Request, class_map: Tensor | None) -> PixelStats:  # [B, H, W]
        """Upscale the images from their source to their sink."""
        source, networks, watch = endpoints.source, self.networks, Stopwatch(self.device)
        number, before = source.shape[0], 0 if request.budget is None else request.budget.searched
        plan = self._plan(endpoints, request, number)
        request, grid = plan.request, plan.request.grid
        smallest = request.in_parts(request.band_parts[-1])
        lowest = partial(self._working_set, endpoints, smallest, plan.waiting, smallest.grid.overlapping, True)
        counts: list[Tensor] = []
        images = [PixelImage(networks, source, n, request, plan.keep, watch) for n in range(number)]
        with (
            patiently(self.device),
            advised("upscale", self.device, plan.used, lowest, endpoints.in_place),
            endpoints.opened(max(1, plan.rows * grid.lr[0] // grid.size[0]), plan.rows) as sink,
            shown(request.progress, number * len(grid.bands()), "band") as bar,
        ):
            if plan.waiting:
                _look(images, request, plan)
            for n, image in enumerate(images):
                image.run(None if class_map is None else class_map[n : n + 1], sink, counts, bar.update)
        done = Work()
        for n in range(number):
            ahead = looking_ahead(grid, waiting_sample(number)) if plan.waiting and n else Work()
            done += request.rule.work(grid) + ahead
        known = self.speeds.known.get(self._place_of(source.dtype, factor_of(done)))
        watch.stop()
        stats = PixelStats.when_asked(partial(self._stats, counts, done, watch, plan.used), watch.later and known is None)
        # A speed that nobody has asked for is not kept up to date.
        if known is not None:
            encoded = sum(image.passes for image in images) * grid.lr[0] * grid.lr[1]
            searched = 0 if request.budget is None else request.budget.searched - before
            done = dataclasses.replace(done, encoded=encoded)
            learn_pixel_speed(known, request, searched, done, stats.counts_per_class, stats.seconds)
        return stats

    def _plan(self, endpoints: Endpoints, request: Request, number: int) -> PixelPlan:
        """The memory plan for `number` images, with the fewest bands that fit."""
        limit, waiting = request.memory_limit, 0 if request.budget is None or request.looked else number - 1
        allowed = spare(self.device) if limit is None else limit
        for parts in request.band_parts:
            request = request.in_parts(parts)
            keep, held, working = self._held(endpoints, request, waiting)
            if working.bytes(1) <= allowed:
                break
        rows = working.rows(limit)
        return PixelPlan(request, waiting, keep, held, rows, working.bytes(rows))

    def _held(self, endpoints: Endpoints, request: Request, waiting: int) -> tuple[bool, int, WorkingSet]:
        """Whether all features of an image are kept, for how many images to come, and the working set."""
        grid, limit, streamed = request.grid, request.memory_limit, not endpoints.in_place
        keep = grid.overlapping or not self.memory.in_bands
        # With all features held, two passes encode the image only once.
        if not keep and request.rule.solved:
            keep = limit is None or self._working_set(endpoints, request, waiting, True, True).bytes(1) <= limit
        held, each = 0, self.memory.features(grid, True)
        if waiting and keep:
            needed = self._working_set(endpoints, request, waiting, True, streamed).bytes(1)
            free = (limit_on(self.device, AUTO) or 0) if limit is None else limit - needed
            held = min(waiting, max(free, 0) // each)
        working = self._working_set(endpoints, request, waiting, keep, streamed)
        return keep, held, dataclasses.replace(working, fixed=working.fixed + held * each)

    def _working_set(self, endpoints: Endpoints, request: Request, waiting: int, keep: bool, in_bands: bool) -> WorkingSet:
        grid = request.grid
        sampled = request.rule.sampled(grid)
        # The logits of the images to come, and the memory of a search in them.
        pixels = min(waiting_sample(waiting + 1) + grid.size[1], grid.size[0] * grid.size[1])
        sampled += waiting * pixels * BUDGET_BYTES * self.num_classes
        sampled += self.memory.gathered(grid) if request.rule.solved else 0
        return self.memory.working_set(grid, keep, sampled, endpoints.source.dtype.itemsize, in_bands, endpoints.step)

    def _stats(self, counts: list[Tensor], work: Work, watch: Stopwatch, working_set: int) -> PixelStats:  # [K] each
        stages = {"encode": 0.0, "classify": 0.0, "solve": 0.0, "assign": 0.0, "upsample": 0.0, "refine": 0.0}
        # The one wait for the device, if nobody else has waited.
        found = (
            (counts[0] if len(counts) == 1 else torch.stack(counts).sum(dim=0)).tolist() if counts else [0] * self.num_classes
        )
        return PixelStats(found, *self.flops.done(found, work), {**stages, **watch.finish()}, working_set)


def _look(images: list[PixelImage], request: Request, plan: PixelPlan) -> None:
    """Sample all images but the first, whose turn it is."""
    assert request.budget is not None
    grid = request.grid
    for n, image in enumerate(images[1:], start=1):
        sample = image.look(waiting_sample(len(images)), n <= plan.held)
        encodes = 0 if n <= plan.held else 1 if plan.keep or sample.weight == 1 else 2
        work = dataclasses.replace(request.rule.work(grid), encoded=encodes * grid.lr[0] * grid.lr[1])
        request.budget.waiting.append(WaitingImage(request.first + n, work, sample))
