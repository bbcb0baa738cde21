"""Distillation by contrast: the most expensive branch teaches the others in the space of some feature network.

:class:`ContrastiveLoss` is that of CDNSR, :class:`CSDLoss` that of CSD, from which CDNSR's code took its features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.models.checkpoints import CheckpointError, load_weights, read_checkpoint, state_dict_of
from fastroute.training.distributed import process_mean
from fastroute.training.losses import at_least_single

# CSD's weights of five feature layers, shallow to deep; fewer layers take the last ones.
LAYER_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)
# Indices of VGG-19's features at its first ReLU of every resolution, and the widths of its convolutions at each.
VGG19_LAYERS = (1, 6, 11, 20, 29)
VGG19_WIDTHS = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPSILON = 1e-7


class FeatureStack(nn.Module):
    """What a sequence of layers computes at some of them; frozen.

    Args:
        layers: for the published losses ``torchvision.models.vgg19(weights=...).features``.
        cuts: indices of the layers whose outputs are wanted, rising.
        mean, std: per channel, by which the input is normalised.

    Attributes:
        channels: number of channels of the last output.

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
        self.channels = [module.out_channels for module in self.layers.modules() if isinstance(module, nn.Conv2d)][-1]
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


def vgg19_features(path: str | Path) -> FeatureStack:
    """VGG-19's features at its first ReLU of every resolution, in which the published losses are computed.

    Args:
        path: torchvision's weights of VGG-19, such as vgg19-dcbb9e9d.pth. Only its convolutions are read.

    Raises:
        fastroute.CheckpointError: the file cannot be read, or holds another network.
    """
    layers: list[nn.Module] = []
    fan_in = 3
    for widths in VGG19_WIDTHS:
        for width in widths:
            layers += [nn.Conv2d(fan_in, width, 3, padding=1), nn.ReLU()]
            fan_in = width
        layers.append(nn.MaxPool2d(2))
    network = nn.Sequential(*layers[: VGG19_LAYERS[-1] + 1])
    content, _ = read_checkpoint(path)
    state = {key.removeprefix("features."): value for key, value in state_dict_of(content, path).items()}
    wanted = {key: value for key, value in state.items() if key in network.state_dict()}
    if not wanted:
        raise CheckpointError(
            f"cannot use {path} as VGG-19: it has no features.0.weight; its keys are {', '.join(state)[:100]}"
        )
    load_weights(network, wanted, path)
    return FeatureStack(network)


class Distillation(nn.Module, ABC):
    """A loss that draws students to their teacher and away from blurred images, which both do not learn from it.

    Args:
        features: maps images to a list of features, such as :class:`FeatureStack`.
    """

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features

    def forward(self, student: Tensor, teacher: Tensor, negatives: Tensor) -> Tensor:  # [N, C, P, P] twice, [M, C, P, P]
        """The loss of one student.

        Args:
            student, teacher: what two branches make of the same patches.
            negatives: M images of the same size, every one of which is a negative to every patch: interpolated LR patches.

        Raises:
            ValueError: there are no negatives.
        """
        return self._compare(self._embed(student), *self._fixed(teacher, negatives))

    def of_branches(self, outputs: Tensor, negatives: Tensor) -> Tensor:  # [K, N, C, P, P], [M, C, P, P]
        """The sum over all branches but the last, which is their teacher."""
        fixed = self._fixed(outputs[-1], negatives)
        return torch.stack([self._compare(self._embed(student), *fixed) for student in outputs[:-1]]).sum()

    @torch.no_grad()
    def _fixed(self, teacher: Tensor, negatives: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """What is compared of images that do not learn."""
        if not len(negatives):
            raise ValueError(f"{type(self).__name__}: negatives must hold at least one image; got none")
        return self._embed(teacher), self._embed(negatives)

    @abstractmethod
    def _embed(self, images: Tensor) -> list[Tensor]:  # [N, C, P, P]
        """What is compared of images."""

    @abstractmethod
    def _compare(self, students: list[Tensor], teachers: list[Tensor], blurred: list[Tensor]) -> Tensor:
        """The loss of one student."""


class ContrastiveLoss(Distillation):
    """CDNSR's contrastive loss, equations 7 to 9: near the teacher, far from blurred images.

    The last features of an image, averaged over it, pass through a projection of two layers to a vector z. The loss of a patch
    is -log(exp(cos(z, z_teacher)) / sum over all S negatives of exp(cos(z, z_negative))), and that of a batch its mean. The
    projection learns with the students; the vectors of teacher and negatives are detached.

    Args:
        features: maps images to a list of features, of which the last one is used; those of VGG-19 in the report, see
            :func:`vgg19_features`. Its attribute `channels` is the number of channels of the last.
        width: length of the vectors, and of the layer between; default the number of channels, as published.
    """

    def __init__(self, features: nn.Module, width: int | None = None) -> None:
        super().__init__(features)
        channels = int(features.channels)  # type: ignore[arg-type]
        width = width or channels
        self.projection = nn.Sequential(nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, width))

    def _embed(self, images: Tensor) -> list[Tensor]:
        return [at_least_single(self.projection(self.features(images)[-1].mean(dim=(2, 3))))]

    def _compare(self, students: list[Tensor], teachers: list[Tensor], blurred: list[Tensor]) -> Tensor:
        student, teacher, negatives = (F.normalize(x[0], dim=1) for x in (students, teachers, blurred))
        near, far = (student * teacher).sum(dim=1), student @ negatives.t()
        return (far.logsumexp(dim=1) - near).mean()


class CSDLoss(Distillation):
    """CSD's contrastive loss: the distance to the teacher over the distances to blurred images.

    For each feature layer, the mean distance |student - teacher| over the sum of the distances |student - negative| to all
    negatives; the layers' ratios are summed with `weights`. Teacher and negatives are detached: only students learn.

    Args:
        features: maps images to a list of features, such as :class:`FeatureStack`.
        weights: one per feature; default the last ones of 1/32, 1/16, 1/8, 1/4, 1.

    Source: Wang et al., "Towards Compact Single Image Super-Resolution via Contrastive Self-distillation", IJCAI 2021.
    """

    def __init__(self, features: nn.Module, weights: Sequence[float] | None = None) -> None:
        super().__init__(features)
        self.weights = weights

    def _embed(self, images: Tensor) -> list[Tensor]:
        return [at_least_single(x) for x in self.features(images)]

    def _compare(self, students: list[Tensor], teachers: list[Tensor], blurred: list[Tensor]) -> Tensor:
        weights = LAYER_WEIGHTS[-len(students) :] if self.weights is None else self.weights
        if len(weights) != len(students):
            raise ValueError(f"CSDLoss: weights must be one per feature, {len(students)}; got {len(weights)}")
        loss = students[0].new_zeros(())
        for weight, s, t, n in zip(weights, students, teachers, blurred, strict=True):
            # One negative at a time: all pairs at once would be M times the features.
            means = process_mean(torch.stack([(s - t).abs().mean(), *((s - one).abs().mean() for one in n)]))
            loss = loss + weight * means[0] / (means[1:].sum() + EPSILON)
        return loss
