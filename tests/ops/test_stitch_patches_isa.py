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
from fastroute.rewrite.optimize import interpolation

pytestmark = [pytest.mark.slow, only_the_cpu_kernels("stitch_patches")]

GRID = TileGrid(21, 26, 9, 7, 4)
SHAPE = (2, 3, *GRID.output_size)
# (features, units of the expansion or 0, kernel); and an interpolation.
LAYERS = [(12, 56, 3), (12, 9, 3), (5, 0, 3), "bicubic"]
TYPES = (torch.float32, torch.uint8)
# Finished patches: as a convolution leaves them, in either memory format, and rows that are no neighbours; how many
# channels, of which type.
FINISHED = [
    *((kind, 3, torch.float32) for kind in ("planes", "pixels", "apart", "shuffled")),
    *((kind, 3, dtype) for kind in ("planes", "pixels", "alike", "shuffled") for dtype in (torch.float16, torch.bfloat16)),
    ("pixels", 3, torch.float64),
    *(("pixels", channels, torch.float32) for channels in (2, 17, 32)),
    ("pixels", 5, torch.bfloat16),
]
WINDOWS = ("hann", "uniform")
# What no type keeps, what some do not, and numbers on either side of the smallest ones.
SPECIAL = torch.tensor([torch.nan, torch.inf, -torch.inf, 7e4, -7e4, 6e-8, 2.9e-8, 1e-40, -0.0])


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
            args = (batches, [0] * len(batches), list(layers.layers), inverse, None, window, *geometry)
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


def finished(kind, channels, dtype):
    """Patches and their factor of pixel shuffle."""
    shuffle = 4 if kind == "shuffled" else 1
    side = GRID.patch * GRID.scale // shuffle
    size = (2 * GRID.num_patches, channels * shuffle * shuffle, side, side)
    if kind == "apart":
        return random((size[0], side, size[1], side + 5)).transpose(1, 2)[..., 2:-3], shuffle
    if kind == "alike":  # one pixel for all of a row
        pixels = random((*size[:3], 1)).to(dtype).contiguous(memory_format=torch.channels_last)
        return pixels.expand(size), shuffle
    patches = random(size)
    patches.view(-1)[100 : 100 + len(SPECIAL)] = SPECIAL
    memory_format = torch.contiguous_format if kind == "planes" else torch.channels_last
    return patches.to(dtype).contiguous(memory_format=memory_format), shuffle


def written_types(dtype):
    return (dtype, torch.uint8, torch.uint16) if dtype != torch.float32 else (dtype, torch.float16, torch.bfloat16, torch.uint8)


@pytest.fixture(scope="module")
def stitched(tmp_path_factory):
    """By instruction set, the images of all finished patches, by window and type."""
    calls = []
    for case in FINISHED:
        patches, shuffle = finished(*case)
        for window in WINDOWS:
            weight = make_window(window, GRID.patch * GRID.scale).to(
                torch.float64 if case[2] == torch.float64 else torch.float32
            )
            geometry = (GRID.height, GRID.width, GRID.patch, GRID.stride, GRID.scale, GRID.crop, shuffle, 0, SHAPE[2])
            for dtype in written_types(case[2]):
                out = torch.full((2, case[1], *GRID.output_size), 7, dtype=dtype)
                calls.append(((patches, shuffled(len(patches), "cpu"), weight, *geometry), {"out": out}))
    return run_on_each("stitch_patches.out", calls, tmp_path_factory.mktemp("isa"))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", FINISHED, ids=str)
def test_finished_patches_have_the_bits_of_the_reference(stitched, isa, case):
    patches, shuffle = finished(*case)
    types = written_types(case[2])
    first = sum(len(WINDOWS) * len(written_types(dtype)) for _, _, dtype in FINISHED[: FINISHED.index(case)])
    images = iter(stitched[isa][first:])
    with fastroute.use_backend("reference"):
        for window in WINDOWS:
            for dtype in types:
                args = (patches, GRID, window, shuffled(len(patches), "cpu"))
                expected = stitch_patches(*args, shuffle=shuffle, dtype=dtype)
                torch.testing.assert_close(next(images), expected, rtol=0, atol=0, equal_nan=True, msg=f"{window}, {dtype}")
