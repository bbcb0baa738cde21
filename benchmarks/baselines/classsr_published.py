"""ClassSR as its published code runs it, and as plain PyTorch can run it best: the baselines of the patch path."""

from __future__ import annotations

import torch
from torch import Tensor

from fastroute.grid import TileGrid
from fastroute.models.classsr import ClassSR


def loop_over_patches(model: ClassSR, image: Tensor, grid: TileGrid) -> Tensor:  # [1, C, H, W]
    """The published way: one patch at a time through the classifier and its branch, summed into the image and divided."""
    span, scale = grid.patch, grid.scale
    total = image.new_zeros(1, image.shape[1], *grid.output_size)
    count = image.new_zeros(1, 1, *grid.output_size)
    for y in grid.row_origins:
        for x in grid.col_origins:
            patch = image[:, :, y : y + span, x : x + span]
            branch = model.branches[int(model.classifier(patch).argmax(dim=1))]
            where = (slice(None), slice(None), slice(y * scale, (y + span) * scale), slice(x * scale, (x + span) * scale))
            total[where] += branch(patch)
            count[where] += 1
    return total / count


def batch_per_class(model: ClassSR, image: Tensor, grid: TileGrid, batch: int = 32) -> Tensor:  # [1, C, H, W]
    """Plain PyTorch at its best: patches by one stack of slices, classes by boolean masks, batches per class in channels_last."""
    span, scale = grid.patch, grid.scale
    places = [(y, x) for y in grid.row_origins for x in grid.col_origins]
    patches = torch.cat([image[:, :, y : y + span, x : x + span] for y, x in places])
    patches = patches.contiguous(memory_format=torch.channels_last)
    class_ids = torch.cat([model.classifier(chunk).argmax(dim=1) for chunk in patches.split(batch)])
    output = image.new_empty(len(places), image.shape[1], span * scale, span * scale)
    for k, branch in enumerate(model.branches):
        rows = (class_ids == k).nonzero().squeeze(1)
        for chunk in rows.split(batch):
            output[chunk] = branch(patches[chunk])
    total = image.new_zeros(1, image.shape[1], *grid.output_size)
    count = image.new_zeros(1, 1, *grid.output_size)
    for (y, x), patch in zip(places, output, strict=True):
        where = (slice(None), slice(None), slice(y * scale, (y + span) * scale), slice(x * scale, (x + span) * scale))
        total[where] += patch
        count[where] += 1
    return total / count
