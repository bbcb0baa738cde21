"""CDNSR's contrastive distillation: the most expensive branch teaches the others in the space of some feature network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastroute.training.distributed import process_mean
from fastroute.training.losses import at_least_single

# Weights of five feature layers, shallow to deep; fewer layers take the last ones.
LAYER_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)
# Indices of VGG-19's features at its first ReLU of every resolution.
VGG19_LAYERS = (1, 6, 11, 20, 29)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPSILON = 1e-7


class FeatureStack(nn.Module):
    """What a sequence of layers computes at some of them; frozen.

    Args:
        layers: for the published loss ``torchvision.models.vgg19(weights=...).features``.
        cuts: indices of the layers whose outputs are wanted, rising.
        mean, std: per channel, by which the input is normalised.

    Shape:
        (N, C, P, P) in [0, 1] to one tensor per cut.
    """

    def __init__(
        self,
        layers: nn.Sequential,
        cuts: Sequence[int] = VGG19_LAYERS,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        if not cuts or list(cuts) != sorted(set(cuts)) or not 0 <= cuts[0] <= cuts[-1] < len(layers):
            raise ValueError(f"FeatureStack: cuts must rise within the {len(layers)} layers; got {tuple(cuts)}")
        self.layers: nn.Sequential = nn.Sequential(*list(layers)[: cuts[-1] + 1]).eval().requires_grad_(False)
        self.cuts = tuple(cuts)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def train(self, mode: bool = True) -> FeatureStack:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, x: Tensor) -> list[Tensor]:  # [N, C, P, P]
        """See the class."""
        x = (x - self.get_buffer("mean").to(x)) / self.get_buffer("std").to(x)
        found = []
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in self.cuts:
                found.append(x)
                # A next layer that works in place would change what is handed out.
                x = x.clone()
        return found


def small_features(channels: int = 3, width: int = 16, levels: int = 3, seed: int = 0) -> FeatureStack:
    """A feature network that needs no download: random orthogonal filters at falling resolution.

    Untrained filters prefer no pattern of pixels over another; orthogonal ones count each once. The same seed gives the same
    network everywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    cuts = []
    fan_in = channels
    for level in range(levels):
        fan_out = width * 2**level
        conv = nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1, bias=False)
        with torch.no_grad():
            nn.init.orthogonal_(conv.weight, gain=2**0.5, generator=generator)
        layers += [conv, nn.ReLU()]
        cuts.append(len(layers) - 1)
        fan_in = fan_out
    return FeatureStack(nn.Sequential(*layers), cuts, (0.5,) * channels, (0.25,) * channels)


class ContrastiveLoss(nn.Module):
    """Near the teacher, far from blurred images; CDNSR, equations 7 to 9, after CSD (Wang et al., IJCAI 2021).

    For each feature layer, the mean distance |student - teacher| over the sum of the distances |student - negative| to all
    negatives; the layers' ratios are summed with `weights`. Teacher and negatives are detached: only students learn.

    Args:
        features: maps images to a list of features, such as :class:`FeatureStack`.
        weights: one per feature; default the last ones of 1/32, 1/16, 1/8, 1/4, 1.
    """

    def __init__(self, features: nn.Module, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.features, self.weights = features, weights

    def forward(self, student: Tensor, teacher: Tensor, negatives: Tensor) -> Tensor:  # [N, C, P, P] twice, [M, C, P, P]
        """The loss of one student.

        Args:
            student, teacher: what two branches make of the same patches.
            negatives: M images of the same size, every one of which is a negative to every patch: interpolated LR patches.
        """
        return self._compare(student, *self._fixed(teacher, negatives))

    def of_branches(self, outputs: Tensor, negatives: Tensor) -> Tensor:  # [K, N, C, P, P], [M, C, P, P]
        """The sum over all branches but the last, which is their teacher."""
        fixed = self._fixed(outputs[-1], negatives)
        return torch.stack([self._compare(student, *fixed) for student in outputs[:-1]]).sum()

    @torch.no_grad()
    def _fixed(self, teacher: Tensor, negatives: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Features of what does not learn."""
        if not len(negatives):
            raise ValueError("ContrastiveLoss: negatives must hold at least one image; got none")
        return self.features(teacher), self.features(negatives)

    def _compare(self, student: Tensor, teachers: list[Tensor], blurred: list[Tensor]) -> Tensor:
        every = (self.features(student), teachers, blurred)
        students, teachers, blurred = ([at_least_single(x) for x in features] for features in every)
        weights = LAYER_WEIGHTS[-len(students) :] if self.weights is None else self.weights
        if len(weights) != len(students):
            raise ValueError(f"ContrastiveLoss: weights must be one per feature, {len(students)}; got {len(weights)}")
        loss = student.new_zeros(())
        for weight, s, t, n in zip(weights, students, teachers, blurred, strict=True):
            # One negative at a time: all pairs at once would be M times the features.
            means = process_mean(torch.stack([(s - t).abs().mean(), *((s - one).abs().mean() for one in n)]))
            loss = loss + weight * means[0] / (means[1:].sum() + EPSILON)
        return loss
