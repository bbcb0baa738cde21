"""Reference of `conv3x3`: Winograd's F(4 x 4, 3 x 3) tile by tile, direct sums of bfloat16, and the weights of both."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Outputs along a side of a tile, taps of the kernel, and inputs along a side.
TILE, TAPS = 4, 3
SIDE = TILE + TAPS - 1
# Numbers at which polynomials are evaluated, beside infinity. Those of opposite sign share their even and odd parts. These
# lose the fewest bits of all pairs of short binary fractions.
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)
# Outputs of a group are padded to a multiple of this: a vector of the widest instruction set.
PAD = 16


def _product(roots: tuple[float, ...]) -> list[float]:
    """The coefficients of the product of (x - root), the constant first."""
    found = [1.0]
    for root in roots:
        found = [high - root * low for high, low in zip([0.0, *found], [*found, 0.0], strict=True)]
    return found


def transforms() -> tuple[Tensor, Tensor, Tensor]:  # [4, 6], [6, 3], [6, 6]
    """A^T, G and B^T of the method of Toom and Cook at `POINTS` and infinity, in float64.

    The outputs of a tile d with a kernel w are A^T [(G w G^T) · (B^T d B)] A. The division by Π (x_j - x_k) stays with the
    kernel, so that the inputs lose no bits by it.
    """
    others = [tuple(x for x in POINTS if x != point) for point in POINTS]
    evaluate = [[x**i for x in POINTS] + [float(i == TILE - 1)] for i in range(TILE)]
    kernel = []
    for point, rest in zip(POINTS, others, strict=True):
        divisor = 1.0
        for x in rest:
            divisor *= point - x
        kernel.append([point**i / divisor for i in range(TAPS)])
    kernel.append([0.0] * (TAPS - 1) + [1.0])
    inputs = [[*_product(rest), 0.0] for rest in others] + [_product(POINTS)]
    a, g, b = (torch.tensor(rows, dtype=torch.float64, device="cpu") for rows in (evaluate, kernel, inputs))
    return a, g, b


def transformed_weight(weight: Tensor, groups: int, shuffle: int) -> Tensor:  # [O, C / G, 3, 3] -> [36, G, C / G, P]
    """G w G^T of every kernel, computed in float64; of the dtype of `weight`, float32 for bfloat16.

    The outputs of a group come pixel by pixel, as a pixel shuffle by `shuffle` places them; the channels of each pixel are
    padded to `PAD` by zeros.
    """
    inputs, parts = weight.shape[1], shuffle**2
    shown = weight.shape[0] // groups // parts
    g = transforms()[1].to(weight.device)
    # One product: of all 9 taps of a kernel with the 36 points, rows before columns.
    points = torch.kron(g, g) @ weight.double().reshape(-1, TAPS**2).t()
    points = points.reshape(SIDE**2, groups, shown, parts, inputs)
    columns = F.pad(points.permute(0, 1, 4, 3, 2), (0, -shown % PAD)).flatten(3)
    return columns.to(torch.float32 if weight.dtype == torch.bfloat16 else weight.dtype).contiguous()


def paired_weight(weight: Tensor, groups: int, shuffle: int) -> Tensor:  # [O, C / G, 3, 3] -> [9, G, pairs, P, 2]
    """The kernel of every tap with the columns of :func:`transformed_weight`, those of two input channels in turn.

    The last of an odd number of channels stands behind zeros.
    """
    parts, inputs = shuffle**2, weight.shape[1]
    shown = weight.shape[0] // groups // parts
    taps = weight.reshape(groups, shown, parts, inputs, TAPS**2).permute(4, 0, 3, 2, 1)
    columns = F.pad(taps, (0, -shown % PAD)).flatten(3)
    if inputs % 2:
        columns = torch.cat([columns[:, :, :-1], torch.zeros_like(columns[:, :, -1:]), columns[:, :, -1:]], dim=2)
    return columns.unflatten(2, (-1, 2)).transpose(3, 4).contiguous()


def unpaired_weight(
    paired: Tensor, inputs: int, channels: int, shuffle: int
) -> Tensor:  # [9, G, pairs, P, 2] -> [O, C / G, 3, 3]
    """The inverse of :func:`paired_weight`, for `inputs` channels of a group and `channels` outputs."""
    groups, parts = paired.shape[1], shuffle**2
    taps = paired.transpose(3, 4).flatten(2, 3).unflatten(3, (parts, -1))[..., : channels // groups // parts]
    if inputs % 2:
        taps = torch.cat([taps[:, :, : inputs - 1], taps[:, :, -1:]], dim=2)
    return taps.permute(1, 4, 3, 2, 0).reshape(channels, inputs, TAPS, TAPS)


def conv3x3_reference(
    image: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [36, G, C / G, P] or, of bfloat16, [9, G, pairs, P, 2]
    bias: Tensor | None,  # [O]
    slope: Tensor | None,  # [O]
    residual: Tensor | None,  # [B, O / s / s, H s, W s]
    channels: int,
    shuffle: int,
    context: int = 0,
) -> Tensor:  # [B, O / s / s, H s, W s], channels_last
    """See :func:`fastroute.conv3x3`.

    Every tile of 4 x 4 outputs reads the 6 x 6 inputs d around it, zeros outside of the image, and gives

        y = A^T [Σ_c u_c · (B^T d_c B)] A,  u_c = G w_c G^T,

    over the channels c of its group, then y + bias, slope · y where that is negative, a pixel shuffle, and y + residual.
    With `context` the first tile begins at the second row, and the first and last row are not outside of the image.

    Images of bfloat16 are computed in float32 and rounded at the end; with weights of bfloat16, y by direct sums over taps and
    channels.
    """
    if image.dtype == torch.bfloat16:
        bias, slope, residual = (None if x is None else x.float() for x in (bias, slope, residual))
        wide = conv3x3_reference(image.float(), weight.float(), bias, slope, residual, channels, shuffle, context)
        return wide.to(image.dtype)
    if weight.ndim == 5:
        groups = weight.shape[1]
        kernel = unpaired_weight(weight, image.shape[1] // groups, channels, shuffle)
        size = image.shape[0], channels, image.shape[2] - 2 * context, image.shape[3]
        # PyTorch's convolutions refuse an image without rows.
        y = image.new_zeros(size)
        if y.numel():
            y = F.conv2d(image, kernel, padding=(1 - context, 1), groups=groups)
        return _followed(y, bias, slope, residual, shuffle)
    batch, inputs, height, width = image.shape
    height -= 2 * context
    groups = weight.shape[1]
    a, _, b = (matrix.to(image) for matrix in transforms())
    down, across = (max(1, -(-size // TILE)) for size in (height, width))
    around = F.pad(image, (1, 1 + across * TILE - width, 1 - context, 1 + down * TILE - height - context))
    tiles = around.unfold(2, SIDE, TILE).unfold(3, SIDE, TILE)
    points = torch.einsum("ai,nchwij,bj->abnhwc", b, tiles, b).reshape(SIDE**2, -1, groups, inputs // max(groups, 1))
    products = torch.einsum("ptgc,pgco->tgop", points, weight)
    shown = channels // groups // shuffle**2
    products = products.unflatten(2, (shuffle**2, -1))[:, :, :, :shown].transpose(2, 3).flatten(2, 3)
    y = torch.einsum("ia,tgoab,jb->tgoij", a, products.unflatten(3, (SIDE, SIDE)), a)
    y = y.reshape(batch, down, across, channels, TILE, TILE).permute(0, 3, 1, 4, 2, 5)
    y = y.reshape(batch, channels, down * TILE, across * TILE)[:, :, :height, :width]
    return _followed(y, bias, slope, residual, shuffle)


def _followed(
    y: Tensor,  # [B, O, H, W]
    bias: Tensor | None,  # [O]
    slope: Tensor | None,  # [O]
    residual: Tensor | None,  # [B, O / s / s, H s, W s]
    shuffle: int,
) -> Tensor:  # [B, O / s / s, H s, W s], channels_last
    """What follows the sums."""
    if bias is not None:
        y = y + bias[:, None, None]
    if slope is not None:
        y = torch.where(y > 0, y, y * slope[:, None, None])
    y = F.pixel_shuffle(y, shuffle)
    if residual is not None:
        y = y + residual
    return y.contiguous(memory_format=torch.channels_last)
