"""The cells of an image and their scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastroute.models.arm import edge_strength

CELL = 32
# Rows of an image that are scored at a time: whole rows of cells.
ROWS = 2 * CELL


class Rectangle(NamedTuple):
    """Rows `top` to `bottom` and columns `left` to `right`, the last ones excluded, in cells or in pixels."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def area(self) -> int:
        """Its cells or pixels."""
        return (self.bottom - self.top) * (self.right - self.left)

    def holds(self, other: Rectangle) -> bool:
        """Whether `other` lies within."""
        inside = self.top <= other.top and self.bottom >= other.bottom
        return inside and self.left <= other.left and self.right >= other.right

    def joined(self, other: Rectangle) -> Rectangle:
        """The least rectangle that holds both."""
        top, left = min(self.top, other.top), min(self.left, other.left)
        return Rectangle(top, left, max(self.bottom, other.bottom), max(self.right, other.right))


@dataclass(frozen=True)
class Cells:
    """Squares that cover an image without overlap; the last row and column are what is left.

    Attributes:
        height, width: of the image, in pixels.
        side: of a cell.
    """

    height: int
    width: int
    side: int = CELL

    @property
    def rows(self) -> int:
        """Rows of cells."""
        return -(-self.height // self.side)

    @property
    def cols(self) -> int:
        """Columns of cells."""
        return -(-self.width // self.side)

    @property
    def whole(self) -> Rectangle:
        """All cells."""
        return Rectangle(0, 0, self.rows, self.cols)

    def pixels(self, cells: Rectangle, margin: int = 0) -> Rectangle:
        """Where `cells` lie in the image, with `margin` more pixels on every side where there are any."""
        top, left = max(cells.top * self.side - margin, 0), max(cells.left * self.side - margin, 0)
        bottom, right = min(cells.bottom * self.side + margin, self.height), min(cells.right * self.side + margin, self.width)
        return Rectangle(top, left, bottom, right)

    def areas(self) -> Tensor:  # [rows, cols]
        """Pixels of every cell, float64."""
        rows, cols = (
            torch.tensor([min(self.side, length - first) for first in range(0, length, self.side)], dtype=torch.float64)
            for length in (self.height, self.width)
        )
        return rows[:, None] * cols


def cell_means(values: Tensor, side: int = CELL) -> Tensor:  # [B, C, H, W] -> [B, C, rows, cols]
    """The mean of `values` over every cell, the last ones over what they hold."""
    return F.avg_pool2d(values, side, ceil_mode=True, count_include_pad=False)


# From an image [1, C, H, W] in [0, 1] and the edge scores of its cells to other scores, both [rows, cols].
Score = Callable[[Tensor, Tensor], Tensor]


def scores_by_rows(read: Callable[[Rectangle], Tensor], cells: Cells, score: Score | None = None) -> Tensor:  # [rows, cols]
    """Scores of an image that is read in bands of rows, float64 on the CPU.

    Args:
        read: gives pixels (C, h, w) in [0, 1].
        cells: of the image.
        score: instead of :func:`edge_scores`.
    """
    found = []
    for top in range(0, cells.height, ROWS):
        bottom = min(top + ROWS, cells.height)
        # The strength of an edge at a pixel depends on its neighbours.
        above, below = min(top, 1), min(cells.height - bottom, 1)
        pixels = read(Rectangle(top - above, 0, bottom + below, cells.width))[None]
        own = slice(above, pixels.shape[2] - below)
        strength = cell_means(edges(pixels)[:, :, own], cells.side)[0, 0]
        found.append(strength if score is None else score(pixels[:, :, own], strength))
    return torch.cat(found).double().cpu()


def edge_scores(images: Tensor, side: int = CELL) -> Tensor:  # [B, C, H, W] -> [B, rows, cols]
    """Mean strength of the edges of every cell, see :func:`fastroute.models.arm.edge_strength`.

    Args:
        images: floating in [0, 1]; of another number of channels than three their mean counts.
        side: of a cell.
    """
    return cell_means(edges(images), side)[:, 0]


def edges(images: Tensor) -> Tensor:  # [B, C, H, W] -> [B, 1, H, W]
    """The strength of edges at every pixel of images in [0, 1]; of another number of channels than three their mean counts."""
    if images.shape[1] != 3:
        images = images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    # A single row or column has no neighbours to be reflected.
    more = max(2 - images.shape[2], 0), max(2 - images.shape[3], 0)
    height, width = images.shape[-2:]
    if any(more):
        images = F.pad(images, (0, more[1], 0, more[0]), mode="replicate")
    return edge_strength(images)[..., :height, :width]
