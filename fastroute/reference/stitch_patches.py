"""Reference of `stitch_patches`: patches added one by one, columns before rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastroute._levels import quantise
from fastroute.grid import covered_size, tile_origins


def axis_weights(window: Tensor, size: int, patch: int, stride: int, scale: int, crop: bool) -> Tensor:  # [P]
    """Normalised weights of every tile along one axis: [tiles, patch * scale], summing to 1 over the tiles of a pixel.

    Weights of pixels outside the image are 0. A pixel that windows of weight 0 alone cover, near an end of the axis, is that
    of the tile at this end.
    """
    origins = tile_origins(size, patch, stride, crop)
    length, span = covered_size(size, patch, stride, crop) * scale, patch * scale
    total = window.new_zeros(max(length, span))
    for origin in origins:
        total[origin * scale : origin * scale + span] += window
    at = torch.tensor([[o * scale + k for k in range(span)] for o in origins], device=window.device)
    ends = torch.where(2 * at < length, 0, len(origins) - 1)
    alone = ends == torch.arange(len(origins), device=window.device)[:, None]
    weights = torch.where(total[at] == 0, alone.to(window.dtype), window / total[at])
    return weights * (at < length)


def stitch_patches_reference(
    patches: Tensor,  # [M, C·r·r, P / r, P / r]
    inverse: Tensor | None,  # [N]
    window: Tensor,  # [P]
    height: int,
    width: int,
    patch: int,
    stride: int,
    scale: int,
    crop: bool,
    shuffle: int = 1,
    dtype: torch.dtype | None = None,
    row_begin: int = 0,
    row_end: int = -1,
) -> Tensor:  # [B, C, rows, W·s]
    """See :func:`fastroute.stitch_patches`; `row_end` -1 is the last output row."""
    if shuffle > 1:
        patches = F.pixel_shuffle(patches, shuffle)
    work = torch.float64 if patches.dtype == torch.float64 else torch.float32
    out_height = covered_size(height, patch, stride, crop) * scale
    out_width = covered_size(width, patch, stride, crop) * scale
    row_end = out_height if row_end < 0 else row_end
    row_origins = tile_origins(height, patch, stride, crop)
    col_origins = tile_origins(width, patch, stride, crop)
    weights_y = axis_weights(window.to(work), height, patch, stride, scale, crop)
    weights_x = axis_weights(window.to(work), width, patch, stride, scale, crop)
    span, tiles = patch * scale, len(row_origins) * len(col_origins)
    batch = (patches.shape[0] if inverse is None else inverse.numel()) // tiles
    image = patches.new_zeros(batch, patches.shape[1], out_height, out_width, dtype=work)
    first = torch.arange(batch, device=patches.device) * tiles
    for i, y in enumerate(row_origins):
        top, bottom = y * scale, min(y * scale + span, out_height)
        if bottom <= row_begin or top >= row_end:
            continue
        strip = image.new_zeros(batch, patches.shape[1], span, out_width)
        for j, x in enumerate(col_origins):
            number = first + (i * len(col_origins) + j)
            rows = patches[number if inverse is None else inverse[number].long()].to(work)
            right = min(x * scale + span, out_width)
            n = right - x * scale
            strip[:, :, :, x * scale : right] += rows[:, :, :, :n] * weights_x[j, :n]
        n = bottom - top
        image[:, :, top:bottom] += strip[:, :, :n] * weights_y[i, :n, None]
    return quantise(image[:, :, row_begin:row_end], dtype or patches.dtype)


def patches_of_regions(
    batches: Sequence[Tensor],  # [M_i, C·r·r, h_i / r, w_i / r] each
    inverse: Tensor,  # [N]
    region: Tensor,  # [N]
    height: int,
    width: int,
    patch: int,
    stride: int,
    scale: int,
    crop: bool,
    shuffle: int,
) -> Tensor:  # [N, C·r·r, P / r, P / r]
    """Every patch cut out of the region that holds it; 0 for a patch that no region holds."""
    rows, cols = tile_origins(height, patch, stride, crop), tile_origins(width, patch, stride, crop)
    first, span, factor, tiles = batches[0], patch * scale // shuffle, scale // shuffle, len(rows) * len(cols)
    patches = first.new_zeros(inverse.numel(), first.shape[1], span, span)
    held = [row for batch in batches for row in batch]
    for n, (place, begin) in enumerate(zip(inverse.tolist(), region.tolist(), strict=True)):
        if not (0 <= place < len(held) and n - n % tiles <= begin <= n):
            continue
        tile, corner = n % tiles, begin % tiles
        y = (rows[tile // len(cols)] - rows[corner // len(cols)]) * factor
        x = (cols[tile % len(cols)] - cols[corner % len(cols)]) * factor
        part = held[place][:, y : y + span, x : x + span]
        if part.shape[1:] == (span, span):
            patches[n] = part
    return patches


def _stitch_patches_backward_reference(
    grad: Tensor,  # [B, C, H·s, W·s]
    inverse: Tensor | None,  # [N]
    window: Tensor,  # [P]
    height: int,
    width: int,
    patch: int,
    stride: int,
    scale: int,
    crop: bool,
    num_patches: int,
) -> Tensor:  # [M, C, P, P]
    """The adjoint: every patch pixel reads the gradient of its output pixel times its weight."""
    work = torch.float64 if grad.dtype == torch.float64 else torch.float32
    c, out_height, out_width = grad.shape[1:]
    row_origins = tile_origins(height, patch, stride, crop)
    col_origins = tile_origins(width, patch, stride, crop)
    weights_y = axis_weights(window.to(work), height, patch, stride, scale, crop)
    weights_x = axis_weights(window.to(work), width, patch, stride, scale, crop)
    span = patch * scale
    padded = F.pad(grad.to(work), (0, max(span - out_width, 0), 0, max(span - out_height, 0)))
    rows = []
    for y, wy in zip(row_origins, weights_y, strict=True):
        for x, wx in zip(col_origins, weights_x, strict=True):
            piece = padded[:, :, y * scale : y * scale + span, x * scale : x * scale + span]
            rows.append(piece * wy[:, None] * wx)
    patches = torch.stack(rows, dim=1).flatten(0, 1)  # image-major
    if inverse is None:
        return patches.to(grad.dtype)
    result = patches.new_zeros(num_patches, c, span, span)
    # A row that several patches read collects all their gradients; one that none reads gets none.
    return result.index_add_(0, inverse.long(), patches).to(grad.dtype)
