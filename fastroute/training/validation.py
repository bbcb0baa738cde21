"""How good a training is by now: PSNR and SSIM on images that it does not learn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastroute import io
from fastroute._arguments import LARGEST_SPAN, whole
from fastroute.degradation import make_pair
from fastroute.quality import compare, least_side, metrics

# From an 8-bit image of low resolution to one of high resolution.
Upscale = Callable[[Tensor], Tensor]


class Quality(NamedTuple):
    """PSNR of RGB in dB and SSIM of RGB, means over the images of a validation."""

    psnr: float
    ssim: float


class Validation:
    """PSNR and SSIM on a folder, as :func:`fastroute.report.evaluation.evaluate` measures them.

    Images are cut to a multiple of the scale and reduced by antialiased bicubic interpolation; results are compared in 8 bits
    without a border of `scale` pixels.

    Args:
        images: folder of HR images, searched recursively.
        scale: upscaling factor.
        every: steps between two validations; there is another one at the end of each stage.
        exclude: glob patterns of file names to leave out.

    Raises:
        ValueError: there are no images, one is too small, or scikit-image is missing.
        fastroute.io.ImageError: an image cannot be read.
    """

    def __init__(self, images: str | Path, scale: int, every: int = 1000, exclude: Sequence[str] = ()) -> None:
        self.scale = int(whole("train", "scale", scale, LARGEST_SPAN))
        self.every = int(whole("train", "validate_every", every, LARGEST_SPAN))
        metrics()
        self.paths = io.list_images(images, exclude)
        self.pairs = [self._pair(path) for path in self.paths]

    def _pair(self, path: Path) -> tuple[Tensor, Tensor]:
        image = io.read_image(path)
        least = least_side(self.scale)
        if min(image.shape[-2:]) < least:
            height, width = image.shape[-2:]
            raise ValueError(f"train: validation images must be at least {least} x {least}; {path} has {width} x {height}")
        return make_pair(image, self.scale)

    def __call__(self, upscale: Upscale) -> Quality:
        """The quality of what `upscale` makes of the reduced images."""
        each = [compare(upscale(lr).cpu(), hr, self.scale) for lr, hr in self.pairs]
        # Equal images have no PSNR; 100 dB, as for patches.
        return Quality(*(float(np.mean([min(found[name], 100.0) for found in each])) for name in ("psnr", "ssim")))


def upscaling(network: nn.Module, device: torch.device) -> Upscale:
    """`network` on whole 8-bit images, as a function of one of them; it should be in evaluation mode."""

    @torch.no_grad()
    def upscale(image: Tensor) -> Tensor:  # uint8 [C, h, w] -> uint8 [C, H, W]
        result = network(image[None].to(device).float() / 255)[0]
        return (result.float().clamp(0, 1) * 255).round().to(torch.uint8)

    return upscale
