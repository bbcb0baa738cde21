"""What the recipes of the systems share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastroute.grid import usual_stride
from fastroute.models.checkpoints import load_weights
from fastroute.runtime.router import Router
from fastroute.runtime.transfer import to_device
from fastroute.training.checks import OWN
from fastroute.training.data import Pool
from fastroute.training.start import Start
from fastroute.training.trainer import Trainer
from fastroute.training.validation import Upscale

# Squared errors in [0, 1]²: that of a usual patch, which `balance` leaves its weight, and what keeps the weight of a flat
# patch, which is nearly exact already, from growing without end.
LEVEL, FLAT = 1e-3, 2e-4


def routed(router: Router, **options: Any) -> Upscale:
    """What a router makes of an image, for the validation."""

    def upscale(image: Tensor) -> Tensor:  # uint8 [C, h, w] -> uint8 [C, H, W]
        return router.upscale(image.to(router.device), **options).image

    return upscale


class RecipeTrainer(Trainer, ABC):
    """Runs the stages of a recipe on a pool of patches.

    Args:
        pool: ranked training patches.
        recipe: what to train; a dataclass with `seed`, `scale`, `patch`, `batch` and `optimizer`.
        state_path: file of the state, see :class:`Trainer`.
        init: weights to start from; default a fresh initialisation. Each recipe says which layouts it takes.
        save_every, device: see :class:`Trainer`.
        model: a system over networks of one's own, for a recipe whose backbone is "own"; it is trained where it is.
        options: other arguments of :class:`Trainer`.

    Raises:
        ValueError: the recipe's backbone is "own" and there is no `model`, or the reverse; see :class:`Trainer` too.
    """

    def __init__(
        self,
        pool: Pool,
        recipe: Any,
        state_path: str | Path,
        init: Start | None = None,
        save_every: int = 500,
        device: str | torch.device = "cpu",
        *,
        model: nn.Module | None = None,
        **options: Any,
    ) -> None:
        self.pool, self.recipe, self.device = pool, recipe, torch.device(device)
        self._make(model, init)
        super().__init__(self.model, pool, recipe, state_path, save_every=save_every, device=device, **options)

    @classmethod
    def check(cls, recipe: Any, init: Start | None = None) -> None:
        """Raise what `recipe`, or weights to start from, would be refused for by :class:`RecipeTrainer` with any images."""
        trial = cls.__new__(cls)
        trial.recipe, trial.device = recipe, torch.device("cpu")
        trial._make(None, init)

    def _make(self, model: nn.Module | None, init: Start | None) -> None:
        """The model with its first weights, and what the steps need of it."""
        if (model is not None) != (self.recipe.backbone == OWN):
            raise ValueError(f"train: backbone={OWN} needs a model, given in Python, and a model needs backbone={OWN}")
        # Drawn on the CPU: the same initial weights on every device.
        torch.manual_seed(self.recipe.seed)
        self.model = self.build() if model is None else model
        self.prepare()
        if init is not None:
            self.start_from(init.at_scale(self.recipe.scale))

    # The first part of the recipe's name.
    system: str

    @abstractmethod
    def build(self) -> nn.Module:
        """The network in its initial state."""

    def prepare(self) -> None:
        """What else the steps need of the model, once there is one."""

    def start_from(self, start: Start) -> None:
        """Take the weights of `start`, in the layout of the model or in another that fits."""
        load_weights(self.model, start.state, start.name)

    def draw_patches(self, size: int, rng: np.random.Generator, own: tuple[int, int] = (0, 0)) -> np.ndarray:
        """Numbers of the `size` patches of a batch; the recipe's `focus` of them from the range `own`, if it is not empty."""
        indices = self.pool.draw(0, len(self.pool.positions), size, rng)
        if own[1] > own[0]:
            count = round(size * self.recipe.focus)
            indices[:count] = self.pool.draw(*own, count, rng)
        return indices

    def balanced(self, errors: Tensor, indices: np.ndarray) -> Tensor:  # [n]
        """The mean squared error of a batch, each patch weighed as the recipe's `balance` says.

        Args:
            errors: (n,), mean squared error of each patch of this process.
            indices: (N,), numbers of the batch's patches in the pool.
        """
        psnr = torch.from_numpy(self.pool.psnr[indices[self.rows]]).to(errors.dtype)
        weights = (LEVEL / (10 ** (-psnr / 10) + FLAT)) ** self.recipe.balance
        return (to_device(weights, self.device) * errors).mean()

    def metadata(self) -> dict[str, Any]:
        """The settings, and what :func:`fastroute.load` reads."""
        r = self.recipe
        places = {"scale": r.scale, "stride": usual_stride(r.patch), "system": f"{self.system}-{r.backbone}"}
        return {**super().metadata(), **places}


def class_shares(probability: Tensor) -> str:  # [N, K]
    """Shares of the most probable classes, for the progress bar."""
    used = torch.bincount(probability.argmax(dim=1), minlength=probability.shape[1])
    shares = "/".join(f"{100 * int(n) // len(probability)}" for n in used)
    return f", classes {shares} %"
