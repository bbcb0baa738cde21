"""ClassSR as its published code runs it, and as plain PyTorch can run it best: the baselines of the patch path.

Where classes are given, the classifier runs all the same and its answer is replaced: its time belongs to routing.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.measure import alternate
from benchmarks.setting import Setting
from fastroute.grid import TileGrid
from fastroute.models.classsr import ClassSR

# Batches among which the tiled network finds its best.
BATCHES = (8, 16, 32, 64)
# Of a batch that takes longer one run tells enough.
SLOW_SECONDS = 0.3


def loop_over_patches(
    model: ClassSR, image: Tensor, grid: TileGrid, class_ids: Sequence[int] | None = None
) -> Tensor:  # [1, C, H, W] -> [1, C, H·s, W·s]
    """The published way: one patch at a time through the classifier and its branch, summed into the image and divided."""
    patches = []
    for number, (y, x) in enumerate(places(grid)):
        patch = image[:, :, y : y + grid.patch, x : x + grid.patch]
        chosen = int(model.classifier(patch).argmax(dim=1))
        patches.append(model.branches[chosen if class_ids is None else class_ids[number]](patch)[0])
    return merge(patches, grid)


def batch_per_class(
    model: ClassSR, image: Tensor, grid: TileGrid, class_ids: Tensor | None = None, batch: int = 32
) -> Tensor:  # [1, C, H, W] -> [1, C, H·s, W·s]
    """Plain PyTorch at its best: patches by one stack of slices, classes by masks, channels_last batches."""
    patches = cut(image, grid)
    chosen = torch.cat([model.classifier(chunk).argmax(dim=1) for chunk in patches.split(batch)])
    chosen = chosen if class_ids is None else class_ids
    output = image.new_empty(len(patches), image.shape[1], grid.patch * grid.scale, grid.patch * grid.scale)
    for k, branch in enumerate(model.branches):
        rows = (chosen == k).nonzero().squeeze(1)
        for chunk in rows.split(batch):
            if len(chunk):
                output[chunk] = branch(patches[chunk])
    return merge(output, grid)


def tiled(network: nn.Module, image: Tensor, grid: TileGrid, batch: int) -> Tensor:  # [1, C, H, W] -> [1, C, H·s, W·s]
    """The whole image through one network, in batches of patches."""
    return merge(torch.cat([network(chunk) for chunk in cut(image, grid).split(batch)]), grid)


def best_batch(network: nn.Module, image: Tensor, grid: TileGrid) -> int:  # [1, C, H, W]
    """The number of patches per batch at which the tiled network is fastest."""
    patches = cut(image, grid)
    sizes = [n for n in BATCHES if n <= len(patches)] or [len(patches)]
    times = alternate({str(n): lambda n=n: network(patches[:n]) for n in sizes}, 3, limit=1.0, slow=SLOW_SECONDS)
    return min(sizes, key=lambda n: times[str(n)].median / n)


def compiled_model(model: ClassSR, classifier: bool = True) -> ClassSR:
    """A copy whose networks are compiled on their first call, for any number of patches."""
    quick = copy.deepcopy(model)
    if classifier:
        quick.classifier = torch.compile(quick.classifier, dynamic=True)
    for number, branch in enumerate(quick.branches, start=1):
        setattr(quick, f"net{number}", torch.compile(branch, dynamic=True))
    return quick


def compiled_network(network: nn.Module, image: Tensor, setting: Setting) -> nn.Module | str:  # [N, C, h, w]
    """The network compiled for any number of inputs of this size, or why not."""
    reason = setting.compile_reason()
    if reason is not None:
        return reason
    quick = torch.compile(copy.deepcopy(network), dynamic=image.shape[0] > 1)
    try:
        with setting.compiling():
            quick(image)
    except RuntimeError as error:
        return f"does not compile: {str(error).splitlines()[0]}"
    return quick


def places(grid: TileGrid) -> list[tuple[int, int]]:
    """Origins of all patches."""
    return [(y, x) for y in grid.row_origins for x in grid.col_origins]


def cut(image: Tensor, grid: TileGrid) -> Tensor:  # [1, C, H, W] -> [N, C, p, p]
    """All patches, channels_last."""
    patches = torch.cat([image[:, :, y : y + grid.patch, x : x + grid.patch] for y, x in places(grid)])
    return patches.contiguous(memory_format=torch.channels_last)


def merge(patches: Tensor | Sequence[Tensor], grid: TileGrid) -> Tensor:  # [N, C, P, P] -> [1, C, H·s, W·s]
    """Overlaps summed and divided by a map of counts."""
    span, scale = grid.patch * grid.scale, grid.scale
    total = patches[0].new_zeros(1, patches[0].shape[0], *grid.output_size)
    count = total.new_zeros(1, 1, *grid.output_size)
    for (y, x), patch in zip(places(grid), patches, strict=True):
        where = (slice(None), slice(None), slice(y * scale, y * scale + span), slice(x * scale, x * scale + span))
        total[where] += patch
        count[where] += 1
    return total / count
