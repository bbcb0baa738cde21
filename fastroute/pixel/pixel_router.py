"""The pixel path: encode, classify every output pixel, upsample each by its class, smooth the seams; band by band."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastroute import buffers
from fastroute._contexts import CallLock, ordinarily
from fastroute.budget.limits import Budget
from fastroute.engines import ANY, TORCH, engine_of
from fastroute.models.pcsr import MLP, PCSR
from fastroute.models.precision import Precisions, parse_to
from fastroute.ops import _checks as check
from fastroute.pixel.pixel_budget import Ahead
from fastroute.pixel.pixel_image import PixelImage
from fastroute.pixel.pixel_rows import BUDGET_BYTES, Footprint, waiting_sample
from fastroute.pixel.pixel_speed import PixelPaces
from fastroute.pixel.pixel_stats import Layers, PixelFlops, PixelStats, Work
from fastroute.pixel.request import Request, looking_ahead, make_grid, make_request
from fastroute.rewrite.optimize import optimize, parameter_dtype
from fastroute.runtime.border import EDGE, ZERO, check_border, continued, cut, refuse_edge
from fastroute.runtime.input_output import Ends, home, in_memory, output_like, streamed
from fastroute.runtime.memory_plan import AUTO, Limit, WorkingSet, advised, limit_on
from fastroute.runtime.progress import Progress, shown
from fastroute.runtime.protocols import Reader, Writer, check_reader
from fastroute.runtime.results import Stopwatch, Streamed, Upscaled
from fastroute.runtime.threads import patiently


class PixelRouter(Precisions):
    """Super-resolution of whole images by PCSR, each output pixel through the upsampler that its class says.

    Args:
        model: set to evaluation mode, otherwise left as it is; its encoder is copied.
        optimized: run the encoder in its fastest exact form, see :func:`fastroute.rewrite.optimize`, and in bands of rows.
        scale: upscaling factor of calls that give neither a scale nor a size.
        border: what the encoder sees beyond the edge, see :class:`fastroute.PatchRouter`; "edge" needs whole factors.

    Example:
        >>> router = PixelRouter(PCSR.from_published(torch.load("pcsr-carn-x4.pth", map_location="cpu", weights_only=True)))
        >>> result = router.upscale(image, scale=4)
        >>> result.image.shape, result.stats.pixels_per_class
    """

    @ordinarily
    def __init__(self, model: PCSR, optimized: bool = True, scale: float = 4.0, border: str = ZERO) -> None:
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"PixelRouter: scale must be positive and finite; got {scale}")
        self.scale, self.border = scale, check_border("PixelRouter", border)
        self.lock, self.model = CallLock(), model.eval()
        self.encoder = model.encoder
        if optimized:
            self.encoder = optimize(model.encoder).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.num_classes, self.channels = model.num_classes, int(model.encoder.channels)  # type: ignore[arg-type]
        self.dtype = parameter_dtype(model)
        self.mlps, self.classifier = _mlps(model)
        if not self.classifier:
            raise ValueError("PixelRouter: model must have a classifier of at least one layer; got an empty one")
        self.footprint = Footprint(model, self.encoder, self.dtype)
        self.flops, self.paces = PixelFlops(model, self.mlps, self.classifier), PixelPaces()

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"PixelRouter({self.num_classes} upsamplers over {type(self.model.encoder).__name__}, {dtype} on {self.device})"

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.classifier[0][0].device

    @ordinarily
    def to(self, *args: Any, **kwargs: Any) -> PixelRouter:
        """Move the networks, `model` among them, to a device, to a type in which they compute, or both.

        It takes what :meth:`torch.nn.Module.to` takes. Images keep their own type. The bilinear image is interpolated and
        added in float32.

        Returns:
            The router.

        Raises:
            ValueError: float16 on a CPU that has no convolutions of it.
            TypeError: a dtype that is not floating.
        """
        device, dtype = parse_to("PixelRouter.to", self.dtype, self.device, args, kwargs)
        self.model.to(device, dtype)
        self.encoder.to(device, dtype)
        self.mlps, self.classifier = _mlps(self.model)
        if dtype != self.dtype:
            self.dtype = dtype
            self.footprint = Footprint(self.model, self.encoder, dtype)
        return self

    @ordinarily
    def compile(self, engine: str = ANY) -> PixelRouter:
        """Accepts "torch" and "auto": the encoder runs in bands of rows, each layer keeping the last rows, by PyTorch alone.

        Raises:
            ValueError: another engine.
        """
        if engine not in (TORCH, ANY):
            engine_of(engine)  # refuses unknown names
            raise ValueError(
                f"compile: engine {engine!r} cannot run a PixelRouter, whose encoder runs in bands of rows; use 'torch'"
            )
        return self

    @ordinarily
    @torch.inference_mode()
    def upscale(
        self,
        image: Tensor,  # [B, C, h, w] or [C, h, w]
        scale: float | None = None,
        size: tuple[int, int] | None = None,
        k: float = 0.0,
        adaptive: bool = False,
        refine: bool = True,
        budget: float | None = None,
        progress: Progress = False,
        memory_limit: int | None = None,
        budget_flops: float | None = None,
        budget_ms: float | None = None,
    ) -> Upscaled:
        """Super-resolve an image or a batch of images.

        Args:
            image: (B, C, h, w) or (C, h, w), floating in [0, 1], uint8 or uint16; on the device of the networks, or on the
                CPU: bands of it are then copied there and back, and the result is on the CPU.
            scale: upscaling factor, an integer or a fraction; the size is rounded. Default that of the router
                where no `size` is given.
            size: (H, W) instead of `scale`.
            k: exponent of the cost in the decision, argmax of probability / cost^k.
            adaptive: decide by the 2-means of each image's second probability instead; two classes only. They are taken over
                a sample of rows where the output has more than 33 million pixels.
            refine: smooth cheap pixels beside dearer ones.
            budget: mean cost of the chosen classes as a fraction of the dearest one's, encoder included; `k` is then solved
                for, on a sample of rows where the output has more than 4 million pixels, and the budget is kept all the
                same. 1 sends every pixel to the dearest class. A batch shares one budget, as a folder does under
                :func:`fastroute.upscale_many`: it is spent where it helps most.
            progress: show a progress bar, or call this function with how many bands are done and how many there are; what it
                raises ends the call.
            memory_limit: bytes to hold at most beside `image`, the result and its class map. It changes no bit of them: a
                budget or `adaptive` encodes the image twice where all features do not fit. Of a batch under one budget so
                many features are kept as fit, by default in 512 MiB, on a GPU 8 GiB; the other images are encoded twice.
            budget_flops: instead of `budget`: FLOPs of the whole call, as `stats.flops` counts them.
            budget_ms: instead of `budget`: milliseconds of the whole call on this device, by what a pixel takes in encoder,
                classifier, each upsampler and around them. That is measured before the first such call, remembered, and
                follows the calls that come after; what else the machine does is not foreseen. The classes, and so the
                result, depend on it.

        Returns:
            :class:`Upscaled`, its class map uint8 (B, H, W) or (H, W). A floating image is not clamped; an integer one is,
            and rounded half to even.

        Raises:
            ValueError: a wrong rank, number of channels, empty image or size, another device, arguments that exclude each
                other, an impossible budget, or a limit below the least that is needed, which the message names. Nothing has
                been computed then.
            TypeError: an unsupported dtype.
        """
        images = check.images("upscale", image, self.channels, home(image, self.device), "h, w")
        if self.border == EDGE:
            factor = self.scale if scale is None else scale
            if size is not None or factor != int(factor):
                raise ValueError(f"upscale: border='edge' needs a whole factor; got scale={factor:g} and size={size}")
            images = continued(images)
        limit = Budget(budget, budget_flops, budget_ms)
        shape, options = images.shape, (scale, size, k, adaptive, refine, progress, memory_limit)
        result = self.answer(images, make_request(self, shape, images.dtype, limit, *options))
        if self.border == EDGE:
            result = cut(result, int(factor), per_pixel=True)
        if image.ndim == 3:
            return dataclasses.replace(result, image=result.image[0], class_map=result.class_map[0])
        return result

    @ordinarily
    @torch.inference_mode()
    def stream(
        self,
        reader: Reader,
        writer: Writer,
        scale: float | None = None,
        size: tuple[int, int] | None = None,
        k: float = 0.0,
        adaptive: bool = False,
        refine: bool = True,
        budget: float | None = None,
        progress: Progress = False,
        memory_limit: Limit = AUTO,
        budget_flops: float | None = None,
        budget_ms: float | None = None,
    ) -> Streamed:
        """Super-resolve an image that need not fit in memory, and neither need its result.

        Args:
            reader: gives rectangles of the image, see :class:`fastroute.Reader`; it is read once, and once more for a budget
                or `adaptive` where all features do not fit.
            writer: takes bands of the result, see :class:`fastroute.Writer`, of the type that the reader gives.
            scale, size, k, adaptive, refine, budget, progress, budget_flops, budget_ms: see :meth:`upscale`. At an integer
                scale few rows are held; at a size in no small ratio to the image's, its features are. Reading and writing
                count towards milliseconds where the computation waits for them.
            memory_limit: bytes to hold at most, None for no limit. By default, "auto", it is 512 MiB, and on a GPU, whose
                bands are larger, 8 GiB. It changes no bit of the result, which is that of :meth:`upscale`.

        Raises:
            ValueError, TypeError: see :meth:`upscale`. Nothing has been read or written then.
            MemoryError, torch.OutOfMemoryError: memory ran out; the message names a limit that would fit.
        """
        refuse_edge("stream", self)
        check_reader("stream", reader, self.channels, check.FLOATING + check.INTEGER_IMAGE)
        limit = Budget(budget, budget_flops, budget_ms)
        memory_limit = limit_on(self.device, memory_limit)
        shape, options = (1, *reader.shape), (scale, size, k, adaptive, refine, progress, memory_limit)
        request = make_request(self, shape, reader.dtype, limit, *options)
        ends = streamed(reader, writer, request.grid.size, self.device)
        return Streamed(None, self._run(ends, request, None))

    def output_size(
        self, height: int, width: int, scale: float | None = None, size: tuple[int, int] | None = None
    ) -> tuple[int, int]:
        """Height and width of what an image of that size becomes, see :meth:`upscale`."""
        return make_grid((height, width), scale, size, self.device, self.scale)[0].size

    @ordinarily
    @torch.inference_mode()
    def answer(self, images: Tensor, request: Request) -> Upscaled:  # [B, C, h, w]
        """What `upscale` gives for a request that is checked."""
        grid = request.grid
        output = output_like("upscale", images, (*images.shape[:2], *grid.size))
        # An ordinary tensor, as the image is.
        with torch.inference_mode(False):
            class_map = buffers.empty((images.shape[0], *grid.size), torch.uint8, self.device)
        stats = self._run(in_memory(images, output, self.device), request, class_map)
        return Upscaled(output, class_map.to(images.device), stats)

    def _run(self, ends: Ends, request: Request, class_map: Tensor | None) -> PixelStats:  # [B, H, W]
        """From one end to the other."""
        source, grid, choice, limit = ends.source, request.grid, request.choice, request.memory_limit
        watch = Stopwatch(self.device)
        number, before = source.shape[0], 0 if request.purse is None else request.purse.searched
        waiting = 0 if request.purse is None or request.looked else number - 1
        keep = grid.overlapping or not self.footprint.in_bands
        # Two passes need not encode twice.
        if not keep and choice.solved:
            keep = limit is None or self._working_set(ends, request, waiting, True, True).bytes(1) <= limit
        held, each = 0, self.footprint.features(grid, True)
        if waiting and keep:
            needed = self._working_set(ends, request, waiting, True, not ends.in_place).bytes(1)
            free = (limit_on(self.device, AUTO) or 0) if limit is None else limit - needed
            held = min(waiting, max(free, 0) // each)
        working = self._working_set(ends, request, waiting, keep, not ends.in_place)
        working = dataclasses.replace(working, fixed=working.fixed + held * each)
        rows = working.rows(limit)
        used = working.bytes(rows)
        lowest = partial(self._working_set, ends, request, waiting, grid.overlapping, True)
        counts = torch.zeros(self.num_classes, dtype=torch.int64, device=self.device)
        images = [PixelImage(self, source, n, request, keep, watch) for n in range(number)]
        with (
            patiently(self.device),
            advised("upscale", self.device, used, lowest, ends.in_place),
            ends.opened(max(1, rows * grid.lr[0] // grid.size[0]), rows) as sink,
            shown(request.progress, number * len(grid.bands()), "band") as bar,
        ):
            if waiting:
                self._look(images, request, held, keep)
            for n, image in enumerate(images):
                image.run(None if class_map is None else class_map[n : n + 1], sink, counts, bar.update)
        done = Work()
        for n in range(number):
            done += choice.work(grid) + (looking_ahead(grid, waiting_sample(number)) if waiting and n else Work())
        stats = self._stats(counts.tolist(), done, watch, used)
        encoded = sum(image.passes for image in images) * grid.lr[0] * grid.lr[1]
        done = dataclasses.replace(done, encoded=encoded)
        searched = 0 if request.purse is None else request.purse.searched - before
        self.paces.learn(self, source.dtype, request, searched, done, stats.pixels_per_class, stats.seconds)
        return stats

    def _look(self, images: list[PixelImage], request: Request, held: int, keep: bool) -> None:
        """Look at all images but the first; the features of the next `held` ones are kept."""
        assert request.purse is not None
        grid = request.grid
        for n, image in enumerate(images[1:], start=1):
            sample = image.look(waiting_sample(len(images)), n <= held)
            encodes = 0 if n <= held else 1 if keep or sample.weight == 1 else 2
            encoded = encodes * grid.lr[0] * grid.lr[1]
            work = dataclasses.replace(request.choice.work(grid), encoded=encoded)
            request.purse.ahead.append(Ahead(request.first + n, work, sample))

    def _working_set(self, ends: Ends, request: Request, waiting: int, keep: bool, in_bands: bool) -> WorkingSet:
        grid = request.grid
        sampled = request.choice.sampled(grid)
        # Logits of the images to come, and a search in them.
        sampled += (
            waiting
            * min(waiting_sample(waiting + 1) + grid.size[1], grid.size[0] * grid.size[1])
            * BUDGET_BYTES
            * self.num_classes
        )
        return self.footprint.working_set(grid, keep, sampled, ends.source.dtype.itemsize, in_bands, ends.step)

    def _stats(self, counts: list[int], work: Work, watch: Stopwatch, working_set: int) -> PixelStats:
        stages = {"encode": 0.0, "classify": 0.0, "solve": 0.0, "assign": 0.0, "upsample": 0.0, "refine": 0.0}
        return PixelStats(counts, *self.flops.done(counts, work), {**stages, **watch.finish()}, working_set)


def _mlps(model: PCSR) -> tuple[list[Layers], Layers]:
    """The layers of the upsamplers and of the classifier, where the model is now."""
    return [_layers(mlp) for mlp in model.upsamplers], _layers(model.classifier)


def _layers(mlp: nn.Module) -> Layers:
    assert isinstance(mlp, MLP)
    return [(w.detach(), b.detach()) for w, b in zip(*mlp.parameter_lists, strict=True)]
