"""The networks of a router of pixels as the pixel path runs them, and what they cost."""

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
    """See the module.

    Attributes:
        encoder: maps (B, C, h, w) to features (B, D, h, w).
        mlps: layers of each upsampler, the cheapest first.
        classifier: layers of the classifier.
        mean: (1, C or 1, 1, 1), taken off the image before the encoder.
        dtype: in which they compute.
        channels: of the images.
        costs: of the classes.
        memory: that they take.
        flops: that they do.
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
        """Where they are."""
        return self.mean.device


def layers_of(mlp: nn.Module) -> Layers:
    """Weights and biases of an MLP, layer by layer."""
    assert isinstance(mlp, MLP)
    return [(w.detach(), b.detach()) for w, b in zip(*mlp.parameter_lists, strict=True)]
