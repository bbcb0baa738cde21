"""The PCSR recipe in its two phases: encoder and dearest upsampler, then the other upsamplers and the classifier."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.models.carn import CARN, RGB_MEAN
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR
from fastroute.training.base import BaseTrainer, Stage, check_backbone, check_settings, class_shares
from fastroute.training.data import downscale, to_uint8
from fastroute.training.losses import average_loss


@dataclass(frozen=True)
class Recipe:
    """What is trained, and for how long.

    Attributes:
        backbone: of the encoder, "fsrcnn" or "carn".
        width: of the encoder.
        upsamplers: hidden widths of each class's MLP, cheapest first; an empty one is plain bilinear interpolation.
        classifier: hidden widths of the classifier's MLP.
        scales: whole upscaling factors; every batch has one of them, drawn evenly.
        patch: LR patch size.
        heavy_steps: phase 1, encoder and dearest upsampler.
        light_steps: phase 2, the other upsamplers and the classifier, all else frozen.
        batch: patches per step.
        learning_rate, light_rate: Adam's peak rates of the phases, annealed by a cosine.
        image_weight: of the absolute error in phase 2.
        average_weight: of :func:`average_loss` over all pixels; 6 is the published weight of 3 on twice that loss.
        seed: fixes initial weights and batches.
    """

    backbone: str = "fsrcnn"
    width: int = 48
    upsamplers: tuple[tuple[int, ...], ...] = ((10, 10, 10), (58, 58, 58, 58))
    classifier: tuple[int, ...] = ()
    scales: tuple[int, ...] = (4,)
    patch: int = 32
    heavy_steps: int = 20000
    light_steps: int = 6000
    batch: int = 16
    learning_rate: float = 1e-3
    light_rate: float = 1e-3
    image_weight: float = 1000.0
    average_weight: float = 6.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self, ("width", "patch", "heavy_steps", "light_steps", "batch"), ("seed", "average_weight"))
        if len(self.upsamplers) < 2 or not self.upsamplers[-1]:
            raise ValueError(f"train: upsamplers must be at least two, the last not empty; got {self.upsamplers}")
        if not self.scales or min(self.scales) < 1 or list(self.scales) != sorted(set(self.scales)):
            raise ValueError(f"train: scales must be positive and rise; got {self.scales}")
        check_backbone(self.backbone, ("fsrcnn", "carn"))
        for widths in (*self.upsamplers, self.classifier):
            if any(w < 1 for w in widths):
                raise ValueError(f"train: widths of an MLP must be at least 1; got {widths}")

    @property
    def scale(self) -> int:
        """The largest factor; pools of patches are made for it."""
        return max(self.scales)


class Trainer(BaseTrainer):
    """Runs a :class:`Recipe` with progress and exact resume; see :class:`BaseTrainer` for the arguments."""

    def _build(self) -> nn.Module:
        r = self.recipe
        carn = r.backbone == "carn"
        encoder = CARN(r.width, upsample=False) if carn else FSRCNN(r.width, upsample=False)
        return PCSR.build(encoder, [hidden or None for hidden in r.upsamplers], r.classifier, RGB_MEAN if carn else None)

    def _plan(self) -> list[Stage]:
        r = self.recipe
        return [
            Stage("encoder and dearest upsampler", r.heavy_steps, r.learning_rate, "heavy"),
            Stage("other upsamplers and classifier", r.light_steps, r.light_rate, "light"),
        ]

    def _parameters(self, stage: Stage) -> list[nn.Parameter]:
        if stage.kind == "heavy":
            return [*self.model.encoder.parameters(), *self.model.upsamplers[-1].parameters()]
        return [*self.model.upsamplers[:-1].parameters(), *self.model.classifier.parameters()]

    def _clip(self, stage: Stage) -> float:
        return 10.0 * (self.recipe.image_weight if stage.kind == "light" else 1)

    def _loss(self, stage: Stage, rng: np.random.Generator) -> tuple[Tensor, float, str]:
        r = self.recipe
        lr, hr = self._draw(rng)
        size, last = (hr.shape[2], hr.shape[3]), self.model.num_classes - 1
        with torch.set_grad_enabled(stage.kind == "heavy"):
            features = self.model.features(lr)
            heavy = self.model.upsample(features, lr, size, None, [last])
        if stage.kind == "heavy":
            # Squared, as PSNR counts.
            loss = F.mse_loss(heavy, hr)
            return 100 * loss, loss.item(), f", x{hr.shape[2] // lr.shape[2]}"
        probability = self.model.probability(features, size)
        outputs = [self.model.upsample(features, lr, size, None, [k]) for k in range(last)]
        mixed = (torch.stack([*outputs, heavy], dim=1) * probability[:, :, None]).sum(dim=1)
        pixels = probability.movedim(1, -1).flatten(0, -2)
        loss = r.image_weight * F.l1_loss(mixed, hr) + r.average_weight * average_loss(pixels)
        return loss, F.mse_loss(mixed.detach(), hr).item(), class_shares(pixels.detach())

    def _draw(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A batch of one scale. For smaller factors than the pool's, part of each HR patch is reduced anew."""
        r = self.recipe
        lr, hr = self._batch(self.pool.draw(0, len(self.pool.positions), r.batch, rng), rng)
        scale = int(rng.choice(r.scales))
        if scale < r.scale:
            span = r.patch * scale
            y, x = (int(rng.integers(0, hr.shape[2] - span + 1)) for _ in range(2))
            hr = hr[:, :, y : y + span, x : x + span]
            lr = to_uint8(downscale(hr, scale)).float() / 255
        return lr, hr
