"""The CDNSR recipe in its four steps: branches, classifier, both together, contrastive distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.models.cdnsr import CDNSR, CLASSIFIER_LAYERS, annealed, gumbel_softmax, mix
from fastroute.runtime.transfer import to_device
from fastroute.training import distributed
from fastroute.training.base import class_shares
from fastroute.training.checks import check_settings
from fastroute.training.classsr import BranchRecipe, BranchTrainer
from fastroute.training.distillation import (
    ContrastiveLoss,
    CSDLoss,
    Distillation,
    FeatureStack,
    small_features,
    vgg19_features,
)
from fastroute.training.losses import at_least_single, cdnsr_loss
from fastroute.training.start import Start, start_branches
from fastroute.training.trainer import Stage, StepResult

# Target FLOPs of the variants, as a fraction of the most expensive branch: near the full network, medium, small.
VARIANTS = {"r": 0.85, "m": 0.65, "s": 0.5}
CONTRASTS: dict[str, Callable[[FeatureStack], Distillation]] = {"cdnsr": ContrastiveLoss, "csd": CSDLoss}


@dataclass(frozen=True)
class Recipe(BranchRecipe):
    """What is trained, and for how long; step 1, the branches, is :class:`BranchRecipe`.

    Attributes:
        variant: "r", "m" or "s", by which `alpha` goes.
        alpha: FLOPs to aim at, as a fraction of the most expensive branch's; 0 takes that of the variant.
        lambda_reg: weight of the FLOPs beside `image_weight`.
        layers: convolutions of the classifier, 3 to 6.
        classifier_steps: step 2, the classifier alone, the branches frozen.
        joint_steps: step 3, classifier and branches together.
        distill_steps: step 4, the branches alone under the trained classifier, the most expensive teaching the others.
        classifier_rate, joint_rate, distill_rate: peak rates of these steps.
        image_weight: of the absolute error.
        contrast: the contrastive loss of step 4: "cdnsr" for :class:`ContrastiveLoss`, "csd" for :class:`CSDLoss`.
        features: file of VGG-19's weights as torchvision stores them, in whose features it is computed, as published; by
            default those of :func:`small_features`, which need no file.
        contrast_weight: of the contrastive loss.
        contrast_batch: patches of a batch that it looks at; its features cost more than the branches.
        negatives: interpolated patches of the batch that serve as negatives.
        temperature: of the Gumbel softmax; falls in steps 2 and 3 each to `last_temperature`, where step 4 keeps it.
    """

    variant: str = "m"
    alpha: float = 0.0
    lambda_reg: float = 30.0
    layers: int = 5
    classifier_steps: int = 2000
    joint_steps: int = 2000
    distill_steps: int = 2000
    classifier_rate: float = 5e-4
    joint_rate: float = 1e-4
    distill_rate: float = 1e-4
    image_weight: float = 1000.0
    contrast: str = "cdnsr"
    features: str = ""
    contrast_weight: float = 1.0
    contrast_batch: int = 16
    negatives: int = 6
    temperature: float = 1.0
    last_temperature: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(
            self,
            ("classifier_steps", "joint_steps", "distill_steps", "negatives", "contrast_batch"),
            ("lambda_reg", "contrast_weight"),
        )
        if self.variant not in VARIANTS:
            raise ValueError(f"train: variant must be one of {', '.join(VARIANTS)}; got {self.variant!r}")
        if self.contrast not in CONTRASTS:
            raise ValueError(f"train: contrast must be one of {', '.join(CONTRASTS)}; got {self.contrast!r}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"train: alpha must lie in [0, 1]; got {self.alpha}")
        if self.layers not in CLASSIFIER_LAYERS:
            raise ValueError(f"train: layers must be 3 to 6; got {self.layers}")
        if not 0 < self.last_temperature <= self.temperature:
            raise ValueError(
                f"train: temperature must not be below last_temperature, above 0; got {self.temperature} and "
                f"{self.last_temperature}"
            )

    @property
    def target(self) -> float:
        """The FLOPs aimed at."""
        return self.alpha or VARIANTS[self.variant]


class Trainer(BranchTrainer):
    """Runs a :class:`Recipe` with progress and exact resume; see :class:`RecipeTrainer` for the arguments.

    `init` may also be a ClassSR, of which it takes the branches: its classifier is too sure of its choices for noise to
    move it.

    Attributes:
        contrast: the loss of step 4.
    """

    system = "cdnsr"

    def build(self) -> nn.Module:
        """See :class:`RecipeTrainer`."""
        return CDNSR.build(self.recipe.backbone, self.recipe.widths, self.recipe.scale, self.recipe.layers)

    def prepare(self) -> None:
        """Counts what the branches cost, and makes the loss of step 4, whose projection learns there."""
        super().prepare()
        if self.recipe.contrast_batch % distributed.size():
            raise ValueError(f"train: contrast_batch must be a multiple of the processes, {distributed.size()}")
        features = vgg19_features(self.recipe.features) if self.recipe.features else small_features()
        self.contrast = CONTRASTS[self.recipe.contrast](features).to(self.device)
        self.helper = self.contrast.projection if isinstance(self.contrast, ContrastiveLoss) else None

    def start_from(self, start: Start) -> None:
        """See :class:`RecipeTrainer`."""
        if start.recipe.startswith("cdnsr"):
            super().start_from(start)
        else:
            start_branches(self.model.branches, start)

    def plan(self) -> list[Stage]:
        """See :class:`fastroute.training.Trainer`."""
        r = self.recipe
        return [
            *super().plan(),
            Stage("classifier", r.classifier_steps, r.classifier_rate, "classifier"),
            Stage("joint", r.joint_steps, r.joint_rate, "joint"),
            Stage("distillation", r.distill_steps, r.distill_rate, "distill"),
        ]

    def parameters(self, stage: Stage) -> list[nn.Parameter]:
        """See :class:`fastroute.training.Trainer`."""
        if stage.branch is not None:
            return super().parameters(stage)
        if stage.kind == "classifier":
            return list(self.model.classifier.parameters())
        branches = [p for branch in self.model.branches for p in branch.parameters()]
        if stage.kind == "distill":
            return branches if self.helper is None else [*branches, *self.helper.parameters()]
        return [*self.model.classifier.parameters(), *branches]

    def system_loss(self, stage: Stage, lr: Tensor, hr: Tensor, rng: np.random.Generator) -> StepResult:
        """See :class:`BranchTrainer`."""
        r, distill = self.recipe, stage.kind == "distill"
        # `step` counts the steps done, so the temperature is that of an uninterrupted run.
        self.model.temperature = r.last_temperature if distill else annealed(
            self.step, stage.steps, r.temperature, r.last_temperature
        )  # fmt: skip
        # Drawn for the whole batch, of which `lr` is a share.
        processes = distributed.size()
        noise = torch.from_numpy(rng.gumbel(size=(len(lr) * processes, self.model.num_classes))[self.rows])
        noise = to_device(noise, self.device)
        with torch.set_grad_enabled(stage.kind != "classifier"):
            outputs = self.model.outputs(lr)
        with torch.set_grad_enabled(not distill):
            logits = at_least_single(self.model.classifier.logits(lr))
            weights = gumbel_softmax(logits, self.model.temperature, noise)
        mixed = mix(outputs, weights)
        if distill:
            drawn = torch.from_numpy(rng.permutation(len(lr) * processes)[: r.negatives])
            negatives = distributed.gathered(lr)[to_device(drawn, self.device)]
            blurred = F.interpolate(negatives, scale_factor=r.scale, mode="bicubic", align_corners=False)
            contrast = self.contrast.of_branches(outputs[:, : r.contrast_batch // processes], blurred)
            loss = r.image_weight * F.l1_loss(mixed, hr) + r.contrast_weight * contrast
        else:
            loss = cdnsr_loss(mixed, hr, weights, self.cost, r.target, r.lambda_reg, r.image_weight)
        return StepResult(loss, F.mse_loss(mixed.detach(), hr), partial(class_shares, weights.detach()))
