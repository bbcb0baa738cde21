"""PSNR and SSIM of RGB and luma, as the papers measure them.

They are those of scikit-image, which ``pip install ".[evaluate]"`` in a copy of the source installs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from fastroute._extras import remedy

# The side of SSIM's Gaussian window, 2 · round(3.5 · 1.5) + 1.
SSIM_WINDOW = 11
# Y of ITU-R BT.601 in 16 … 235, from RGB in 0 … 255.
LUMA = (65.481 / 255, 128.553 / 255, 24.966 / 255)
LUMA_BLACK = 16.0


def compare(image: Tensor, target: Tensor, border: int) -> dict[str, float]:  # [3, H, W] uint8 twice
    """PSNR and SSIM of RGB and luma, without `border` pixels on every side.

    SSIM as defined by Wang et al. (2004): a Gaussian window of standard deviation 1.5, no correction for the sample size.

    Raises:
        ValueError: the images differ in size, or scikit-image is missing.
    """
    psnr, ssim = metrics()
    if image.shape != target.shape:
        raise ValueError(f"compare: image must be {tuple(target.shape)} as target; got {tuple(image.shape)}")
    inner = (slice(None), slice(border, image.shape[1] - border), slice(border, image.shape[2] - border))
    a, b = (x[inner].numpy() for x in (image, target))
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}

    def decibels(x: np.ndarray, y: np.ndarray) -> float:
        # scikit-image would divide by zero.
        return math.inf if np.array_equal(x, y) else float(psnr(y, x, data_range=255))

    ya, yb = (luma(x) for x in (a, b))
    return {
        "psnr": decibels(a, b),
        "ssim": float(ssim(b, a, channel_axis=0, **window)),
        "psnr_y": decibels(ya, yb),
        "ssim_y": float(ssim(yb, ya, **window)),
    }


def least_side(factor: int) -> int:
    """The least side of an image of which :func:`compare` can measure the result at `factor`, cut to a multiple of it."""
    return SSIM_WINDOW + 3 * factor - 1


def luma(rgb: np.ndarray) -> np.ndarray:  # [3, H, W] in 0 … 255 -> [H, W]
    """Y of BT.601, 16 … 235, not rounded."""
    return np.tensordot(np.array(LUMA), rgb.astype(np.float64), axes=1) + LUMA_BLACK


def metrics() -> tuple[Any, Any]:
    """The PSNR and SSIM of scikit-image, which only this module needs.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    except ImportError as error:
        raise ValueError(f"evaluate: PSNR and SSIM need scikit-image ({error}): {remedy('evaluate')}") from error
    return peak_signal_noise_ratio, structural_similarity
