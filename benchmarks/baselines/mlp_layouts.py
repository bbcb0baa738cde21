"""Ways in which people run one MLP per class over many queries: queries as columns, and one grouped product per layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.baselines.pcsr_published import make_queries, pixel_centres, sample

Layers = list[tuple[Tensor, Tensor]]
# Grouped products want rows of whole 16 bytes.
PAD = 16


def queries(features: Tensor, size: tuple[int, int]) -> Tensor:  # [1, D, h, w] -> [Q, D + 4]
    """The input of the MLPs for every output pixel."""
    coord = pixel_centres(size, features.device).flatten(0, 1).to(features.dtype)
    cell = torch.tensor([2 / size[0], 2 / size[1]], device=features.device, dtype=features.dtype).expand_as(coord)
    return make_queries(features, coord, cell)[0]


def finished(flat: Tensor, residual: Tensor, size: tuple[int, int]) -> Tensor:  # [Q, C] -> [1, C, H, W]
    """The queries' colours as an image, on the bilinear one."""
    coord = pixel_centres(size, residual.device).flatten(0, 1).to(residual.dtype)
    flat = flat + sample(residual, coord, "bilinear", "border")[0]
    return flat.t().reshape(1, -1, *size)


def by_columns(
    features: Tensor,  # [1, D, h, w]
    mlps: list[Layers],
    size: tuple[int, int],
    class_map: Tensor | None,  # [1, H, W]
    residual: Tensor,  # [1, C, h, w]
) -> Tensor:  # [1, C, H, W]
    """The layout of tiny-cuda-nn: queries are columns, a layer is W · X with the bias along rows."""
    x = queries(features, size).t().contiguous()
    flat = x.new_empty(residual.shape[1], x.shape[1])
    for number, layers in enumerate(mlps):
        if class_map is None:
            flat = columns(layers, x)
            break
        index = (class_map.flatten() == number).nonzero().squeeze(1)
        flat[:, index] = columns(layers, x[:, index])
    return finished(flat.t(), residual, size)


def columns(layers: Layers, x: Tensor) -> Tensor:  # [F, Q] -> [C, Q]
    """One MLP over columns."""
    for number, (weight, bias) in enumerate(layers):
        x = torch.addmm(bias[:, None], weight, x)
        if number < len(layers) - 1:
            x = x.relu_()
    return x


def grouped(mlps: list[Layers]) -> Callable[[Tensor, tuple[int, int], Tensor, Tensor], Tensor] | str:
    """MLPs of several classes as one grouped product per layer, padded to one width and depth; or why that does not run."""
    if not hasattr(torch, "_grouped_mm"):
        return "torch._grouped_mm is not in this torch"
    depth = max(len(layers) for layers in mlps)
    stacks = _stacked([_deepened(layers, depth) for layers in mlps])
    channels = mlps[0][-1][0].shape[0]

    def run(features: Tensor, size: tuple[int, int], class_map: Tensor, residual: Tensor) -> Tensor:
        ids = class_map.flatten()
        order = ids.argsort(stable=True)
        ends = torch.bincount(ids, minlength=len(mlps)).cumsum(0).to(torch.int32)
        x = queries(features, size)[order]
        x = F.pad(x, (0, stacks[0][0].shape[1] - x.shape[1]))
        sorted_ids = ids[order].long()
        for number, (weights, biases) in enumerate(stacks):
            x = torch._grouped_mm(x, weights, offs=ends) + biases[sorted_ids]
            if number < depth - 1:
                x = x.relu_()
        flat = x.new_empty(len(ids), channels)
        flat[order] = x[:, :channels]
        return finished(flat, residual, size)

    return run


def _deepened(layers: Layers, depth: int) -> Layers:
    """As many layers by identities before the last: what has passed a ReLU passes it again unchanged."""
    width = layers[-1][0].shape[1]
    like = layers[-1][0]
    identity = (torch.eye(width, dtype=like.dtype, device=like.device), like.new_zeros(width))
    return [*layers[:-1], *[identity] * (depth - len(layers)), layers[-1]]


def _stacked(mlps: list[Layers]) -> list[tuple[Tensor, Tensor]]:  # [K, F_in, F_out] and [K, F_out] per layer
    """The layers of all classes, zeros added up to one width."""
    made = []
    for same_depth in zip(*mlps, strict=True):
        rows, cols = (-(-max(w.shape[d] for w, _ in same_depth) // PAD) * PAD for d in (1, 0))
        weights = torch.stack([F.pad(w.t(), (0, cols - w.shape[0], 0, rows - w.shape[1])) for w, _ in same_depth])
        made.append((weights, torch.stack([F.pad(b, (0, cols - b.shape[0])) for _, b in same_depth])))
    return made
