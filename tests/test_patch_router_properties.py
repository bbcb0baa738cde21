"""Routing equals the plain loop for any size, patch, stride, scale, classes, and height of the bands."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import picture, randomise, routed_plainly
from torch import nn

from fastroute import PatchRouter, TileGrid
from fastroute.patch import branches as branches_module
from fastroute.patch import patch_memory
from fastroute.runtime.tuning import Setting


@st.composite
def grids(draw: st.DrawFn) -> TileGrid:
    patch = draw(st.integers(1, 9))
    stride, scale = draw(st.integers(1, patch)), draw(st.integers(1, 4))
    return TileGrid(draw(st.integers(1, 30)), draw(st.integers(1, 30)), patch, stride, scale)


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    # Odd batch sizes and both memory formats, without a stopwatch.
    def setting(self, c, device):
        layers = len(list(self.modules[c]))
        return Setting((3 + layers % 4) * self.size[2] * self.size[3], layers % 2 == 0)

    monkeypatch.setattr(branches_module.Branches, "setting", setting)
    monkeypatch.setenv("FASTROUTE_TUNE", "0")


def branches(scale: int, shuffled: bool) -> list[nn.Module]:
    """Two branches of different lengths, with equal final pixel shuffles or none."""
    if shuffled:
        tails = [
            [nn.Conv2d(4, 2 * scale**2, 1), nn.PixelShuffle(scale)],
            [nn.Conv2d(2, 2 * scale**2, 1), nn.PixelShuffle(scale)],
        ]
    else:
        tails = [[nn.Conv2d(4, 2, 1), nn.Upsample(scale_factor=scale)], [nn.Upsample(scale_factor=scale)]]
    long = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), *tails[0])
    return [randomise(m, seed).eval() for seed, m in enumerate((long, nn.Sequential(nn.Conv2d(2, 2, 1), *tails[1])))]


@pytest.mark.slow
@given(
    grids(), st.integers(0, 3), st.integers(1, 60), st.booleans(), st.sampled_from(["uniform", "hann"]), st.integers(0, 2**20)
)
def test_routing_is_the_plain_loop(grid, batch, per_band, shuffled, window, seed):
    networks = branches(grid.scale, shuffled)
    router = PatchRouter(networks, None, patch=grid.patch, stride=grid.stride, scale=grid.scale, window=window, merge=1)
    assert router.shuffle == (grid.scale if shuffled else 1)
    image = picture(batch, 2, grid.height, grid.width, seed)
    generator = torch.Generator().manual_seed(seed)
    class_map = torch.randint(0, 2, (batch, grid.rows, grid.cols), generator=generator)
    expected = routed_plainly(image, grid, networks, class_map.flatten(), window)
    with mock.patch.object(patch_memory, "PATCHES_PER_BAND", {"cpu": per_band}):
        result = router.upscale(image, class_map=class_map)
    torch.testing.assert_close(result.image.double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(result.class_map, class_map)


@given(grids(), st.integers(0, 5), st.integers(1, 60))
def test_bands_cover_every_tile_row_once_in_order(grid, batch, per_band):
    with mock.patch.object(patch_memory, "PATCHES_PER_BAND", {"cpu": per_band}):
        bands = patch_memory.plan_bands(batch, grid, per_band)
    rows = [(b, row) for band in bands for b in range(*band.images) for row in range(*band.rows)]
    assert rows == [(b, row) for b in range(batch) for row in range(grid.rows)]
    for band in bands:
        images, height = band.images[1] - band.images[0], band.rows[1] - band.rows[0]
        # Several images only whole; no larger than asked for, but for the height of a row, halves rounded up.
        assert images == 1 or height == grid.rows
        assert images * height * grid.cols <= per_band + 1.5 * grid.cols
