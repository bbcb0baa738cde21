"""The upscaling factor of a network, found from its weights if nothing else states it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

# FSRCNN ends in a transposed convolution of 9 x 9 taps at any of these factors.
CANDIDATES = (2, 3, 4)
# The levels of flat images, their side, and the mean error up to which a result still counts as flat.
LEVELS = (0.25, 0.5, 0.75)
SIDE = 12
FLAT = 0.05
# For each backbone, the convolutions before each pixel shuffle. The factor follows from their shapes and number.
UPSAMPLERS = {
    "carn": r"upsample\.up\.body\.\d+\.weight",
    "srresnet": r"upconv\d\.weight",
    "rcan": r"tail\.0\.\d+\.weight",
}


def scale_of_shapes(backbone: str, state: Mapping[str, Tensor], prefix: str, width: int) -> int | None:
    """The factor that follows from the shapes under `prefix`; None if several factors have these shapes, as in FSRCNN."""
    if backbone not in UPSAMPLERS:
        return None
    pattern = re.compile(re.escape(prefix) + UPSAMPLERS[backbone])
    layers = [value for key, value in state.items() if pattern.fullmatch(key) and value.ndim == 4]
    factors = [round((len(layer) / width) ** 0.5) for layer in layers]
    if not factors or any(factor not in (2, 3) for factor in factors):
        return None
    scale = 1
    for factor in factors:
        scale *= factor
    return scale


@torch.no_grad()
def scale_of_flat_images(build: Callable[[int], nn.Module]) -> int | None:
    """The factor at which flat images stay flat; None if this holds for none or several of `CANDIDATES`.

    Taps that were trained for another factor are summed in other groups, so the image gets another level and a pattern.

    Args:
        build: makes the network for a factor, with its weights.
    """
    flat = torch.tensor(LEVELS).view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE)
    fitting = []
    for scale in CANDIDATES:
        # The border is left out, because networks see zeros there.
        inner = slice(4 * scale, -4 * scale)
        result = build(scale).eval()(flat)[:, :, inner, inner]
        # NaN never fits.
        if (result - flat[:, :, :1, :1]).abs().mean() < FLAT:
            fitting.append(scale)
    return fitting[0] if len(fitting) == 1 else None
