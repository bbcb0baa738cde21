"""The PCSR recipe in its two phases: encoder and most expensive upsampler, then the other upsamplers and the classifier."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.models.carn import RGB_MEAN
from fastroute.models.pcsr import BACKBONES, MLP, PCSR, encoder_of
from fastroute.pixel.pixel_router import PixelRouter
from fastroute.reference.pixel_mlp import bilinear_reference
from fastroute.runtime.transfer import to_device
from fastroute.training.base import RecipeTrainer, class_shares, routed
from fastroute.training.checks import check_backbone, check_settings, check_shares
from fastroute.training.data import downscale, to_uint8
from fastroute.training.losses import average_loss
from fastroute.training.optimizers import check_optimizer
from fastroute.training.start import Start, start_encoder
from fastroute.training.trainer import Stage, StepResult
from fastroute.training.validation import Upscale


@dataclass(frozen=True)
class Recipe:
    """What is trained, and for how long.

    Attributes:
        backbone: of the encoder, "fsrcnn", "carn", "srresnet" or "rcan"; "own" for a model given in Python.
        width: of the encoder.
        blocks: of the encoder: residual blocks of SRResNet, or those of each group of RCAN; 0 for as many as published.
        upsamplers: hidden widths of each class's MLP, cheapest first; an empty one is plain bilinear interpolation.
        classifier: hidden widths of the classifier's MLP.
        scales: whole upscaling factors; every batch has one of them, drawn evenly.
        patch: LR patch size.
        heavy_steps: phase 1, encoder and most expensive upsampler.
        light_steps: phase 2, the other upsamplers and the classifier, all else frozen.
        batch: patches per step.
        pixels: output pixels of every LR pixel at which a step evaluates classifier and upsamplers, drawn anew for each step
            and LR pixel; 0 for all. They take most of the time; every feature still learns in every step.
        focus: share of the patches of phase 1 that comes from the harder half of them, by bicubic interpolation.
        balance: how much phase 1 heeds easy patches, as for ClassSR; see :class:`fastroute.training.classsr.BranchRecipe`.
        learning_rate, light_rate: peak rates of the phases, annealed by a cosine.
        optimizer: "adam" or "soap", of all stages; see :func:`fastroute.training.optimizers.make_optimizer`.
        image_weight: of the absolute error in phase 2.
        average_weight: of :func:`average_loss` over all pixels; 6 is the published weight of 3 on twice that loss.
        seed: fixes initial weights and batches.
    """

    backbone: str = "fsrcnn"
    width: int = 48
    blocks: int = 0
    upsamplers: tuple[tuple[int, ...], ...] = ((10, 10, 10), (58, 58, 58, 58))
    classifier: tuple[int, ...] = ()
    scales: tuple[int, ...] = (4,)
    patch: int = 32
    heavy_steps: int = 20000
    light_steps: int = 6000
    batch: int = 16
    pixels: int = 4
    focus: float = 0.0
    balance: float = 0.0
    learning_rate: float = 1e-3
    light_rate: float = 1e-3
    optimizer: str = "adam"
    image_weight: float = 1000.0
    average_weight: float = 6.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(
            self, ("width", "patch", "heavy_steps", "light_steps", "batch"), ("pixels", "seed", "average_weight", "blocks")
        )
        if len(self.upsamplers) < 2 or not self.upsamplers[-1]:
            raise ValueError(f"train: upsamplers must be at least two, the last not empty; got {self.upsamplers}")
        if not self.scales or min(self.scales) < 1 or list(self.scales) != sorted(set(self.scales)):
            raise ValueError(f"train: scales must be positive and rise; got {self.scales}")
        check_shares(self, "focus", "balance")
        check_optimizer(self.optimizer)
        check_backbone(self.backbone, BACKBONES)
        for name, mlps in (("upsamplers", self.upsamplers), ("classifier", (self.classifier,))):
            if any(w < 1 for widths in mlps for w in widths):
                raise ValueError(f"train: {name}: widths of an MLP must be at least 1; got {getattr(self, name)}")

    @property
    def scale(self) -> int:
        """The largest factor; pools of patches are made for it."""
        return max(self.scales)


class Trainer(RecipeTrainer):
    """Runs a :class:`Recipe` with progress and exact resume; see :class:`RecipeTrainer` for the arguments.

    `init` may also be one network of the encoder's backbone and width, or a ClassSR model whose most expensive branch is such a
    network. The encoder takes its layers up to the features.
    """

    system = "pcsr"

    def build(self) -> nn.Module:
        """See :class:`RecipeTrainer`."""
        r = self.recipe
        sizes = {"width": r.width} | ({"blocks": r.blocks} if r.blocks else {})
        mean = RGB_MEAN if r.backbone == "carn" else None
        return PCSR.build(encoder_of(r.backbone, **sizes), [hidden or None for hidden in r.upsamplers], r.classifier, mean)

    def upscale(self, stage: Stage) -> Upscale:
        """The most expensive upsampler everywhere while it learns, then the classes that the classifier chooses."""
        router = PixelRouter(self.model, scale=self.recipe.scale)
        return routed(router, **({"budget": 1.0} if stage.kind == "heavy" else {}))

    def start_from(self, start: Start) -> None:
        """See :class:`RecipeTrainer`."""
        if any(key.startswith("encoder.") for key in start.state):
            super().start_from(start)
        else:
            start_encoder(self.model.encoder, start)

    def plan(self) -> list[Stage]:
        """See :class:`fastroute.training.Trainer`."""
        r = self.recipe
        return [
            Stage("encoder and most expensive upsampler", r.heavy_steps, r.learning_rate, "heavy"),
            Stage("other upsamplers and classifier", r.light_steps, r.light_rate, "light"),
        ]

    def parameters(self, stage: Stage) -> list[nn.Parameter]:
        """See :class:`fastroute.training.Trainer`."""
        if stage.kind == "heavy":
            return [*self.model.encoder.parameters(), *self.model.upsamplers[-1].parameters()]
        return [*self.model.upsamplers[:-1].parameters(), *self.model.classifier.parameters()]

    def largest_norm(self, stage: Stage) -> float:
        """See :class:`fastroute.training.Trainer`."""
        return 10.0 * (self.recipe.image_weight if stage.kind == "light" else 1)

    def loss(self, stage: Stage, rng: np.random.Generator) -> StepResult:
        """See :class:`fastroute.training.Trainer`."""
        r = self.recipe
        indices = self.draw(stage, rng)
        lr, hr = self._pairs(indices, rng)
        scale = hr.shape[2] // lr.shape[2]
        chosen = torch.from_numpy(choose_pixels(lr.shape[2] * lr.shape[3], scale**2, r.pixels, rng))
        chosen = to_device(chosen, self.device)
        bilinear, target = (at_pixels(x, chosen) for x in (bilinear_reference(lr, *hr.shape[2:]), hr))
        with torch.set_grad_enabled(stage.kind == "heavy"):
            features = self.model.features(lr)
            heavy = bilinear + run_mlp(self.model.upsamplers[-1], features, chosen, scale)
        if stage.kind == "heavy":
            # Squared, as PSNR counts.
            errors = (heavy - target).square().mean(dim=(1, 2, 3))
            return StepResult(100 * self.balanced(errors, indices), errors.detach().mean(), lambda: f", x{scale}")
        probability = run_mlp(self.model.classifier, features, chosen, scale).softmax(dim=-1)
        outputs = [bilinear + run_mlp(mlp, features, chosen, scale) for mlp in self.model.upsamplers[:-1]]
        mixed = (torch.stack([*outputs, heavy], dim=-1) * probability[..., None, :]).sum(dim=-1)
        pixels = probability.flatten(0, -2)
        loss = r.image_weight * F.l1_loss(mixed, target) + r.average_weight * average_loss(pixels)
        return StepResult(loss, F.mse_loss(mixed.detach(), target), partial(class_shares, pixels.detach()))

    def draw(self, stage: Stage, rng: np.random.Generator) -> np.ndarray:
        """Numbers of the patches of a step."""
        return self.draw_patches(self.recipe.batch, rng, self.pool.class_range(1, 2) if stage.kind == "heavy" else (0, 0))

    def _pairs(self, indices: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A batch of one scale.

        For smaller factors than the pool's, part of each HR patch is reduced anew.
        """
        r = self.recipe
        lr, hr = self.batch(indices, rng)
        scale = int(rng.choice(r.scales))
        if scale < r.scale:
            span = r.patch * scale
            y, x = (int(rng.integers(0, hr.shape[2] - span + 1)) for _ in range(2))
            hr = hr[:, :, y : y + span, x : x + span]
            lr = to_uint8(downscale(hr, scale)).float() / 255
        return lr, hr


def choose_pixels(cells: int, inside: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """For each LR pixel, `count` different ones of the `inside` output pixels in it, int64 (cells, count); 0 means all."""
    if not 0 < count < inside:
        return np.tile(np.arange(inside), (cells, 1))
    return rng.random((cells, inside)).argsort(axis=1)[:, :count]


def at_pixels(image: Tensor, chosen: Tensor) -> Tensor:  # [B, C, H, W], [h·w, q] -> [B, h·w, q, C]
    """`image` at some output pixels of every LR pixel, which are numbered row by row, as the LR pixels are."""
    channels, scale = image.shape[1], math.isqrt(image[0, 0].numel() // len(chosen))
    cells = F.pixel_unshuffle(image, scale).unflatten(1, (channels, -1)).flatten(3).permute(0, 3, 2, 1)
    return cells.gather(2, chosen[None, :, :, None].expand(len(image), -1, -1, channels))


def run_mlp(mlp: MLP, features: Tensor, chosen: Tensor, scale: int) -> Tensor:  # [B, D, h, w], [h·w, q] -> [B, h·w, q, F]
    """`mlp` at some output pixels of every LR pixel, the numbers of `pixel_mlp` at a whole factor; 0 for an empty one.

    What the first layer makes of a feature is computed once per LR pixel.
    """
    weights, biases = mlp.parameter_lists
    if not weights:
        return features.new_zeros(())
    depth = features.shape[1]
    relative = torch.stack([chosen // scale, chosen % scale], dim=-1) * 2 + 1 - scale
    place = torch.cat([relative, torch.full_like(relative, 2)], dim=-1).to(features.dtype) / scale
    x = F.linear(features.flatten(2).transpose(1, 2), weights[0][:, :depth])[:, :, None]
    x = x + F.linear(place, weights[0][:, depth:], biases[0])
    for weight, bias in zip(weights[1:], biases[1:], strict=True):
        x = F.linear(F.relu(x), weight, bias)
    return x
