"""The trainer of one's own networks and of all recipes: stages, annealed rates, progress, validation and exact resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fastroute import buffers, io
from fastroute.models.checkpoints import load_weights, save_checkpoint
from fastroute.models.precision import PRECISIONS
from fastroute.training import distributed
from fastroute.training.checks import check_settings
from fastroute.training.data import Pairs, Sized
from fastroute.training.logs import Log
from fastroute.training.optimizers import check_optimizer, make_optimizer
from fastroute.training.state import plain, read_state
from fastroute.training.validation import Upscale, Validation, upscaling

# Steps over which the rate rises at the beginning of a stage, and the share of its peak below which it never falls.
WARM_UP = 200
LOWEST_RATE = 1e-3
# Steps between two looks at the loss, each of which waits for a GPU.
SHOWN_EVERY = 20
Criterion = Callable[[Tensor, Tensor], Tensor]


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
    kind: str = ""
    branch: int | None = None


class StepResult(NamedTuple):
    """What one step says.

    Attributes:
        loss: a scalar with gradients.
        mse: mean squared error in [0, 1]², without gradients.
        note: for the progress bar. It is made when it is shown, which on a GPU waits for the step.
    """

    loss: Tensor
    mse: Tensor
    note: Callable[[], str] = str


@dataclass(frozen=True)
class Recipe:
    """How one network is trained.

    Attributes:
        steps: number of steps.
        batch: pairs per step.
        learning_rate: peak rate, annealed by a cosine.
        optimizer: "adam" or "soap"; see :func:`fastroute.training.optimizers.make_optimizer`.
        seed: fixes the batches.
    """

    steps: int = 20000
    batch: int = 16
    learning_rate: float = 1e-3
    optimizer: str = "adam"
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self, ("steps", "batch"), ("seed",))
        check_optimizer(self.optimizer)


class Data(Protocol):
    """Training pairs by number, such as :class:`fastroute.training.data.Pool`."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, rng: np.random.Generator, share: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """Float pairs (N, C, p, p) and (N, C, P, P) of `indices[share]` on `device`, random by `rng` alone."""


class Trainer:
    """Trains a network on pairs of LR and HR images.

    Batches are drawn from a generator seeded by (seed, stage, step), so a resumed run sees what an uninterrupted one
    would have seen. Of several processes (:mod:`fastroute.training.distributed`) each takes an equal share of every batch, and
    all of them hold the same weights, up to rounding those of one process.

    Used as it is, all weights of one network learn from one loss. Where several parts learn one after another or the loss
    needs more than output and target, a subclass says so by `plan`, `parameters` and `step`; the recipes of
    `fastroute train` are such subclasses.

    Args:
        network: maps (N, C, p, p) in [0, 1] to (N, C, P, P). It is trained where it is, not copied.
        data: a :class:`fastroute.training.data.Pool`, or a data set with ``len`` whose items are pairs of tensors (C, p, p) and
            (C, P, P), float in [0, 1] or uint8; its items are read in this process, and their order is that of the seed.
        recipe: how long, how fast, and by which optimizer.
        state_path: file of the state, written every `save_every` steps, and read on start if it exists.
        loss: from output and target to a scalar. A module that has weights learns with the network.
        save_every: steps between two states.
        device: where to train.
        precision: "float32", or "bfloat16" or "float16" for the convolutions and products of both passes. Weights, their
            updates and the losses' sums stay in float32; float16 scales its losses so that small gradients do not vanish.
        validation: at its intervals, PSNR and SSIM are measured, and best.safetensors and last.safetensors written beside the
            state. "best" compares within the present stage.
        logs: get the numbers of the training.
        origin: what else decides what is learnt, such as a digest of the images, by what messages call it. It is saved with the
            state, which only a training of the same origin goes on from.
        resume: True requires a state to go on from, False begins anew over one; by default the training goes on if it can.

    Raises:
        ValueError: an unknown precision, or a batch that the processes cannot share equally.

    Example:
        >>> trainer = Trainer(network, pairs, Recipe(steps=1000), "runs/own/state.pt", loss=F.l1_loss)
        >>> trainer.run()
    """

    model: Any
    # What learns beside the model and is saved with it, such as the weights of a loss.
    helper: nn.Module | None = None

    def __init__(
        self,
        network: nn.Module,
        data: Data | Sized,
        recipe: Any,
        state_path: str | Path,
        *,
        loss: Criterion = F.l1_loss,
        save_every: int = 500,
        device: str | torch.device = "cpu",
        precision: str = "float32",
        validation: Validation | None = None,
        logs: Sequence[Log] = (),
        origin: Mapping[str, str] | None = None,
        resume: bool | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"train: precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
        if recipe.batch % distributed.size():
            raise ValueError(f"train: batch must be a multiple of the processes, {distributed.size()}; got {recipe.batch}")
        ready: Any = data
        self.data: Data = ready if callable(getattr(data, "batch", None)) else Pairs(ready)
        self.recipe, self.state_path, self.save_every = recipe, Path(state_path), save_every
        self.device, self.precision = torch.device(device), precision
        self.validation, self.logs, self.resume, self.origin = validation, tuple(logs), resume, dict(origin or {})
        # Of the rows of a batch; every process draws the same numbers for all of them.
        self.rows = slice(distributed.rank(), None, distributed.size())
        self.criterion = loss
        if isinstance(loss, nn.Module):
            self.helper = loss.to(self.device)
        self.model = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = distributed.synchronised(self.model, self.device).train()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")
        self.stages = self.plan()
        self.number, self.step = 0, 0  # of the stage, and of the steps done in it
        self.best: tuple[int, float] | None = None  # stage and PSNR
        self._settled = True  # the weights are those after `step` steps
        # What a forward pass changes: statistics of batch norms, and how they were before a step that is not done.
        self.norms = [module for module in self.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self._statistics = [buffer for module in self.norms for buffer in module.buffers()]
        self._before: list[Tensor] = []

    def plan(self) -> list[Stage]:
        """The stages in their order."""
        return [Stage("training", self.recipe.steps, self.recipe.learning_rate)]

    def begin(self, stage: Stage) -> None:
        """Put the model into the mode in which `stage` trains it; called before its first step and after each validation."""
        self.model.train()

    def parameters(self, stage: Stage) -> list[nn.Parameter]:
        """What `stage` trains."""
        learning = [self.model] if self.helper is None else [self.model, self.helper]
        return [parameter for module in learning for parameter in module.parameters() if parameter.requires_grad]

    def draw(self, stage: Stage, rng: np.random.Generator) -> np.ndarray:
        """Numbers of the pairs of a step, for all processes together."""
        return rng.integers(0, len(self.data), self.recipe.batch)

    def loss(self, stage: Stage, rng: np.random.Generator) -> StepResult:
        """The loss of one step, random by `rng` alone."""
        lr, hr = self.batch(self.draw(stage, rng), rng)
        output = self.model(lr)
        return StepResult(self.criterion(output, hr), F.mse_loss(output.detach().float(), hr))

    def largest_norm(self, stage: Stage) -> float:
        """Largest norm of a gradient, to which longer ones are cut."""
        return 10.0

    def finish(self) -> None:
        """What makes of the present weights a model to use; the same on every call, and without effect on what is learnt."""
        self.model.eval()

    def upscale(self, stage: Stage) -> Upscale:
        """What is validated in `stage`, once `finish` has been called."""
        return upscaling(self.model, self.device)

    def metadata(self) -> dict[str, Any]:
        """What is stored beside the weights in a checkpoint."""
        return asdict(self.recipe)

    def batch(self, indices: np.ndarray, rng: np.random.Generator, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        """Pairs of the data, (N, C, p, p) and (N, C, P, P), on the device and in the memory format of the model.

        Of `indices` they are the share of this process, or `rows`.
        """
        lr, hr = self.data.batch(indices, rng, self.rows if rows is None else rows, self.device)
        return lr.contiguous(memory_format=torch.channels_last), hr.contiguous(memory_format=torch.channels_last)

    @buffers.explained("train", "use a smaller batch")
    def run(self) -> Any:
        """Train to the end, from the saved state if there is one; returns the model in evaluation mode.

        Raises:
            ValueError: the saved state belongs to another recipe, or there is none where `resume` requires one.
        """
        optimizer_state = self._load()
        told = () if distributed.rank() else self.logs
        for log in told:
            log.begin(self.steps_done)
        try:
            for number in range(self.number, len(self.stages)):
                stage = self.stages[number]
                parameters = self.parameters(stage)
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
                self.number, self.step = number + 1, 0
                self._save(None)
        finally:
            for log in told:
                log.end()
        self.finish()
        if self.validation is not None and not distributed.rank():
            self.write(self.state_path.with_name("last.safetensors"))
        return self.model

    @property
    def steps_done(self) -> int:
        """The number of steps done, in all stages."""
        return sum(stage.steps for stage in self.stages[: self.number]) + self.step

    def write(self, path: str | Path) -> None:
        """Write the present weights, in the layout of the model, with :meth:`metadata`."""
        save_checkpoint(path, self.model, self.metadata())

    def _run_stage(self, number: int, stage: Stage, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        smooth: Tensor | None = None
        loss_of = distributed.averaging(self.loss, parameters)
        half = torch.autocast(self.device.type, PRECISIONS[self.precision], enabled=self.precision != "float32")
        hidden = distributed.rank() > 0
        self.begin(stage)
        with tqdm(total=stage.steps, initial=self.step, desc=stage.name, unit="step", disable=hidden) as bar:
            for step in range(self.step, stage.steps):
                rng = np.random.default_rng([self.recipe.seed, number, step])
                warm = min(1.0, (step + 1) / WARM_UP)
                rate = stage.rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / stage.steps))
                rate = max(rate, stage.rate * LOWEST_RATE)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                self._before = [buffer.clone() for buffer in self._statistics]
                with half:
                    loss, mse, note = loss_of(stage, rng)
                optimizer.zero_grad(set_to_none=True)
                self.scaler.scale(loss).backward()
                self.scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(parameters, self.largest_norm(stage))
                self._settled = False
                self.scaler.step(optimizer)
                self.scaler.update()
                self.step, self._before = step + 1, []
                self._settled = True
                smooth = mse if smooth is None else torch.lerp(smooth, mse, 0.02)
                bar.update()
                if step % SHOWN_EVERY == 0 and not hidden:
                    psnr = -10 * math.log10(smooth.item() + 1e-12)
                    bar.set_postfix_str(f"PSNR {psnr:.2f} dB{note()}")
                    self._log(stage, rate=rate, loss=loss.item(), psnr=psnr)
                if self.validation and (self.step % self.validation.every == 0 or self.step == stage.steps) and not hidden:
                    self._validate(stage, bar)
                if self.step % self.save_every == 0:
                    self._save(optimizer)

    def _validate(self, stage: Stage, bar: tqdm) -> None:
        assert self.validation is not None
        self.finish()
        found = self.validation(self.upscale(stage))
        self._log(stage, validation_psnr=found.psnr, validation_ssim=found.ssim)
        bar.write(f"{stage.name}, step {self.step}: validation {found.psnr:.3f} dB, SSIM {found.ssim:.4f}")
        paths = [self.state_path.with_name("last.safetensors")]
        if self.best is None or self.best[0] != self.number or found.psnr > self.best[1]:
            self.best = self.number, found.psnr
            paths.append(self.state_path.with_name("best.safetensors"))
        for path in paths:
            self.write(path)
        self.begin(stage)

    def _log(self, stage: Stage, **numbers: float) -> None:
        for log in self.logs:
            log.write({"stage": stage.name, "step": self.step, "steps": self.steps_done, **numbers})

    def _save(self, optimizer: torch.optim.Optimizer | None) -> None:
        if distributed.rank() > 0:
            return
        state = {
            "recipe": plain(asdict(self.recipe)),
            "stage": self.number,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
            "precision": self.precision,
            "scaler": self.scaler.state_dict(),
            "helper": {} if self.helper is None else self.helper.state_dict(),
            "best": None if self.best is None else list(self.best),
            "origin": self.origin,
        }
        self.state_path.parent.mkdir(parents=True, exist_ok=True)
        io.write_atomically(self.state_path, lambda file: torch.save(state, file))

    def _load(self) -> dict | None:
        about = self.recipe, self.precision, self.resume, self.origin
        state = distributed.from_first(lambda: read_state(self.state_path, *about))
        if state is None:
            return None
        load_weights(self.model, state["model"], self.state_path)
        if self.helper is not None and state.get("helper"):
            self.helper.load_state_dict(state["helper"])
        self.number, self.step = state["stage"], state["step"]
        self.best = tuple(state["best"]) if state.get("best") else None
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        return state["optimizer"]
