"""ClassSR: "A General Framework to Accelerate Super-Resolution Networks by Data Characteristic", Kong et al., CVPR 2021."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastroute.models.carn import CARN
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.rcan import RCAN
from fastroute.models.srresnet import SRResNet


def carn(width: int, scale: int) -> CARN:
    """CARN as ClassSR trains it, with the mean colour in two convolutions."""
    return CARN(width, scale, mean_layers=True)


# For each backbone, a function of width and scale that makes it in ClassSR's form, and the published widths.
BACKBONES: dict[str, Callable[[int, int], nn.Module]] = {"fsrcnn": FSRCNN, "carn": carn, "srresnet": SRResNet, "rcan": RCAN}
WIDTHS = {"fsrcnn": (16, 36, 56), "carn": (36, 52, 64), "srresnet": (36, 52, 64), "rcan": (36, 50, 64)}


class PatchClassifier(nn.Module):
    """ClassSR's class module: one 4 x 4 stride-4 and four 1 x 1 convolutions, an average and a linear layer.

    Args:
        num_classes: number of branches to choose from.
        width: channels of the hidden layers.
        layers: number of convolutions: 5 in ClassSR, 3 to 6 in CDNSR.

    Shape:
        patches (N, 3, p, p), p a multiple of 4, to class probabilities (N, num_classes).
    """

    CELL = 4

    def __init__(self, num_classes: int = 3, width: int = 128, layers: int = 5) -> None:
        super().__init__()
        if num_classes < 1 or layers < 2:
            raise ValueError(
                f"PatchClassifier: num_classes must be at least 1 and layers at least 2; got {num_classes} and {layers}"
            )
        hidden: list[nn.Module] = [nn.Conv2d(3, width, self.CELL, self.CELL), nn.LeakyReLU(0.1)]
        for _ in range(layers - 2):
            hidden += [nn.Conv2d(width, width, 1), nn.LeakyReLU(0.1)]
        self.CondNet = nn.Sequential(*hidden, nn.Conv2d(width, 32, 1))
        self.lastOut = nn.Linear(32, num_classes)

    def logits(self, patches: Tensor) -> Tensor:  # [N, 3, p, p] -> [N, K]
        """The class scores before the softmax."""
        return self.lastOut(self.CondNet(patches).mean(dim=(2, 3)))

    def forward(self, patches: Tensor) -> Tensor:  # [N, 3, p, p] -> [N, K]
        """Class probabilities."""
        return torch.softmax(self.logits(patches), dim=1)


class ClassSR(nn.Module):
    """A classifier and one branch per class, in the published state-dict layout (`classifier`, `net1`, `net2`, …).

    Args:
        branches: one network per class, from the cheapest to the most expensive.
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
        """ClassSR over FSRCNN branches, by default of the published widths."""
        return cls([FSRCNN(width, scale) for width in widths])

    @classmethod
    def build(cls, backbone: str, widths: Sequence[int] | None = None, scale: int = 4, layers: int = 5) -> ClassSR:
        """ClassSR over a backbone, one branch per width.

        Args:
            backbone: "fsrcnn", "carn", "srresnet" or "rcan".
            widths: feature channels of the branches, cheapest first. Default: the published widths.
            scale: upscaling factor.
            layers: number of convolutions of the classifier.
        """
        if backbone not in BACKBONES:
            raise ValueError(f"ClassSR: backbone must be one of {', '.join(BACKBONES)}; got {backbone!r}")
        chosen = WIDTHS[backbone] if widths is None else widths
        branches = [BACKBONES[backbone](width, scale) for width in chosen]
        return cls(branches, PatchClassifier(len(branches), layers=layers))

    @property
    def branches(self) -> list[nn.Module]:
        """The branches, cheapest first."""
        return [self.get_submodule(f"net{number}") for number in range(1, self.num_classes + 1)]

    def mixture(self, patches: Tensor) -> tuple[Tensor, Tensor]:  # [N, C, p, p] -> [N, C, P, P], [N, K]
        """The sum of all branches weighted by probability, and the probabilities, without a loop over patches."""
        probability = self.classifier(patches)
        return self.mixed(patches, probability), probability

    def mixed(self, patches: Tensor, weights: Tensor) -> Tensor:  # [N, C, p, p], [N, K] -> [N, C, P, P]
        """The weighted sum of the outputs of all branches for each patch."""
        if len(branches := [branch for branch in self.branches if type(branch) is FSRCNN]) == self.num_classes:
            return FSRCNN.mixture(branches, patches, weights)
        each = weights.t()[:, :, None, None, None]
        mixed = each[0] * self.branches[0](patches)
        for weight, branch in zip(each[1:], self.branches[1:], strict=True):
            mixed = torch.addcmul(mixed, weight, branch(patches))
        return mixed

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
