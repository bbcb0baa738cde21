"""The networks of a pixel router as the pixel path runs them, and their costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastroute.models.pcsr import MLP, PixelCosts
from fastroute.ops.pixel_mlp import Layers
from fastroute.pixel.pixel_rows import PixelMemory
from fastroute.pixel.pixel_stats import PixelFlops


@dataclass(frozen=True)
class PixelNetworks:
    """A frozen record of the networks.

    Attributes:
        encoder: maps (B, C, h, w) to features (B, D, h, w).
        mlps: layers of each upsampler, the cheapest first.
        classifier: layers of the classifier.
        mean: (1, C or 1, 1, 1), subtracted from the image before the encoder.
        dtype: type in which they compute.
        channels: number of channels of the images.
        costs: costs of the classes.
        memory: memory that they need.
        flops: FLOPs that they perform.
    """

    encoder: nn.Module
    mlps: Sequence[Layers]
    classifier: Layers
    mean: Tensor
    dtype: torch.dtype
    channels: int
    costs: PixelCosts
    memory: PixelMemory
    flops: PixelFlops

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.mlps)

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return self.mean.device


def layers_of(mlp: nn.Module) -> Layers:
    """Weights and biases of an MLP, layer by layer."""
    assert isinstance(mlp, MLP)
    return [(w.detach(), b.detach()) for w, b in zip(*mlp.parameter_lists, strict=True)]
