"""Tests of `stitch_patches` on each instruction set of this processor."""

from __future__ import annotations

import pytest
import torch
from instruction_sets import ISAS, has_fma, only_the_cpu_kernels, run_on_each
from support import random
from test_stitch_patches import shuffled
from test_stitch_patches_upsampled import TOLERANCE, layers_of, upsampler

import fastroute
from fastroute import TileGrid, make_window, stitch_patches
from fastroute.models.arm import Bicubic
from fastroute.models.optimize import interpolation

pytestmark = only_the_cpu_kernels("stitch_patches")

GRID = TileGrid(21, 26, 9, 7, 4)
SHAPE = (2, 3, *GRID.output_size)
# (features, units of the expansion or 0, kernel); and an interpolation.
LAYERS = [(12, 56, 3), (12, 9, 3), (5, 0, 3), "bicubic"]
TYPES = (torch.float32, torch.uint8)
# Finished patches: as a convolution leaves them, in either memory format, and rows that are no neighbours.
FINISHED = ("planes", "pixels", "apart", "shuffled")


def problem(sizes):
    if sizes == "bicubic":
        layers = interpolation(Bicubic(GRID.scale), GRID.patch)
    else:
        features, units, kernel = sizes
        layers = upsampler(features, units or features, 3, GRID.scale, kernel, expands=units > 0)
    size = (2 * GRID.num_patches, layers.features, GRID.patch, GRID.patch)
    x = random(size).contiguous(memory_format=torch.channels_last)
    return x, layers, shuffled(len(x), "cpu"), make_window("hann", GRID.patch * GRID.scale)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """By instruction set, the images of all problems in all types."""
    calls = []
    for sizes in LAYERS:
        for dtype in TYPES:
            x, layers, inverse, window = problem(sizes)
            batches = list(x.split(4))
            geometry = (GRID.height, GRID.width, GRID.patch, GRID.stride, GRID.scale, GRID.crop, layers.shuffle, 0, SHAPE[2])
            args = (batches, [0] * len(batches), list(layers.layers), inverse, window, *geometry)
            written = {"out": torch.full(SHAPE, 7, dtype=dtype), "spent": torch.zeros(2, dtype=torch.float64)}
            calls.append((args, written))
    return run_on_each("stitch_patches.upsampled_out", calls, tmp_path_factory.mktemp("isa"))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sizes", LAYERS, ids=str)
def test_against_float64(outputs, isa, sizes):
    x, layers, inverse, _ = problem(sizes)
    with fastroute.use_backend("reference"):
        exact = stitch_patches(layers_of(x, layers), GRID, "hann", inverse)
    single, pixels = outputs[isa][LAYERS.index(sizes) * len(TYPES) :][: len(TYPES)]
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=TOLERANCE)
    assert (pixels.double() - 255 * exact.clamp(0, 1)).abs().max() <= 0.5 + 255 * TOLERANCE


def test_each_name_is_heeded(outputs):
    """Fused multiply-adds give other last bits: where there are such, they are used."""
    assert torch.equal(outputs["baseline"][0], outputs["avx2"][0]) == (not has_fma())


def finished(kind):
    """Patches of `kind` and their factor of pixel shuffle."""
    shuffle = 4 if kind == "shuffled" else 1
    side = GRID.patch * GRID.scale // shuffle
    channels = 3 * shuffle * shuffle
    if kind == "apart":
        return random((2 * GRID.num_patches, side, channels, side + 5)).transpose(1, 2)[..., 2:-3], shuffle
    memory_format = torch.contiguous_format if kind == "planes" else torch.channels_last
    return random((2 * GRID.num_patches, channels, side, side)).contiguous(memory_format=memory_format), shuffle


@pytest.fixture(scope="module")
def stitched(tmp_path_factory):
    """By instruction set, the images of the finished patches of each kind, by type and window."""
    calls = []
    for kind in FINISHED:
        patches, shuffle = finished(kind)
        for window in ("hann", "uniform"):
            weight = make_window(window, GRID.patch * GRID.scale)
            geometry = (GRID.height, GRID.width, GRID.patch, GRID.stride, GRID.scale, GRID.crop, shuffle, 0, SHAPE[2])
            for dtype in TYPES:
                written = {"out": torch.full(SHAPE, 7, dtype=dtype)}
                calls.append(((patches, shuffled(len(patches), "cpu"), weight, *geometry), written))
    return run_on_each("stitch_patches.out", calls, tmp_path_factory.mktemp("isa"))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", FINISHED)
def test_finished_patches_have_the_bits_of_the_reference(stitched, isa, kind):
    patches, shuffle = finished(kind)
    each = 2 * len(TYPES)
    images = iter(stitched[isa][FINISHED.index(kind) * each :][:each])
    with fastroute.use_backend("reference"):
        for window in ("hann", "uniform"):
            for dtype in TYPES:
                args = (patches, GRID, window, shuffled(len(patches), "cpu"))
                assert torch.equal(next(images), stitch_patches(*args, shuffle=shuffle, dtype=dtype)), (window, dtype)
