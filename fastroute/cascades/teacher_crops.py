"""Crops of images and what a teacher makes of them, kept on disk: a teacher runs once, a student learns many times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from fastroute import io
from fastroute.degradation import downscale, to_uint8
from fastroute.models.arm import edge_score

TRAIN, VALIDATION = "train", "validation"
# Each image is used as it is and reduced: what people enlarge is the one or the other.
SHRINKS = (1, 2, 4)
# Of so many places drawn, the one with the strongest edges is taken: flat ones teach little.
PLACES = 2


@dataclass(frozen=True)
class Crops:
    """The crops of some images, a file for each visit of an image.

    Attributes:
        folder: of the files; made when the first is written.
        paths: of the images.
        teacher: from (1, C, h, w) in [0, 1] to (1, C, h * scale, w * scale).
        key: what the teacher's outputs depend on; files of another key are made anew.
        scale, side: of the teacher, and of a crop in input pixels.
        seed: of the places.
    """

    folder: Path
    paths: Sequence[Path]
    teacher: Callable[[Tensor], Tensor]
    key: str
    scale: int
    side: int = 128
    seed: int = 0

    def file(self, kind: str, number: int) -> Path:
        """The file of visit `number`, made if it is not there."""
        path = self.folder / f"{kind}-{number:05d}.safetensors"
        wanted = self._key(kind, number)
        if path.is_file() and _key_of(path) == wanted:
            return path
        inputs = self._inputs(kind, number)
        outputs = []
        for crop in inputs:
            with torch.inference_mode():
                outputs.append(to_uint8(self.teacher(crop[None].float() / 255)[0].float()))
        data = save({"input": torch.stack(inputs), "teacher": torch.stack(outputs)}, {"key": wanted})
        self.folder.mkdir(parents=True, exist_ok=True)
        io.write_atomically(path, lambda file: file.write(data))
        return path

    def _key(self, kind: str, number: int) -> str:
        image = self.paths[number % len(self.paths)]
        return f"{self.key} {image.name} {image.stat().st_size} {kind} {number} {self.side} {self.seed}"

    def _inputs(self, kind: str, number: int) -> list[Tensor]:
        """Crops of one image, one at each reduction at which it is large enough."""
        rng = np.random.default_rng([self.seed, kind == VALIDATION, number])
        image = io.read_image(self.paths[number % len(self.paths)])
        crops = []
        for shrink in SHRINKS:
            smaller = image if shrink == 1 else to_uint8(downscale(image[None].float() / 255, shrink)[0])
            height, width = smaller.shape[-2:]
            if min(height, width) < self.side and shrink > 1:
                continue
            places = []
            for _ in range(PLACES):
                y, x = (int(rng.integers(0, max(length - self.side, 0) + 1)) for length in (height, width))
                places.append(_cut(smaller, y, x, self.side))
            scores = edge_score(torch.stack(places).float() / 255)
            crops.append(places[int(scores.argmax())])
        return crops


def _cut(image: Tensor, y: int, x: int, side: int) -> Tensor:  # [C, H, W] -> [C, side, side]
    """A square of `image`, continued by its edge where it is smaller."""
    crop = image[:, y : y + side, x : x + side]
    rows, cols = (torch.arange(side).clamp(max=length - 1) for length in crop.shape[-2:])
    return crop[:, rows][:, :, cols].contiguous()


def _key_of(path: Path) -> str:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return str((file.metadata() or {}).get("key", ""))
    except (safetensors.SafetensorError, OSError):
        return ""


def read_part(
    path: Path, index: int, y: int, x: int, side: int, scale: int
) -> tuple[Tensor, Tensor]:  # [C, side, side], [C, side * scale, side * scale]
    """A square of crop `index` of a file and what the teacher made of it, uint8."""
    with safetensors.safe_open(path, framework="pt") as file:
        lr = file.get_slice("input")[index, :, y : y + side, x : x + side]
        s = scale
        hr = file.get_slice("teacher")[index, :, y * s : (y + side) * s, x * s : (x + side) * s]
    return lr, hr


def crops_in(path: Path) -> int:
    """How many crops a file holds."""
    with safetensors.safe_open(path, framework="pt") as file:
        return int(file.get_slice("input").get_shape()[0])
