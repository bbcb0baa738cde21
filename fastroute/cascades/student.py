"""A small network learns what a large one makes of images; no other images than those are needed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fastroute import io
from fastroute.cascades.teacher_crops import TRAIN, VALIDATION, Crops, crops_in, read_part
from fastroute.models.checkpoints import CheckpointError, load_weights, read_checkpoint
from fastroute.models.compact import Compact

# Of the images, every so many-th is for validation, and at most so many.
HELD_OUT, MOST_HELD_OUT = 8, 6
# Seconds between two saved states, and between two validations.
SAVE_EVERY, VALIDATE_EVERY = 60.0, 240.0
WARM_UP = 50
# Averaged weights forget with this rate once there are many steps.
DECAY = 0.998
CLIP = 1.0
STATE = {"recipe", "step", "seconds", "model", "average", "optimizer", "history"}


@dataclass(frozen=True)
class Recipe:
    """How a student learns.

    Attributes:
        width, depth: of the student, a :class:`fastroute.models.compact.Compact`.
        scale, channels: of the teacher.
        batch, side: squares of a step and their side in input pixels.
        margin: pixels along the border of a crop from which nothing is learnt: the teacher sees no further there.
        rate: peak of the learning rate, which falls to nothing by a cosine over the time.
        teacher_share: of the time for the teacher's outputs, as long as there are not `visits` of them.
        visits: images to be visited at most, an image counting as often as it is.
        seed: of places and batches.
    """

    width: int = 64
    depth: int = 16
    scale: int = 4
    channels: int = 3
    batch: int = 8
    side: int = 48
    margin: int = 8
    rate: float = 4e-4
    teacher_share: float = 0.35
    visits: int = 300
    seed: int = 0


@dataclass(frozen=True)
class Learnt:
    """What came of it.

    Attributes:
        student: in evaluation mode, averaged weights.
        psnr: to the teacher, on crops of images from which nothing was learnt, in dB.
        steps, seconds, crops: how long it learnt, from how many crops.
    """

    student: Compact
    psnr: float
    steps: int
    seconds: float
    crops: int


class Student:
    """Learns for some time; the teacher's outputs are made between the steps.

    Args:
        crops: of the images to learn from.
        held_out: of those to validate on.
        recipe: sizes and rates.
        state_path: where the state is kept, from which another run goes on.
        start: weights to start from, in the layout of the student.
        device, dtype: where, and the type of the convolutions.
        tell: is given a line of text now and then.

    Raises:
        fastroute.CheckpointError: a saved state of another recipe, or weights that do not fit.
    """

    def __init__(
        self,
        crops: Crops,
        held_out: Crops,
        recipe: Recipe,
        state_path: Path,
        start: dict[str, Tensor] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.crops, self.held_out, self.recipe, self.state_path = crops, held_out, recipe, state_path
        self.device, self.dtype, self.tell = device or torch.device("cpu"), dtype, tell
        torch.manual_seed(recipe.seed)
        self.model = Compact(recipe.width, recipe.depth, recipe.scale, recipe.channels)
        if start is not None:
            load_weights(self.model, start, "the weights to start from")
        self.model = self.model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=recipe.rate, betas=(0.9, 0.99))
        self.step, self.seconds, self.teacher_seconds = 0, 0.0, 0.0
        self.files: list[tuple[Path, int]] = []  # and the number of the crop in it
        self.visited = 0
        self.history: list[dict[str, float]] = []
        self._resume()

    def run(self, minutes: float, progress: bool = True) -> Learnt:
        """Learn until `minutes` have been spent, those of runs before included."""
        total = 60 * minutes
        saved, validated = self.seconds, self.seconds
        parts = self._validation()
        if not self.history:
            self._note(parts)
        with tqdm(total=round(total), initial=round(min(self.seconds, total)), unit="s", disable=not progress) as bar:
            while self.seconds < total:
                begin = time.perf_counter()
                if self._wants_crops():
                    self._visit()
                    taken = time.perf_counter() - begin
                    self.teacher_seconds += taken
                else:
                    loss = self._learn(self.seconds / total)
                    taken = time.perf_counter() - begin
                    if self.step % 20 == 0:
                        bar.set_postfix_str(f"step {self.step}, error {loss:.4f}, {self._last():.2f} dB")
                self.seconds += taken
                bar.update(min(round(self.seconds), round(total)) - bar.n)
                if self.seconds - validated > VALIDATE_EVERY:
                    self._note(parts)
                    validated = self.seconds
                if self.seconds - saved > SAVE_EVERY:
                    self._save()
                    saved = self.seconds
        psnr = self._note(parts)
        self._save()
        student = Compact(self.recipe.width, self.recipe.depth, self.recipe.scale, self.recipe.channels)
        student.load_state_dict({name: value.cpu() for name, value in self.average.items()})
        return Learnt(student.eval(), psnr, self.step, self.seconds, len(self.files))

    def _wants_crops(self) -> bool:
        if self.visited >= self.recipe.visits:
            return False
        enough = 3 * self.recipe.batch
        return len(self.files) < enough or self.teacher_seconds < self.recipe.teacher_share * self.seconds

    def _visit(self) -> None:
        path = self.crops.file(TRAIN, self.visited)
        self.files += [(path, index) for index in range(crops_in(path))]
        self.visited += 1

    def _learn(self, share: float) -> float:
        recipe = self.recipe
        rng = np.random.default_rng([recipe.seed, self.step])
        rate = recipe.rate * min(1.0, (self.step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * share))
        for group in self.optimizer.param_groups:
            group["lr"] = max(rate, recipe.rate * 1e-3)
        lr, hr = self._batch(rng)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            found = self.model(lr)
        loss = F.l1_loss(found.float(), hr)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.step += 1
        decay = min(DECAY, self.step / (self.step + 10))
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value, 1 - decay)
        return float(loss.detach())

    def _batch(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        recipe, lrs, hrs = self.recipe, [], []
        last = self.crops.side - 2 * recipe.margin - recipe.side
        for number in rng.integers(0, len(self.files), recipe.batch):
            y, x = (recipe.margin + int(offset) for offset in rng.integers(0, last + 1, 2))
            lr, hr = read_part(self.files[number][0], self.files[number][1], y, x, recipe.side, recipe.scale)
            turn = int(rng.integers(0, 8))
            lr, hr = (torch.rot90(t, turn % 4, (1, 2)) for t in (lr, hr))
            if turn >= 4:
                lr, hr = lr.flip(2), hr.flip(2)
            lrs.append(lr)
            hrs.append(hr)
        lr, hr = (torch.stack(x).to(self.device).float().div_(255) for x in (lrs, hrs))
        return lr.contiguous(memory_format=torch.channels_last), hr

    def _validation(self) -> list[tuple[Path, int]]:
        paths = [self.held_out.file(VALIDATION, number) for number in range(len(self.held_out.paths))]
        return [(path, index) for path in paths for index in range(crops_in(path))]

    def _note(self, parts: list[tuple[Path, int]]) -> float:
        """PSNR of the averaged weights to the teacher, in dB, which is told and remembered."""
        recipe, side = self.recipe, self.held_out.side
        plain = Compact(recipe.width, recipe.depth, recipe.scale, recipe.channels).to(self.device).eval()
        plain.load_state_dict(self.average)
        inner = slice(recipe.margin * recipe.scale, (side - recipe.margin) * recipe.scale)
        errors = []
        for path, index in parts:
            lr, hr = (x.to(self.device).float() / 255 for x in read_part(path, index, 0, 0, side, recipe.scale))
            with torch.inference_mode():
                found = plain(lr[None])[0].clamp(0, 1)
            errors.append(float((found - hr)[:, inner, inner].square().mean()))
        # The mean of decibels, each crop counting alike, beside that of the squares.
        each = [-10 * math.log10(max(error, 1e-10)) for error in errors]
        psnr = -10 * math.log10(max(sum(errors) / max(len(errors), 1), 1e-10))
        mean = sum(each) / max(len(each), 1)
        self.history.append({"seconds": self.seconds, "step": self.step, "psnr": psnr, "mean": mean})
        self.tell(
            f"{self.seconds / 60:6.1f} min, step {self.step}, {len(self.files)} crops: {psnr:.2f} dB to the teacher "
            f"({mean:.2f} dB in the mean of the crops)"
        )
        return psnr

    def _last(self) -> float:
        return self.history[-1]["psnr"] if self.history else math.nan

    def _save(self) -> None:
        state = {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "visited": self.visited,
            "teacher_seconds": self.teacher_seconds,
        }
        io.write_atomically(self.state_path, lambda file: torch.save(state, file))

    def _resume(self) -> None:
        if not self.state_path.exists():
            return
        state, _ = read_checkpoint(self.state_path)
        if not state.keys() >= STATE:
            raise CheckpointError(f"cannot resume from {self.state_path}: it is no state of a student; delete it to start anew")
        if state["recipe"] != asdict(self.recipe):
            own: dict[str, Any] = asdict(self.recipe)
            changed = ", ".join(name for name in own if state["recipe"].get(name) != own[name])
            raise CheckpointError(
                f"cannot resume from {self.state_path}: it was saved with another {changed}; delete it to start anew"
            )
        load_weights(self.model, state["model"], self.state_path)
        self.average = {name: value.to(self.device) for name, value in state["average"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        self.teacher_seconds = state["teacher_seconds"]
        for _ in range(state["visited"]):
            self._visit()
