"""PCSR as its authors run it: the baseline that the pixel path is measured against.

Plain PyTorch and the same order of work: all queries' coordinates are made up front in float32, chunks of 300,000 of
them are sampled with `grid_sample`, classified, sampled again by class and pushed through that class's MLP, and the
refinement unfolds the whole image into its 3 x 3 neighbourhoods. Only the weights come from
:class:`fastroute.models.pcsr.PCSR`.

    python -m benchmarks.baselines.pcsr_published CHECKPOINT [--size 256 256] [--scale 4] [--k 0] [--device cpu]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastroute.models.pcsr import MLP, PCSR

CHUNK = 300_000


@dataclass
class PublishedRun:
    """One upscaled image, its class map and where the time went."""

    image: Tensor  # [B, C, H, W]
    class_map: Tensor  # [B, H, W]
    encoder_seconds: float
    rest_seconds: float


def pcsr_published(
    model: PCSR,
    lr: Tensor,  # [B, C, h, w]
    size: tuple[int, int],
    k: float = 0.0,
    adaptive: bool = False,
    refine: bool = True,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:  # [B, C, H, W], [B, H, W]
    """The published computation: the output image and the class of every pixel."""
    run = time_pcsr_published(model, lr, size, k, adaptive, refine, chunk)
    return run.image, run.class_map


@torch.no_grad()
def time_pcsr_published(
    model: PCSR,
    lr: Tensor,  # [B, C, h, w]
    size: tuple[int, int],
    k: float = 0.0,
    adaptive: bool = False,
    refine: bool = True,
    chunk: int = CHUNK,
) -> PublishedRun:
    """The published computation with the encoder and the rest timed apart; the cost vector is made beforehand."""
    height, width = size
    channels = lr.shape[1]
    factor = round((height / lr.shape[2] + width / lr.shape[3]) / 2, 1)
    cost = torch.tensor(model.class_cost(factor), device=lr.device)

    start = now(lr.device)
    image = lr - model.get_buffer("mean")
    features = model.encoder(image)
    encoded = now(lr.device)

    coord = pixel_centres(size, lr.device).flatten(0, 1)
    cell = torch.tensor([2 / height, 2 / width], device=lr.device).expand_as(coord)
    class_map = classify(model, features, coord, cell, cost, k, adaptive, chunk)
    images = zip(torch.split(features, 1), torch.split(image, 1), class_map, strict=True)
    flat = torch.stack([upsample(model, f, x, coord, cell, c, chunk) for f, x, c in images])
    output = flat.transpose(1, 2).reshape(-1, channels, height, width)
    class_map = class_map.view(-1, height, width)
    if refine:
        output = unfold_refinement(output, class_map)
    output = output + model.get_buffer("mean")
    return PublishedRun(output, class_map, encoded - start, now(lr.device) - encoded)


def pixel_centres(size: tuple[int, int], device: torch.device) -> Tensor:  # [H, W, 2]
    """(y, x) of all pixel centres of an image that covers [-1, 1] x [-1, 1], in float32 as published."""
    axes = [-1 + 1 / n + (2 / n) * torch.arange(n, device=device).float() for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def sample(image: Tensor, coord: Tensor, mode: str, padding: str) -> Tensor:  # [B, D, h, w], [Q, 2] -> [B, Q, D]
    """`image` at `coord`, which is (y, x) where `grid_sample` wants (x, y)."""
    grid = coord.flip(-1).expand(image.shape[0], 1, *coord.shape)
    found = F.grid_sample(image, grid, mode=mode, padding_mode=padding, align_corners=False)
    return found[:, :, 0].transpose(1, 2)


def make_queries(features: Tensor, coord: Tensor, cell: Tensor) -> Tensor:  # [B, D, h, w] -> [B, Q, D + 4]
    """Nearest feature, relative coordinate and cell of every query."""
    h, w = features.shape[2:]
    lr_size = torch.tensor([h, w], device=features.device)
    centres = pixel_centres((h, w), features.device).permute(2, 0, 1)[None]
    nearest = sample(features, coord, "nearest", "zeros")
    relative = (coord - sample(centres, coord, "nearest", "zeros")) * lr_size
    relative, rel_cell = (t.expand(*nearest.shape[:2], 2) for t in (relative, cell * lr_size))
    return torch.cat([nearest, relative, rel_cell], dim=-1)


def classify(
    model: PCSR,
    features: Tensor,  # [B, D, h, w]
    coord: Tensor,  # [H·W, 2]
    cell: Tensor,  # [H·W, 2]
    cost: Tensor,  # [K]
    k: float,
    adaptive: bool,
    chunk: int,
) -> Tensor:  # [B, H·W]
    """The class of every query, chunk by chunk."""
    parts = zip(torch.split(coord, chunk), torch.split(cell, chunk), strict=True)
    probability = torch.cat([model.classifier(make_queries(features, *p)).softmax(dim=-1) for p in parts], dim=1)
    if adaptive:
        return torch.stack([two_means(p[:, 1]) for p in probability])
    return (probability / cost.pow(k)).argmax(dim=-1)


def two_means(score: Tensor) -> Tensor:  # [Q] -> [Q]
    """Lloyd's iteration over [0, 1] from the centres mean and 0, distances written out for every query and centre."""
    value = (score - score.min()) / (score.max() - score.min())
    centres = torch.stack([value.mean(), value.new_zeros(())])
    label = torch.zeros_like(value, dtype=torch.long)
    for _ in range(19):
        label = (value[:, None] - centres).square().argmin(dim=1)
        fresh = torch.stack([value[label == c].mean() for c in range(2)]).nan_to_num(0)
        moved, centres = (fresh - centres).square().sum(), fresh
        if moved <= 1e-4:
            break
    return 1 - label if label[value.argmin()] == 1 else label


def upsample(
    model: PCSR,
    features: Tensor,  # [1, D, h, w]
    image: Tensor,  # [1, C, h, w]
    coord: Tensor,  # [H·W, 2]
    cell: Tensor,  # [H·W, 2]
    class_map: Tensor,  # [H·W]
    chunk: int,
) -> Tensor:  # [H·W, C]
    """Every query through the MLP of its class, plus the bilinear image."""
    output = image.new_zeros(len(coord), image.shape[1])
    for begin in range(0, len(coord), chunk):
        part = slice(begin, begin + chunk)
        for number, mlp in enumerate(model.upsamplers):
            assert isinstance(mlp, MLP)
            index = (class_map[part] == number).nonzero().squeeze(1) + begin
            if len(index) and len(mlp.layers):
                output[index] = mlp(make_queries(features, coord[index], cell[index]))[0]
        output[part] += sample(image, coord[part], "bilinear", "border")[0]
    return output


def unfold_refinement(image: Tensor, class_map: Tensor) -> Tensor:  # [B, C, H, W], [B, H, W] -> [B, C, H, W]
    """Light pixels with a heavy neighbour become the mean of their 3 x 3 pixels, the outermost excepted."""

    def neighbours(x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, 9, H, W]
        columns = F.unfold(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3)
        return columns.view(x.shape[0], x.shape[1], 9, *x.shape[2:])

    flag = class_map[:, None]
    chosen = (flag == 0) & (neighbours(flag.to(image.dtype)).sum(dim=2) > 0)
    chosen[:, :, [0, -1], :] = False
    chosen[:, :, :, [0, -1]] = False
    return torch.where(chosen, neighbours(image).mean(dim=2), image)


def now(device: torch.device) -> float:
    """Seconds, once all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main(print_line: Callable[[str], object] = print) -> None:
    """Time one random image; the median of the runs after one warm-up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256), metavar=("h", "w"), help="LR size")
    parser.add_argument("--scale", type=float, default=4.0)
    parser.add_argument("--k", type=float, default=0.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    model = PCSR.from_published(torch.load(args.checkpoint, map_location="cpu", weights_only=True)).to(args.device)
    lr = torch.rand(1, 3, *args.size, generator=torch.Generator().manual_seed(0)).to(args.device)
    size = (round(args.size[0] * args.scale), round(args.size[1] * args.scale))
    runs = [time_pcsr_published(model, lr, size, args.k) for _ in range(args.runs + 1)][1:]
    run = sorted(runs, key=lambda r: r.encoder_seconds + r.rest_seconds)[len(runs) // 2]
    heavy = run.class_map.float().mean().item()
    print_line(f"encoder {run.encoder_seconds:.4f} s, rest {run.rest_seconds:.4f} s, expensive pixels {heavy:.1%}")


if __name__ == "__main__":
    main()
