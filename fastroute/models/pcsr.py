"""PCSR: "Accelerating Image Super-Resolution Networks with Pixel-Level Classification", Jeong et al., ECCV 2024."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.models.carn import CARN, RGB_MEAN
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.precision import FullPrecision
from fastroute.models.rcan import RCAN
from fastroute.models.srresnet import SRResNet
from fastroute.profiling import count_flops
from fastroute.reference.adaptive_threshold import adaptive_threshold_reference
from fastroute.reference.assign_classes import penalised_argmax
from fastroute.reference.pixel_mlp import pixel_mlp_reference, placed_axis
from fastroute.reference.refine_boundaries import refine_boundaries_reference

# The side of the LR patch for which the published code counts the FLOPs of the classes.
COST_PATCH = 16
# The relative coordinate and the cell, each in y and x.
POSITION = 4
# The largest number of layers that a checkpoint may describe.
MOST_WIDTHS = 256
# The models of the published code: the one of its first phase, which trains one MLP, and the one of its second phase.
DENSE, PUBLISHED = "pcsr-phase0", ("pcsr-phase0", "pcsr-phase1")
# The options of the published encoders, and the arguments that they become here.
ENCODERS = {
    "fsrcnn": {"d": "width", "s": "shrink", "m": "depth"},
    "carn": {"nf": "width", "group": "groups"},
    "srresnet": {"nf": "width", "nb": "blocks"},
}
# All encoders. RCAN's was not published.
BACKBONES: dict[str, Callable[..., nn.Module]] = {"fsrcnn": FSRCNN, "carn": CARN, "srresnet": SRResNet, "rcan": RCAN}


@dataclass(frozen=True)
class PixelCosts:
    """The costs of the classes of a :class:`PCSR`.

    Attributes:
        encoder: FLOPs of the encoder on an LR patch of 16 x 16, as the paper counts them.
        weights: number of weights of each upsampler.
    """

    encoder: int
    weights: tuple[int, ...]

    def at(self, scale: float) -> list[float]:
        """The cost of each class at a factor: FLOPs of encoder and MLP as the paper counts them, normalised to a sum of 1."""
        pixels = round(COST_PATCH * scale) ** 2
        flops = [self.encoder + 2 * pixels * weights for weights in self.weights]
        return [f / sum(flops) for f in flops]


class PCSROutput(NamedTuple):
    """The output of a :class:`PCSR`: the image, the class of every pixel and the probabilities of the classes."""

    image: Tensor  # [B, C, H, W]
    class_map: Tensor  # [B, H, W]
    probability: Tensor  # [B, K, H, W]


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        widths: widths of the input, of each hidden layer and of the output. Fewer than two make the empty MLP of a free class.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    @property
    def parameter_lists(self) -> tuple[list[Tensor], list[Tensor]]:
        """The weights and biases of the layers, first layer first."""
        linear = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        return [layer.weight for layer in linear], [layer.bias for layer in linear]

    def forward(self, x: Tensor) -> Tensor:  # [..., F] -> [..., C]
        """See the class."""
        return self.layers(x)


class PCSR(FullPrecision):
    """An encoder at the size of the input, a classifier of output pixels and one upsampler per class.

    Args:
        encoder: maps (B, C, h, w) to features (B, D, h, w). Its attributes `channels` and `width` are C and D.
        upsamplers: one :class:`MLP` per class, from the cheapest to the most expensive, each from D + 4 to C numbers. An empty
            one is plain bilinear interpolation.
        classifier: an :class:`MLP` from D + 4 numbers to one score per class.
        mean: colour subtracted from the input before the encoder, or None.

    Shape:
        (B, C, h, w) in [0, 1] to a :class:`PCSROutput` at any size. In training mode its image is the sum of all
        upsamplers weighted by their probabilities. This is the plain form that defines the numbers;
        :class:`fastroute.PixelRouter` is the fast one.
    """

    def __init__(
        self,
        encoder: nn.Module,
        upsamplers: Sequence[MLP],
        classifier: MLP,
        mean: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not upsamplers:
            raise ValueError("PCSR: upsamplers must hold at least one MLP; got none")
        self.encoder = encoder
        self.upsamplers = nn.ModuleList(upsamplers)
        self.classifier = classifier
        colour = torch.tensor(list(mean or [0.0]), dtype=torch.float32).view(1, -1, 1, 1)
        self.register_buffer("mean", colour, persistent=False)
        self._costs: PixelCosts | None = None

    @classmethod
    def build(
        cls,
        encoder: nn.Module,
        hidden: Sequence[Sequence[int] | None],
        classifier_hidden: Sequence[int],
        mean: Sequence[float] | None = None,
    ) -> PCSR:
        """PCSR with MLPs of the given hidden widths for an encoder with a `width` and `channels`. None is a free class."""
        fan_in, channels = int(encoder.width) + POSITION, int(encoder.channels)  # type: ignore[arg-type]
        upsamplers = [MLP([] if h is None else [fan_in, *h, channels]) for h in hidden]
        return cls(encoder, upsamplers, MLP([fan_in, *classifier_hidden, len(hidden)]), mean)

    @classmethod
    def from_published(cls, checkpoint: Mapping[str, Any]) -> PCSR:
        """The network in a checkpoint of PCSR's code, as `torch.load` returns it. In the first phase, it has one class.

        Raises:
            ValueError: the checkpoint is of another kind.
            RuntimeError: the weights do not fit the network that the checkpoint describes.
        """
        model = cls.of_specification(checkpoint)
        model.load_state_dict(cls.published_state(checkpoint))
        # The type of the published weights, whatever torch's default type is.
        return model.float().eval()

    @classmethod
    def of_specification(cls, checkpoint: Mapping[str, Any]) -> PCSR:
        """The network that such a checkpoint describes, without its weights.

        Raises:
            ValueError: the checkpoint is of another kind, or describes no network.
        """
        spec = checkpoint.get("model", {})
        if spec.get("name") not in PUBLISHED:
            raise ValueError(
                f"PCSR: checkpoint must hold a model named one of {', '.join(PUBLISHED)}; got {spec.get('name')!r}"
            )
        args = spec["args"]
        name, options = args["encoder_spec"]["name"], args["encoder_spec"].get("args") or {}
        if name not in ENCODERS:
            raise ValueError(f"PCSR: encoder must be one of {', '.join(ENCODERS)}; got {name!r}")
        samplers = [part for part in ("light_sampler", "heavy_sampler") if f"{part}_spec" in args]
        hidden = [args[f"{part}_spec"]["args"]["imnet_spec"]["args"]["hidden_list"] for part in samplers]
        deciding: list[int] = []
        if "classifier_spec" in args:
            deciding = args["classifier_spec"]["args"]["imnet_spec"]["args"]["hidden_list"]
        sizes = [options[key] for key in ENCODERS[name] if key in options]
        widths = [*sizes, *(width for widths in hidden for width in widths), *deciding]
        if len(widths) > MOST_WIDTHS or not all(isinstance(w, int) and w > 0 for w in widths):
            raise ValueError(f"PCSR: widths must be at most {MOST_WIDTHS} positive whole numbers; got {str(widths)[:100]}")
        known = {argument: options[key] for key, argument in ENCODERS[name].items() if key in options}
        # The defaults of the published code for what a configuration leaves out.
        known.setdefault("width", 56 if name == "fsrcnn" else 64)
        return cls.build(encoder_of(name, **known), hidden, deciding, RGB_MEAN if name == "carn" else None)

    @staticmethod
    def published_state(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """The weights in such a checkpoint, under their names here. For the first phase, a classifier of one class is added."""
        state = {rename_published(str(key)): value for key, value in checkpoint["model"]["sd"].items()}
        if checkpoint["model"].get("name") == DENSE:
            first = state.get("upsamplers.1.layers.0.weight")
            state = {key.replace("upsamplers.1.", "upsamplers.0.", 1): value for key, value in state.items()}
            if isinstance(first, Tensor) and first.ndim == 2:
                state |= {
                    "classifier.layers.0.weight": first.new_zeros(1, first.shape[1]),
                    "classifier.layers.0.bias": first.new_zeros(1),
                }
        return state

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.upsamplers)

    def parameter_lists(self, number: int) -> tuple[list[Tensor], list[Tensor]]:
        """The weights and biases of the upsampler of class `number`."""
        mlp = self.upsamplers[number]
        assert isinstance(mlp, MLP)
        return mlp.parameter_lists

    def features(self, lr: Tensor) -> Tensor:  # [B, C, h, w] -> [B, D, h, w]
        """The features of `lr`."""
        return self.encoder(lr - self.get_buffer("mean").to(lr.dtype))

    def probability(self, features: Tensor, size: tuple[int, int]) -> Tensor:  # [B, D, h, w] -> [B, K, H, W]
        """The probability of every class at every output pixel."""
        weights, biases = self.classifier.parameter_lists
        place = relative_coordinates(features, size)
        return pixel_mlp_reference(features, weights, biases, [len(weights)], *size, relative=place).softmax(dim=1)

    def upsample(
        self,
        features: Tensor,  # [B, D, h, w]
        lr: Tensor,  # [B, C, h, w]
        size: tuple[int, int],
        class_map: Tensor | None,  # [B, H, W]
        classes: Sequence[int] | None = None,
    ) -> Tensor:  # [B, C, H, W]
        """The bilinear image plus the output of each pixel's upsampler, one of `classes`, to which `class_map` refers."""
        chosen = range(self.num_classes) if classes is None else classes
        lists = [self.parameter_lists(k) for k in chosen]
        weights, biases = [w for ws, _ in lists for w in ws], [b for _, bs in lists for b in bs]
        depths, place = [len(ws) for ws, _ in lists], relative_coordinates(features, size)
        return pixel_mlp_reference(features, weights, biases, depths, *size, class_map, lr, relative=place)

    @property
    def costs(self) -> PixelCosts:
        """The costs of the classes."""
        if self._costs is None:
            channels = int(self.encoder.channels)  # type: ignore[arg-type]
            lists = [self.parameter_lists(c)[0] for c in range(self.num_classes)]
            weights = tuple(sum(w.numel() for w in layers) for layers in lists)
            self._costs = PixelCosts(count_flops(self.encoder, (1, channels, COST_PATCH, COST_PATCH), "pcsr"), weights)
        return self._costs

    def class_cost(self, scale: float) -> list[float]:
        """The cost of every class at a factor as the paper counts it, normalised to a sum of 1."""
        return self.costs.at(scale)

    def forward(
        self,
        lr: Tensor,  # [B, C, h, w]
        scale: float | None = None,
        size: tuple[int, int] | None = None,
        penalty: float = 0.0,
        adaptive: bool = False,
        refine: bool = True,
    ) -> PCSROutput:
        """Upscale by `scale` or to `size`.

        Args:
            lr: images in [0, 1].
            scale: upscaling factor, an integer or a fraction; the size is rounded.
            size: (H, W) instead of `scale`.
            penalty: exponent k of the cost in the class decision, argmax of probability / cost^k; 0 is the plain argmax.
            adaptive: decide by the 2-means of each image's second probability instead; two classes only.
            refine: smooth cheap pixels beside more expensive ones.
        """
        if (scale is None) == (size is None):
            raise ValueError(f"PCSR: give either scale or size; got scale={scale} and size={size}")
        h, w = lr.shape[2:]
        if scale is not None:
            size = (round(h * scale), round(w * scale))
        assert size is not None
        features = self.features(lr)
        probability = self.probability(features, size)
        if self.training:
            every = [self.upsample(features, lr, size, None, [c]) for c in range(self.num_classes)]
            mixture = (torch.stack(every, dim=1) * probability[:, :, None]).sum(dim=1)
            return PCSROutput(mixture, probability.argmax(dim=1), probability)
        if adaptive:
            if self.num_classes != 2:
                raise ValueError(f"PCSR: adaptive needs exactly 2 classes; got {self.num_classes}; use penalty instead")
            class_map = adaptive_threshold_reference(probability[:, 1])
        else:
            # The published code takes the mean factor of a size, rounded to one decimal.
            factor = scale if scale is not None else round((size[0] / h + size[1] / w) / 2, 1)
            cost = torch.tensor(self.class_cost(factor) if penalty else [1.0] * self.num_classes, dtype=torch.float32)
            class_map = penalised_argmax(probability, cost, penalty)
        image = self.upsample(features, lr, size, class_map)
        return PCSROutput(refine_boundaries_reference(image, class_map) if refine else image, class_map, probability)


def encoder_of(name: str, **options: int) -> nn.Module:
    """The network `name` without its upsampler, as an encoder."""
    return BACKBONES[name](**options, upsample=False)


def relative_coordinates(features: Tensor, size: tuple[int, int]) -> Tensor:  # [B, D, h, w] -> [H + W]
    """The position of each row, and then of each column, of the output within its feature, as in the published code.

    Positions are in half features from the centre. Each is the difference of two centres in [-1, 1], in float32 (float64 for
    float64), times the size, which differs by about 1e-7 · h from the exact fraction. The networks were trained with these
    numbers. The feature is the one that `grid_sample` reads, so a rounded coordinate half way between two features decides
    between them as it does there.
    """
    work = torch.float64 if features.dtype == torch.float64 else torch.float32
    axes = []
    for small, large in zip(features.shape[2:], size, strict=True):
        centres, place = (
            -1 + 1 / n + (2 / n) * torch.arange(n, device=features.device).to(work) for n in (small, max(large, 1))
        )
        grid = torch.stack([place, torch.zeros_like(place)], dim=-1)[None, None]
        nearest = F.grid_sample(centres[None, None, None], grid, mode="nearest", align_corners=False)[0, 0, 0]
        axes.append(((place - nearest) * small)[:large])
    return torch.cat(axes)


def features_read(size: int, relative: Tensor) -> Tensor:  # [n] -> [n]
    """Along one axis of `size` features, the feature that each output pixel reads at coordinates such as the above."""
    return placed_axis(size, len(relative), relative)


def rename_published(key: str) -> str:
    """The name in :class:`PCSR` of a published parameter."""
    for old, new in (("light_sampler.imnet", "upsamplers.0"), ("heavy_sampler.imnet", "upsamplers.1")):
        key = key.replace(old, new)
    return key.replace("classifier.imnet", "classifier")
