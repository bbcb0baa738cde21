"""The class scores of every patch of an image, if possible without extracting the patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastroute.grid import TileGrid
from fastroute.models.classsr import PatchClassifier
from fastroute.ops._upsampled import bias_of
from fastroute.ops.cell_mlp import cell_mlp, plain_bytes
from fastroute.ops.extract_patches import extract_patches
from fastroute.patch.bands import band_around
from fastroute.profiling import count_flops
from fastroute.runtime.devices import on_device
from fastroute.runtime.memory_plan import REARRANGED, pass_bytes
from fastroute.runtime.rows import Source, TensorSource
from fastroute.runtime.transfer import to_device

# Cells per band of the image, which is read from a file at once and shared by the threads: a whole image 960 pixels wide.
CELLS_PER_BAND = {"cpu": 32768, "cuda": 1 << 20}
# Bytes that a batch of extracted patches may take in a classifier. More does not fit a CPU's caches; a GPU needs more work.
BATCH_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}


@dataclass(frozen=True)
class Scores:
    """Class scores and their cost.

    Attributes:
        score: (N, K), the output of the classifier.
        flops: multiply-adds done, times two.
    """

    score: Tensor
    flops: int


def classify_patches(classifier: nn.Module, image: Tensor | Source, grid: TileGrid) -> Scores:  # [B, C, H, W]
    """The scores of all patches of `grid`.

    ClassSR's classifier runs once per 4 x 4 cell of the image instead of once per patch if patch and stride are multiples of 4,
    because the features of a cell are the same for every patch that covers it. The last convolution and the linear layer
    commute with the average and become one product per patch. Patches off the cell grid are classified on their own: those of
    the shifted last row and column if the image is not a patch plus a multiple of 4 wide or high. Any other classifier gets
    the extracted patches in batches. Rows of the image are read from top to bottom, once or twice.

    Args:
        classifier: maps patches (N, C, p, p) to scores (N, K).
        image: (B, C, H, W), floating or uint8 / uint16, or the source of its rows.
        grid: where the patches lie.

    Raises:
        ValueError: the classifier returns another shape than (N, K).
    """
    source = TensorSource(image, image.device) if isinstance(image, Tensor) else image
    batch = source.shape[0]
    if not cellwise(classifier, grid):
        numbers, places = (torch.arange(batch * grid.num_patches, device=at) for at in ("cpu", source.device))
        return _by_patch(classifier, source, grid, numbers, places)
    assert isinstance(classifier, PatchClassifier)  # for the type checker; cellwise has seen it
    cell = classifier.CELL
    rows = [i for i, y in enumerate(grid.row_origins) if y % cell == 0]
    cols = [j for j, x in enumerate(grid.col_origins) if x % cell == 0]
    score, flops = _by_cell(classifier, source, grid, rows, cols)  # [B, rows, cols, K]
    if len(rows) == grid.rows and len(cols) == grid.cols:
        return Scores(score.flatten(0, 2), flops)
    full = score.new_empty(batch, grid.rows, grid.cols, score.shape[-1])
    full[:, : len(rows), : len(cols)] = score
    # Only the last row and column can be off the cells.
    off = torch.ones(batch, grid.rows, grid.cols, dtype=torch.bool)
    off[:, : len(rows), : len(cols)] = False
    numbers = off.flatten().nonzero().squeeze(1)
    places = to_device(numbers, full.device)
    rest = _by_patch(classifier, source, grid, numbers, places)
    full = full.flatten(0, 2)
    full[places] = rest.score
    return Scores(full, flops + rest.flops)


def classifying_bytes(classifier: nn.Module, source: Source, grid: TileGrid) -> int:
    """The largest number of bytes that :func:`classify_patches` holds beside the image and the scores."""
    dtype = next((p.dtype for p in classifier.parameters()), torch.float32)
    if not cellwise(classifier, grid):
        size = (1, source.shape[1], grid.patch, grid.patch)
        return patches_per_batch(classifier, size, source.device) * _patch_bytes(classifier, size)
    assert isinstance(classifier, PatchClassifier)  # for the type checker; cellwise has seen it
    hidden = classifier.lastOut.in_features
    for layer in classifier.CondNet:
        hidden = max(hidden, layer.out_channels) if isinstance(layer, nn.Conv2d) else hidden
    cell = classifier.CELL
    cols = -(-grid.width // cell)
    rows = max(1, on_device(CELLS_PER_BAND, source.device) // cols) + 2 * grid.patch // cell
    pixels = source.shape[1] * cell**2
    # A band, the memory that cell_mlp works in, and the averaged rows of cells, joined to others.
    held = dtype.itemsize * (rows * cols * pixels + 2 * rows * grid.cols * hidden)
    return held + plain_bytes(cols, pixels, hidden, dtype, source.device)


def patches_per_batch(classifier: nn.Module, size: tuple[int, ...], device: torch.device) -> int:
    """How many extracted patches of `size`, (1, C, p, p), `classifier` gets at a time."""
    return max(1, on_device(BATCH_BYTES, device) // _patch_bytes(classifier, size))


def cellwise(classifier: nn.Module, grid: TileGrid) -> bool:
    """Whether `classifier` may run once per cell of the image instead of once per patch."""
    fits = _has_cells(classifier, grid.patch) and grid.stride % PatchClassifier.CELL == 0
    return fits and grid.height >= grid.patch and grid.width >= grid.patch


def _has_cells(classifier: nn.Module, patch: int) -> TypeGuard[PatchClassifier]:
    """Whether `classifier` computes a mean over cells for a patch of this size."""
    # A subclass may override forward.
    return type(classifier) is PatchClassifier and patch % classifier.CELL == 0


class _Layers:
    """The layers of a PatchClassifier that run per cell, and its last two layers, which follow the average, as a single one."""

    def __init__(self, classifier: PatchClassifier) -> None:
        *inner, last = (layer for layer in classifier.CondNet if isinstance(layer, nn.Conv2d))
        head = classifier.lastOut
        self.inner = [(conv.weight.flatten(1), bias_of(conv)) for conv in inner]
        self.weight = head.weight @ last.weight.flatten(1)
        self.bias = torch.addmv(head.bias, head.weight, bias_of(last))
        self.per_cell = sum(weight.numel() for weight, _ in self.inner)
        self.per_patch = self.weight.numel()

    def score(self, patches: Tensor) -> Tensor:  # [n, C, p, p] -> [n, K]
        """The scores of patches that are classified one by one."""
        rows = cell_mlp(patches, self.inner, PatchClassifier.CELL, patches.shape[-1] // PatchClassifier.CELL, 1)
        return torch.softmax(torch.addmm(self.bias, rows[:, :, 0].mean(dim=1), self.weight.t()), dim=-1)


def _by_cell(
    classifier: PatchClassifier, source: Source, grid: TileGrid, rows: list[int], cols: list[int]
) -> tuple[Tensor, int]:
    cell, layers = classifier.CELL, _Layers(classifier)
    row_cells = [grid.row_origins[i] // cell for i in rows]
    span = grid.patch // cell
    height, width = row_cells[-1] + span, grid.col_origins[cols[-1]] // cell + span  # cells that some patch covers
    batch = source.shape[0]

    logits = layers.weight.new_empty(batch, len(rows), len(cols), len(layers.bias))
    count = max(1, on_device(CELLS_PER_BAND, source.device) // width)
    for b in range(batch):
        # Rows of cells, averaged along the row, until the last patch over them is done.
        held, begin, row = torch.empty(0), 0, 0
        for top in range(0, height, count):
            bottom = min(top + count, height)
            band = source.get((b, b + 1), (top * cell, bottom * cell))[:, :, :, : width * cell]
            means = cell_mlp(band, layers.inner, cell, span, grid.stride // cell)[0]
            held = torch.cat([held, means]) if len(held) else means
            while row < len(rows) and row_cells[row] + span <= bottom:
                average = held[row_cells[row] - begin :][:span].mean(dim=0)
                # Tile rows are computed one after the other, so that the numbers do not depend on how many rows the image has.
                torch.addmm(layers.bias, average, layers.weight.t(), out=logits[b, row])
                row += 1
            if row < len(rows):
                held, begin = held[row_cells[row] - begin :], row_cells[row]
    # The averages are counted as the product that computes them.
    products = height * width * layers.per_cell + len(rows) * len(cols) * layers.per_patch
    return torch.softmax(logits, dim=-1), 2 * batch * products


# Kept by the size of an input, because counting takes longer than classifying.
_FLOPS: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], int]] = WeakKeyDictionary()
_BYTES: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], int]] = WeakKeyDictionary()


def _patch_flops(classifier: nn.Module, size: tuple[int, ...]) -> int:
    if _has_cells(classifier, size[-1]):
        layers = _Layers(classifier)
        return 2 * ((size[-1] // PatchClassifier.CELL) ** 2 * layers.per_cell + layers.per_patch)
    known = _FLOPS.setdefault(classifier, {})
    if size not in known:
        known[size] = count_flops(classifier, size)
    return known[size]


def _patch_bytes(classifier: nn.Module, size: tuple[int, ...]) -> int:
    known = _BYTES.setdefault(classifier, {})
    if size not in known:
        dtype = next((p.dtype for p in classifier.parameters()), torch.float32)
        known[size] = REARRANGED * pass_bytes(classifier, size, dtype)
    return known[size]


def score_patches(classifier: nn.Module, patches: Tensor) -> Tensor:  # [n, C, p, p] -> [n, K]
    """The scores of single patches; ClassSR's classifier computes them by cells."""
    if _has_cells(classifier, patches.shape[-1]):
        return _Layers(classifier).score(patches)
    return classifier(patches)


def _by_patch(classifier: nn.Module, source: Source, grid: TileGrid, numbers: Tensor, places: Tensor) -> Scores:  # [n], [n]
    """The scores of the patches `numbers`, ascending and on the CPU. `places` are the same numbers on the source's device."""
    dtype = next((p.dtype for p in classifier.parameters()), torch.float32)
    size = (1, source.shape[1], grid.patch, grid.patch)
    pieces: list[Tensor] = []
    count = patches_per_batch(classifier, size, source.device)
    for chunk, here in zip(numbers.split(count), places.split(count), strict=True) if len(numbers) else []:
        band = band_around(chunk, grid)
        pixels, part = band.read(source, grid)
        order = here - band.first_patch(grid)
        piece = score_patches(classifier, extract_patches(pixels, part, order=order, dtype=dtype))
        if piece.ndim != 2 or piece.shape[0] != chunk.shape[0]:
            raise ValueError(
                f"classifier: must map ({chunk.shape[0]}, C, p, p) to ({chunk.shape[0]}, K); got {tuple(piece.shape)}"
            )
        pieces.append(piece)
    flops = _patch_flops(classifier, size) * numbers.shape[0]
    if not pieces:
        # Without any patch, a dummy patch shows the number of classes.
        return Scores(classifier(torch.zeros(size, dtype=dtype, device=source.device))[:0], 0)
    return Scores(torch.cat(pieces), flops)
