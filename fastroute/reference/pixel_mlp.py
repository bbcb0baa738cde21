"""Reference of `pixel_mlp`: the queries of LIIF, an MLP per class and the bilinear residual."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Output pixels whose queries are held at once: bounds the memory, changes no number. PCSR's own chunk.
CHUNK = 300_000


def nearest_axis(size: int, out_size: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Along one axis, the feature that each output pixel reads and twice its distance from that feature's centre.

    Returns the index, int64 [out_size], and the relative coordinate times `out_size`, an exact int64 [out_size].
    """
    doubled = (2 * torch.arange(out_size, device=device) + 1) * size
    index = doubled // (2 * out_size)
    # Half way between two features the even one is read, as round-to-nearest-even does.
    tie = doubled % (2 * out_size) == 0
    index = index - (tie & (index % 2 == 1)).long()
    return index, doubled - (2 * index + 1) * out_size


def placed_axis(size: int, out_size: int, relative: Tensor) -> Tensor:  # [out_size] -> [out_size]
    """Along one axis, the feature that each output pixel reads where its relative coordinate is given.

    The one nearest to the pixel or one of the two beside it: whichever centre lies `relative` away. NaN reads the nearest.
    """
    index, exact = nearest_axis(size, out_size, relative.device)
    further = exact.double() / max(out_size, 1) - relative.double()
    return (index + (further > 1).long() - (further < -1).long()).clamp(0, max(size - 1, 0))


def bilinear_axis(size: int, out_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis, the two source pixels of each output pixel, int64, and the weight of the second one, float64."""
    # 2 · out_size times the source coordinate (y + 0.5) · size / out_size - 0.5.
    place = ((2 * torch.arange(out_size) + 1) * size - out_size).clamp(0, 2 * out_size * (size - 1))
    first = place // (2 * out_size)
    return first, (first + 1).clamp(max=size - 1), (place % (2 * out_size)).double() / (2 * out_size)


def bilinear_reference(
    image: Tensor,  # [B, C, h, w]
    height: int,
    width: int,
    rows: tuple[int, int] | None = None,
) -> Tensor:  # [B, C, H, W]
    """Bilinear interpolation between pixel centres (`align_corners=False`), edges repeated; only some rows with `rows`."""
    for dim, out_size in ((2, height), (3, width)):
        first, second, weight = (t.to(image.device) for t in bilinear_axis(image.shape[dim], out_size))
        if dim == 2 and rows is not None:
            first, second, weight = (t[rows[0] : rows[1]] for t in (first, second, weight))
        weight = weight.to(image.dtype)[:, None] if dim == 2 else weight.to(image.dtype)
        image = image.index_select(dim, first) * (1 - weight) + image.index_select(dim, second) * weight
    return image


def pixel_mlp_reference(
    features: Tensor,  # [B, D, h, w]
    weights: list[Tensor],  # [F_out, F_in] each, the layers of class 0 first
    biases: list[Tensor],  # [F_out] each
    depths: list[int],
    height: int,
    width: int,
    class_map: Tensor | None = None,  # [B, H, W]
    residual: Tensor | None = None,  # [B, C, h, w]
    rows: tuple[int, int] | None = None,
    relative: Tensor | None = None,  # [H + W]
) -> Tensor:  # [B, C, H, W]
    """See :func:`fastroute.pixel_mlp`; `depths` says how many of the layers belong to each class.

    All coordinates are fractions of integers, the same along x with (w, W) for (h, H). Output pixel (y, x) has its
    centre at (y + 1/2) · h / H in units of features; feature i covers i to i + 1. So:

        index      i = (2y + 1) · h // 2H, integer division; where (2y + 1) · h is a multiple of 2H the pixel lies half
                   way between features i - 1 and i, and the even one of them is read. Always in [0, h).
        relative   rel_y = ((2y + 1) · h - (2i + 1) · H) / H, in [-1, 1]; the numerator is an exact integer.
        cell       cell_y = 2 · h / H, the same for all pixels.
        query      [feature(i, j) | rel_y | rel_x | cell_y | cell_x], D + 4 numbers, y before x.

    Where `relative` is given, rel_y and rel_x are its numbers, and the index is the one from whose feature's centre the
    pixel lies that far: i + 1 where rel_y of i exceeds the given number by more than 1, i - 1 where it falls as short of
    it, else i; clamped to [0, h).

    At an integer scale s = H / h this is i = y // s and rel_y = (2 · (y mod s) + 1) / s - 1: s² distinct pairs.

        layers     x <- W x + b, with ReLU after every layer but the last. The class's last layer gives the C channels.
        first      W q + b = W[:, :D] · feature(i, j) + W[:, D] · rel_y + W[:, D+1] · rel_x + (W[:, D+2] · cell_y +
                   W[:, D+3] · cell_x + b): the first term is one vector per feature, the bracket one per call.
        bilinear   v = clamp((2y + 1) · h - H, 0, 2H · (h - 1)); y0 = v // 2H; y1 = min(y0 + 1, h - 1);
                   f_y = (v mod 2H) / 2H; the residual is (1 - f_y) · row(y0) + f_y · row(y1), and so along x.
                   That is `align_corners=False` with repeated edges.
        output     residual + MLP of the pixel's class. A class of depth 0 is free: its output is the residual, or 0.

    Sums are kept in float32 (float64 for float64) and rounded once, after the residual has been added.

    Source: PCSR (Jeong et al., ECCV 2024), whose upsampler is LIIF's (Chen et al., CVPR 2021) without local ensemble
    and feature unfolding. Its code gets the same quantities from float32 coordinates in [-1, 1], whose rounding is about
    1e-7 · h in `rel` and makes that code read the odd feature in 1 of 6 ties. `relative` can repeat both.
    """
    work = torch.float64 if features.dtype == torch.float64 else torch.float32
    batch, _, h, w = features.shape
    layers = iter(zip(weights, biases, strict=True))
    mlps = [[next(layers) for _ in range(depth)] for depth in depths]
    channels = weights[-1].shape[0] if weights else (0 if residual is None else residual.shape[1])
    device = features.device

    row, rel_y = (t.to(device) for t in nearest_axis(h, height))
    col, rel_x = (t.to(device) for t in nearest_axis(w, width))
    rel_y, rel_x = rel_y.to(work) / height, rel_x.to(work) / width
    if relative is not None:
        rel_y, rel_x = relative.to(work).split([height, width])
        row, col = placed_axis(h, height, rel_y), placed_axis(w, width, rel_x)
    cell = torch.tensor([2 * h / max(height, 1), 2 * w / max(width, 1)], dtype=work, device=device)
    pieces = []
    begin, end = (0, height) if rows is None else rows
    for part in torch.split(torch.arange(begin, end, device=device), max(CHUNK // max(batch * width, 1), 1)):
        n = len(part)
        feature = features.index_select(2, row[part]).index_select(3, col).to(work).permute(0, 2, 3, 1)
        place = torch.stack([rel_y[part, None].expand(n, width), rel_x.expand(n, width)], dim=-1)
        query = torch.cat([feature, place.expand(batch, n, width, 2), cell.expand(batch, n, width, 2)], dim=-1)
        piece = query.new_zeros(batch, n, width, channels)
        for k, mlp in enumerate(mlps):
            if not mlp:
                continue
            if class_map is None:
                piece = apply_mlp(query, mlp)
            else:
                mask = class_map[:, part] == k
                piece[mask] = apply_mlp(query[mask], mlp)
        pieces.append(piece)
    output = torch.cat(pieces, dim=1).permute(0, 3, 1, 2)
    if residual is not None:
        output = output + bilinear_reference(residual.to(work), height, width, (begin, end))
    return output.to(features.dtype).contiguous()


def apply_mlp(x: Tensor, layers: list[tuple[Tensor, Tensor]]) -> Tensor:  # [..., F] -> [..., C]
    """Linear layers with ReLU between them."""
    for number, (weight, bias) in enumerate(layers):
        x = F.linear(x if number == 0 else F.relu(x), weight.to(x.dtype), bias.to(x.dtype))
    return x


def _pixel_mlp_backward_reference(
    grad: Tensor,  # [B, C, rows, W]
    features: Tensor,  # [B, D, h, w]
    weights: list[Tensor],  # [F_out, F_in] each
    biases: list[Tensor],  # [F_out] each
    depths: list[int],
    height: int,
    width: int,
    class_map: Tensor | None,  # [B, H, W]
    residual: Tensor | None,  # [B, C, h, w]
    relative: Tensor | None,  # [H + W]
    row_begin: int,
    row_end: int,
) -> list[Tensor]:
    """Gradients of features, weights, biases and residual, in that order: autograd through a second forward pass.

    A few rows at a time, so that the queries and activations of only those are held.
    """
    inputs = [features, *weights, *biases, *([] if residual is None else [residual])]
    number, work = len(weights), torch.float64 if features.dtype == torch.float64 else torch.float32
    sums = [torch.zeros(x.shape, dtype=work, device=x.device) for x in inputs]
    step = max(CHUNK // max(features.shape[0] * width, 1), 1)
    for begin in range(row_begin, row_end, step):
        rows = (begin, min(begin + step, row_end))
        with torch.enable_grad():
            leaves = [x.detach().to(work).requires_grad_() for x in inputs]
            ws, bs = leaves[1 : 1 + number], leaves[1 + number : 1 + 2 * number]
            last = None if residual is None else leaves[-1]
            output = pixel_mlp_reference(leaves[0], ws, bs, depths, height, width, class_map, last, rows, relative)
        if not output.requires_grad:
            continue
        part = grad[:, :, rows[0] - row_begin : rows[1] - row_begin].to(work)
        for total, value in zip(sums, torch.autograd.grad(output, leaves, part, allow_unused=True), strict=True):
            if value is not None:
                total += value
    return [total.to(x.dtype) for total, x in zip(sums, inputs, strict=True)]
