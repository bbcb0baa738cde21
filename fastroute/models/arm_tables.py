"""ARM's published tables: the measurements of every width, which its code stores beside the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastroute.models.arm import EdgeTable
from fastroute.models.checkpoints import CheckpointError, read_checkpoint

# Names in the file: the centres of the bins of the edge score, the mean PSNR in each bin, and the FLOPs of each class.
TABLE, CENTRES, MEANS, COSTS = "hmap", "hmap_x_list", "hmap_y_mean_list", "cost_list"
MOST_BINS, MOST_CLASSES = 4096, 64


@dataclass(frozen=True)
class PublishedTable:
    """The content of a table's file.

    Attributes:
        score: float64 (bins,), centres of equal bins from 0.
        psnr: float64 (K, bins), expected PSNR of each class in dB.
        cost: float64 (K,), FLOPs of each class as the paper counts them.
    """

    score: Tensor
    psnr: Tensor
    cost: Tensor

    def fill(self, table: EdgeTable) -> None:
        """Copy this table into `table`, which must have the same numbers of classes and bins."""
        table.score.copy_(self.score)
        table.psnr.copy_(self.psnr)


def read_table(path: str | Path) -> PublishedTable:
    """The table in a file of ARM's code (.state). Only numbers and NumPy arrays of numbers are unpickled.

    Raises:
        fastroute.CheckpointError: the file is missing or damaged, holds no such table, or holds anything else.
    """
    content = read_checkpoint(path, arrays=True)[0].get(TABLE)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"cannot use {path}: it holds no table of ARM, which its code stores under {TABLE!r}")
    found = {name: _matrix(content.get(name), name, path) for name in (CENTRES, MEANS)}
    score, psnr = found[CENTRES], found[MEANS]
    cost = _vector(content.get(COSTS), COSTS, path)
    if score.shape != psnr.shape or len(cost) != len(psnr) or len(psnr) < 2:
        sizes = f"{tuple(score.shape)}, {tuple(psnr.shape)} and {tuple(cost.shape)}"
        raise CheckpointError(
            f"cannot use {path}: its table must have scores and PSNRs of one shape and a cost per class; got {sizes}"
        )
    if not bool((score == score[0]).all()):
        raise CheckpointError(f"cannot use {path}: the classes of its table have different bins")
    width = 2 * float(score[0, 0])
    even = (torch.arange(score.shape[1], dtype=torch.float64) + 0.5) * width
    if not width > 0 or not torch.allclose(score[0], even, rtol=1e-6, atol=0):
        raise CheckpointError(f"cannot use {path}: the bins of its table must be equal and begin at 0")
    return PublishedTable(score[0], psnr, cost)


def _matrix(rows: Any, name: str, path: str | Path) -> Tensor:  # [K, bins]
    if not isinstance(rows, list) or not 0 < len(rows) <= MOST_CLASSES:
        raise CheckpointError(f"cannot use {path}: its {name} must be a list of at most {MOST_CLASSES} arrays")
    vectors = [_vector(row, name, path) for row in rows]
    if len({len(vector) for vector in vectors}) > 1:
        raise CheckpointError(f"cannot use {path}: the arrays of its {name} must be of one length")
    return torch.stack(vectors)


def _vector(values: Any, name: str, path: str | Path) -> Tensor:  # [n]
    if (
        not isinstance(values, np.ndarray)
        or values.dtype.kind not in "fiu"
        or values.ndim != 1
        or not 0 < len(values) <= MOST_BINS
    ):
        raise CheckpointError(f"cannot use {path}: its {name} must hold arrays of at most {MOST_BINS} numbers")
    vector = torch.from_numpy(values.astype(np.float64))
    if not all(map(math.isfinite, vector.tolist())):
        raise CheckpointError(f"cannot use {path}: its {name} must be finite")
    return vector
