"""The FLOPs of the pixel path, and its statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import add

from torch import nn

from fastroute.ops.pixel_mlp import Layers
from fastroute.profiling import PCSR, RoutedFlops, count_each, mix_flops
from fastroute.runtime.results import RoutingStats

# Side of the image on which the FLOPs of an encoder are counted.
SIDE = 16


@dataclass(frozen=True)
class PixelStats(RoutingStats):
    """Statistics of one call of :meth:`PixelRouter.upscale`, whose `patches` are output pixels.

    The stages are encode, classify, solve (the search for the exponent under a budget), assign, upsample and refine.
    """

    @property
    def overhead(self) -> float:
        """The share of the time that is spent outside the networks."""
        networks = sum(self.seconds[name] for name in ("encode", "classify", "upsample"))
        return 1 - networks / self.seconds["total"]

    def __str__(self) -> str:
        return super().__str__().replace("patches", "pixels", 1)


@dataclass(frozen=True)
class Work:
    """The work for some images that does not depend on the classes of their pixels.

    Attributes:
        features: pixels of the images.
        pixels: pixels of the outputs.
        encoded: pixels of the images that pass through the encoder.
        classified, products: output pixels that pass through the classifier, and features that its first layer multiplies.
    """

    features: int = 0
    pixels: int = 0
    encoded: int = 0
    classified: int = 0
    products: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*map(add, vars(self).values(), vars(other).values()))


class PixelFlops:
    """FLOPs per output pixel and per feature, because all pixels of a feature share the product of a first layer.

    Args:
        encoder: the original encoder.
        channels: number of channels of the images.
        mlps: layers of the upsamplers.
        classifier: layers of the classifier.
    """

    def __init__(self, encoder: nn.Module, channels: int, mlps: Sequence[Layers], classifier: Layers) -> None:
        size = (1, channels, SIDE, SIDE)
        flops = count_each(encoder, size)
        self.encoder, self.encoder_paper = flops["true"] / SIDE**2, flops["pcsr"] / SIDE**2
        self.pixel, self.feature = [_per_pixel(mlp) for mlp in mlps], [_per_feature(mlp) for mlp in mlps]
        self.paper = [_weights(mlp) for mlp in mlps]
        self.classifier = _per_pixel(classifier), _per_feature(classifier)
        self.classifier_paper = _weights(classifier)
        # A network without counted operations still writes its values.
        self.costs = [float(flops or size[1]) for flops in self.pixel]

    def all_in(self, number: int, work: Work) -> float:
        """The FLOPs with all pixels in class `number` and none classified."""
        return self.encoder * work.features + self.feature[number] * work.features + self.costs[number] * work.pixels

    def fixed(self, work: Work) -> float:
        """The FLOPs of everything except the upsamplers, all of which are in use."""
        classifier = self.classifier[0] * work.classified + self.classifier[1] * work.products
        return self.encoder * work.encoded + sum(self.feature) * work.features + classifier

    def done(self, counts: Sequence[int], work: Work) -> tuple[RoutedFlops, RoutedFlops]:
        """The FLOPs as done, and as PCSR counts: with the classifier at every pixel, but not in what is dense.

        Args:
            counts: pixels per class.
            work: all other work.
        """
        used = sum(shared for shared, n in zip(self.feature, counts, strict=True) if n)
        classifier = self.classifier[0] * work.classified + self.classifier[1] * work.products
        every = self.classifier_paper * work.pixels if work.classified else 0
        true, paper = mix_flops(self.pixel, counts, classifier), mix_flops(self.paper, counts, every)
        routed = true.routed + self.encoder * work.encoded + used * work.features
        dense = true.dense + self.encoder * work.features + max(self.feature) * work.features
        encoder = self.encoder_paper * work.features
        return RoutedFlops(routed, dense, dense), RoutedFlops(paper.routed + encoder, paper.dense + encoder, paper=PCSR)


def _per_pixel(layers: Layers) -> int:
    """The FLOPs as done, without the product with the features."""
    first = layers[0][0].shape if layers else (0, 4)
    # The parts of the first layer for the row and for the column are two multiply-adds per unit.
    return 2 * (sum(weight.numel() for weight, _ in layers) - first[0] * (first[1] - 2))


def _weights(layers: Layers) -> int:
    """The FLOPs that PCSR counts for a pixel."""
    return 2 * sum(weight.numel() for weight, _ in layers)


def _per_feature(layers: Layers) -> int:
    return 2 * layers[0][0].shape[0] * (layers[0][0].shape[1] - 4) if layers else 0
