"""The routed result is that of a plain PyTorch loop over patches."""

from __future__ import annotations

import pytest
import torch
from networks import as_float, as_image, patches_of, picture, random_classsr, randomise, routed_plainly
from support import bits, in_layout
from torch import nn

from fastroute import PatchRouter, TileGrid, buffers
from fastroute.models.classsr import ClassSR
from fastroute.models.fsrcnn import FSRCNN
from fastroute.patch import patch_memory
from fastroute.patch.bands import plan_bands

pytestmark = pytest.mark.usefixtures("quick_tuning")
PATCH, STRIDE, SCALE = 16, 12, 4
# Sums of at most a few thousand float32 products of about 1, in another order.
TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def system() -> ClassSR:
    return random_classsr((3, 5, 8), SCALE, PATCH)


@pytest.fixture(scope="module")
def router(system) -> PatchRouter:
    return PatchRouter(system.branches, system.classifier, patch=PATCH, stride=STRIDE, scale=SCALE, merge=1)


def plainly(system: ClassSR, image: torch.Tensor, grid: TileGrid, window: object = "uniform") -> tuple:
    """Class map and float64 image of the loop."""
    with torch.no_grad():
        patches = patches_of(as_float(image), grid)
        ids = system.classifier(patches).argmax(dim=1) if len(patches) else torch.zeros(0, dtype=torch.int64)
    return ids.view(image.shape[0], grid.rows, grid.cols), routed_plainly(image, grid, system.branches, ids, window)


def check(router: PatchRouter, system: ClassSR, image: torch.Tensor, window: object = "uniform") -> None:
    grid = TileGrid(*image.shape[2:], router.patch, router.stride, router.scale)
    ids, expected = plainly(system, image, grid, window)
    result = router.upscale(image)
    assert torch.equal(result.class_map, ids)
    assert result.image.dtype == image.dtype and result.image.shape == expected.shape
    torch.testing.assert_close(result.image.double(), expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 40), (7, 5), (16, 16), (17, 16), (28, 40), (45, 61), (64, 33), (15, 53), (101, 19)]
)
def test_sizes(router, system, height, width):
    check(router, system, picture(1, 3, height, width, seed=height * width))


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("size", [(45, 61), (9, 30)])
def test_batches(router, system, batch, size):
    check(router, system, picture(batch, 3, *size, seed=4))


def test_the_picture_uses_all_classes(router):
    """Else the comparisons above would prove little."""
    assert min(router.upscale(picture(1, 3, 101, 101)).stats.counts_per_class) > 3


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed", "expanded"])
def test_memory_layouts_of_the_image(router, system, layout):
    check(router, system, in_layout(picture(2, 3, 41, 38), layout))


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_ranks(router, system, dtype, rank):
    image = as_image(picture(1, 3, 45, 30, seed=2), dtype)
    grid = TileGrid(45, 30, PATCH, STRIDE, SCALE)
    ids, expected = plainly(system, image, grid)
    result = router.upscale(image if rank == 4 else image[0])
    assert result.image.dtype == dtype
    assert result.image.shape == (1, 3, 180, 120)[4 - rank :]
    assert result.class_map.dtype == torch.uint8
    assert torch.equal(result.class_map, ids if rank == 4 else ids[0])
    actual = result.image.view(1, 3, 180, 120)
    if not dtype.is_floating_point:
        levels = (expected.clamp(0, 1) * (255 if dtype == torch.uint8 else 65535)).round()
        assert levels.min() == 0 and levels.max() > 250, "nothing is clamped"
        # 1e-5 is less than a level of uint16, so rounding may differ by one.
        difference = (actual.int() - levels.int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < (1e-3 if dtype == torch.uint8 else 0.2)
        return
    assert actual.max() > 1, "a floating image is not clamped"
    # Rounding to the image's type, once.
    step = {torch.float16: 2**-11, torch.bfloat16: 2**-8}.get(dtype, 0)
    torch.testing.assert_close(actual.double(), expected, rtol=1.01 * step, atol=1e-5)


@pytest.mark.parametrize("per_band", [1, 5, 6, 13, 40])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 90, 70), (3, 45, 30), (2, 200, 16), (1, 10, 90)])
def test_bands_change_nothing(router, monkeypatch, per_band, batch, height, width):
    image = picture(batch, 3, height, width, seed=per_band)
    whole = router.upscale(image)
    monkeypatch.setattr(patch_memory, "PATCHES_PER_BAND", {"cpu": per_band})
    grid = TileGrid(height, width, PATCH, STRIDE, SCALE)
    bands = plan_bands(batch, grid, per_band)
    assert sum((b.images[1] - b.images[0]) * (b.rows[1] - b.rows[0]) for b in bands) == batch * grid.rows
    banded = router.upscale(image)
    assert torch.equal(banded.class_map, whole.class_map)
    assert banded.stats.counts_per_class == whole.stats.counts_per_class
    # The same patches in batches of other sizes.
    torch.testing.assert_close(banded.image, whole.image, **TOLERANCE)


@pytest.mark.parametrize("stride", [4, 5, 8, 16, 28, 31, 32])
@pytest.mark.parametrize("per_band", [256, 3])
def test_strides(system, monkeypatch, stride, per_band):
    monkeypatch.setattr(patch_memory, "PATCHES_PER_BAND", {"cpu": per_band})
    small = ClassSR.fsrcnn((3, 4), 2)
    randomise(small, 3).eval()
    router = PatchRouter(small.branches, system.classifier, patch=32, stride=stride, scale=2, merge=1)
    image = picture(1, 3, 50 if stride < 16 else 75, 41, seed=stride)
    grid = TileGrid(*image.shape[2:], 32, stride, 2)
    ids = torch.randint(0, 2, (grid.rows, grid.cols), generator=torch.Generator().manual_seed(stride))
    expected = routed_plainly(image, grid, small.branches, ids.flatten())
    torch.testing.assert_close(router.upscale(image, class_map=ids).image.double(), expected, **TOLERANCE)


@pytest.mark.parametrize("window", ["uniform", "linear", "hann", "gaussian", torch.linspace(0.1, 2, PATCH * SCALE)])
def test_windows(system, window):
    router = PatchRouter(system.branches, system.classifier, patch=PATCH, stride=7, scale=SCALE, window=window, merge=1)
    check(router, system, picture(1, 3, 35, 41), window)


def test_as_written_and_optimized(system):
    router = PatchRouter(system.branches, system.classifier, patch=PATCH, stride=STRIDE, scale=SCALE, optimized=False, merge=1)
    check(router, system, picture(1, 3, 45, 61))


def test_single_branch_needs_no_classifier(system):
    router = PatchRouter([system.net3], None, patch=PATCH, stride=STRIDE, scale=SCALE, merge=1)
    image = picture(2, 3, 45, 30)
    grid = TileGrid(45, 30, PATCH, STRIDE, SCALE)
    result = router.upscale(image)
    expected = routed_plainly(image, grid, [system.net3], torch.zeros(2 * grid.num_patches, dtype=torch.int64))
    torch.testing.assert_close(result.image.double(), expected, **TOLERANCE)
    assert result.stats.counts_per_class == [2 * grid.num_patches]
    assert result.stats.flops.fraction == result.stats.paper_flops.fraction == 1


def test_gray_and_five_channels():
    for channels in (1, 5):
        branches = [randomise(FSRCNN(w, 2, channels=channels), w).eval() for w in (5, 6)]
        router = PatchRouter(branches, None, patch=8, stride=8, scale=2, merge=1)
        image = picture(1, channels, 19, 21)
        grid = TileGrid(19, 21, 8, 8, 2)
        ids = torch.arange(grid.num_patches).view(grid.rows, grid.cols) % 2
        expected = routed_plainly(image, grid, branches, ids.flatten())
        torch.testing.assert_close(router.upscale(image, class_map=ids).image.double(), expected, **TOLERANCE)


def test_bicubic_as_free_class(system):
    branches = [nn.Upsample(scale_factor=SCALE, mode="bicubic"), system.net2]
    router = PatchRouter(branches, Brightness(), patch=PATCH, stride=STRIDE, scale=SCALE, merge=1)
    image = picture(1, 3, 45, 61)
    grid = TileGrid(45, 61, PATCH, STRIDE, SCALE)
    ids = Brightness()(patches_of(image, grid)).argmax(dim=1)
    expected = routed_plainly(image, grid, branches, ids)
    # Given classes first: what follows also needs the classes' costs.
    given = router.upscale(image, class_map=ids.view(grid.rows, grid.cols))
    torch.testing.assert_close(given.image.double(), expected, **TOLERANCE)
    result = router.upscale(image)
    assert torch.equal(result.class_map.flatten(), ids) and 0 < ids.sum() < len(ids)
    torch.testing.assert_close(result.image.double(), expected, **TOLERANCE)


@pytest.mark.parametrize("factors", [(4, 2), (4, 4), (2, 2), (4, 1)])
def test_branches_with_final_shuffles(factors):
    """Equal final shuffles are undone by the stitching, different ones by themselves."""
    branches = []
    for number, factor in enumerate(factors):
        layers = [nn.Conv2d(3, 3 * factor**2, 3, padding=1), nn.PixelShuffle(factor)]
        branch = nn.Sequential(nn.Upsample(scale_factor=4 // factor), *layers[: 2 if factor > 1 else 1])
        branches.append(randomise(branch, number).eval())
    router = PatchRouter(branches, Brightness(), patch=16, stride=12, scale=4, merge=1)
    assert router.shuffle == (factors[0] if factors[0] == factors[1] else 1)
    image = picture(1, 3, 45, 61)
    grid = TileGrid(45, 61, 16, 12, 4)
    ids = Brightness()(patches_of(image, grid)).argmax(dim=1)
    result = router.upscale(image)
    assert torch.equal(result.class_map.flatten(), ids) and 0 < ids.sum() < len(ids)
    torch.testing.assert_close(result.image.double(), routed_plainly(image, grid, branches, ids), **TOLERANCE)


class Brightness(nn.Module):
    """A classifier without parameters: dark patches are class 0, bright ones class 1."""

    def forward(self, patches):
        bright = patches.mean(dim=(1, 2, 3))
        return torch.stack([1.02 - bright, bright], dim=1)


def test_half_precision_networks():
    system = random_classsr((3, 4), 2, 8).to(torch.bfloat16)
    router = PatchRouter(system.branches, system.classifier, patch=8, stride=8, scale=2, merge=1)
    image = picture(1, 3, 24, 40).to(torch.bfloat16)
    result = router.upscale(image)
    assert result.image.dtype == torch.bfloat16
    grid = TileGrid(24, 40, 8, 8, 2)
    full = [branch.float() for branch in system.branches]
    expected = routed_plainly(image, grid, full, result.class_map.flatten())
    # A dozen layers, each rounding to 8 bits.
    assert (result.image.double() - expected).abs().mean() < 0.02 * expected.abs().mean() + 0.01


def test_every_output_pixel_is_written(router, poisoned, monkeypatch):
    for size, per_band in (((45, 61), 256), ((45, 61), 4), ((3, 30), 1)):
        monkeypatch.setattr(patch_memory, "PATCHES_PER_BAND", {"cpu": per_band})
        assert router.upscale(picture(2, 3, *size)).image.isfinite().all()


def test_repeats_bit_for_bit(router):
    image = picture(1, 3, 45, 61)
    first = router.upscale(image).image
    assert torch.equal(bits(router.upscale(image).image), bits(first))


def test_router_and_result_say_what_they_are(router):
    assert repr(router) == "PatchRouter(3 branches, patch=16, stride=12, scale=4, float32 on cpu)"
    told = repr(router.upscale(picture(1, 3, 20, 30)[0]))
    assert told.startswith("Upscaled(image: (3, 80, 120) float32 on cpu, class_map: (2, 3) uint8 on cpu; 6 patches, ")


def test_huge_pages_change_nothing(router, monkeypatch):
    image = picture(1, 3, 45, 61)
    expected = router.upscale(image).image
    monkeypatch.setattr(buffers, "BUFFER_FROM", 1)
    assert torch.equal(router.upscale(image).image, expected)
    empty = buffers.empty((3, 5), torch.float16, torch.device("cpu"))
    assert (empty.shape, empty.dtype, empty.is_contiguous()) == ((3, 5), torch.float16, True)
    empty.fill_(2)
    assert empty.sum() == 30


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_patches_of_many_earlier_bands(monkeypatch, stride):
    system = random_classsr((3, 5, 8), 2, 8)
    router = PatchRouter(system.branches, patch=8, stride=stride, scale=2, merge=1)
    image = picture(1, 3, 21, 19)
    grid = TileGrid(21, 19, patch=8, stride=stride, scale=2)
    ids = torch.randint(0, 3, (grid.rows, grid.cols), generator=torch.Generator().manual_seed(0))
    expected = router.upscale(image, class_map=ids).image
    for per_band in (1, 2 * grid.cols, 5 * grid.cols):
        monkeypatch.setattr(patch_memory, "PATCHES_PER_BAND", {"cpu": per_band})
        torch.testing.assert_close(router.upscale(image, class_map=ids).image, expected, rtol=0, atol=1e-6)


def test_results_are_ordinary_tensors(router):
    result = router.upscale(picture(1, 3, 20, 20))
    result.image.clamp_(0, 1)
    assert (result.image * torch.ones(1, requires_grad=True)).requires_grad
    result.class_map.add_(1)


def test_progress_bar(router, capsys):
    router.upscale(picture(1, 3, 20, 20))
    assert capsys.readouterr().err == ""
    router.upscale(picture(1, 3, 20, 20), progress=True)
    assert "4/4" in capsys.readouterr().err
