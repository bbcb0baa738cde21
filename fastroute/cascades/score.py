"""A small learned score of cells, to be tried against the strength of edges: what error the cheapest network makes there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from fastroute.cascades.cells import CELL
from fastroute.cascades.measured import Measured
from fastroute.cascades.table_fit import FLOOR
from fastroute.ops.cell_mlp import cell_mlp

# The scores of cells: the mean strength of their edges, one that is learnt, and that of what a cheaper network makes of them.
EDGE, LEARNED, OUTPUT = "edge", "learned", "output"
# Side of the squares that the features are computed of, sizes of their layers, and the slope of their leaky ReLU.
SQUARE, SIZES, SLOPE = 4, (24, 16), 0.1
# How it learns: steps, cells of a step, and the rate, which falls to nothing by a cosine.
STEPS, BATCH, RATE = 400, 128, 4e-3
# Added to the strength of an edge before its logarithm is taken.
LEAST_EDGE = 0.1
NAMES = ("score.0.weight", "score.0.bias", "score.1.weight", "score.1.bias", "score.last.weight", "score.last.bias")
MOST_SIZE = 256


@dataclass(frozen=True)
class CellScore:
    """Features of squares of 4 pixels, averaged over a cell, and the strength of its edges, through a linear layer.

    Attributes:
        weights: of the two layers of the features, [F, C * 16] and [F, F], and of the last, [1, F + 1]; each before its bias.
    """

    weights: tuple[Tensor, ...]

    def __call__(self, images: Tensor, edges: Tensor) -> Tensor:  # [1, C, H, W], [rows, cols] -> [rows, cols]
        """Scores of all cells: the root of the error that is expected, in levels of 8 bits."""
        w0, b0, w1, b1, last, bias = (weight.to(images.device, torch.float32) for weight in self.weights)
        height, width = images.shape[2:]
        images = F.pad(images.float(), (0, -width % CELL, 0, -height % CELL), mode="replicate")
        span = CELL // SQUARE
        rows = cell_mlp(images, [(w0, b0), (w1, b1)], SQUARE, span, span, SLOPE)[0]
        features = rows.unflatten(0, (-1, span)).mean(dim=1)
        return _score(torch.cat([features, _log(edges.to(features))[..., None]], dim=-1), last, bias)

    def tensors(self) -> dict[str, Tensor]:
        """As they are stored."""
        return dict(zip(NAMES, self.weights, strict=True))


def stored_score(content: Mapping[str, Tensor], channels: int) -> CellScore:
    """What :meth:`CellScore.tensors` gave.

    Raises:
        ValueError: tensors are missing, or do not fit each other.
    """
    found = [content.get(name) for name in NAMES]
    weights = [x.float() for x in found if isinstance(x, Tensor)]
    if len(weights) < len(NAMES) or any(x.numel() > MOST_SIZE**2 or not bool(x.isfinite().all()) for x in weights):
        raise ValueError("its score must have finite weights, all of them")
    first, second = (len(weights[n]) if weights[n].ndim else 0 for n in (0, 2))
    shapes = [(first, channels * SQUARE**2), (first,), (second, first), (second,), (1, second + 1), (1,)]
    if not 0 < first <= MOST_SIZE or not 0 < second <= MOST_SIZE or [tuple(x.shape) for x in weights] != shapes:
        raise ValueError("the weights of its score do not fit each other")
    return CellScore(tuple(weights))


def fit_score(cells: Sequence[Measured], seed: int = 0) -> CellScore:
    """Learn the logarithm of the cheapest network's error in a cell.

    Args:
        cells: of pictures, with their pixels.
        seed: of the first weights and the order.
    """
    pictures = [c for c in cells if c.image is not None]
    squares = torch.cat([_squares(c.image) for c in pictures if c.image is not None])
    logs = torch.cat([_log(c.scores.flatten().float()) for c in pictures])
    wanted = torch.cat([c.errors[0].flatten().clamp(min=FLOOR).log().float() for c in pictures])
    generator = torch.Generator().manual_seed(seed)
    sizes = (squares.shape[2], *SIZES)
    weights: list[Tensor] = []
    for n, m in pairwise(sizes):
        weights += [torch.randn(m, n, generator=generator) * (2 / n) ** 0.5, torch.zeros(m)]
    # Flat squares of any brightness look alike at first.
    weights[0] -= weights[0].unflatten(1, (-1, SQUARE**2)).mean(dim=2, keepdim=True).expand(-1, -1, SQUARE**2).flatten(1)
    weights += [torch.zeros(1, SIZES[-1] + 1), torch.full((1,), float(wanted.mean()))]
    # It begins as the line through the logarithms of the edges.
    slope = float(((logs - logs.mean()) * (wanted - wanted.mean())).sum() / (logs - logs.mean()).square().sum().clamp(min=1e-6))
    weights[4][0, -1], weights[5][0] = slope, float(wanted.mean()) - slope * float(logs.mean())
    with torch.inference_mode(False), torch.enable_grad():
        parameters = [weight.clone().requires_grad_() for weight in weights]
        optimizer = torch.optim.Adam(parameters, lr=RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            chosen = torch.randint(len(squares), (BATCH,), generator=generator)
            w0, b0, w1, b1, last, bias = parameters
            features = F.leaky_relu(F.linear(squares[chosen], w0, b0), SLOPE)
            features = F.leaky_relu(F.linear(features, w1, b1), SLOPE).mean(dim=1)
            found = F.linear(torch.cat([features, logs[chosen, None]], dim=-1), last, bias)[:, 0]
            loss = F.smooth_l1_loss(found, wanted[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return CellScore(tuple(parameter.detach() for parameter in parameters))


def _squares(image: Tensor) -> Tensor:  # uint8 [C, H, W] -> [cells, squares, C * 16]
    """The squares of every cell, continued by the edge where the image ends."""
    height, width = image.shape[-2:]
    pixels = F.pad(image[None].float() / 255, (0, -width % CELL, 0, -height % CELL), mode="replicate")
    span = CELL // SQUARE
    parts = F.pixel_unshuffle(pixels, SQUARE)[0].unflatten(1, (-1, span)).unflatten(3, (-1, span))
    return parts.permute(1, 3, 2, 4, 0).flatten(2, 3).flatten(0, 1)


def _log(edges: Tensor) -> Tensor:  # [...]
    return (edges + LEAST_EDGE).log()


def _score(features: Tensor, last: Tensor, bias: Tensor) -> Tensor:
    # [rows, cols, F + 1], [1, F + 1], [1] -> [rows, cols]
    return 255 * (F.linear(features, last, bias)[..., 0] / 2).clamp(-20, 0).exp()
