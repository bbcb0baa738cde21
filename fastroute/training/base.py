"""What all recipes share: stages, annealed rates, progress, and exact resume."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastroute import buffers, io
from fastroute._arguments import LARGEST_SPAN, real, whole
from fastroute.io.files import remove_parts
from fastroute.models.checkpoints import CheckpointError, load_weights, read_checkpoint
from fastroute.models.precision import PRECISIONS
from fastroute.training import distributed
from fastroute.training.data import Pool
from fastroute.training.optimizers import make_optimizer
from fastroute.training.start import Start

STATE_KEYS = {"recipe", "stage", "step", "model", "optimizer"}
# What states have that were saved in another precision than float32.
MORE_STATE_KEYS = {"precision", "scaler"}
# Steps over which the rate rises at the beginning of a stage, and the share of its peak below which it never falls.
WARM_UP = 200
LOWEST_RATE = 1e-3


@dataclass(frozen=True)
class Stage:
    """One stretch of training.

    Attributes:
        name: shown beside the progress bar.
        steps: its length.
        rate: peak rate, annealed by a cosine.
        kind: what is trained, in the words of the recipe.
        branch: number of the branch, where one is trained alone.
    """

    name: str
    steps: int
    rate: float
    kind: str
    branch: int | None = None


# The note is made when it is shown, which on a GPU waits for the step.
StepResult = tuple[Tensor, Tensor, Callable[[], str]]


def check_settings(recipe: Any, positive: Sequence[str], not_negative: Sequence[str] = ()) -> None:
    """Raise an error that names the first setting that is no number of its kind, below 1, below 0, or beyond what can be.

    Args:
        recipe: a dataclass; of all of its fields numbers are looked at.
        positive, not_negative: names of fields.

    Raises:
        TypeError: a setting is no number, or no whole one where its default is.
        ValueError: it is out of range.
    """
    least = {**dict.fromkeys(not_negative, 0), **dict.fromkeys(positive, 1)}
    for field in fields(recipe):
        value, name, kind = getattr(recipe, field.name), field.name, str(field.type)
        most = 2**63 - 1 if name == "seed" or name.endswith("steps") else LARGEST_SPAN
        numbers = [value] if kind == "int" else value if kind.startswith("tuple[int") else []
        if kind.startswith("tuple[tuple[int"):
            if not all(isinstance(part, Sequence) for part in value):
                raise TypeError(f"train: {name} must be lists of whole numbers; got {value}")
            numbers = [number for part in value for number in part]
        for number in numbers:
            whole("train", name, number, most, least.get(name, -most))
        if kind == "float" and not math.isfinite(real("train", name, value)):
            raise ValueError(f"train: {name} must be finite; got {value}")
        if name.endswith(("rate", "weight", "price")):
            least.setdefault(name, 0)
    for name, bound in least.items():
        if not getattr(recipe, name) >= bound:
            raise ValueError(f"train: {name} must be at least {bound}; got {getattr(recipe, name)}")


def check_backbone(backbone: str, known: Iterable[str]) -> None:
    """Raise a ValueError that lists the known backbones."""
    if backbone not in known:
        raise ValueError(f"train: backbone must be one of {', '.join(known)}; got {backbone!r}")


def check_widths(widths: Sequence[int]) -> None:
    """Raise a ValueError where widths are not positive or do not rise."""
    if not widths or list(widths) != sorted(set(widths)):
        raise ValueError(f"train: widths must rise; got {widths}")
    if widths[0] < 1:
        raise ValueError(f"train: widths must be at least 1; got {widths}")


class BaseTrainer(ABC):
    """Runs the stages of a recipe.

    Batches are drawn from a generator seeded by (seed, stage, step), so a resumed run sees what an uninterrupted one
    would have seen. Of several processes (:mod:`fastroute.training.distributed`) each takes an equal share of every batch, and
    all of them hold the same weights, up to rounding those of one process.

    Args:
        pool: ranked training patches.
        recipe: what to train; a dataclass with `seed`, `scale`, `patch`, `batch` and `optimizer`.
        state_path: checkpoint written every `save_every` steps and read on start when it exists.
        init: weights to start from; default a fresh initialisation. Each recipe says which layouts it takes.
        save_every: steps between two checkpoints.
        device: where to train.
        precision: "float32", or "bfloat16" or "float16" for the convolutions and products of both passes. Weights, their
            updates and the losses' sums stay in float32; float16 scales its losses so that small gradients do not vanish.
    """

    model: Any

    def __init__(
        self,
        pool: Pool,
        recipe: Any,
        state_path: Path,
        init: Start | None = None,
        save_every: int = 500,
        device: str | torch.device = "cpu",
        precision: str = "float32",
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"train: precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
        if recipe.batch % distributed.size():
            raise ValueError(f"train: batch must be a multiple of the processes, {distributed.size()}; got {recipe.batch}")
        self.pool, self.recipe, self.state_path, self.save_every = pool, recipe, Path(state_path), save_every
        self.device, self.precision = torch.device(device), precision
        # Of the rows of a batch; every process draws the same numbers for all of them.
        self.rows = slice(distributed.rank(), None, distributed.size())
        # Drawn on the CPU: the same initial weights on every device.
        torch.manual_seed(recipe.seed)
        self.model = self._build().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if init is not None:
            self._start_from(init)
        self.model = distributed.synchronised(self.model, self.device).train()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")
        self.stages = self._plan()
        self.stage, self.step = 0, 0
        self._settled = True  # the weights are those after `step` steps
        # What a forward pass changes: statistics of batch norms, and how they were before a step that is not done.
        norms = [module for module in self.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self._statistics = [buffer for module in norms for buffer in module.buffers()]
        self._before: list[Tensor] = []

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
    def _loss(self, stage: Stage, rng: np.random.Generator) -> StepResult:
        """Loss of one step, mean squared error in [0, 1]², and a note for the progress bar; random by `rng` alone."""

    def _start_from(self, start: Start) -> None:
        """Take the weights of `start`, in the layout of the model or in another that fits."""
        load_weights(self.model, start.state, start.name)

    def _clip(self, stage: Stage) -> float:
        """Largest norm of a gradient."""
        return 10.0

    def _finish(self) -> None:
        """What follows the last step; the same on every call."""
        self.model.eval()

    @buffers.explained("train", "use a smaller batch")
    def run(self) -> Any:
        """Train to the end, from the saved state if there is one; returns the model in evaluation mode.

        Raises:
            ValueError: the saved state belongs to another recipe.
        """
        optimizer_state = self._load()
        for number in range(self.stage, len(self.stages)):
            stage = self.stages[number]
            parameters = self._parameters(stage)
            optimizer = make_optimizer(self.recipe.optimizer, parameters, stage.rate)
            if optimizer_state is not None:
                optimizer.load_state_dict(optimizer_state)
                optimizer_state = None
            try:
                self._run_stage(number, stage, optimizer, parameters)
            except (KeyboardInterrupt, SystemExit):
                # Within an update the weights are of neither step.
                if self._settled:
                    for buffer, value in zip(self._statistics, self._before, strict=False):
                        buffer.copy_(value)
                    self._save(optimizer)
                raise
            self.stage, self.step = number + 1, 0
            self._save(None)
        self._finish()
        return self.model

    def _run_stage(self, number: int, stage: Stage, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        smooth: Tensor | None = None
        loss_of = distributed.averaging(self._loss, parameters)
        half = torch.autocast(self.device.type, PRECISIONS[self.precision], enabled=self.precision != "float32")
        hidden = distributed.rank() > 0
        with tqdm(total=stage.steps, initial=self.step, desc=stage.name, unit="step", disable=hidden) as bar:
            for step in range(self.step, stage.steps):
                rng = np.random.default_rng([self.recipe.seed, number, step])
                warm = min(1.0, (step + 1) / WARM_UP)
                rate = stage.rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / stage.steps))
                for group in optimizer.param_groups:
                    group["lr"] = max(rate, stage.rate * LOWEST_RATE)
                self._before = [buffer.clone() for buffer in self._statistics]
                with half:
                    loss, mse, note = loss_of(stage, rng)
                optimizer.zero_grad(set_to_none=True)
                self.scaler.scale(loss).backward()
                self.scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(parameters, self._clip(stage))
                self._settled = False
                self.scaler.step(optimizer)
                self.scaler.update()
                self.step, self._before = step + 1, []
                self._settled = True
                smooth = mse if smooth is None else torch.lerp(smooth, mse, 0.02)
                bar.update()
                if step % 20 == 0 and not hidden:
                    bar.set_postfix_str(f"PSNR {-10 * math.log10(smooth.item() + 1e-12):.2f} dB{note()}")
                if self.step % self.save_every == 0:
                    self._save(optimizer)

    def _batch(self, indices: np.ndarray, rng: np.random.Generator, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        """Patches of the pool, (N, C, p, p) and (N, C, P, P), on the device and in the memory format of the model.

        Of `indices` they are the share of this process, or `rows`.
        """
        lr, hr = self.pool.batch(indices, rng, self.rows if rows is None else rows, self.device)
        return lr.contiguous(memory_format=torch.channels_last), hr.contiguous(memory_format=torch.channels_last)

    def _save(self, optimizer: torch.optim.Optimizer | None) -> None:
        if distributed.rank() > 0:
            return
        state = {
            "recipe": _plain(asdict(self.recipe)),
            "stage": self.stage,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
            "precision": self.precision,
            "scaler": self.scaler.state_dict(),
        }
        io.write_atomically(self.state_path, lambda file: torch.save(state, file))

    def _load(self) -> dict | None:
        state = distributed.from_first(self._read_state)
        if state is None:
            return None
        load_weights(self.model, state["model"], self.state_path)
        self.stage, self.step = state["stage"], state["step"]
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        return state["optimizer"]

    def _read_state(self) -> dict | None:
        # A killed run may have left half a file.
        remove_parts([self.state_path])
        if not self.state_path.exists():
            return None
        state, _ = read_checkpoint(self.state_path)
        if set(state) - MORE_STATE_KEYS != STATE_KEYS or not isinstance(state["recipe"], dict):
            raise CheckpointError(f"cannot resume from {self.state_path}: it is no state of training; delete it to start anew")
        own = {**_plain(asdict(self.recipe)), "precision": self.precision}
        # A setting that did not exist when the state was saved had the effect of its default.
        defaults = _plain({field.name: field.default for field in fields(self.recipe)})
        saved = {**defaults, **state["recipe"], "precision": state.get("precision", "float32")}
        if saved != own:
            changed = [name for name in {**own, **saved} if saved.get(name) != own.get(name)]
            told = ", ".join(f"{name}={saved.get(name)}" for name in changed)
            raise ValueError(
                f"train: {self.state_path} was saved by a recipe with other {', '.join(changed)}; train to another folder, "
                f"delete that file, or give what it was saved with: {told}"
            )
        return state


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
