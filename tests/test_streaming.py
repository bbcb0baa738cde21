"""Streamed results are those of `upscale`, bit for bit, whatever the limit; and the limit holds."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from networks import as_image, picture, random_classsr
from support import bits
from test_pixel_router import make_model
from torch import nn

from fastroute import PatchRouter, PixelRouter
from fastroute.patch import patch_memory, patch_router
from fastroute.pixel import pixel_image, pixel_router, pixel_rows
from fastroute.runtime import memory_plan
from fastroute.runtime.endpoints import in_bands
from fastroute.runtime.protocols import ArrayReader, ArrayWriter

pytestmark = pytest.mark.usefixtures("quick_tuning")
DTYPES = [torch.uint8, torch.uint16, torch.float32, torch.float16]


def make_patch_router(patch=16, stride=12) -> PatchRouter:
    system = random_classsr((3, 5, 8), 4, patch)
    return PatchRouter(system.branches, system.classifier, patch=patch, stride=stride, scale=4)


@pytest.fixture(scope="module")
def patches() -> PatchRouter:
    return make_patch_router()


@pytest.fixture(scope="module")
def pixels() -> PixelRouter:
    return PixelRouter(make_model())


def least(router, image, step=1, **options) -> int:
    """The smallest limit, as the error names it."""
    with pytest.raises(ValueError, match=r"memory_limit must be at least \d+ bytes") as caught:
        router.stream(ArrayReader(image.numpy(), True), Recorder(step), memory_limit=1, **options)
    return int(re.search(r"at least (\d+) bytes", str(caught.value))[1])


class Recorder:
    """A writer that notes the bands."""

    def __init__(self, row_step=1):
        self.row_step, self.bands = row_step, []

    def write(self, y, x, pixels):
        assert x == 0
        self.bands.append((y, pixels.clone()))


@pytest.mark.parametrize("kind", ["patches", "pixels"])
def test_the_default_limit_is_the_least_where_nothing_fits_into_it(kind, request, monkeypatch):
    router, image = request.getfixturevalue(kind), picture(1, 3, 40, 90)[0]
    options = {} if kind == "patches" else {"scale": 2}
    smallest, expected = least(router, image, **options), router.upscale(image, **options).image
    monkeypatch.setattr(memory_plan, "DEFAULT_LIMIT", {"cpu": 1000, "cuda": 1000})
    writer = Recorder()
    stats = router.stream(ArrayReader(image.numpy(), True), writer, **options).stats
    assert stats.working_set == smallest
    assert torch.equal(bits(torch.cat([band for _, band in writer.bands], dim=1)), bits(expected))


def check(router, image, step=1, **options):
    """All limits give the bits of `upscale`; the bands follow one another in steps."""
    expected = router.upscale(image, **options)
    smallest = least(router, image, step, **options)
    heights = []
    for limit in (smallest, smallest + 100_000, None):
        writer = Recorder(step)
        result = router.stream(ArrayReader(image.numpy(), True), writer, memory_limit=limit, **options)
        assert [y for y, _ in writer.bands] == np.cumsum([0] + [band.shape[1] for _, band in writer.bands])[:-1].tolist()
        assert all(y % step == 0 for y, _ in writer.bands)
        streamed = torch.cat([band for _, band in writer.bands], dim=1)
        assert torch.equal(bits(streamed), bits(expected.image))
        assert result.stats.counts_per_class == expected.stats.counts_per_class
        assert limit is None or result.stats.working_set <= limit
        if result.class_map is not None:
            assert torch.equal(result.class_map, expected.class_map)
        heights.append(max(band.shape[1] for _, band in writer.bands))
    assert heights == sorted(heights)
    return heights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1), (9, 40), (101, 61), (64, 45)])
def test_patches(patches, monkeypatch, dtype, size):
    monkeypatch.setattr(patch_memory, "PATCHES_PER_BAND", {"cpu": 8})
    image = as_image(picture(1, 3, *size, seed=size[0]), dtype)[0]
    for step in (1, 16):
        heights = check(patches, image, step)
    assert size[0] < 64 or heights[0] < heights[-1], "the limit changes nothing"


@pytest.mark.slow
@pytest.mark.parametrize(("patch", "stride"), [(8, 8), (16, 5), (32, 28)])
@pytest.mark.parametrize("options", [{"budget": 0.85}, {"penalty": 0.4}, {"budget": 1}], ids=str)
def test_patch_sizes_and_choices(monkeypatch, patch, stride, options):
    monkeypatch.setattr(patch_memory, "PATCHES_PER_BAND", {"cpu": 20})
    check(make_patch_router(patch, stride), as_image(picture(1, 3, 75, 50), torch.uint8)[0], 7, **options)


@pytest.mark.slow
def test_classifier_of_another_kind(monkeypatch):
    class Brightness(nn.Module):
        def forward(self, patches):
            bright = patches.mean(dim=(1, 2, 3))
            return torch.stack([1.02 - bright, bright], dim=1)

    monkeypatch.setattr(patch_memory, "PATCHES_PER_BAND", {"cpu": 8})
    system = random_classsr((3, 5), 4, 16)
    check(PatchRouter(system.branches, Brightness(), patch=16, stride=12, scale=4), picture(1, 3, 101, 61)[0])


def test_given_classes(patches):
    image = picture(1, 3, 101, 61)[0]
    check(patches, image, class_map=patches.upscale(image).class_map.flip(0))


OPTIONS = [
    {},
    {"penalty": 0.4, "refine": False},
    {"scale": 3, "budget": 0.8},
    {"scale": 2, "adaptive": True},
    {"scale": 1.5},
    {"size": (103, 61)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("band", [1 << 20, 2000])
def test_pixels(pixels, monkeypatch, options, band):
    monkeypatch.setattr(pixel_rows, "OUTPUT_BAND", {"cpu": band})
    monkeypatch.setattr(pixel_rows, "ENCODER_BAND", {"cpu": 100})
    for dtype, size in ((torch.uint8, (51, 30)), (torch.uint16, (1, 9)), (torch.float32, (40, 33))):
        check(pixels, as_image(picture(1, 3, *size), dtype)[0], 16, **options)


@pytest.mark.parametrize("options", [{"budget": 0.8}, {"adaptive": True}], ids=str)
def test_sampled_decisions(pixels, monkeypatch, options):
    """Rows are sampled, and the features of all bands do not fit: the image is encoded twice."""
    monkeypatch.setattr(pixel_rows, "OUTPUT_BAND", {"cpu": 2000})
    monkeypatch.setattr(pixel_rows, "ENCODER_BAND", {"cpu": 100})
    image = picture(1, 3, 120, 33)[0]
    whole = pixels.upscale(image, scale=2, **options).class_map
    monkeypatch.setattr(pixel_rows, "BUDGET_SAMPLE", {"cpu": 4000})
    monkeypatch.setattr(pixel_rows, "ADAPTIVE_SAMPLE", 4000)
    runs = []
    monkeypatch.setattr(pixel_image, "rows_in_bands", lambda *args: runs.append(1) or rows_in_bands(*args))
    rows_in_bands = pixel_rows.rows_in_bands
    smallest = least(pixels, image, scale=2, **options)
    reader = ArrayReader(image.numpy(), True)
    for limit, encoded in ((smallest, 2), (None, 1)):
        runs.clear()
        pixels.stream(reader, Recorder(), memory_limit=limit, scale=2, **options)
        assert len(runs) == encoded
    check(pixels, image, scale=2, **options)
    sampled = pixels.upscale(image, scale=2, **options).class_map
    assert (sampled != whole).float().mean() < 0.1


@pytest.mark.slow
def test_carn_in_bands(monkeypatch):
    monkeypatch.setattr(pixel_rows, "OUTPUT_BAND", {"cpu": 2000})
    monkeypatch.setattr(pixel_rows, "ENCODER_BAND", {"cpu": 100})
    check(PixelRouter(make_model("carn")), picture(1, 3, 70, 21)[0], scale=2, penalty=0.1)


def test_encoder_that_needs_the_whole_image(monkeypatch):
    monkeypatch.setattr(pixel_rows, "OUTPUT_BAND", {"cpu": 2000})
    model = make_model()
    model.encoder.add_module("pool", nn.Identity())
    check(PixelRouter(model, optimized=False), picture(1, 3, 40, 21)[0], scale=2)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("size", [(9, 14), (70, 40)])
def test_images_on_the_host(patches, pixels, monkeypatch, batch, size):
    """Bands that go to a device and back, as for a GPU, here to the same device."""
    monkeypatch.setattr(patch_memory, "PATCHES_PER_BAND", {"cpu": 8})
    image = picture(batch, 3, *size)
    for router, module in ((patches, patch_router), (pixels, pixel_router)):
        expected = router.upscale(image)
        with monkeypatch.context() as patched:
            patched.setattr(module, "in_memory", in_bands)
            result = router.upscale(image)
        assert torch.equal(result.image, expected.image) and torch.equal(result.class_map, expected.class_map)


def test_limit_of_images_in_memory(patches, pixels):
    image = picture(1, 3, 60, 40)
    for router in (patches, pixels):
        with pytest.raises(ValueError, match="upscale: memory_limit must be at least"):
            router.upscale(image, memory_limit=10)
        result = router.upscale(image, memory_limit=1 << 28)
        assert 0 < result.stats.working_set <= 1 << 28
        assert torch.equal(result.image, router.upscale(image).image)


@pytest.mark.parametrize(
    ("limit", "error"), [(0, ValueError), (-5, ValueError), (1.5, TypeError), ("1 GB", TypeError), (True, TypeError)]
)
def test_refused_limits(patches, pixels, limit, error):
    for router in (patches, pixels):
        with pytest.raises(error, match="memory_limit must be"):
            router.upscale(picture(1, 3, 9, 9), memory_limit=limit)


@pytest.mark.parametrize("name", ["patches", "pixels"])
def test_refused_readers(request, name):
    router, writer = request.getfixturevalue(name), Recorder()
    image = picture(1, 3, 9, 9)[0].numpy()
    with pytest.raises(TypeError, match=r"stream: reader must have shape, dtype and read\(y0, y1, x0, x1\); got Tensor"):
        router.stream(torch.from_numpy(image), writer)
    with pytest.raises(ValueError, match=r"reader must give \(3, H, W\); its shape is \(2, 9, 9\)"):
        router.stream(ArrayReader(image[:2], True), writer)
    with pytest.raises(ValueError, match="at least one pixel"):
        router.stream(ArrayReader(image[:, :0], True), writer)
    with pytest.raises(TypeError, match="reader must give one of float32"):
        router.stream(ArrayReader(image.astype(np.int32), True), writer)
    reader = ArrayReader(image, True)
    reader.read = lambda y0, y1, x0, x1: torch.zeros(3, 1, 1)
    with pytest.raises(ValueError, match=r"read\(0, \d+, 0, 9\) must give a tensor"):
        router.stream(reader, writer)
    assert writer.bands == []


@pytest.mark.parametrize("name", ["patches", "pixels"])
def test_an_error_of_the_writer_is_raised(request, name, monkeypatch):
    monkeypatch.setattr(patch_memory, "PATCHES_PER_BAND", {"cpu": 8})
    monkeypatch.setattr(pixel_rows, "OUTPUT_BAND", {"cpu": 2000})

    class Full:
        def write(self, y, x, pixels):
            raise OSError("no space left")

    router = request.getfixturevalue(name)
    with pytest.raises(OSError, match="no space left"):
        router.stream(ArrayReader(picture(1, 3, 90, 40)[0].numpy(), True), Full())


@pytest.mark.parametrize("name", ["patches", "pixels"])
def test_out_of_memory_names_a_limit_that_fits(request, name, monkeypatch):
    class Hungry:
        def write(self, y, x, pixels):
            torch.empty(1 << 50, dtype=torch.uint8)

    router, image = request.getfixturevalue(name), picture(1, 3, 90, 40)[0]
    smallest = least(router, image)
    with pytest.raises(MemoryError, match=r"upscale: out of memory .* memory_limit=\d+ would fit") as caught:
        router.stream(ArrayReader(image.numpy(), True), Hungry())
    fits = int(re.search(r"memory_limit=(\d+)", str(caught.value))[1])
    assert fits >= smallest
    router.stream(ArrayReader(image.numpy(), True), Recorder(), memory_limit=fits)
    monkeypatch.setattr(memory_plan.buffers, "available", lambda device, enough: 1000)
    with pytest.raises(MemoryError, match=r"the least that a streamed run needs is .* were free"):
        router.stream(ArrayReader(image.numpy(), True), Hungry())


def test_a_result_that_does_not_fit(patches):
    image = torch.zeros(1, 1, 1).expand(3, 1 << 24, 1 << 20)
    with pytest.raises(MemoryError, match=r"the result takes .* `stream` and `upscale_file` write it in bands"):
        patches.upscale(image, class_map=None, budget=1)


def test_arrays():
    rgb, gray = np.zeros((4, 5, 3), np.uint16), np.zeros((4, 5), np.float32)
    assert ArrayReader(rgb).shape == (3, 4, 5) and ArrayReader(rgb).dtype == torch.uint16
    assert ArrayReader(gray).shape == (1, 4, 5) and ArrayReader(gray).read(1, 3, 0, 5).shape == (1, 2, 5)
    assert ArrayReader(rgb, channels_first=True).shape == (4, 5, 3)
    with pytest.raises(ValueError, match=r"array must be \(H, W, C\) or \(H, W\); got \(4,\)"):
        ArrayReader(gray[:, 0])
    pixels = torch.arange(12).view(3, 2, 2).to(torch.uint16)
    ArrayWriter(rgb).write(1, 2, pixels)
    assert np.array_equal(rgb[1:3, 2:4], pixels.permute(1, 2, 0).numpy()) and rgb.sum() == pixels.numpy().sum()
    ArrayWriter(gray).write(2, 0, torch.ones(1, 2, 5))
    assert gray.sum() == 10
