"""The ClassSR recipe: branches on their difficulty class, then the classifier, then both together, then what routing costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.grid import usual_stride
from fastroute.models.classsr import BACKBONES, ClassSR, PatchClassifier
from fastroute.patch.patch_router import PatchRouter
from fastroute.profiling import count_flops
from fastroute.training.base import RecipeTrainer, class_shares, routed
from fastroute.training.checks import check_backbone, check_settings, check_shares, check_widths
from fastroute.training.losses import average_loss, class_loss, routing_loss
from fastroute.training.optimizers import check_optimizer
from fastroute.training.trainer import Stage, StepResult
from fastroute.training.validation import Upscale

NORMS = ("running", "batch")


@dataclass(frozen=True)
class BranchRecipe:
    """How branches are pre-trained.

    Attributes:
        backbone: "fsrcnn", "carn", "srresnet" or "rcan"; "own" for a model given in Python.
        widths: feature channels of each branch, cheapest first.
        scale, patch: upscaling factor and LR patch size.
        branch_steps: steps of pre-training of each branch; a cheap branch learns less and needs fewer.
        batch: patches per step.
        focus: share of a branch's pre-training batch that comes from its own difficulty class. The published recipe
            uses 1; the rest, drawn from all classes, keeps every branch usable when a budget sends it other patches.
        balance: how much a branch's pre-training heeds easy patches: the squared error of each counts by the power -`balance`
            of that of its bicubic upscaling. 0 is plain squared error, which hard patches decide; at 1, as in a mean of PSNR,
            a patch counts by the share of its error that goes away.
        learning_rate: peak rate, annealed by a cosine.
        optimizer: "adam" or "soap", of all stages; see :func:`fastroute.training.optimizers.make_optimizer`.
        norms: by what the batch norms of CARN normalise once the branches have been pre-trained: "running" for the statistics
            of that pre-training, as in inference, "batch" for those of each batch. The published loop takes those of a patch.
        seed: fixes initial weights and batches.
    """

    backbone: str = "fsrcnn"
    widths: tuple[int, ...] = (16, 36, 56)
    scale: int = 4
    patch: int = 32
    branch_steps: tuple[int, ...] = (6000, 8000, 12000)
    batch: int = 32
    focus: float = 0.5
    balance: float = 0.0
    learning_rate: float = 1e-3
    optimizer: str = "adam"
    norms: str = "batch"
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self, ("batch", "scale", "patch"), ("seed",))
        check_widths(self.widths)
        if len(self.branch_steps) != len(self.widths) or min(self.branch_steps, default=0) < 1:
            widths, got = (", ".join(map(str, numbers)) for numbers in (self.widths, self.branch_steps))
            raise ValueError(
                f"train: branch_steps must be one positive number per width, {len(self.widths)} for widths {widths}; got {got}"
            )
        if self.patch < (cell := PatchClassifier.CELL):
            raise ValueError(f"train: patch must be at least {cell}, the side of a cell of the classifier; got {self.patch}")
        check_shares(self, "focus", "balance")
        if self.norms not in NORMS:
            raise ValueError(f"train: norms must be one of {', '.join(NORMS)}; got {self.norms!r}")
        check_optimizer(self.optimizer)
        check_backbone(self.backbone, BACKBONES)


@dataclass(frozen=True)
class Recipe(BranchRecipe):
    """What is trained, and for how long; the branches' part is :class:`BranchRecipe`.

    Attributes:
        classifier_steps: steps of the classifier alone, the branches frozen.
        joint_steps: steps of classifier and branches together.
        routing_steps: steps of the classifier alone at the end, by what each choice costs: see :func:`routing_loss`.
        routing_price: squared error (per pixel, of images in [0, 1]) that the most expensive branch must save to be worthwhile.
        classifier_rate, joint_rate, routing_rate: peak rates of these stages.
        image_weight, class_weight, average_weight: loss weights of the classifier and joint stages (1000, 0.5 and 3 as
            published).
    """

    classifier_steps: int = 1200
    joint_steps: int = 800
    routing_steps: int = 1500
    routing_price: float = 3e-5
    classifier_rate: float = 5e-4
    joint_rate: float = 1e-4
    routing_rate: float = 1e-3
    image_weight: float = 1000.0
    class_weight: float = 0.5
    average_weight: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, ("classifier_steps", "joint_steps", "routing_steps"))


class BranchTrainer(RecipeTrainer):
    """Pre-trains branches, each on its difficulty class and on others; see :class:`RecipeTrainer` for the arguments."""

    system = "classsr"

    def build(self) -> nn.Module:
        """See :class:`RecipeTrainer`."""
        return ClassSR.build(self.recipe.backbone, self.recipe.widths, self.recipe.scale)

    def prepare(self) -> None:
        """Counts what the branches cost."""
        if len(self.model.branches) != len(self.recipe.branch_steps):
            raise ValueError(
                f"train: branch_steps must be one number per branch of the model, {len(self.model.branches)}; got "
                f"{len(self.recipe.branch_steps)}"
            )
        flops = [count_flops(branch, (1, 3, self.recipe.patch, self.recipe.patch)) for branch in self.model.branches]
        self.cost = torch.tensor(flops, dtype=torch.float32, device=self.device) / max(flops)

    def upscale(self, stage: Stage) -> Upscale:
        """The branch that learns alone, or all of them as a router chooses."""
        alone, r = stage.branch, self.recipe
        branches = self.model.branches if alone is None else [self.model.branches[alone]]
        classifier = self.model.classifier if alone is None else None
        places = {"patch": r.patch, "stride": usual_stride(r.patch), "scale": r.scale}
        return routed(PatchRouter(branches, classifier, window="hann", tune=False, **places))

    def plan(self) -> list[Stage]:
        """See :class:`fastroute.training.Trainer`."""
        r = self.recipe
        return [
            Stage(f"branch {k + 1}", r.branch_steps[k], r.learning_rate, "branch", k) for k in reversed(range(len(r.widths)))
        ]

    def begin(self, stage: Stage) -> None:
        """See :class:`fastroute.training.Trainer`."""
        super().begin(stage)
        if stage.branch is None and self.recipe.norms == "running":
            for norm in self.norms:
                norm.eval()

    def parameters(self, stage: Stage) -> list[nn.Parameter]:
        """See :class:`fastroute.training.Trainer`."""
        assert stage.branch is not None  # the only stages planned here
        return list(self.model.branches[stage.branch].parameters())

    def largest_norm(self, stage: Stage) -> float:
        """See :class:`fastroute.training.Trainer`."""
        return 10.0 * (1 if stage.branch is not None else self.recipe.image_weight)

    def loss(self, stage: Stage, rng: np.random.Generator) -> StepResult:
        """See :class:`fastroute.training.Trainer`."""
        indices = self.draw(stage, rng)
        lr, hr = self.batch(indices, rng)
        if stage.branch is None:
            return self.system_loss(stage, lr, hr, rng)
        # Squared, as PSNR counts: the error of strong edges decides, which the absolute one undervalues.
        errors = (self.model.branches[stage.branch](lr) - hr).square().mean(dim=(1, 2, 3))
        return StepResult(100 * self.balanced(errors, indices), errors.detach().mean(), lambda: "")

    def system_loss(self, stage: Stage, lr: Tensor, hr: Tensor, rng: np.random.Generator) -> StepResult:
        """Loss of the stages after the branches, for pairs of patches; see :meth:`fastroute.training.Trainer.loss`."""
        raise NotImplementedError(f"a stage {stage.name!r} without a loss")

    def draw(self, stage: Stage, rng: np.random.Generator) -> np.ndarray:
        """Numbers of the patches of a step."""
        # The classifier needs larger batches: its average loss compares class shares within one.
        if stage.branch is None:
            return self.draw_patches(2 * self.recipe.batch, rng)
        low, high = self.pool.class_range(stage.branch, len(self.recipe.widths))
        return self.draw_patches(self.recipe.batch, rng, (low, max(high, low + 1)))


class Trainer(BranchTrainer):
    """Runs a :class:`Recipe` with progress and exact resume; see :class:`RecipeTrainer` for the arguments."""

    def plan(self) -> list[Stage]:
        """See :class:`fastroute.training.Trainer`."""
        r = self.recipe
        return [
            *super().plan(),
            Stage("classifier", r.classifier_steps, r.classifier_rate, "classifier"),
            Stage("joint", r.joint_steps, r.joint_rate, "joint"),
            Stage("routing", r.routing_steps, r.routing_rate, "routing"),
        ]

    def parameters(self, stage: Stage) -> list[nn.Parameter]:
        """See :class:`fastroute.training.Trainer`."""
        if stage.branch is not None:
            return super().parameters(stage)
        return list((self.model if stage.kind == "joint" else self.model.classifier).parameters())

    def system_loss(self, stage: Stage, lr: Tensor, hr: Tensor, rng: np.random.Generator) -> StepResult:
        """See :class:`BranchTrainer`."""
        if stage.kind == "joint":
            output, probability = self.model.mixture(lr)
        else:
            with torch.no_grad():
                outputs = torch.stack([branch(lr) for branch in self.model.branches], dim=1)
            probability = self.model.classifier(lr)
            if stage.kind == "routing":
                errors = (outputs.clamp(0, 1) - hr[:, None]).square().mean(dim=(2, 3, 4))
                chosen = errors.gather(1, probability.argmax(dim=1, keepdim=True)).mean()
                loss = routing_loss(probability, errors, self.cost, self.recipe.routing_price)
                return StepResult(loss, chosen, partial(class_shares, probability.detach()))
            output = (probability[:, :, None, None, None] * outputs).sum(dim=1)
        r = self.recipe
        loss = r.image_weight * F.l1_loss(output, hr)
        loss = loss + r.class_weight * class_loss(probability) + r.average_weight * average_loss(probability)
        return StepResult(loss, F.mse_loss(output.detach(), hr), partial(class_shares, probability.detach()))
