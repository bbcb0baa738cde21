"""The class scores of every patch of an image, if possible without extracting the patches."""

from __future__ import annotations

from collections.abc import Iterator
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
from fastroute.runtime.rows import Source, Span, TensorSource
from fastroute.runtime.transfer import to_device

# Cells per band of the image, which is read from a file at once and shared by the threads: a whole image 960 pixels wide.
CELLS_PER_BAND = {"cpu": 32768, "cuda": 1 << 20}
# Bytes that a batch of extracted patches may take in a classifier. More does not fit a CPU's caches; a GPU needs more work.
BATCH_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
# About how many patches a block of tile rows has. Patches of two blocks are never classified in one batch, so blocks can be
# classified by several processes, and no batch reads rows that lie far apart.
BLOCK_PATCHES = 8192


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
    score = score_rows(classifier, source, grid, (0, grid.rows))
    return Scores(score, source.shape[0] * classifying_flops(classifier, source.shape[1], grid))


def block_rows(grid: TileGrid) -> int:
    """The number of tile rows of a block, see :func:`score_rows`."""
    return max(1, BLOCK_PATCHES // grid.cols)


def score_rows(classifier: nn.Module, source: Source, grid: TileGrid, rows: Span) -> Tensor:  # [N, K]
    """The scores of the patches of some tile rows of every image: those that :func:`classify_patches` gives, bit for bit.

    Args:
        classifier, source, grid: see :func:`classify_patches`.
        rows: first tile row and one past the last: the bounds of blocks of `block_rows`, or the end of the grid.
    """
    batch, (first, end) = source.shape[0], rows
    if not cellwise(classifier, grid):
        # Made on the device: a copy from the host would wait.
        numbers, places = (
            torch.arange(batch, device=at)[:, None] * grid.num_patches
            + torch.arange(first * grid.cols, end * grid.cols, device=at)
            for at in ("cpu", source.device)
        )
        return _by_patch(classifier, source, grid, numbers.flatten(), places.flatten())
    assert isinstance(classifier, PatchClassifier)  # for the type checker; cellwise has seen it
    on_rows, cols = cell_rows(grid)
    inner = [i for i in on_rows if first <= i < end]
    score = _by_cell(classifier, source, grid, inner, cols)  # [B, rows, cols, K]
    if len(inner) == end - first and len(cols) == grid.cols:
        return score.flatten(0, 2)
    full = score.new_empty(batch, end - first, grid.cols, score.shape[-1])
    full[:, : len(inner), : len(cols)] = score
    # Only the last row and column can be off the cells.
    off = torch.ones(batch, end - first, grid.cols, dtype=torch.bool)
    off[:, : len(inner), : len(cols)] = False
    here, own = off.flatten().nonzero().squeeze(1), (end - first) * grid.cols
    there, full = to_device(here, full.device), full.flatten(0, 2)
    # The same numbers among all patches, on both devices.
    numbers, places = (n + first * grid.cols + n // own * (grid.num_patches - own) for n in (here, there))
    full[there] = _by_patch(classifier, source, grid, numbers, places)
    return full


def cell_rows(grid: TileGrid) -> tuple[list[int], list[int]]:
    """The tile rows and columns that begin with a cell."""
    cell = PatchClassifier.CELL
    return [i for i, y in enumerate(grid.row_origins) if y % cell == 0], [
        j for j, x in enumerate(grid.col_origins) if x % cell == 0
    ]


def classifying_flops(classifier: nn.Module, channels: int, grid: TileGrid) -> int:
    """Multiply-adds of :func:`classify_patches` for one image, times two."""
    each = _patch_flops(classifier, (1, channels, grid.patch, grid.patch))
    if not cellwise(classifier, grid):
        return grid.num_patches * each
    assert isinstance(classifier, PatchClassifier)  # for the type checker; cellwise has seen it
    (rows, cols), layers = cell_rows(grid), _Layers(classifier)
    height, width = covered_cells(grid, rows, cols)
    # The averages are counted as the product that computes them.
    products = height * width * layers.per_cell + len(rows) * len(cols) * layers.per_patch
    return 2 * products + (grid.num_patches - len(rows) * len(cols)) * each


def covered_cells(grid: TileGrid, rows: list[int], cols: list[int]) -> tuple[int, int]:
    """The rows and columns of cells that some patch of these tile rows and columns covers, from the first of the image on."""
    ends = grid.row_origins[rows[-1]], grid.col_origins[cols[-1]]
    return (ends[0] + grid.patch) // PatchClassifier.CELL, (ends[1] + grid.patch) // PatchClassifier.CELL


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
) -> Tensor:  # [B, rows, cols, K]
    cell, layers = classifier.CELL, _Layers(classifier)
    row_cells = [grid.row_origins[i] // cell for i in rows]
    span = grid.patch // cell
    height, width = covered_cells(grid, cell_rows(grid)[0], cols)
    batch = source.shape[0]

    logits = layers.weight.new_empty(batch, len(rows), len(cols), len(layers.bias))
    count = max(1, on_device(CELLS_PER_BAND, source.device) // width)
    for b in range(batch):
        # Rows of cells, averaged along the row, until the last patch over them is done. Bands are those of the whole image.
        begin = row_cells[0] // count * count if rows else height
        held, row = torch.empty(0), 0
        for top in range(begin, height, count):
            bottom = min(top + count, height)
            band = source.get((b, b + 1), (top * cell, bottom * cell))[:, :, :, : width * cell]
            means = cell_mlp(band, layers.inner, cell, span, grid.stride // cell)[0]
            held = torch.cat([held, means]) if len(held) else means
            done = row
            while done < len(rows) and row_cells[done] + span <= bottom:
                done += 1
            starts = [at - begin for at in row_cells[row:done]]
            # A CPU computes tile rows one after the other, so that the numbers do not depend on how many rows the image has.
            for part in [range(n, n + 1) for n in range(len(starts))] if held.device.type == "cpu" else [range(len(starts))]:
                average = _row_means(held, [starts[n] for n in part], span).flatten(0, 1)
                to = logits[b, row + part.start : row + part.stop].flatten(0, 1)
                torch.addmm(layers.bias, average, layers.weight.t(), out=to)
            row = done
            if row == len(rows):
                break
            held, begin = held[row_cells[row] - begin :], row_cells[row]
    return torch.softmax(logits, dim=-1)


def _row_means(rows: Tensor, starts: list[int], span: int) -> Tensor:  # [n, m, F] -> [starts, m, F]
    """The means of `span` rows from each of `starts` on, which are at equal distances but for the last one."""
    if len(starts) == 1:
        return rows[starts[0] :][:span].mean(dim=0, keepdim=True)
    if not starts:
        return rows[:0]
    step = starts[1] - starts[0]
    even = [start for n, start in enumerate(starts) if start == starts[0] + n * step]
    means = rows[even[0] : even[-1] + span].unfold(0, span, step).mean(dim=-1)
    return means if len(even) == len(starts) else torch.cat([means, _row_means(rows, starts[len(even) :], span)])


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


def _by_patch(
    classifier: nn.Module, source: Source, grid: TileGrid, numbers: Tensor, places: Tensor
) -> Tensor:  # [n], [n] -> [n, K]
    """The scores of the patches `numbers`, ascending and on the CPU. `places` are the same numbers on the source's device."""
    dtype = next((p.dtype for p in classifier.parameters()), torch.float32)
    size = (1, source.shape[1], grid.patch, grid.patch)
    pieces: list[Tensor] = []
    count = patches_per_batch(classifier, size, source.device)
    for begin, end in _batches(numbers, grid, count):
        band = band_around(numbers[begin:end], grid)
        pixels, part = band.read(source, grid)
        order = places[begin:end] - band.first_patch(grid)
        piece = score_patches(classifier, extract_patches(pixels, part, order=order, dtype=dtype))
        if piece.ndim != 2 or piece.shape[0] != end - begin:
            raise ValueError(f"classifier: must map ({end - begin}, C, p, p) to ({end - begin}, K); got {tuple(piece.shape)}")
        pieces.append(piece)
    if not pieces:
        # Without any patch, a dummy patch shows the number of classes.
        return classifier(torch.zeros(size, dtype=dtype, device=source.device))[:0]
    return torch.cat(pieces)


def _batches(numbers: Tensor, grid: TileGrid, count: int) -> Iterator[Span]:  # [n]
    """Where batches of at most `count` of the patches `numbers` begin and end. None lies in two blocks of a large image."""
    lengths, rows = [len(numbers)], block_rows(grid)
    if rows < grid.rows:
        block = numbers // grid.num_patches * grid.rows + numbers % grid.num_patches // grid.cols // rows
        lengths = torch.unique_consecutive(block, return_counts=True)[1].tolist()
    begin = 0
    for length in lengths:
        for first in range(begin, begin + length, count):
            yield first, min(first + count, begin + length)
        begin += length
