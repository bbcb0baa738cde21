"""The pixel path: encode, classify every output pixel, upsample each by its class, smooth the seams; band by band."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastroute import memory
from fastroute.models.optimize import optimize, parameter_dtype
from fastroute.models.pcsr import MLP, PCSR
from fastroute.ops import _checks as check
from fastroute.ops.assign_classes import assign_classes
from fastroute.profiling import RoutedFlops, count_flops, mix_flops
from fastroute.routing.pixel_image import Choice, PixelImage
from fastroute.routing.pixel_rows import Footprint, PixelGrid
from fastroute.routing.result import RoutingStats, Stopwatch, Streamed, Upscaled
from fastroute.routing.working_set import DEFAULT_LIMIT, WorkingSet, advised, check_limit
from fastroute.streaming.ends import Ends, home, in_memory, output_like, streamed
from fastroute.streaming.protocols import Reader, Writer, check_reader

Layers = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PixelStats(RoutingStats):
    """What was done for one call of :meth:`PixelRouter.upscale`; its `patches` are output pixels."""

    @property
    def pixels_per_class(self) -> list[int]:
        """Output pixels that went through each upsampler, cheapest first."""
        return self.patches_per_class

    @property
    def overhead(self) -> float:
        """Share of the time spent on anything but networks."""
        networks = sum(self.seconds[name] for name in ("encode", "classify", "upsample"))
        return 1 - networks / self.seconds["total"]

    def __str__(self) -> str:
        return super().__str__().replace("patches", "pixels", 1)


class PixelRouter:
    """Super-resolution of whole images by PCSR, each output pixel through the upsampler that its class says.

    Args:
        model: set to evaluation mode, otherwise left as it is; its encoder is copied.
        optimized: run the encoder in its fastest exact form, see :func:`fastroute.models.optimize`, and in bands of rows.

    Example:
        >>> router = PixelRouter(PCSR.from_published(torch.load("pcsr-carn-x4.pth", map_location="cpu", weights_only=True)))
        >>> result = router.upscale(image, scale=4)
        >>> result.image.shape, result.stats.pixels_per_class
    """

    def __init__(self, model: PCSR, optimized: bool = True) -> None:
        self.model = model.eval()
        self.encoder = model.encoder
        if optimized:
            self.encoder = optimize(model.encoder).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.num_classes, self.channels = model.num_classes, int(model.encoder.channels)  # type: ignore[arg-type]
        self.dtype = parameter_dtype(model)
        self.mlps = [_layers(mlp) for mlp in model.upsamplers]
        self.classifier = _layers(model.classifier)
        if not self.classifier:
            raise ValueError("PixelRouter: model must have a classifier of at least one layer; got an empty one")
        size = (1, self.channels, 16, 16)
        self.footprint = Footprint(model, self.encoder, self.dtype)
        self._encoder_flops = [count_flops(model.encoder, size, name) / 256 for name in ("true", "paper")]

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.classifier[0][0].device

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
        progress: bool = False,
        memory_limit: int | None = None,
    ) -> Upscaled:
        """Super-resolve an image or a batch of images.

        Args:
            image: (B, C, h, w) or (C, h, w), floating in [0, 1], uint8 or uint16; on the device of the networks, or on the
                CPU: bands of it are then copied there and back, and the result is on the CPU.
            scale: upscaling factor, an integer or a fraction; the size is rounded. Default 4 where no `size` is given.
            size: (H, W) instead of `scale`.
            k: exponent of the cost in the decision, argmax of probability / cost^k.
            adaptive: decide by the 2-means of each image's second probability instead; two classes only. They are taken over
                a sample of rows where the output has more than 33 million pixels.
            refine: smooth cheap pixels beside dearer ones.
            budget: mean cost of the chosen classes as a fraction of the dearest one's; `k` is then solved for, on a sample
                of rows where the output has more than 2 million pixels.
            progress: show a progress bar.
            memory_limit: bytes to hold at most beside `image`, the result and its class map. It changes no bit of them: a
                budget or `adaptive` encodes the image twice where all features do not fit.

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
        grid, choice = self._check(images.shape, memory_limit, scale, size, k, adaptive, budget)
        output = output_like("upscale", images, (*images.shape[:2], *grid.size))
        class_map = memory.empty((images.shape[0], *grid.size), torch.uint8, self.device)
        ends = in_memory(images, output, self.device)
        stats = self._run(ends, grid, choice, refine, progress, memory_limit, class_map)
        class_map = class_map.to(images.device)
        if image.ndim == 3:
            return Upscaled(output[0], class_map[0], stats)
        return Upscaled(output, class_map, stats)

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
        progress: bool = False,
        memory_limit: int | None = DEFAULT_LIMIT,
    ) -> Streamed:
        """Super-resolve an image that need not fit in memory, and neither need its result.

        Args:
            reader: gives rectangles of the image, see :class:`fastroute.Reader`; it is read once, and once more for a budget
                or `adaptive` where all features do not fit.
            writer: takes bands of the result, see :class:`fastroute.Writer`, of the type that the reader gives.
            scale, size, k, adaptive, refine, budget, progress: see :meth:`upscale`. At an integer scale few rows are held; at
                a size in no small ratio to the image's, its features are.
            memory_limit: bytes to hold at most. It changes no bit of the result, which is that of :meth:`upscale`.

        Raises:
            ValueError, TypeError: see :meth:`upscale`. Nothing has been read or written then.
            MemoryError, torch.OutOfMemoryError: memory ran out; the message names a limit that would fit.
        """
        check_reader("stream", reader, self.channels, check.FLOATING + check.INTEGER_IMAGE)
        grid, choice = self._check((1, *reader.shape), memory_limit, scale, size, k, adaptive, budget)
        ends = streamed(reader, writer, grid.size, self.device)
        return Streamed(None, self._run(ends, grid, choice, refine, progress, memory_limit, None))

    def output_size(
        self, height: int, width: int, scale: float | None = None, size: tuple[int, int] | None = None
    ) -> tuple[int, int]:
        """Height and width of what an image of that size becomes, see :meth:`upscale`."""
        return self._check((1, self.channels, height, width), None, scale, size, 0.0, False, None)[0].size

    def _run(
        self,
        ends: Ends,
        grid: PixelGrid,
        choice: Choice,
        refine: bool,
        progress: bool,
        memory_limit: int | None,
        class_map: Tensor | None,  # [B, H, W]
    ) -> PixelStats:
        """From one end to the other; the arguments are checked."""
        source = ends.source
        watch = Stopwatch(self.device, self.device.type != "cuda" or ends.in_place)
        keep = grid.overlapping or not self.footprint.in_bands
        # Two passes need not encode twice.
        if not keep and choice.solved:
            keep = memory_limit is None or self._working_set(ends, grid, choice, True, True).bytes(1) <= memory_limit
        working = self._working_set(ends, grid, choice, keep, not ends.in_place)
        rows = working.rows(memory_limit)
        used = working.bytes(rows)
        lowest = partial(self._working_set, ends, grid, choice, grid.overlapping, True)
        counts = torch.zeros(self.num_classes, dtype=torch.int64, device=self.device)
        total = source.shape[0] * len(grid.bands())
        with (
            advised("upscale", self.device, used, lowest, ends.in_place),
            ends.opened(max(1, rows * grid.lr[0] // grid.size[0]), rows) as sink,
            tqdm(total=total, unit="band", desc="upscale", disable=not progress) as bar,
        ):
            for number in range(source.shape[0]):
                image = PixelImage(self, ends, number, grid, choice, keep, watch)
                image.run(None if class_map is None else class_map[number : number + 1], refine, sink, counts, bar.update)
        return self._stats(counts.tolist(), source.shape[0] * math.prod(grid.lr), watch, used)

    def _working_set(self, ends: Ends, grid: PixelGrid, choice: Choice, keep: bool, in_bands: bool) -> WorkingSet:
        return self.footprint.working_set(grid, keep, choice.sampled(grid), ends.source.dtype.itemsize, in_bands, ends.step)

    def _check(
        self,
        shape: Sequence[int],
        memory_limit: int | None,
        scale: float | None,
        size: tuple[int, int] | None,
        k: float,
        adaptive: bool,
        budget: float | None,
    ) -> tuple[PixelGrid, Choice]:
        op = "upscale"
        check_limit(op, memory_limit)
        if scale is not None and size is not None:
            raise ValueError(f"{op}: give either scale or size; got scale={scale} and size={size}")
        h, w = shape[2:]
        if size is None:
            factor = 4.0 if scale is None else float(scale)
            if not (math.isfinite(factor) and factor > 0):
                raise ValueError(f"{op}: scale must be positive and finite; got {scale}")
            size = (round(h * factor), round(w * factor))
        else:
            # The published code knows a size by its mean factor, to one decimal.
            factor = max(round((size[0] / h + size[1] / w) / 2, 1), 0.1)
        if min(size) < 1:
            raise ValueError(f"{op}: size must be at least 1 x 1; got {size}")
        if not math.isfinite(k):
            raise ValueError(f"{op}: k must be finite; got {k}")
        if (k != 0) + adaptive + (budget is not None) > 1:
            raise ValueError(f"{op}: give one of k, adaptive and budget; got k={k}, adaptive={adaptive}, budget={budget}")
        if adaptive and self.num_classes != 2:
            raise ValueError(f"{op}: adaptive needs exactly 2 classes; got {self.num_classes}; use k instead")
        if budget is not None:
            # Refuses an impossible budget before anything is computed.
            assign_classes(torch.ones(1, self.num_classes), self.model.class_cost(factor), budget=budget)
        cost = self.model.class_cost(factor) if k or budget is not None else [1.0] * self.num_classes
        return PixelGrid((h, w), (int(size[0]), int(size[1]))), Choice(cost, k, adaptive, budget)

    def _stats(self, counts: list[int], features: int, watch: Stopwatch, working_set: int) -> PixelStats:
        pixels = sum(counts)

        def flops(layers: Layers) -> tuple[int, int]:
            """Per output pixel: as done, but for the product with the features, and as the papers count."""
            tail = sum(weight.numel() for weight, _ in layers)
            first = layers[0][0].shape if layers else (0, 4)
            # The row's and the column's part of the first layer are two multiply-adds per unit.
            return 2 * (tail - first[0] * (first[1] - 2)), 2 * tail

        def shared(layers: Layers) -> int:
            return 2 * layers[0][0].shape[0] * (layers[0][0].shape[1] - 4) if layers else 0

        true = mix_flops([flops(m)[0] for m in self.mlps], counts)
        paper = mix_flops([flops(m)[1] for m in self.mlps], counts)
        used = sum(shared(m) for m, n in zip(self.mlps, counts, strict=True) if n)
        dearest = max(shared(m) for m in self.mlps)
        extra = flops(self.classifier)[0] * pixels + shared(self.classifier) * features
        encoder, encoder_paper = (f * features for f in self._encoder_flops)
        done = RoutedFlops(true.routed + encoder + extra + used * features, true.dense + encoder + dearest * features)
        stages = {"encode": 0.0, "classify": 0.0, "assign": 0.0, "upsample": 0.0, "refine": 0.0}
        seconds = {**stages, **watch.finish()}
        paper = RoutedFlops(paper.routed + encoder_paper, paper.dense + encoder_paper)
        return PixelStats(counts, done, paper, seconds, working_set)


def _layers(mlp: nn.Module) -> Layers:
    assert isinstance(mlp, MLP)
    return [(w.detach(), b.detach()) for w, b in zip(*mlp.parameter_lists, strict=True)]
