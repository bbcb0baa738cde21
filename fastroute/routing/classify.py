"""Class scores of every patch of an image, without extracting the patches where that is possible."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.grid import TileGrid
from fastroute.models.classsr import PatchClassifier
from fastroute.ops.extract_patches import extract_patches
from fastroute.profiling import count_flops

# Cells per chunk: 2048 rows of 128 channels are 1 MiB, which stays in the second-level cache between two layers.
CELLS_PER_CHUNK = 2048
# Patches per batch where they must be extracted.
PATCHES_PER_BATCH = 32


@dataclass(frozen=True)
class Scores:
    """Class scores and what they cost.

    Attributes:
        score: (N, K) as the classifier gives them.
        flops: multiply-adds done, times two.
    """

    score: Tensor
    flops: int


def classify_patches(classifier: nn.Module, image: Tensor, grid: TileGrid) -> Scores:  # [B, C, H, W]
    """Scores of all patches of `grid`.

    ClassSR's classifier is run once per 4 x 4 cell of the image instead of once per patch when patch and stride are
    multiples of 4: the features of a cell are the same for every patch that covers it. The last convolution and the linear
    layer commute with the average and become one product per patch. Patches off the cell grid, the shifted last row and
    column when the image is not a multiple of 4 beyond a patch, are classified on their own. Any other classifier gets the
    extracted patches in batches.

    Args:
        classifier: maps patches (N, C, p, p) to scores (N, K).
        image: (B, C, H, W), floating or uint8 / uint16.
        grid: where the patches lie.

    Raises:
        ValueError: the classifier returns another shape than (N, K).
    """
    if not _cellwise(classifier, grid):
        return _by_patch(classifier, image, grid, None)
    assert isinstance(classifier, PatchClassifier)  # for the type checker; _cellwise has seen it
    cell = classifier.CELL
    rows = [i for i, y in enumerate(grid.row_origins) if y % cell == 0]
    cols = [j for j, x in enumerate(grid.col_origins) if x % cell == 0]
    score, flops = _by_cell(classifier, image, grid, rows, cols)  # [B, rows, cols, K]
    if len(rows) == grid.rows and len(cols) == grid.cols:
        return Scores(score.flatten(0, 2), flops)
    full = score.new_empty(image.shape[0], grid.rows, grid.cols, score.shape[-1])
    full[:, : len(rows), : len(cols)] = score
    # Only the last row and column can be off the cells.
    off = torch.ones(image.shape[0], grid.rows, grid.cols, dtype=torch.bool, device=image.device)
    off[:, : len(rows), : len(cols)] = False
    rest = _by_patch(classifier, image, grid, off.flatten().nonzero().squeeze(1))
    full[off] = rest.score
    return Scores(full.flatten(0, 2), flops + rest.flops)


def _cellwise(classifier: nn.Module, grid: TileGrid) -> bool:
    # A subclass may have a forward of its own.
    if type(classifier) is not PatchClassifier:
        return False
    cell = classifier.CELL
    fits = grid.patch % cell == 0 and grid.stride % cell == 0
    return fits and grid.height >= grid.patch and grid.width >= grid.patch


def _by_cell(
    classifier: PatchClassifier, image: Tensor, grid: TileGrid, rows: list[int], cols: list[int]
) -> tuple[Tensor, int]:
    layers = [layer for layer in classifier.CondNet if isinstance(layer, nn.Conv2d)]
    first, middle, last = layers[0], layers[1:-1], layers[-1]
    cell, hidden = classifier.CELL, first.out_channels
    row_cells = [grid.row_origins[i] // cell for i in rows]
    col_cells = [grid.col_origins[j] // cell for j in cols]
    span = grid.patch // cell
    height, width = row_cells[-1] + span, col_cells[-1] + span  # cells that some patch covers
    batch, channels = image.shape[:2]
    average_y = _averages(row_cells, span, height, first.weight)
    average_x = _averages(col_cells, span, width, first.weight)

    weight = first.weight.flatten(1)  # [hidden, C·16]
    inner = [(conv.weight.flatten(1), _bias(conv)) for conv in middle]
    score = image.new_empty(batch, len(rows), len(cols), classifier.lastOut.out_features, dtype=weight.dtype)
    # Σ over the cells of a patch, then one product for the last convolution and the linear layer together.
    tail_weight = classifier.lastOut.weight @ last.weight.flatten(1)
    tail_bias = torch.addmv(classifier.lastOut.bias, classifier.lastOut.weight, _bias(last))
    step = max(1, CELLS_PER_CHUNK // width)
    for b in range(batch):
        pooled = weight.new_empty(height, len(cols), hidden)
        for top in range(0, height, step):
            count = min(step, height - top)
            band = image[b, :, top * cell : (top + count) * cell, : width * cell]
            band = to_float(band, weight.dtype).reshape(channels, count, cell, width, cell)
            x = band.permute(1, 3, 0, 2, 4).reshape(count * width, channels * cell * cell)
            x = F.leaky_relu_(torch.addmm(_bias(first), x, weight.t()), 0.1)
            for w, bias in inner:
                x = F.leaky_relu_(torch.addmm(bias, x, w.t()), 0.1)
            pooled[top : top + count] = average_x @ x.view(count, width, hidden)
        patches = (average_y @ pooled.flatten(1)).view(len(rows) * len(cols), hidden)
        logits = torch.addmm(tail_bias, patches, tail_weight.t())
        score[b] = torch.softmax(logits, dim=1).view(len(rows), len(cols), -1)
    # The averages are sums of span cells per output, done densely for speed: counted as the sums that they are.
    products = height * width * (weight.numel() + sum(w.numel() for w, _ in inner))
    products += len(rows) * len(cols) * tail_weight.numel()
    return score, 2 * batch * products


def _bias(conv: nn.Conv2d) -> Tensor:  # [out_channels]
    return conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias


def _averages(starts: list[int], span: int, length: int, like: Tensor) -> Tensor:  # [tiles, length]
    """Row i averages `span` cells from starts[i]."""
    first = torch.tensor(starts, device=like.device)[:, None]
    at = torch.arange(length, device=like.device)
    return ((at >= first) & (at < first + span)).to(like.dtype) / span


def to_float(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixels in `dtype`; integers become [0, 1]."""
    if x.dtype.is_floating_point:
        return x.to(dtype)
    return x.to(dtype) / (255 if x.dtype == torch.uint8 else 65535)


_FLOPS: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], int]] = WeakKeyDictionary()


def _patch_flops(classifier: nn.Module, size: tuple[int, ...]) -> int:
    """FLOPs of one patch; counting takes longer than classifying, so it is done once."""
    known = _FLOPS.setdefault(classifier, {})
    if size not in known:
        known[size] = count_flops(classifier, size)
    return known[size]


def _by_patch(classifier: nn.Module, image: Tensor, grid: TileGrid, numbers: Tensor | None) -> Scores:
    if numbers is None:
        numbers = torch.arange(image.shape[0] * grid.num_patches, device=image.device)
    dtype = next((p.dtype for p in classifier.parameters()), torch.float32)
    pieces: list[Tensor] = []
    for chunk in numbers.split(PATCHES_PER_BATCH):
        piece = classifier(extract_patches(image, grid, order=chunk, dtype=dtype))
        if piece.ndim != 2 or piece.shape[0] != chunk.shape[0]:
            raise ValueError(
                f"classifier: must map ({chunk.shape[0]}, C, p, p) to ({chunk.shape[0]}, K); got {tuple(piece.shape)}"
            )
        pieces.append(piece)
    size = (1, image.shape[1], grid.patch, grid.patch)
    flops = _patch_flops(classifier, size) * numbers.shape[0]
    if not pieces:
        # No patch: one throw-away patch tells the number of classes.
        return Scores(classifier(image.new_zeros(size, dtype=dtype))[:0], 0)
    return Scores(torch.cat(pieces), flops)
