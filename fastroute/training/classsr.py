"""The ClassSR recipe: branches on their difficulty class, then the classifier, then both together, then what routing costs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fastroute import io
from fastroute.models.checkpoints import CheckpointError, load_weights, read_checkpoint
from fastroute.models.classsr import ClassSR
from fastroute.profiling import count_flops
from fastroute.training.data import Pool
from fastroute.training.losses import average_loss, class_loss, routing_loss

STATE_KEYS = {"recipe", "stage", "step", "model", "optimizer"}


@dataclass(frozen=True)
class Recipe:
    """What is trained, and for how long.

    Attributes:
        widths: FSRCNN width of each branch, cheapest first.
        scale, patch: upscaling factor and LR patch size.
        branch_steps: steps of pre-training of each branch; a cheap branch learns less and needs fewer.
        classifier_steps: steps of the classifier alone, the branches frozen.
        joint_steps: steps of classifier and branches together.
        batch: patches per step.
        focus: share of a branch's pre-training batch that comes from its own difficulty class. The published recipe
            uses 1; the rest, drawn from all classes, keeps every branch usable when a budget sends it other patches.
        routing_steps: steps of the classifier alone at the end, by what each choice costs: see :func:`routing_loss`.
        routing_price: squared error (per pixel, of images in [0, 1]) that the dearest branch must save to be worth its cost.
        learning_rate, classifier_rate, joint_rate, routing_rate: Adam's peak rates of the stages, each annealed by a cosine.
        image_weight, class_weight, average_weight: loss weights of the last two stages (1000, 0.5 and 3 as published).
        seed: fixes initial weights and batches.
    """

    widths: tuple[int, ...] = (16, 36, 56)
    scale: int = 4
    patch: int = 32
    branch_steps: tuple[int, ...] = (6000, 8000, 12000)
    classifier_steps: int = 1200
    joint_steps: int = 800
    routing_steps: int = 1500
    routing_price: float = 3e-5
    batch: int = 32
    focus: float = 0.5
    learning_rate: float = 1e-3
    classifier_rate: float = 5e-4
    joint_rate: float = 1e-4
    routing_rate: float = 1e-3
    image_weight: float = 1000.0
    class_weight: float = 0.5
    average_weight: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.branch_steps) != len(self.widths) or min(self.branch_steps, default=0) < 1:
            raise ValueError(f"train: branch_steps must be one positive number per width; got {self.branch_steps}")
        for name in ("classifier_steps", "joint_steps", "routing_steps", "batch", "scale", "patch"):
            if getattr(self, name) < 1:
                raise ValueError(f"train: {name} must be at least 1; got {getattr(self, name)}")
        if not 0 <= self.focus <= 1:
            raise ValueError(f"train: focus must lie in [0, 1]; got {self.focus}")
        if self.seed < 0:
            raise ValueError(f"train: seed must be at least 0; got {self.seed}")
        if not self.widths or list(self.widths) != sorted(set(self.widths)):
            raise ValueError(f"train: widths must rise; got {self.widths}")


@dataclass(frozen=True)
class Stage:
    """One stretch of training: which parameters move, for how many steps, from what peak rate."""

    name: str
    steps: int
    rate: float
    branch: int | None = None
    joint: bool = False
    routing: bool = False


class Trainer:
    """Runs a :class:`Recipe` with progress and exact resume.

    Batches are drawn from a generator seeded by (seed, stage, step), so a resumed run sees what an uninterrupted one
    would have seen.

    Args:
        pool: ranked training patches.
        recipe: what to train.
        state_path: checkpoint written every `save_every` steps and read on start when it exists.
        init: weights to start from, in the published layout; default a fresh initialisation.
        init_name: what a message calls `init`.
        save_every: steps between two checkpoints.
    """

    def __init__(
        self,
        pool: Pool,
        recipe: Recipe,
        state_path: Path,
        init: dict[str, Tensor] | None = None,
        init_name: str = "init",
        save_every: int = 500,
    ) -> None:
        self.pool, self.recipe, self.state_path, self.save_every = pool, recipe, Path(state_path), save_every
        torch.manual_seed(recipe.seed)
        self.model = ClassSR.fsrcnn(recipe.widths, recipe.scale).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if init is not None:
            load_weights(self.model, init, init_name)
        self.model.train()
        flops = [count_flops(branch, (1, 3, recipe.patch, recipe.patch)) for branch in self.model.branches]
        self.cost = torch.tensor(flops, dtype=torch.float32) / max(flops)
        self.stages = self._plan()
        self.stage, self.step = 0, 0

    def _plan(self) -> list[Stage]:
        r = self.recipe
        stages = [Stage(f"branch {k + 1}", r.branch_steps[k], r.learning_rate, k) for k in reversed(range(len(r.widths)))]
        stages.append(Stage("classifier", r.classifier_steps, r.classifier_rate))
        stages.append(Stage("joint", r.joint_steps, r.joint_rate, joint=True))
        stages.append(Stage("routing", r.routing_steps, r.routing_rate, routing=True))
        return stages

    def run(self) -> ClassSR:
        """Train to the end, from the saved state if there is one; returns the model in evaluation mode.

        Raises:
            ValueError: the saved state belongs to another recipe.
        """
        optimizer_state = self._load()
        for number in range(self.stage, len(self.stages)):
            stage = self.stages[number]
            parameters = self._parameters(stage)
            optimizer = torch.optim.Adam(parameters, lr=stage.rate, betas=(0.9, 0.99))
            if optimizer_state is not None:
                optimizer.load_state_dict(optimizer_state)
                optimizer_state = None
            self._run_stage(number, stage, optimizer, parameters)
            self.stage, self.step = number + 1, 0
            self._save(None)
        return self.model.eval()

    def _parameters(self, stage: Stage) -> list[nn.Parameter]:
        if stage.branch is not None:
            return list(self.model.branches[stage.branch].parameters())
        return list((self.model if stage.joint else self.model.classifier).parameters())

    def _run_stage(self, number: int, stage: Stage, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        smooth: float | None = None
        with tqdm(total=stage.steps, initial=self.step, desc=stage.name, unit="step") as bar:
            for step in range(self.step, stage.steps):
                rng = np.random.default_rng([self.recipe.seed, number, step])
                warm = min(1.0, (step + 1) / 200)
                rate = stage.rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / stage.steps))
                for group in optimizer.param_groups:
                    group["lr"] = max(rate, stage.rate * 1e-3)
                loss, mse, shares = self._loss(stage, rng)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 10.0 * (1 if stage.branch is not None else self.recipe.image_weight))
                optimizer.step()
                smooth = mse if smooth is None else 0.98 * smooth + 0.02 * mse
                bar.update()
                if step % 20 == 0:
                    bar.set_postfix_str(f"PSNR {-10 * math.log10(smooth + 1e-12):.2f} dB{shares}")
                self.step = step + 1
                if self.step % self.save_every == 0:
                    self._save(optimizer)

    def _loss(self, stage: Stage, rng: np.random.Generator) -> tuple[Tensor, float, str]:
        lr, hr = self._draw(stage, rng)
        if stage.branch is not None:
            output = self.model.branches[stage.branch](lr)
            # Squared, as PSNR counts: the error of strong edges decides, which the absolute one undervalues.
            loss = F.mse_loss(output, hr)
            return 100 * loss, loss.item(), ""
        if stage.joint:
            output, probability = self.model.mixture(lr)
        else:
            with torch.no_grad():
                outputs = torch.stack([branch(lr) for branch in self.model.branches], dim=1)
            probability = self.model.classifier(lr)
            if stage.routing:
                errors = (outputs.clamp(0, 1) - hr[:, None]).square().mean(dim=(2, 3, 4))
                chosen = errors.gather(1, probability.argmax(dim=1, keepdim=True)).mean().item()
                return (
                    routing_loss(probability, errors, self.cost, self.recipe.routing_price),
                    chosen,
                    self._shares(probability),
                )
            output = (probability[:, :, None, None, None] * outputs).sum(dim=1)
        r = self.recipe
        loss = r.image_weight * F.l1_loss(output, hr)
        loss = loss + r.class_weight * class_loss(probability) + r.average_weight * average_loss(probability)
        return loss, F.mse_loss(output.detach(), hr).item(), self._shares(probability)

    def _shares(self, probability: Tensor) -> str:
        used = torch.bincount(probability.argmax(dim=1), minlength=self.model.num_classes)
        shares = "/".join(f"{100 * int(n) // len(probability)}" for n in used)
        return f", classes {shares} %"

    def _draw(self, stage: Stage, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        total, size = len(self.pool.positions), self.recipe.batch
        # The classifier needs larger batches: its average loss compares class shares within one.
        if stage.branch is None:
            size *= 2
        indices = self.pool.draw(0, total, size, rng)
        if stage.branch is not None:
            own = round(size * self.recipe.focus)
            low, high = self.pool.class_range(stage.branch, len(self.recipe.widths))
            indices[:own] = self.pool.draw(low, max(high, low + 1), own, rng)
        lr, hr = self.pool.batch(indices, rng)
        return lr.contiguous(memory_format=torch.channels_last), hr.contiguous(memory_format=torch.channels_last)

    def _save(self, optimizer: torch.optim.Optimizer | None) -> None:
        state = {
            "recipe": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.recipe).items()},
            "stage": self.stage,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
        }
        io.write_atomically(self.state_path, lambda file: torch.save(state, file))

    def _load(self) -> dict | None:
        if not self.state_path.exists():
            return None
        state, _ = read_checkpoint(self.state_path)
        if set(state) != STATE_KEYS or not isinstance(state["recipe"], dict):
            raise CheckpointError(f"cannot resume from {self.state_path}: it is no state of training; delete it to start anew")
        saved = {k: tuple(v) if isinstance(v, list) else v for k, v in state["recipe"].items()}
        if saved != asdict(self.recipe):
            changed = [k for k, v in asdict(self.recipe).items() if saved.get(k) != v]
            raise ValueError(
                f"train: {self.state_path} was saved by a recipe with other {', '.join(changed)}; "
                "train to another folder or delete it"
            )
        load_weights(self.model, state["model"], self.state_path)
        self.stage, self.step = state["stage"], state["step"]
        return state["optimizer"]
