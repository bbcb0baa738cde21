"""What all recipes share: stages, annealed rates, progress, and exact resume."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastroute import io
from fastroute.models.checkpoints import CheckpointError, load_weights, read_checkpoint
from fastroute.training.data import Pool

STATE_KEYS = {"recipe", "stage", "step", "model", "optimizer"}
# Steps over which the rate rises at the beginning of a stage, and the share of its peak below which it never falls.
WARM_UP = 200
LOWEST_RATE = 1e-3


@dataclass(frozen=True)
class Stage:
    """One stretch of training.

    Attributes:
        name: shown beside the progress bar.
        steps: its length.
        rate: Adam's peak rate, annealed by a cosine.
        kind: what is trained, in the words of the recipe.
        branch: number of the branch, where one is trained alone.
    """

    name: str
    steps: int
    rate: float
    kind: str
    branch: int | None = None


def check_settings(recipe: Any, positive: Sequence[str], not_negative: Sequence[str] = ()) -> None:
    """Raise a ValueError that names the first setting below 1, or below 0."""
    for names, least in ((positive, 1), (not_negative, 0)):
        for name in names:
            if not getattr(recipe, name) >= least:
                raise ValueError(f"train: {name} must be at least {least}; got {getattr(recipe, name)}")


def check_backbone(backbone: str, known: Iterable[str]) -> None:
    """Raise a ValueError that lists the known backbones."""
    if backbone not in known:
        raise ValueError(f"train: backbone must be one of {', '.join(known)}; got {backbone!r}")


def check_widths(widths: Sequence[int]) -> None:
    """Raise a ValueError where widths do not rise."""
    if not widths or list(widths) != sorted(set(widths)):
        raise ValueError(f"train: widths must rise; got {widths}")


class BaseTrainer(ABC):
    """Runs the stages of a recipe.

    Batches are drawn from a generator seeded by (seed, stage, step), so a resumed run sees what an uninterrupted one
    would have seen.

    Args:
        pool: ranked training patches.
        recipe: what to train; a dataclass with `seed`, `scale`, `patch` and `batch`.
        state_path: checkpoint written every `save_every` steps and read on start when it exists.
        init: weights to start from, in the published layout; default a fresh initialisation.
        init_name: what a message calls `init`.
        save_every: steps between two checkpoints.
        device: where to train.
    """

    model: Any

    def __init__(
        self,
        pool: Pool,
        recipe: Any,
        state_path: Path,
        init: dict[str, Tensor] | None = None,
        init_name: str = "init",
        save_every: int = 500,
        device: str | torch.device = "cpu",
    ) -> None:
        self.pool, self.recipe, self.state_path, self.save_every = pool, recipe, Path(state_path), save_every
        self.device = torch.device(device)
        # Drawn on the CPU: the same initial weights on every device.
        torch.manual_seed(recipe.seed)
        self.model = self._build().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if init is not None:
            self._start_from(init, init_name)
        self.model.train()
        self.stages = self._plan()
        self.stage, self.step = 0, 0
        self._settled = True  # the weights are those after `step` steps

    @abstractmethod
    def _build(self) -> nn.Module:
        """The network in its initial state."""

    @abstractmethod
    def _plan(self) -> list[Stage]:
        """The stages in their order."""

    @abstractmethod
    def _parameters(self, stage: Stage) -> list[nn.Parameter]:
        """What `stage` trains."""

    @abstractmethod
    def _loss(self, stage: Stage, rng: np.random.Generator) -> tuple[Tensor, float, str]:
        """Loss of one step, mean squared error in [0, 1]², and a note for the progress bar; random by `rng` alone."""

    def _start_from(self, init: dict[str, Tensor], name: str) -> None:
        load_weights(self.model, init, name)

    def _clip(self, stage: Stage) -> float:
        """Largest norm of a gradient."""
        return 10.0

    def _finish(self) -> None:
        """What follows the last step; the same on every call."""
        self.model.eval()

    def run(self) -> Any:
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
            try:
                self._run_stage(number, stage, optimizer, parameters)
            except (KeyboardInterrupt, SystemExit):
                # Within an update the weights are of neither step.
                if self._settled:
                    self._save(optimizer)
                raise
            self.stage, self.step = number + 1, 0
            self._save(None)
        self._finish()
        return self.model

    def _run_stage(self, number: int, stage: Stage, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        smooth: float | None = None
        with tqdm(total=stage.steps, initial=self.step, desc=stage.name, unit="step") as bar:
            for step in range(self.step, stage.steps):
                rng = np.random.default_rng([self.recipe.seed, number, step])
                warm = min(1.0, (step + 1) / WARM_UP)
                rate = stage.rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / stage.steps))
                for group in optimizer.param_groups:
                    group["lr"] = max(rate, stage.rate * LOWEST_RATE)
                loss, mse, note = self._loss(stage, rng)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, self._clip(stage))
                self._settled = False
                optimizer.step()
                self.step = step + 1
                self._settled = True
                smooth = mse if smooth is None else 0.98 * smooth + 0.02 * mse
                bar.update()
                if step % 20 == 0:
                    bar.set_postfix_str(f"PSNR {-10 * math.log10(smooth + 1e-12):.2f} dB{note}")
                if self.step % self.save_every == 0:
                    self._save(optimizer)

    def _batch(self, indices: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Patches of the pool, (N, C, p, p) and (N, C, P, P), on the device and in the memory format of the model."""
        lr, hr = (x.to(self.device, non_blocking=True) for x in self.pool.batch(indices, rng))
        return lr.contiguous(memory_format=torch.channels_last), hr.contiguous(memory_format=torch.channels_last)

    def _save(self, optimizer: torch.optim.Optimizer | None) -> None:
        state = {
            "recipe": _plain(asdict(self.recipe)),
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
        own = _plain(asdict(self.recipe))
        # A setting that did not exist when the state was saved had the effect of its default.
        saved = {**_plain({field.name: field.default for field in fields(self.recipe)}), **state["recipe"]}
        if saved != own:
            changed = [name for name in {**own, **saved} if saved.get(name) != own.get(name)]
            raise ValueError(
                f"train: {self.state_path} was saved by a recipe with other {', '.join(changed)}; "
                "train to another folder or delete it"
            )
        load_weights(self.model, state["model"], self.state_path)
        self.stage, self.step = state["stage"], state["step"]
        return state["optimizer"]


def _plain(value: Any) -> Any:
    """Tuples as lists, which a saved state holds."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def class_shares(probability: Tensor) -> str:  # [N, K]
    """Shares of the most probable classes, for the progress bar."""
    used = torch.bincount(probability.argmax(dim=1), minlength=probability.shape[1])
    shares = "/".join(f"{100 * int(n) // len(probability)}" for n in used)
    return f", classes {shares} %"
