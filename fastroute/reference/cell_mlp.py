"""Reference of `cell_mlp`: one product per layer over all cells, then means of windows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastroute._levels import to_float

# Cells that go through all layers together on a CPU: 4096 rows of 128 float32 are 2 MiB, which second-level caches hold.
CHUNK = 4096


def chunk_on(device: torch.device) -> int:
    """Cells that go through all layers together; other devices than CPUs want larger products."""
    return CHUNK if device.type == "cpu" else 64 * CHUNK


def cell_mlp_reference(
    image: Tensor,  # [B, C, H, W]
    weights: list[Tensor],  # [F_out, F_in] each
    biases: list[Tensor],  # [F_out] each
    slope: float,
    cell: int,
    span: int,
    step: int,
) -> Tensor:  # [B, H // cell, windows, F_out]
    """See :func:`fastroute.cell_mlp`.

    Column x of row y of cells gives, from its C · cell² pixels, channel by channel and row by row,

        f(y, x)      the pixels v <- leaky_relu(W_n v + b_n) for each layer n, leaky_relu(a) = a where a > 0, else slope · a.
        out(y, j)    (f(y, s) + … + f(y, s + span - 1)) / span,  s = min(j · step, W / cell - span),
                     for all j up to the first with s = W / cell - span.

    Integer pixels are divided by their maximum. Everything is done in the dtype of the layers.
    """
    batch, channels, _, width = image.shape
    cols = width // cell
    # A step beyond the last window is one to it.
    step = min(step, max(cols - span, 1))
    pieces = []
    for part in image.split(max(chunk_on(image.device) // max(batch * cols, 1), 1) * cell, dim=2):
        rows = part.shape[2] // cell
        x = to_float(part, weights[0].dtype).reshape(batch, channels, rows, cell, cols, cell)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(batch * rows * cols, channels * cell * cell)
        for weight, bias in zip(weights, biases, strict=True):
            x = torch.addmm(bias, x, weight.t())
            x = F.leaky_relu(x, slope) if x.requires_grad else F.leaky_relu_(x, slope)
        x = x.view(batch, rows, cols, x.shape[1])
        means = x.unfold(2, span, step).mean(dim=-1)
        if (cols - span) % step:
            means = torch.cat([means, x[:, :, cols - span :].mean(dim=2, keepdim=True)], dim=2)
        pieces.append(means)
    return torch.cat(pieces, dim=1).contiguous()


def _cell_mlp_backward_reference(
    grad: Tensor,  # [B, H // cell, windows, F_out]
    image: Tensor,  # [B, C, H, W]
    weights: list[Tensor],  # [F_out, F_in] each
    biases: list[Tensor],  # [F_out] each
    slope: float,
    cell: int,
    span: int,
    step: int,
) -> list[Tensor]:
    """Gradients of image, weights and biases, in that order: autograd through a second forward pass.

    That of an image of integers is zero.
    """
    inputs = [image, *weights, *biases]
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(x.dtype.is_floating_point) for x in inputs]
        n = len(weights)
        output = cell_mlp_reference(leaves[0], leaves[1 : 1 + n], leaves[1 + n :], slope, cell, span, step)
    wanted = [x for x in leaves if x.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, grad.to(output.dtype)))
    return [next(found) if x.requires_grad else torch.zeros_like(x) for x in leaves]
