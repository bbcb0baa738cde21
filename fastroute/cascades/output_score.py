"""Scores of what a cheaper network makes of cells, instead of the cells themselves; its result is kept, not made twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastroute.cascades.cells import Cells, cell_means
from fastroute.cascades.run import Network, Piece, Read, cut, within

# Of the cheaper classes, the most expensive one that costs no more than this share of the dense run is scored by default.
SCORED = 0.1


@dataclass(frozen=True)
class Base:
    """The class whose result was scored.

    Attributes:
        number: of the class.
        pieces: in which it ran on the whole image; they do not fade into each other.
        results: of the pieces, floating (C, h, w); None where they are not kept.
    """

    number: int
    pieces: Sequence[Piece]
    results: Sequence[Tensor] | None

    @property
    def pixels(self) -> int:
        """LR pixels on which it ran."""
        return sum(piece.outer.area for piece in self.pieces)

    @property
    def ready(self) -> dict[int, Sequence[Tensor]]:
        """The results that are kept, by class."""
        return {} if self.results is None else {self.number: self.results}


def scored_class(costs: Sequence[float]) -> int:
    """The class whose result is scored where nobody has tried which is best: it costs little, and is the best of those."""
    return max((k for k, cost in enumerate(costs[:-1]) if cost <= SCORED * costs[-1]), default=0)


def strengths(result: Tensor, side: int) -> Tensor:  # [B, C, H, W] -> [B, rows, cols]
    """The mean absolute difference of neighbouring pixels within every cell, in levels of 8 bits.

    A network has removed the noise of a cell, and made visible what it takes for detail. Whether that foretells its errors
    better than the cell itself is for a calibration to find out.

    Args:
        result: of a network, floating in [0, 1]; what lies beyond is cut off.
        side: of a cell, in pixels of the result.
    """
    values = 255 * result.clamp(0, 1)
    height, width = values.shape[2:]
    across = F.pad(values.diff(dim=3).abs_(), (0, 1)).mean(dim=1, keepdim=True)
    down = F.pad(values.diff(dim=2).abs_(), (0, 0, 0, 1)).mean(dim=1, keepdim=True)
    # A difference belongs to both cells, or to none.
    across[..., side - 1 : width - 1 : side] = 0
    down[..., side - 1 : height - 1 : side, :] = 0
    return cell_means(across.add_(down), side)[:, 0]


def scored_result(
    number: int, pieces: Sequence[Piece], network: Network, read: Read, cells: Cells, scale: int, keep: bool
) -> tuple[Tensor, Base]:  # [rows, cols]
    """Scores of an image by what a network makes of it, float64 on the CPU, and what it makes.

    Args:
        number: of the network's class.
        pieces: of the whole image; each holds whole cells, and its context all that the network sees.
        network: gives the result of a batch of images.
        read: gives the pixels of the image.
        cells: of the image.
        scale: of the network.
        keep: whether the results are wanted again.
    """
    scores = torch.zeros(cells.rows, cells.cols, dtype=torch.float64)
    results = []
    for piece in pieces:
        result = cut(network(read(piece.outer)[None])[0], within(piece.inner, piece.outer, scale))
        found = strengths(result[None], scale * cells.side)[0]
        top, left = piece.inner.top // cells.side, piece.inner.left // cells.side
        scores[top : top + len(found), left : left + found.shape[1]] = found.double().cpu()
        if keep:
            results.append(result)
    return scores, Base(number, pieces, results if keep else None)
