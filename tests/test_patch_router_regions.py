"""Regions in `PatchRouter`: what merges is computed once, and the image stays the mean over its patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from networks import as_image, picture, random_classsr
from torch import Tensor, nn
from torch.nn import functional as F

import fastroute
from fastroute import Bicubic, PatchRouter, TileGrid, io, merge_regions, stitch_patches
from fastroute.cli import main
from fastroute.patch import patch_memory
from fastroute.patch.regions import Merging
from fastroute.reference.stitch_patches import patches_of_regions
from fastroute.runtime.protocols import ArrayReader, ArrayWriter

pytestmark = pytest.mark.usefixtures("quick_tuning", "one_thread")
PATCH, STRIDE, SCALE = 16, 12, 4
IMAGE = picture(2, 3, 133, 101, seed=3)


@pytest.fixture(scope="module")
def router() -> PatchRouter:
    system = random_classsr((3, 12, 40), SCALE, PATCH)
    return PatchRouter(system.branches, system.classifier, patch=PATCH, stride=STRIDE, scale=SCALE)


def clustered(grid: TileGrid, images: int, classes: int, seed: int) -> Tensor:  # [B, rows, cols]
    make = torch.Generator().manual_seed(seed)
    coarse = torch.rand((images, 1, -(-grid.rows // 3), -(-grid.cols // 3)), generator=make)
    return (F.interpolate(coarse, (grid.rows, grid.cols))[:, 0] * classes).long()


def by_region(router: PatchRouter, branches: list[nn.Module], image: Tensor, class_map: Tensor, promote: bool) -> Tensor:
    """Region by region: cut out, through the branch as it was given, and the patches of each region stitched."""
    grid = router.grid(*image.shape[-2:])
    merged = merge_regions(class_map.flatten(), grid, router.costs, router.merge, promote)
    shapes, tiles = grid.region_shapes(router.merge), grid.num_patches
    rows, cols = grid.row_origins, grid.col_origins
    outputs, places = [], {}
    for n in (merged.region == torch.arange(merged.region.numel())).nonzero().flatten().tolist():
        height, width = shapes[int(merged.group[n]) % len(shapes)]
        y, x = rows[n % tiles // grid.cols], cols[n % grid.cols]
        padded = F.pad(
            image[n // tiles][None], (0, max(x + width - grid.width, 0), 0, max(y + height - grid.height, 0)), "replicate"
        )
        with torch.no_grad():
            outputs.append(branches[int(merged.class_ids[n])](padded[:, :, y : y + height, x : x + width]))
        places[n] = len(outputs) - 1
    inverse = torch.tensor([places[int(n)] for n in merged.region])
    geometry = (grid.height, grid.width, grid.patch, grid.stride, grid.scale, grid.crop, 1)
    return stitch_patches(patches_of_regions(outputs, inverse, merged.region, *geometry), grid, router.window)


@pytest.mark.slow
@pytest.mark.parametrize("merge", [2, 4, 8])
@pytest.mark.parametrize("size", [(133, 101), (16, 90), (5, 7)], ids=str)
def test_equals_region_by_region(merge, size):
    system = random_classsr((3, 8, 16), SCALE, PATCH)
    router = PatchRouter(system.branches, None, patch=PATCH, stride=STRIDE, scale=SCALE, merge=merge)
    image = IMAGE[:, :, : size[0], : size[1]]
    grid = router.grid(*image.shape[-2:])
    for promote in (False, True):
        class_map = clustered(grid, 2, 3, seed=merge)
        result = router.upscale(image, class_map=class_map, promote=promote)
        expected = by_region(router, list(system.branches), image, class_map, promote)
        torch.testing.assert_close(result.image, expected, rtol=0, atol=1e-5)
        assert (result.class_map >= class_map).all() and (promote or torch.equal(result.class_map, class_map))


@pytest.mark.slow
def test_a_free_class_and_other_last_layers():
    system = random_classsr((5, 8), SCALE, PATCH)
    plain = nn.Sequential(nn.Conv2d(3, 48, 3, padding=1), nn.PixelShuffle(4), nn.Tanh()).eval()
    branches = [Bicubic(SCALE), *system.branches, plain]
    router = PatchRouter(branches, None, patch=PATCH, stride=STRIDE, scale=SCALE, costs=[1, 2, 3, 4])
    class_map = clustered(router.grid(*IMAGE.shape[-2:]), 2, 4, seed=1)
    result = router.upscale(IMAGE, class_map=class_map)
    torch.testing.assert_close(result.image, by_region(router, branches, IMAGE, class_map, False), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("per_band", [1, 30, 60])
def test_bands_and_streams_change_nothing(router, monkeypatch, per_band):
    whole = router.upscale(IMAGE)
    monkeypatch.setattr(patch_memory, "PATCHES_PER_BAND", {"cpu": per_band})
    banded = router.upscale(IMAGE)
    assert torch.equal(banded.class_map, whole.class_map)
    torch.testing.assert_close(banded.image, whole.image, rtol=0, atol=1e-6)
    output = np.empty((3, 133 * SCALE, 101 * SCALE), np.float32)
    reader, writer = ArrayReader(IMAGE[0].numpy(), channels_first=True), ArrayWriter(output, channels_first=True)
    streamed = router.stream(reader, writer, memory_limit=64 << 20)
    assert torch.equal(streamed.class_map, router.upscale(IMAGE[0]).class_map)
    assert np.array_equal(output, router.upscale(IMAGE[0]).image.numpy())


def test_statistics_count_what_ran(router):
    result = router.upscale(IMAGE)
    stats, grid = result.stats, router.grid(*IMAGE.shape[-2:])
    merged = merge_regions(result.class_map.flatten(), grid, router.costs, 4, False)
    shapes = grid.region_shapes(4)
    work = [0.0] * 3
    for group in merged.group.tolist():
        if group < 3 * len(shapes):
            height, width = shapes[group % len(shapes)]
            work[group // len(shapes)] += height * width / PATCH**2
    # Merged again, the classes as they ran need no other regions.
    assert stats.work_per_class == pytest.approx(work)
    assert sum(work) < sum(stats.counts_per_class) == result.class_map.numel()
    one_pass = max(router.branch_flops) * 2 * 133 * 101 / PATCH**2
    assert stats.flops.one_pass == pytest.approx(one_pass)
    assert stats.flops.of_one_pass == pytest.approx(stats.flops.routed / one_pass)
    assert "of those of one pass" in str(stats)
    dense = router.upscale(IMAGE, budget=1).stats
    assert dense.flops.fraction == 1 and 1 < dense.flops.of_one_pass < 1.3


@pytest.mark.parametrize("budget", [0.6, 0.8, 0.95])
def test_budgets_count_regions(router, budget):
    merged = router.upscale(IMAGE, budget=budget)
    branches = sum(f * w for f, w in zip(router.branch_flops, merged.stats.work_per_class, strict=True))
    allowed = budget * merged.stats.flops.dense
    assert 0.9 * allowed < branches <= allowed * (1 + 1e-6)
    # What merging saves is spent: more patches are in the most expensive class than the same FLOPs buy without.
    flops = merged.stats.flops.routed
    router.merge = 1
    try:
        alone = router.upscale(IMAGE, budget_flops=flops)
    finally:
        router.merge = 4
    assert merged.stats.counts_per_class[2] > alone.stats.counts_per_class[2]


def test_budgets_of_flops_and_many_images(router):
    images = [IMAGE[0], IMAGE[1, :, :70], IMAGE[0, :, :16, :16]]
    flops = sum(router.upscale(image).stats.flops.routed for image in images)
    results = list(fastroute.upscale_many(router, images, budget_flops=0.9 * flops))
    assert 0.8 * flops < sum(result.stats.flops.routed for result in results) <= 0.9 * flops * (1 + 1e-6)
    fraction = list(fastroute.upscale_many(router, images, budget=0.6))
    dense = sum(result.stats.flops.dense for result in fraction)
    used = sum(f * w for r in fraction for f, w in zip(router.branch_flops, r.stats.work_per_class, strict=True))
    assert 0.5 * dense < used <= 0.6 * dense * (1 + 1e-6)


def test_one_class_is_merged_as_far_as_it_goes():
    grid = TileGrid(540, 960, 32, 28)
    areas = [Merging(grid, merge).patches() * 32**2 / (540 * 960) for merge in (1, 2, 4, 8)]
    assert areas == sorted(areas, reverse=True) and areas[0] > 1.37 and areas[2] < 1.07


class OnlyPatches(nn.Module):
    """As a transformer whose windows are as large as its patches."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (PATCH, PATCH):
            raise ValueError("only patches")
        return x


def test_branches_that_take_nothing_but_patches():
    router = PatchRouter([OnlyPatches(), nn.Identity()], None, patch=PATCH, stride=STRIDE, scale=1)
    assert router.merge == 1
    class_map = clustered(router.grid(*IMAGE.shape[-2:]), 2, 2, seed=5)
    torch.testing.assert_close(router.upscale(IMAGE, class_map=class_map).image, IMAGE, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="merge must be 1 for branches that take no other size than a patch; got 4"):
        PatchRouter([OnlyPatches()], None, patch=PATCH, stride=STRIDE, scale=1, merge=4)
    for wrong in (0, 3, 16, -1, True, 2.5):
        with pytest.raises(ValueError, match=r"merge must be one of \(1, 2, 4, 8\), or None; got"):
            PatchRouter([nn.Identity()], None, patch=PATCH, stride=STRIDE, scale=1, merge=wrong)


def test_identity_of_every_merge_is_the_image():
    for merge in (1, 2, 4, 8):
        router = PatchRouter([nn.Identity()] * 3, None, patch=PATCH, stride=STRIDE, scale=1, merge=merge, window="hann")
        for size in [(133, 101), (90, 20), (3, 50)]:
            image = IMAGE[:, :, : size[0], : size[1]]
            class_map = clustered(router.grid(*image.shape[-2:]), 2, 3, seed=merge)
            assert (router.upscale(image, class_map=class_map).image - image).abs().max() < 1e-6


@pytest.mark.slow
def test_load_and_command_line_merge(tmp_path):
    assert fastroute.load().merge == 4 and fastroute.load(merge=1).merge == 1
    with pytest.raises(ValueError, match="PCSR routes pixels and has no merge"):
        fastroute.load("pcsr-fsrcnn-x4", merge=2)
    image, source, target = as_image(IMAGE[0], torch.uint8), tmp_path / "in.png", tmp_path / "out.png"
    io.write_image(source, image)
    result = CliRunner().invoke(main, ["upscale", str(source), str(target), "--merge", "1", "--quiet"])
    assert result.exit_code == 0, result.output
    assert torch.equal(io.read_image(target), fastroute.load(merge=1).upscale(image).image)
