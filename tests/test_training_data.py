"""Pairs, their ranking by difficulty, and the patches drawn from them."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from networks import picture
from PIL import Image
from torch.nn import functional as F

from fastroute import io
from fastroute.degradation import downscale, make_pair, to_uint8
from fastroute.training.data import Pool, bicubic_psnr

SCALE, PATCH, STRIDE = 2, 8, 4


def as_uint8(image: torch.Tensor) -> torch.Tensor:
    return (image[0] * 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    io.write_image(folder / "large.png", as_uint8(picture(1, 3, 120, 160)))
    io.write_image(folder / "small.png", as_uint8(picture(1, 3, 40, 45, seed=1)))
    io.write_image(folder / "flat.png", torch.full((3, 30, 30), 77, dtype=torch.uint8))
    return folder


@pytest.fixture(scope="module")
def pool(folder):
    return Pool.build(folder, SCALE, PATCH, shrinks=(1.0, 2.5), stride=STRIDE)


@pytest.mark.parametrize("scale", [1, 1.6, 2, 2.5, 3, 4])
def test_downscale_is_pillows(scale):
    """Antialiased bicubic with a = -0.5, away from the borders, where conventions differ."""
    image = picture(1, 1, 96, 120, seed=3)
    size = (round(120 / scale), round(96 / scale))
    expected = Image.fromarray(image[0, 0].numpy()).resize(size, Image.Resampling.BICUBIC)
    actual = downscale(image, scale)[0, 0]
    assert actual.shape == size[::-1]
    difference = (actual - torch.from_numpy(np.array(expected)).clamp(0, 1)).abs()
    assert difference[3:-3, 3:-3].max() < 1 / 255
    # It does differ from the filter without antialiasing.
    if scale >= 2:
        plain = F.interpolate(image, size=size[::-1], mode="bicubic").clamp(0, 1)[0, 0]
        assert (actual - plain).abs().max() > 0.05


def test_downscale_keeps_at_least_one_pixel():
    assert downscale(torch.rand(1, 3, 2, 9), 5).shape == (1, 3, 1, 2)
    assert downscale(torch.rand(1, 3, 9, 9), 3).max() <= 1


def test_to_uint8():
    assert to_uint8(torch.tensor([-1.0, 0, 0.5 / 255, 1.5 / 255, 0.4, 1, 2])).tolist() == [0, 0, 0, 2, 102, 255, 255]


@pytest.mark.parametrize("size", [(16, 20), (19, 23), (17, 16)])
def test_make_pair(size):
    image = as_uint8(picture(1, 3, *size))
    lr, hr = make_pair(image, 4)
    height, width = size[0] // 4, size[1] // 4
    assert lr.shape == (3, height, width) and lr.dtype == hr.dtype == torch.uint8
    assert torch.equal(hr, image[:, : 4 * height, : 4 * width])
    expected = downscale(hr[None].float() / 255, 4)[0] * 255
    assert (lr.float() - expected).abs().max() <= 0.5 + 1e-4


def test_ranking(pool, folder):
    # 120 x 160: pairs of 60 x 80 and, at 48 x 64, of 24 x 32; 40 x 45: 20 x 22 and, at 16 x 18, 8 x 9; 30 x 30: 15 x 15;
    # the flat one is too small when it is reduced.
    sizes = [tuple(lr.shape[1:]) for lr in pool.lr]
    assert sizes == [(15, 15), (60, 80), (24, 32), (20, 22), (8, 9)]
    assert all(hr.shape[1:] == (2 * h, 2 * w) for hr, (h, w) in zip(pool.hr, sizes, strict=True))
    count = [((h - PATCH) // STRIDE + 1) * ((w - PATCH) // STRIDE + 1) for h, w in sizes]
    assert np.bincount(pool.positions[:, 0]).tolist() == count
    assert (np.diff(pool.psnr) <= 0).all() and pool.psnr[0] > pool.psnr[-1] + 3
    assert len(np.unique(pool.positions, axis=0)) == len(pool.positions) == sum(count)
    # The flat image is reproduced exactly, and nothing else is.
    assert (pool.psnr[: count[0]] == 100).all() and (pool.positions[: count[0], 0] == 0).all()
    assert pool.psnr[count[0]] < 100


def test_rank_is_the_psnr_of_the_bicubic_upscaling(pool):
    count = len(pool.positions)
    for number in (0, 5, 40, count // 2, count - 1):
        image, y, x = pool.positions[number]
        up = F.interpolate(pool.lr[image][None].float(), scale_factor=SCALE, mode="bicubic").clamp(0, 255)[0]
        place = (..., slice(SCALE * y, SCALE * (y + PATCH)), slice(SCALE * x, SCALE * (x + PATCH)))
        error = (up[place] - pool.hr[image][place].float()).double().square().mean().item()
        expected = min(100.0, 10 * math.log10(255**2 / max(error, 1e-30)))
        assert pool.psnr[number] == pytest.approx(expected, abs=1e-3)


def test_bicubic_psnr_by_hand():
    lr = torch.full((1, 4, 8), 100, dtype=torch.uint8)
    hr = torch.full((1, 8, 16), 100, dtype=torch.uint8)
    hr[:, :, 8:] = 110
    psnr = bicubic_psnr(lr, hr, 4, 4, 2)
    assert psnr.shape == (1, 2)
    assert psnr[0, 0] == 100
    assert psnr[0, 1].item() == pytest.approx(20 * math.log10(255 / 10), abs=1e-4)


def test_exclusion(folder, pool):
    fewer = Pool.build(folder, SCALE, PATCH, shrinks=(1.0,), stride=STRIDE, exclude=("la*", "flat.png"))
    assert [tuple(lr.shape[1:]) for lr in fewer.lr] == [(20, 22)]
    with pytest.raises(ValueError, match=r"every image in .* is excluded by la\*, flat\.png, small\*"):
        Pool.build(folder, SCALE, PATCH, exclude=("la*", "flat.png", "small*"))


def test_shrinks(folder, pool):
    more = Pool.build(folder, SCALE, PATCH, shrinks=(1.0, 1.5, 2.5), stride=STRIDE)
    assert len(more.lr) > len(pool.lr) and more.images == pool.images
    for shrinks in ((), (0.5,), (1.0, float("nan")), (float("inf"),)):
        with pytest.raises(ValueError, match="shrinks must be numbers of at least 1; got"):
            Pool.build(folder, SCALE, PATCH, shrinks=shrinks)
    with pytest.raises(ValueError, match="reduced by 50 and more, no image is as large as a patch of 8 x 2 pixels"):
        Pool.build(folder, SCALE, PATCH, shrinks=(90, 50))


def test_small_images_are_named(tmp_path):
    for number in range(6):
        io.write_image(tmp_path / f"{number}.png", torch.zeros(3, 15 + (number == 3), 90 + number, dtype=torch.uint8))
    message = r"at least 16 x 16 pixels, one patch; too small: .*0\.png \(90 x 15\), .*4\.png \(94 x 15\) and 1 more; move them"
    with pytest.raises(ValueError, match=message):
        Pool.build(tmp_path, SCALE, PATCH)
    assert Pool.build(tmp_path, SCALE, PATCH, (1.0, 2.0), exclude=("[!3].png",)).images == 1


@pytest.mark.parametrize("total", [1, 2, 3, 10, 100, 101])
@pytest.mark.parametrize("classes", [1, 2, 3])
def test_class_range_shares(total, classes):
    pool = Pool([], [], np.zeros((total, 3), dtype=np.int32), np.zeros(total, dtype=np.float32), PATCH, SCALE)
    ranges = [pool.class_range(k, classes) for k in range(classes)]
    assert ranges[0][0] == 0 and ranges[-1][1] == total
    assert all(before[1] == after[0] for before, after in pairwise(ranges))
    sizes = [high - low for low, high in ranges]
    assert max(sizes) - min(sizes) <= 1


def test_draw_by_the_square_root():
    """Images of 400, 100 and 25 patches, interleaved: drawn as 20 : 10 : 5."""
    sizes = (400, 100, 25)
    images = np.random.default_rng(0).permutation(np.repeat(np.arange(3), sizes))
    pool = Pool([], [], np.stack([images, images, images], 1), np.zeros(525, dtype=np.float32), PATCH, SCALE)
    count = 70_000
    drawn = pool.draw(0, 525, count, np.random.default_rng(1))
    assert drawn.min() >= 0 and drawn.max() < 525
    shares = np.bincount(images[drawn]) / count
    # Five standard deviations of a share of a half are 0.0095.
    assert np.abs(shares - np.array([20, 10, 5]) / 35).max() < 0.0095
    # Within an image all patches are alike: of 400 each, 100 draws on average.
    often = np.bincount(drawn, minlength=525)
    assert often.min() > 0
    assert np.abs(often[images == 0] - 100).max() < 55
    # The same generator draws the same; a part of the ranks draws from there alone.
    assert (pool.draw(0, 525, 50, np.random.default_rng(3)) == pool.draw(0, 525, 50, np.random.default_rng(3))).all()
    part = pool.draw(100, 110, 1000, np.random.default_rng(2))
    assert set(part) == set(range(100, 110))
    assert set(pool.draw(7, 8, 5, np.random.default_rng(2))) == {7}
    assert len(pool.draw(0, 525, 0, np.random.default_rng(2))) == 0


def test_batches_are_turned_pairs(pool):
    """LR and HR are turned alike: each LR patch is still the reduction of its HR patch."""
    indices = np.arange(len(pool.positions))[-120:]
    lr, hr = pool.batch(indices, np.random.default_rng(4))
    assert lr.shape == (120, 3, PATCH, PATCH) and hr.shape == (120, 3, SCALE * PATCH, SCALE * PATCH)
    assert lr.dtype == hr.dtype == torch.float32 and lr.min() >= 0 and hr.max() <= 1
    reduced = downscale(hr, SCALE)
    # The kernel reaches two LR pixels beyond a patch's border, where the patch alone knows less.
    inside = (..., slice(2, -2), slice(2, -2))
    assert (lr[inside] - reduced[inside]).abs().max() <= 0.5 / 255 + 1e-5
    # Had they been turned differently, they would not match.
    assert (lr[inside] - reduced.flip(3)[inside]).abs().amax(dim=(1, 2, 3)).min() > 0.02


def test_all_eight_turns_occur(pool):
    index = len(pool.positions) - 1
    image, y, x = pool.positions[index]
    patch = pool.lr[image][:, y : y + PATCH, x : x + PATCH].float() / 255
    lr, _ = pool.batch(np.full(200, index), np.random.default_rng(0))
    turned = [torch.rot90(patch, k, (1, 2)) for k in range(4)]
    turned += [t.flip(2) for t in turned]
    counts = [sum(torch.equal(one, t) for one in lr) for t in turned]
    assert sum(counts) == 200 and min(counts) > 8
