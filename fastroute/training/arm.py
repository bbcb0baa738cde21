"""The ARM recipe: one width per step, drawn by cost, then the table from edge scores to PSNR."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fastroute.grid import usual_stride
from fastroute.models.arm import ARM, BACKBONES, BINS, edge_score
from fastroute.patch.patch_router import PatchRouter
from fastroute.training.base import RecipeTrainer, routed
from fastroute.training.checks import check_backbone, check_settings, check_shares, check_widths
from fastroute.training.optimizers import check_optimizer
from fastroute.training.start import Start, start_network
from fastroute.training.trainer import Stage, StepResult
from fastroute.training.validation import Upscale

MEASURED_AT_ONCE = 32


@dataclass(frozen=True)
class Recipe:
    """What is trained, and for how long.

    Attributes:
        backbone: "fsrcnn", "carn", "srresnet" or "rcan"; "own" for a model given in Python.
        widths: rising; class 0 is interpolation.
        scale, patch: upscaling factor and LR patch size.
        steps: each trains one width; 0 only measures the table, of weights to start from.
        batch: patches per step.
        balance: how much the widths heed easy patches, as for ClassSR; see :class:`fastroute.training.classsr.BranchRecipe`.
        learning_rate: peak rate, annealed by a cosine.
        optimizer: "adam" or "soap", of all stages; see :func:`fastroute.training.optimizers.make_optimizer`.
        bins: of the table.
        table_patches: patches on which the table is measured, spread evenly from the easiest to the hardest.
        eta: what a decibel is worth, in units of the most expensive class's FLOPs; the published code tries 0.5 to 32.
        seed: fixes initial weights, widths and batches.
    """

    backbone: str = "fsrcnn"
    widths: tuple[int, ...] = (16, 36, 56)
    scale: int = 4
    patch: int = 32
    steps: int = 30000
    batch: int = 32
    balance: float = 0.0
    learning_rate: float = 1e-3
    optimizer: str = "adam"
    bins: int = BINS
    table_patches: int = 8000
    eta: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self, ("scale", "patch", "batch", "bins", "table_patches"), ("steps", "seed"))
        check_widths(self.widths)
        check_shares(self, "balance")
        check_optimizer(self.optimizer)
        check_backbone(self.backbone, BACKBONES)
        if not self.eta > 0:
            raise ValueError(f"train: eta must be above 0; got {self.eta}")


class Trainer(RecipeTrainer):
    """Runs a :class:`Recipe` with progress and exact resume; see :class:`RecipeTrainer` for the arguments.

    `init` may also be one network of the largest width, such as a published supernet, which has no table. Of a ClassSR or CDNSR
    model it takes the most expensive branch. The narrower networks are the first channels of this network, as always, and are
    trained from there.
    """

    system = "arm"

    def build(self) -> nn.Module:
        """See :class:`RecipeTrainer`."""
        r = self.recipe
        return ARM(r.backbone, r.widths, r.scale, r.bins, r.patch)

    def prepare(self) -> None:
        """Finds how often each width learns."""
        cost = self.model.classifier.cost
        self.share = (cost.square() / cost.square().sum()).cpu().numpy()

    def upscale(self, stage: Stage) -> Upscale:
        """All classes, as the table measured by now chooses."""
        r, arm = self.recipe, self.model
        router = PatchRouter(
            arm.branches, arm.classifier, patch=r.patch, stride=usual_stride(r.patch), scale=r.scale, window="hann",
            costs=arm.costs(r.patch), tune=False,
        )  # fmt: skip
        return routed(router)

    def start_from(self, start: Start) -> None:
        """See :class:`RecipeTrainer`."""
        if "classifier.table.psnr" in start.state:
            super().start_from(start)
        else:
            start_network(self.model.network, start.network)

    def plan(self) -> list[Stage]:
        """See :class:`fastroute.training.Trainer`."""
        return [Stage("widths", self.recipe.steps, self.recipe.learning_rate, "widths")]

    def parameters(self, stage: Stage) -> list[nn.Parameter]:
        """See :class:`fastroute.training.Trainer`."""
        return list(self.model.network.parameters())

    def loss(self, stage: Stage, rng: np.random.Generator) -> StepResult:
        """See :class:`fastroute.training.Trainer`."""
        # By the square of its cost, as published: a wide network learns more slowly. Interpolation costs nothing.
        k = int(rng.choice(len(self.share), p=self.share))
        indices = self.draw_patches(self.recipe.batch, rng)
        lr, hr = self.batch(indices, rng)
        # Squared, as PSNR counts.
        errors = (self.model.run(k, lr) - hr).square().mean(dim=(1, 2, 3))
        loss, width = self.balanced(errors, indices), int(self.model.widths[k - 1])
        return StepResult(100 * loss, errors.detach().mean(), lambda: f", last width {width}")

    def finish(self) -> None:
        """See :class:`fastroute.training.Trainer`."""
        super().finish()
        # The recipe's, whatever weights it started from.
        self.model.classifier.eta.copy_(self.recipe.eta * self.model.classifier.cost[-1])
        total = len(self.pool.positions)
        chosen = np.unique(np.linspace(0, total - 1, min(total, self.recipe.table_patches)).round().astype(np.int64))
        rng = np.random.default_rng(self.recipe.seed)
        scores, psnrs = [], []
        for indices in np.array_split(chosen, -(-len(chosen) // MEASURED_AT_ONCE)):
            lr, hr = self.batch(indices, rng, slice(None))
            scores.append(edge_score(lr))
            psnrs.append(self.model.measure(lr, hr))
        self.model.table.fit(torch.cat(scores), torch.cat(psnrs))
