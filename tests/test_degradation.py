"""Downscaling is MATLAB's, to the edge: the definition written as a loop over pixels."""

from __future__ import annotations

import math

import pytest
import torch
from networks import picture
from torch.nn import functional as F

from fastroute.degradation import downscale, make_pair, taps


def keys(x: float) -> float:
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def line(values: list[float], size: int) -> list[float]:
    """One output pixel after the other: the kernel, widened by the factor, over the mirrored line."""
    factor, result = len(values) / size, []
    width = max(factor, 1)
    for i in range(size):
        centre = (i + 0.5) * factor - 0.5
        total = weights = 0.0
        for j in range(math.floor(centre - 2 * width) - 1, math.ceil(centre + 2 * width) + 2):
            weight = keys((j - centre) / width)
            place = j % (2 * len(values))
            total += weight * values[min(place, 2 * len(values) - 1 - place)]
            weights += weight
        result.append(total / weights)
    return result


@pytest.mark.parametrize(("length", "size"), [(8, 2), (12, 4), (15, 5), (9, 4), (3, 1), (1, 1), (4, 4), (40, 10)])
def test_a_line(length, size):
    values = torch.rand(length, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    places, weights = taps(length, size)
    torch.testing.assert_close(
        (values[places] * weights).sum(dim=0), torch.tensor(line(values.tolist(), size), dtype=torch.float64)
    )


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_an_image(scale):
    image = picture(1, 2, 7 * scale, 5 * scale, seed=scale).clamp(0, 1)
    rows = torch.tensor([[line(column, 7) for column in plane.t().tolist()] for plane in image[0]]).transpose(1, 2)
    expected = torch.tensor([[line(row, 5) for row in plane.tolist()] for plane in rows])
    torch.testing.assert_close(downscale(image, scale)[0], expected.clamp(0, 1), rtol=0, atol=1e-6)


def test_away_from_the_border_it_is_pytorchs():
    image = picture(1, 3, 80, 96, seed=1).clamp(0, 1)
    ours, theirs = downscale(image, 4), F.interpolate(image, size=(20, 24), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(ours[..., 2:-2, 2:-2], theirs[..., 2:-2, 2:-2], rtol=0, atol=2e-6)
    assert (ours - theirs).abs().max() > 0.01


def test_flat_images_stay_flat():
    lr, hr = make_pair(torch.full((3, 33, 30), 200, dtype=torch.uint8), 4)
    assert lr.shape == (3, 8, 7) and hr.shape == (3, 32, 28) and (lr == 200).all()
