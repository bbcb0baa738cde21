"""Photographs to measure on: those of the folder that FASTROUTE_DATA names, or the sample that comes with the project."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import ROOT
from fastroute import io
from fastroute.degradation import make_pair

SAMPLE = ROOT / "assets" / "sample.png"
SCALE = 4


def data_folder() -> Path | None:
    """The folder of photographs and published weights, where there is one."""
    folder = os.environ.get("FASTROUTE_DATA")
    return Path(folder) if folder else None


def photographs(name: str) -> list[Path]:
    """HR photographs of a set such as "test4k"; the sample alone without a data folder."""
    folder = data_folder()
    return [SAMPLE] if folder is None else io.list_images(folder / "images" / name)


def source(name: str) -> str:
    """What `photographs` gives, as a note says it."""
    return "the sample photograph, FASTROUTE_DATA being unset" if data_folder() is None else f"images/{name} of FASTROUTE_DATA"


def tiled(image: Tensor, height: int, width: int) -> Tensor:  # [C, h, w] -> [C, H, W]
    """The image mirrored to and fro until it fills a size, cut to it."""
    rows, cols = (_to_and_fro(have, want) for have, want in zip(image.shape[1:], (height, width), strict=True))
    return image[:, rows][:, :, cols].contiguous()


def _to_and_fro(have: int, want: int) -> Tensor:
    place = torch.arange(want) % (2 * have)
    return torch.where(place < have, place, 2 * have - 1 - place)


def low_resolution(path: Path, size: tuple[int, int] | None = None) -> Tensor:  # [1, 3, h, w]
    """The LR image of a photograph, uint8 as files hold it; tiled or cut to `size`. The sample is LR as it is."""
    image = io.read_image(path)
    lr = image if path == SAMPLE else make_pair(image, SCALE)[0]
    return (lr if size is None else tiled(lr, *size))[None]


def bicubic(lr: Tensor, scale: int = SCALE) -> Tensor:  # uint8 [C, h, w] -> uint8 [C, H, W]
    """Plain bicubic enlargement."""
    wide = F.interpolate(lr[None].float(), scale_factor=scale, mode="bicubic")[0]
    return wide.clamp(0, 255).round().to(torch.uint8)
