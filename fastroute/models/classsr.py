"""ClassSR: "A General Framework to Accelerate Super-Resolution Networks by Data Characteristic", Kong et al., CVPR 2021."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastroute.models.fsrcnn import FSRCNN


class PatchClassifier(nn.Module):
    """ClassSR's class module: one 4 x 4 stride-4 and four 1 x 1 convolutions, an average and a linear layer.

    Args:
        num_classes: number of branches to choose from.
        width: channels of the hidden layers.

    Shape:
        patches (N, 3, p, p), p a multiple of 4, to class probabilities (N, num_classes).
    """

    CELL = 4

    def __init__(self, num_classes: int = 3, width: int = 128) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, self.CELL, self.CELL), nn.LeakyReLU(0.1)]
        for _ in range(3):
            layers += [nn.Conv2d(width, width, 1), nn.LeakyReLU(0.1)]
        layers.append(nn.Conv2d(width, 32, 1))
        self.CondNet = nn.Sequential(*layers)
        self.lastOut = nn.Linear(32, num_classes)

    def logits(self, patches: Tensor) -> Tensor:  # [N, 3, p, p] -> [N, K]
        """Class scores before the softmax."""
        return self.lastOut(self.CondNet(patches).mean(dim=(2, 3)))

    def forward(self, patches: Tensor) -> Tensor:  # [N, 3, p, p] -> [N, K]
        """Class probabilities."""
        return torch.softmax(self.logits(patches), dim=1)


class ClassSR(nn.Module):
    """A classifier and one branch per class, in the published state-dict layout (`classifier`, `net1`, `net2`, …).

    Args:
        branches: one network per class, from the cheapest to the dearest.
        classifier: maps patches (N, C, p, p) to probabilities (N, K).

    Shape:
        (N, C, p, p) to (N, C, p * scale, p * scale). In training mode the output is the mixture of all branches
        weighted by their probabilities (ClassSR, equation 2); in evaluation mode each patch goes through its most
        probable branch. This is the plain form that defines the numbers; :class:`fastroute.PatchRouter` is the fast one.
    """

    def __init__(self, branches: Sequence[nn.Module], classifier: nn.Module | None = None) -> None:
        super().__init__()
        if not branches:
            raise ValueError("ClassSR: branches must hold at least one network; got none")
        self.num_classes = len(branches)
        self.scale = int(branches[0].scale)  # type: ignore[arg-type]
        self.classifier = classifier if classifier is not None else PatchClassifier(self.num_classes)
        for number, branch in enumerate(branches, start=1):
            self.add_module(f"net{number}", branch)

    @classmethod
    def fsrcnn(cls, widths: Sequence[int] = (16, 36, 56), scale: int = 4) -> ClassSR:
        """ClassSR over FSRCNN branches; the default widths are the published ones."""
        return cls([FSRCNN(width, scale) for width in widths])

    @property
    def branches(self) -> list[nn.Module]:
        """The branches, cheapest first."""
        return [self.get_submodule(f"net{number}") for number in range(1, self.num_classes + 1)]

    def mixture(self, patches: Tensor) -> tuple[Tensor, Tensor]:  # [N, C, p, p] -> [N, C, P, P], [N, K]
        """The probability-weighted sum of all branches, and the probabilities; whole batches, no loop over patches."""
        probability = self.classifier(patches)
        weights = probability.t()[:, :, None, None, None]
        mixed = torch.stack([w * branch(patches) for w, branch in zip(weights, self.branches, strict=True)])
        return mixed.sum(dim=0), probability

    def forward(self, patches: Tensor) -> Tensor:  # [N, C, p, p] -> [N, C, P, P]
        """The mixture in training mode, the chosen branch otherwise."""
        if self.training:
            return self.mixture(patches)[0]
        class_ids = self.classifier(patches).argmax(dim=1)
        n, c, height, width = patches.shape
        output = patches.new_empty(n, c, height * self.scale, width * self.scale)
        for k, branch in enumerate(self.branches):
            rows = (class_ids == k).nonzero().squeeze(1)
            if rows.numel():
                output[rows] = branch(patches[rows])
        return output
