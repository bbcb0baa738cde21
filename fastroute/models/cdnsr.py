"""CDNSR: "Classification-based Dynamic Network for Efficient Super-Resolution", Wang et al., ICASSP 2023."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastroute.models.carn import CARN
from fastroute.models.classsr import BACKBONES, ClassSR, PatchClassifier

# Feature channels of the branches in the report.
WIDTHS = {"fsrcnn": (16, 36, 56), "carn": (36, 52, 56), "srresnet": (36, 52, 64), "rcan": (36, 50, 64)}
CLASSIFIER_LAYERS = (3, 4, 5, 6)


class CDNSR(ClassSR):
    """ClassSR's classifier and branches, with hard choices relaxed by Gumbel noise while it trains.

    The state dict has ClassSR's layout, and evaluation is ClassSR's: each patch goes through its most probable branch.

    Args:
        branches: one network per class, from the cheapest to the most expensive; the last teaches the others.
        classifier: maps patches (N, C, p, p) to probabilities (N, K), and has their `logits`.

    Attributes:
        temperature: temperature of the relaxation. The smaller it is, the closer the choice is to one branch per patch.
    """

    temperature = 1.0

    @classmethod
    def build(cls, backbone: str, widths: Sequence[int] | None = None, scale: int = 4, layers: int = 5) -> CDNSR:
        """CDNSR over a backbone.

        Args:
            backbone: "fsrcnn", "carn", "srresnet" or "rcan".
            widths: feature channels of the branches, cheapest first. Default: those of the report.
            scale: upscaling factor.
            layers: number of convolutions of the classifier, 3 to 6.
        """
        if backbone not in BACKBONES:
            raise ValueError(f"CDNSR: backbone must be one of {', '.join(BACKBONES)}; got {backbone!r}")
        if layers not in CLASSIFIER_LAYERS:
            raise ValueError(f"CDNSR: layers must be 3 to 6; got {layers}")
        branches: list[nn.Module] = []
        for width in WIDTHS[backbone] if widths is None else widths:
            # Its CARN has biases in place of batch norms, whose statistics a mixture of classes would blur.
            carn = backbone == "carn"
            branches.append(
                CARN(width, scale, mean_layers=True, batch_norm=False) if carn else BACKBONES[backbone](width, scale)
            )
        return cls(branches, PatchClassifier(len(branches), layers=layers))

    def outputs(self, patches: Tensor) -> Tensor:  # [N, C, p, p] -> [K, N, C, P, P]
        """The output of every branch for every patch."""
        return torch.stack([branch(patches) for branch in self.branches])

    def relaxed(self, patches: Tensor, noise: Tensor | None = None) -> Tensor:  # [N, C, p, p], [N, K] -> [N, K]
        """The class weights in training, from :func:`gumbel_softmax` at the present temperature."""
        return gumbel_softmax(self.classifier.logits(patches), self.temperature, noise)  # type: ignore[operator]

    def mixture(self, patches: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:  # [N, C, p, p], [N, K]
        """The sum of all branches under relaxed choices, and the choices (N, K), without a loop over patches."""
        weights = self.relaxed(patches, noise)
        return self.mixed(patches, weights), weights


def mix(outputs: Tensor, weights: Tensor) -> Tensor:  # [K, N, C, P, P], [N, K] -> [N, C, P, P]
    """The weighted sum of the branches' outputs for each patch."""
    return (weights.t()[:, :, None, None, None] * outputs).sum(dim=0)


def gumbel_noise(size: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Samples of the Gumbel distribution, -log(-log u) with u uniform in (0, 1); CDNSR, equation 5."""
    uniform = torch.rand(tuple(size), generator=generator, dtype=torch.float64)
    # A zero is infinitely unlikely, and its logarithm would be infinite.
    return -(-uniform.clamp(min=torch.finfo(torch.float64).tiny).log()).log()


def gumbel_softmax(logits: Tensor, temperature: float, noise: Tensor | None = None) -> Tensor:  # [N, K], [N, K] -> [N, K]
    """softmax((logits + noise) / temperature), CDNSR, equation 6.

    The argmax is a sample from softmax(logits); the weights around it have gradients, and at temperature 0 would be one-hot.

    Args:
        logits: class scores.
        temperature: above 0.
        noise: Gumbel noise. Default: drawn here.
    """
    if not temperature > 0:
        raise ValueError(f"gumbel_softmax: temperature must be above 0; got {temperature}")
    if noise is None:
        noise = gumbel_noise(logits.shape)
    if noise.shape != logits.shape:
        raise ValueError(f"gumbel_softmax: noise must be {tuple(logits.shape)} as logits; got {tuple(noise.shape)}")
    return torch.softmax((logits + noise.to(logits)) / temperature, dim=1)


def annealed(step: int, steps: int, first: float = 1.0, last: float = 0.4) -> float:
    """The temperature in training: it falls from `first` by first / steps at every step, but never below `last`."""
    return max(first * (1 - step / max(steps, 1)), last)
