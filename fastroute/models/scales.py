"""The upscaling factor of a network, where nothing but its weights tells it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

# FSRCNN ends in a transposed convolution of 9 x 9 taps at any of these factors.
CANDIDATES = (2, 3, 4)
# Levels of flat images, their side, and the mean error up to which they count as flat still.
LEVELS = (0.25, 0.5, 0.75)
SIDE = 12
FLAT = 0.05
# The convolutions before each pixel shuffle, by backbone: by their shapes and their number the factor is known.
UPSAMPLERS = {
    "carn": r"upsample\.up\.body\.\d+\.weight",
    "srresnet": r"upconv\d\.weight",
    "rcan": r"tail\.0\.\d+\.weight",
}


def scale_of_shapes(backbone: str, state: Mapping[str, Tensor], prefix: str, width: int) -> int | None:
    """The factor that the shapes under `prefix` say; None where they are the same for several, as those of FSRCNN are."""
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
    """The factor at which a flat image stays flat; None where none or several of `CANDIDATES` do so.

    Taps that were trained for another factor are summed in other groups: the image then gets another level and a pattern.

    Args:
        build: makes the network, its weights in place, for a factor.
    """
    flat = torch.tensor(LEVELS).view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE)
    fitting = []
    for scale in CANDIDATES:
        # Without the border, where networks see zeros.
        inner = slice(4 * scale, -4 * scale)
        result = build(scale).eval()(flat)[:, :, inner, inner]
        # Not a number fits nothing.
        if (result - flat[:, :, :1, :1]).abs().mean() < FLAT:
            fitting.append(scale)
    return fitting[0] if len(fitting) == 1 else None
