"""Pictures of the decisions of a router."""

from __future__ import annotations

import torch
from torch import Tensor

from fastroute.grid import TileGrid

GREEN, YELLOW, RED = (46, 160, 67), (240, 200, 40), (214, 40, 40)
# The share of the class colour in the picture.
OPACITY = 0.42


def class_colours(num_classes: int) -> Tensor:
    """One RGB colour per class, uint8 (K, 3): from green for the cheapest through yellow to red for the most expensive."""
    stops = torch.tensor([GREEN, YELLOW, RED], dtype=torch.float32)
    at = torch.linspace(0, 2, num_classes) if num_classes > 1 else torch.zeros(1)
    low = at.floor().clamp(max=1).long()
    mix = (at - low)[:, None]
    return ((1 - mix) * stops[low] + mix * stops[low + 1]).round().to(torch.uint8)


def colour_names(num_classes: int) -> list[str]:
    """The names of the colours of :func:`class_colours`, for a legend."""
    at = [2 * k / (num_classes - 1) for k in range(num_classes)] if num_classes > 1 else [0.0]
    between = {0: "yellow-green", 1: "orange"}
    return [("green", "yellow", "red")[int(x)] if x == int(x) else between[int(x)] for x in at]


def class_overlay(image: Tensor, class_map: Tensor, grid: TileGrid | None, num_classes: int) -> Tensor:
    """Draw the class of every patch as a colour over the image, with a line between patches, as the papers do.

    Args:
        image: the stitched uint8 image (C, H, W), C = 1 or 3, of the size that ``grid.output_size`` gives.
        class_map: (grid.rows, grid.cols), 0 the cheapest class; or (H, W) without a grid.
        grid: where the patches lie, or None for a class per pixel. A pixel that several patches cover shows the class of the
            last one. If a last row or column is shifted inward, the one before keeps its share.
        num_classes: number of classes, which fixes the colours.

    Returns:
        uint8 (3, H, W).

    Raises:
        ValueError: the sizes do not match.
    """
    palette = class_colours(num_classes).float()
    gray = image.cpu().float().mean(dim=0, keepdim=True)
    if grid is None:
        if class_map.shape != image.shape[1:]:
            raise ValueError(
                f"class_overlay: class_map must be {tuple(image.shape[1:])} as the image is; got {tuple(class_map.shape)}"
            )
        return blend(gray, palette[class_map.cpu().long()].permute(2, 0, 1)).round().to(torch.uint8)
    if tuple(class_map.shape) != (grid.rows, grid.cols) or tuple(image.shape[1:]) != grid.output_size:
        raise ValueError(
            f"class_overlay: class_map must be ({grid.rows}, {grid.cols}) and image (C, {grid.output_size[0]}, "
            f"{grid.output_size[1]}); got {tuple(class_map.shape)} and {tuple(image.shape)}"
        )
    rows, row_edges = _owners(grid.row_origins, grid.stride, grid.output_size[0], grid.scale)
    cols, col_edges = _owners(grid.col_origins, grid.stride, grid.output_size[1], grid.scale)
    colours = palette[class_map.cpu().long()]  # [rows, cols, 3]
    tint = colours[rows][:, cols].permute(2, 0, 1)
    picture = blend(gray, tint)
    picture[:, row_edges] *= 0.6
    picture[:, :, col_edges] *= 0.6
    return picture.round().to(torch.uint8)


def blend(gray: Tensor, tint: Tensor) -> Tensor:  # [1, H, W], [3, H, W] -> [3, H, W]
    """Blend the picture in gray with its class colours."""
    return (1 - OPACITY) * gray + OPACITY * tint


def _owners(origins: list[int], stride: int, length: int, scale: int) -> tuple[Tensor, Tensor]:
    """The last tile that covers each output pixel, and the first pixel of every tile but the first.

    A last tile that is shifted inward leaves its predecessor the same share as all others have.
    """
    shown = [*origins[:-1], origins[-2] + stride] if len(origins) > 1 else origins
    starts = torch.tensor(shown) * scale
    return torch.searchsorted(starts, torch.arange(length), right=True) - 1, starts[1:]
