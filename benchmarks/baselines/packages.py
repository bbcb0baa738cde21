"""Cutting and merging by packages that people use for it, each in its documented way.

They pad the image where the stride leaves a remainder, while a TileGrid shifts its last row and column of patches inward; so
only what lies before those can be compared. The packages are pinned in the extra `benchmark`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute._extras import remedy
from fastroute.grid import TileGrid

# Python that a package needs where fastroute runs on an older one.
NEEDS = {"kornia": (3, 11), "onnxruntime": (3, 11)}
HINT = f"not installed: {remedy('benchmark')}"


def find(name: str) -> ModuleType | str:
    """The module, or why it is missing."""
    package = name.split(".")[0]
    if importlib.util.find_spec(package) is None:
        least = NEEDS.get(package, (3, 0))
        if sys.version_info < least:
            return f"needs Python {least[0]}.{least[1]} or newer, this is {sys.version_info[0]}.{sys.version_info[1]}"
        return HINT
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return f"cannot be imported: {error}"


def padded_size(grid: TileGrid, scale: int = 1) -> tuple[int, int]:
    """Height and width that whole strides fill, times `scale`."""
    return tuple(((n - 1) * grid.stride + grid.patch) * scale for n in (grid.rows, grid.cols))


def pad_image(image: Tensor, grid: TileGrid) -> Tensor:  # [B, C, H, W]
    """The image padded with its edge to whole strides."""
    height, width = padded_size(grid)
    return F.pad(image, (0, width - image.shape[3], 0, height - image.shape[2]), mode="replicate")


def extractors(grid: TileGrid) -> dict[str, Callable[[Tensor], Tensor] | str]:
    """[B, C, H, W] to [N, C, p, p] by package, or why not."""
    kornia, monai = find("kornia.contrib"), find("monai.inferers")

    def by_kornia(image: Tensor) -> Tensor:
        patches = kornia.extract_tensor_patches(pad_image(image, grid), grid.patch, grid.stride)
        return patches.flatten(0, 1).contiguous()

    def by_monai(image: Tensor) -> Tensor:
        splitter = monai.SlidingWindowSplitter(grid.patch, overlap=grid.patch - grid.stride, pad_mode="replicate")
        return torch.stack([patch for patch, _ in splitter(image)], dim=1).flatten(0, 1)

    return {
        "kornia": kornia if isinstance(kornia, str) else by_kornia,
        "MONAI": monai if isinstance(monai, str) else by_monai,
    }


def sliding_window(network: nn.Module, grid: TileGrid, batch: int) -> Callable[[Tensor], Tensor] | str:
    """[1, C, H, W] to [1, C, H·s, W·s] by MONAI's sliding-window inference, which also shifts the last windows inward."""
    monai = find("monai.inferers")
    if isinstance(monai, str):
        return monai
    overlap = 1 - grid.stride / grid.patch
    return lambda image: monai.sliding_window_inference(image, grid.patch, batch, network, overlap=overlap)


def mergers(grid: TileGrid) -> dict[str, Callable[[Tensor], Tensor] | str]:
    """[N, C, P, P] to [1, C, H·s, W·s], overlaps averaged, by package, or why not."""
    kornia, monai, tiler = find("kornia.contrib"), find("monai.inferers"), find("tiler")
    height, width = grid.output_size
    padded = padded_size(grid, grid.scale)
    span, step = grid.patch * grid.scale, grid.stride * grid.scale

    def by_kornia(patches: Tensor) -> Tensor:
        return kornia.combine_tensor_patches(patches[None], padded, span, step)[:, :, :height, :width]

    def by_monai(patches: Tensor) -> Tensor:
        c = patches.shape[1]
        merger = monai.AvgMerger((1, c, *padded), cropped_shape=(1, c, height, width), device=patches.device)
        for number in range(len(patches)):
            place = number // grid.cols * step, number % grid.cols * step
            merger.aggregate(patches[number : number + 1], place)
        return merger.finalize()

    def by_tiler(patches: Tensor) -> Tensor:
        c = patches.shape[1]
        tiles = tiler.Tiler((c, *padded), (c, span, span), (0, span - step, span - step), channel_dimension=0)
        merger = tiler.Merger(tiles, save_visits=False)
        for number, patch in enumerate(patches.cpu().numpy()):
            merger.add(number, patch)
        return torch.from_numpy(merger.merge()[None, :, :height, :width]).to(patches.device)

    return {
        "kornia": kornia if isinstance(kornia, str) else by_kornia,
        "MONAI": monai if isinstance(monai, str) else by_monai,
        "tiler": tiler if isinstance(tiler, str) else by_tiler,
    }
