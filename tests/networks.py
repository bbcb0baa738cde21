"""Random networks that tell classes apart, pictures for them, and the routed result in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute import TileGrid, make_window
from fastroute.models.classsr import ClassSR, PatchClassifier

MAXIMUM = {torch.uint8: 255, torch.uint16: 65535}


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights under which every layer matters; batch norms with statistics of their own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                # A transposed convolution has its inputs first, and each output takes 1 / stride² of the taps.
                fan_in = part.weight[0].numel()
                if isinstance(part, nn.ConvTranspose2d):
                    fan_in = max(1, part.weight.numel() // part.out_channels // part.stride[0] ** 2)
                part.weight.normal_(0, (1.2 / fan_in) ** 0.5, generator=generator)
                if part.bias is not None:
                    part.bias.normal_(0, 0.1, generator=generator)
            elif isinstance(part, nn.PReLU):
                part.weight.uniform_(-0.2, 0.5, generator=generator)
            elif isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.3, generator=generator)
                part.running_var.uniform_(0.3, 2, generator=generator)
                if part.affine:
                    part.weight.normal_(0, 1, generator=generator)
                    part.bias.normal_(0, 0.3, generator=generator)
    return module


def picture(b: int, c: int, height: int, width: int, seed: int = 0) -> Tensor:  # [B, C, H, W] in [0, 1]
    """Noise whose strength varies over the image, so that patches differ as those of photographs do."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(b, c, height, width, generator=generator)
    coarse = torch.rand(b, 2 * c, -(-height // 8), -(-width // 8), generator=generator)
    if b == 0:
        return noise
    level, strength = F.interpolate(coarse, (height, width), mode="bilinear").split(c, dim=1)
    return (level + strength.square() * (noise - 0.5)).clamp(0, 1)


def as_image(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[0, 1] in the steps of an image type."""
    return (x * MAXIMUM[dtype]).round().int().to(dtype) if dtype in MAXIMUM else x.to(dtype)


def as_float(image: Tensor) -> Tensor:
    return image.int() / MAXIMUM[image.dtype] if image.dtype in MAXIMUM else image.float()


def random_classsr(widths: Sequence[int] = (4, 6, 8), scale: int = 4, patch: int = 16, seed: int = 0) -> ClassSR:
    """Random branches, and a classifier that sends patches of `picture` to all of them."""
    system = randomise(ClassSR.fsrcnn(widths, scale), seed).eval()
    calibrate(system.classifier, patch)
    return system


@torch.no_grad()
def calibrate(classifier: PatchClassifier, patch: int) -> None:
    """Logits of mean 0 and standard deviation 2 over patches of `picture`."""
    logits = torch.cat([classifier.logits(picture(100, 3, patch, patch, seed=s)) for s in range(3)])
    std, mean = torch.std_mean(logits, dim=0)
    classifier.lastOut.weight.mul_(2 / std[:, None])
    classifier.lastOut.bias.sub_(mean).mul_(2 / std)


def patches_of(image: Tensor, grid: TileGrid) -> Tensor:  # [B, C, H, W] floating -> [N, C, p, p]
    """One slice after another; beyond the image its edge repeats."""
    below, right = max(grid.patch - grid.height, 0), max(grid.patch - grid.width, 0)
    padded = F.pad(image, (0, right, 0, below), mode="replicate")
    pieces = [
        one[:, y : y + grid.patch, x : x + grid.patch] for one in padded for y in grid.row_origins for x in grid.col_origins
    ]
    return torch.stack(pieces) if pieces else image.new_empty(0, image.shape[1], grid.patch, grid.patch)


def merge(outputs: Tensor, grid: TileGrid, batch: int, window: str | Tensor = "uniform") -> Tensor:  # [N, C, P, P]
    """Weighted sums over the sum of weights, one patch after another, in float64."""
    span = grid.patch * grid.scale
    weights = make_window(window, span).double()
    weight = weights[:, None] * weights
    height, width = max(grid.height, grid.patch) * grid.scale, max(grid.width, grid.patch) * grid.scale
    total = torch.zeros(batch, outputs.shape[1], height, width, dtype=torch.float64)
    weight_sum = torch.zeros(height, width, dtype=torch.float64)
    places = [(y * grid.scale, x * grid.scale) for y in grid.row_origins for x in grid.col_origins]
    for number, output in enumerate(outputs):
        y, x = places[number % len(places)]
        total[number // len(places), :, y : y + span, x : x + span] += output.double() * weight
    for y, x in places:
        weight_sum[y : y + span, x : x + span] += weight
    return (total / weight_sum)[:, :, : grid.height * grid.scale, : grid.width * grid.scale]


@torch.no_grad()
def routed_plainly(
    image: Tensor,  # [B, C, H, W]
    grid: TileGrid,
    branches: Sequence[nn.Module],
    class_ids: Tensor,  # [N]
    window: str | Tensor = "uniform",
) -> Tensor:  # [B, C, H·s, W·s] float64
    """What routing means: a Python loop that sends every patch on its own through the branch of its class."""
    pieces = patches_of(as_float(image), grid)
    outputs = [branches[int(k)](piece[None])[0] for piece, k in zip(pieces, class_ids, strict=True)]
    span = grid.patch * grid.scale
    stacked = torch.stack(outputs) if outputs else pieces.new_empty(0, image.shape[1], span, span)
    return merge(stacked, grid, image.shape[0], window)
