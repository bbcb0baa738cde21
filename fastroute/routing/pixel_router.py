"""The pixel path: encode, classify every output pixel, upsample each by its class, smooth the seams; band by band."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastroute import memory
from fastroute.models.optimize import optimize, parameter_dtype
from fastroute.models.pcsr import MLP, PCSR
from fastroute.models.streaming import run_in_bands, unsupported_reasons
from fastroute.ops import _checks as check
from fastroute.ops.adaptive_threshold import adaptive_threshold
from fastroute.ops.assign_classes import assign_classes
from fastroute.ops.pixel_mlp import pixel_mlp
from fastroute.ops.refine_boundaries import refine_boundaries
from fastroute.profiling import RoutedFlops, count_flops, mix_flops
from fastroute.routing.classify import to_float
from fastroute.routing.result import RoutingStats, Stopwatch, Upscaled

# Pixels of a band, of the output and of the encoder's input: bounds of the memory, large enough to give threads work.
OUTPUT_BAND = 1 << 20
ENCODER_BAND = 1 << 14
# A budget is solved on at most this many pixels, in rows spread over the image.
BUDGET_SAMPLE = 1 << 21

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
    ) -> Upscaled:
        """Super-resolve an image or a batch of images.

        Args:
            image: (B, C, h, w) or (C, h, w), floating in [0, 1], uint8 or uint16, on the device of the networks.
            scale: upscaling factor, an integer or a fraction; the size is rounded. Default 4 where no `size` is given.
            size: (H, W) instead of `scale`.
            k: exponent of the cost in the decision, argmax of probability / cost^k.
            adaptive: decide by the 2-means of each image's second probability instead; two classes only.
            refine: smooth cheap pixels beside dearer ones.
            budget: mean cost of the chosen classes as a fraction of the dearest one's; `k` is then solved for, on a sample
                of rows where the output has more than 2 million pixels.
            progress: show a progress bar.

        Returns:
            :class:`Upscaled`, its class map uint8 (B, H, W) or (H, W). A floating image is not clamped; an integer one is,
            and rounded half to even.

        Raises:
            ValueError: a wrong rank, number of channels, empty image or size, another device, arguments that exclude each
                other, or an impossible budget. Nothing has been computed then.
            TypeError: an unsupported dtype.
        """
        images, size, factor = self._check(image, scale, size, k, adaptive, budget)
        cost = self.model.class_cost(factor) if k or budget is not None else [1.0] * self.num_classes
        watch = Stopwatch(images.device)
        output = memory.empty((images.shape[0], images.shape[1], *size), images.dtype, images.device)
        class_map = memory.empty((images.shape[0], *size), torch.uint8, images.device)
        bands = max(1, OUTPUT_BAND // size[1])
        with tqdm(total=images.shape[0] * 2 * -(-size[0] // bands), unit="band", desc="upscale", disable=not progress) as bar:
            for number in range(images.shape[0]):
                lr = images[number : number + 1]
                with watch.stage("encode"):
                    features = self.encode(lr)
                self._classify(features, class_map[number : number + 1], cost, k, adaptive, budget, watch, bar.update)
                here = slice(number, number + 1)
                self._upsample(features, lr, class_map[here], output[here], refine, watch, bar.update)
        stats = self._stats(class_map, images.shape[2] * images.shape[3], watch)
        if image.ndim == 3:
            return Upscaled(output[0], class_map[0], stats)
        return Upscaled(output, class_map, stats)

    def encode(self, lr: Tensor) -> Tensor:  # [1, C, h, w] -> [1, D, h, w]
        """The features of one image, channels_last."""
        _, _, height, width = lr.shape
        if unsupported_reasons(self.encoder):
            return self.encoder(self._normalise(lr))
        depth = int(self.model.encoder.width)  # type: ignore[arg-type]
        features = memory.empty((1, height, width, depth), self.dtype, lr.device).permute(0, 3, 1, 2)
        run_in_bands(self.encoder, lambda rows, cols: self._normalise(lr[:, :, rows, cols]), features, ENCODER_BAND)
        return features

    def _normalise(self, lr: Tensor) -> Tensor:
        image = to_float(lr, self.dtype) - self.model.get_buffer("mean").to(self.dtype)
        return image.contiguous(memory_format=torch.channels_last)

    def _classify(
        self,
        features: Tensor,  # [1, D, h, w]
        class_map: Tensor,  # [1, H, W]
        cost: list[float],
        k: float,
        adaptive: bool,
        budget: float | None,
        watch: Stopwatch,
        done: Callable[[int], object],
    ) -> None:
        height, width = class_map.shape[1:]
        if adaptive:
            score = memory.empty((1, height, width), self.dtype, features.device)
            odds = _last_layer(self.classifier, lambda w, b: (w[1:] - w[:1], b[1:] - b[:1]))
            with watch.stage("classify"):
                for begin, end in _bands(height, width):
                    logit = pixel_mlp(features, [odds], (height, width), rows=(begin, end))
                    torch.sigmoid(logit[:, 0], out=score[:, begin:end])
                    done(1)
            with watch.stage("assign"):
                class_map.copy_(adaptive_threshold(score, torch.uint8))
            return
        if budget is not None:
            with watch.stage("assign"):
                k = self._solve(features, (height, width), cost, budget)
        # argmax of softmax(z) / cost^k is argmax of z - k · log(cost): a change of the last bias.
        shift = torch.tensor([k * math.log(c) for c in cost], dtype=torch.float64).to(features.device)
        penalised = _last_layer(self.classifier, lambda w, b: (w, (b.double() - shift).to(b.dtype)))
        for begin, end in _bands(height, width):
            with watch.stage("classify"):
                logits = pixel_mlp(features, [penalised], (height, width), rows=(begin, end))
            with watch.stage("assign"):
                class_map[:, begin:end] = assign_classes(logits, [1.0] * self.num_classes, dtype=torch.uint8)
            done(1)

    def _solve(self, features: Tensor, size: tuple[int, int], cost: list[float], budget: float) -> float:
        """The smallest penalty at which the mean cost of the sampled pixels is within the budget."""
        height, width = size
        step = -(-height * width // BUDGET_SAMPLE)
        rows = range(step // 2, height, step) if step > 1 else None
        mlps = [self.classifier]
        if rows is None:
            logits = pixel_mlp(features, mlps, size)
        else:
            logits = torch.cat([pixel_mlp(features, mlps, size, rows=(y, y + 1)) for y in rows], dim=2)
        logits = logits.double().flatten(2)[0].t()  # [n, K]
        log_cost = torch.tensor(cost, dtype=torch.float64, device=logits.device).log()
        share = torch.tensor([c / max(cost) for c in cost], dtype=torch.float64, device=logits.device)

        def spent(penalty: float) -> float:
            return share[(logits - penalty * log_cost).argmax(dim=1)].mean().item()

        # Penalties at which no score counts any more.
        gaps = log_cost.unique().diff()
        spread = (logits.amax() - logits.amin()).item() + 1
        bound = spread / gaps.min().item() if len(gaps) else 1.0
        low, high = -bound, bound
        if spent(low) <= budget:
            return low
        while (middle := 0.5 * (low + high)) not in (low, high) and high - low > 1e-9 * bound:
            low, high = (low, middle) if spent(middle) <= budget else (middle, high)
        return high

    def _upsample(
        self,
        features: Tensor,  # [1, D, h, w]
        lr: Tensor,  # [1, C, h, w]
        class_map: Tensor,  # [1, H, W]
        output: Tensor,  # [1, C, H, W]
        refine: bool,
        watch: Stopwatch,
        done: Callable[[int], object],
    ) -> None:
        height, width = class_map.shape[1:]
        residual = to_float(lr, self.dtype)
        for begin, end in _bands(height, width):
            # The refinement looks one row further.
            top, bottom = (max(begin - 1, 0), min(end + 1, height)) if refine else (begin, end)
            with watch.stage("upsample"):
                band = pixel_mlp(features, self.mlps, (height, width), class_map, residual, rows=(top, bottom))
            with watch.stage("refine"):
                classes = class_map[:, top:bottom] if refine else class_map.new_zeros(1, bottom - top, width)
                target = output[:, :, begin:end]
                rows = (begin - top, end - top)
                if output.dtype in (self.dtype, *check.INTEGER_IMAGE):
                    refine_boundaries(band, classes, rows, out=target)
                else:
                    target.copy_(refine_boundaries(band, classes, rows))
            done(1)

    def _check(
        self,
        image: Tensor,
        scale: float | None,
        size: tuple[int, int] | None,
        k: float,
        adaptive: bool,
        budget: float | None,
    ) -> tuple[Tensor, tuple[int, int], float]:
        op = "upscale"
        images = check.images(op, image, self.channels, self.device, "h, w")
        if scale is not None and size is not None:
            raise ValueError(f"{op}: give either scale or size; got scale={scale} and size={size}")
        h, w = images.shape[2:]
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
        return images, (int(size[0]), int(size[1])), factor

    def _stats(self, class_map: Tensor, lr_pixels: int, watch: Stopwatch) -> PixelStats:
        with watch.stage("assign"):
            # Band by band: a sum of all would be made of a 64-bit copy.
            bands = class_map.view(-1).split(OUTPUT_BAND)
            counts = torch.stack([torch.bincount(band, minlength=self.num_classes) for band in bands]).sum(dim=0).tolist()
        images = class_map.shape[0]
        features, pixels = images * lr_pixels, class_map.numel()

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
        return PixelStats(counts, done, RoutedFlops(paper.routed + encoder_paper, paper.dense + encoder_paper), seconds)


def _layers(mlp: nn.Module) -> Layers:
    assert isinstance(mlp, MLP)
    return [(w.detach(), b.detach()) for w, b in zip(*mlp.parameter_lists, strict=True)]


def _last_layer(layers: Layers, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Layers:
    return [*layers[:-1], change(*layers[-1])]


def _bands(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Rows (first, one past the last) of bands of nearly equal height."""
    count = -(-height * width // OUTPUT_BAND)
    edges = [height * i // count for i in range(count + 1)]
    yield from ((a, b) for a, b in pairwise(edges) if b > a)
