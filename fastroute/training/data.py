"""Training data: LR by antialiased bicubic downscaling, patches ranked into difficulty classes by PSNR."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from fastroute import buffers, io
from fastroute.degradation import downscale, make_pair, to_uint8
from fastroute.runtime.transfer import to_device
from fastroute.training import distributed

NAMED_AT_MOST = 4
# Factors by which every image is reduced for training, by default.
SHRINKS = (1.0, 1.6, 2.5)


@dataclass(frozen=True, eq=False)
class Pool:
    """LR/HR images and the patches drawn from them, sorted from the easiest to the hardest.

    Attributes:
        lr, hr: uint8 images (C, h, w) and (C, h * scale, w * scale).
        positions: int32 (M, 3): image, row and column of each patch in LR pixels.
        psnr: float32 (M,): PSNR of its bicubic upscaling in dB, falling.
        patch: LR patch size.
        scale: upscaling factor.
        images: number of files that they come from.
    """

    lr: list[Tensor]
    hr: list[Tensor]
    positions: np.ndarray
    psnr: np.ndarray
    patch: int
    scale: int
    images: int = 0

    @staticmethod
    @buffers.explained("train", "use fewer or smaller images")
    def build(
        folder: str | Path,
        scale: int = 4,
        patch: int = 32,
        shrinks: Sequence[float] = SHRINKS,
        stride: int = 16,
        exclude: Sequence[str] = (),
    ) -> Pool:
        """Read every image below `folder` and rank its patches.

        Args:
            folder: searched recursively.
            scale, patch: upscaling factor and LR patch size.
            shrinks: each image is used reduced by each of these factors, at least 1, which adds sharper material. One that
                becomes smaller than a patch is left out.
            stride: distance of the patch positions in LR pixels.
            exclude: glob patterns of file names to leave out, such as pixel art, whose structure no photograph has.

        Raises:
            ValueError: `folder` holds no image, or one smaller than a patch; `shrinks` are not numbers of at least 1, or leave
                no image as large as a patch.
            fastroute.io.ImageError: an image cannot be read.
        """
        check_shrinks(shrinks)
        paths = io.list_images(folder, exclude)
        check_sizes(paths, patch * scale)
        lrs: list[Tensor] = []
        hrs: list[Tensor] = []
        positions, psnrs = [], []
        for path in tqdm(paths, desc="reading images", unit="image", disable=distributed.rank() > 0):
            image = _read(path)
            for shrink in shrinks:
                smaller = image if shrink == 1 else to_uint8(downscale(image[None].float() / 255, shrink)[0])
                if min(smaller.shape[-2:]) < patch * scale:
                    continue
                lr, hr = make_pair(smaller, scale)
                psnr = bicubic_psnr(lr, hr, patch, stride, scale)  # [rows, cols]
                rows, cols = np.indices(psnr.shape)
                number = np.full(rows.size, len(lrs))
                positions.append(np.stack([number, rows.ravel() * stride, cols.ravel() * stride], axis=1))
                psnrs.append(psnr.numpy().ravel())
                lrs.append(lr)
                hrs.append(hr)
        if not lrs:
            least = f"{min(shrinks):g}"
            raise ValueError(f"train: reduced by {least} and more, no image is as large as a patch of {patch} x {scale} pixels")
        psnr_all = np.concatenate(psnrs)
        order = np.argsort(-psnr_all, kind="stable")
        where = np.concatenate(positions).astype(np.int32)[order]
        return Pool(lrs, hrs, where, psnr_all[order].astype(np.float32), patch, scale, len(paths))

    def __len__(self) -> int:
        return len(self.positions)

    def class_range(self, k: int, num_classes: int) -> tuple[int, int]:
        """Patches of difficulty class `k`: equal shares by rank, 0 the easiest."""
        total = len(self.positions)
        return total * k // num_classes, total * (k + 1) // num_classes

    def draw(self, low: int, high: int, count: int, rng: np.random.Generator) -> np.ndarray:
        """`count` numbers of patches in [low, high), an image of n patches there as often as the square root of n says.

        Drawn by number of patches alone, one large image of an odd texture would teach more than twenty others.
        """
        sizes, first, by_image = self._sources(low, high)
        share = np.sqrt(sizes) / np.sqrt(sizes).sum()
        sources = rng.choice(len(sizes), size=count, p=share)
        return low + by_image[first[sources] + (rng.random(count) * sizes[sources]).astype(np.int64)]

    @lru_cache(maxsize=16)  # noqa: B019 - a pool lives as long as its training
    def _sources(self, low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Patches per image in [low, high), where each image's begin, and the patches sorted by image."""
        images = self.positions[low:high, 0]
        sizes = np.unique(images, return_counts=True)[1]
        return sizes, np.cumsum(sizes) - sizes, np.argsort(images, kind="stable")

    def batch(
        self,
        indices: np.ndarray,
        rng: np.random.Generator,
        share: slice = slice(None),
        device: torch.device | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Float patches (N, C, p, p) and (N, C, p * s, p * s), each flipped and turned at random.

        Args:
            indices: numbers of patches.
            rng: draws one turn for each of `indices`.
            share: which of them are wanted.
            device: where; default the CPU.
        """
        p, s = self.patch, self.scale
        lrs, hrs = [], []
        turns = rng.integers(0, 8, len(indices))
        for (image, y, x), turn in zip(self.positions[indices[share]], turns[share], strict=True):
            lr = self.lr[image][:, y : y + p, x : x + p]
            hr = self.hr[image][:, y * s : (y + p) * s, x * s : (x + p) * s]
            lr, hr = (torch.rot90(t, int(turn) % 4, (1, 2)) for t in (lr, hr))
            if turn >= 4:
                lr, hr = lr.flip(2), hr.flip(2)
            lrs.append(lr)
            hrs.append(hr)
        # Bytes travel while a GPU works on what came before.
        lr, hr = (to_device(torch.stack(x), device or torch.device("cpu")).float().div_(255) for x in (lrs, hrs))
        return lr, hr


class Sized(Protocol):
    """A data set by number, such as a :class:`torch.utils.data.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]: ...


class Pairs:
    """Batches of a data set of one's own.

    Args:
        dataset: its items are pairs of tensors, (C, p, p) and (C, P, P), all of one size, float in [0, 1] or uint8.

    Raises:
        ValueError: it is empty.
    """

    def __init__(self, dataset: Sized) -> None:
        if not len(dataset):
            raise ValueError("train: data must hold at least one pair; it is empty")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: np.ndarray, rng: np.random.Generator, share: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """The pairs of `indices[share]` as float32, as they are."""
        pairs = [self.dataset[int(index)] for index in indices[share]]
        lr, hr = (to_device(torch.stack(images), device) for images in zip(*pairs, strict=True))
        lr, hr = (x.float().div_(255) if x.dtype == torch.uint8 else x.float() for x in (lr, hr))
        return lr, hr


def check_shrinks(shrinks: Sequence[float]) -> None:
    """Raise a ValueError unless `shrinks` are finite numbers of at least 1."""
    if not shrinks or not all(1 <= shrink < math.inf for shrink in shrinks):
        raise ValueError(f"train: shrinks must be numbers of at least 1; got {tuple(shrinks)}")


def check_sizes(paths: Sequence[Path], side: int) -> None:
    """Raise a ValueError that names the images smaller than `side`; reads only headers."""
    small = [f"{path} ({w} x {h})" for path, (h, w) in zip(paths, map(_size, paths), strict=True) if min(h, w) < side]
    if small:
        more = f" and {len(small) - NAMED_AT_MOST} more" if len(small) > NAMED_AT_MOST else ""
        raise ValueError(
            f"train: images must be at least {side} x {side} pixels, one patch; too small: "
            f"{', '.join(small[:NAMED_AT_MOST])}{more}; move them, or leave them out with --exclude"
        )


def _size(path: Path) -> tuple[int, int]:
    """Height and width in either order."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        # Its way of reading knows more kinds of files, and names the one at fault.
        _, height, width = _read(path).shape
        return height, width


def _read(path: Path) -> Tensor:  # uint8 [3, H, W]
    try:
        return io.read_image(path)
    except io.ImageError as error:
        raise io.ImageError(f"{error}; move it, or leave it out with --exclude") from error


def bicubic_psnr(lr: Tensor, hr: Tensor, patch: int, stride: int, scale: int) -> Tensor:
    """PSNR in dB, (rows, cols), of the bicubic upscaling of each patch of `lr` (C, h, w); 100 where it is exact."""
    up = F.interpolate(lr[None].float(), scale_factor=scale, mode="bicubic").clamp(0, 255)[0]
    error = (up - hr.float()).square().mean(dim=0)
    mean = F.avg_pool2d(error[None, None], patch * scale, stride * scale)[0, 0]
    return (10 * torch.log10(255**2 / mean.clamp(min=1e-30))).clamp(max=100)
