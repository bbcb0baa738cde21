"""Scores of all patches: with and without extracting them."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import as_float, as_image, calibrate, patches_of, picture, random_classsr
from torch import nn

from fastroute import TileGrid
from fastroute.models.classsr import PatchClassifier
from fastroute.patch import classify
from fastroute.patch.classify import classify_patches
from fastroute.profiling import count_flops


@pytest.fixture(scope="module")
def classifier() -> PatchClassifier:
    return random_classsr((3, 3, 3), 2, 16, seed=5).classifier


@torch.no_grad()
def check(classifier: nn.Module, image: torch.Tensor, grid: TileGrid) -> int:
    expected = classifier(patches_of(as_float(image), grid))
    result = classify_patches(classifier, image, grid)
    assert result.score.std(dim=0).min() > 0.01, "scores that do not differ prove little"
    torch.testing.assert_close(result.score, expected, rtol=0, atol=1e-5)
    return result.flops


# Exact multiples of the cell, one and both axes off it, images of one patch row, a remainder of 1 to 3 pixels.
@pytest.mark.parametrize("size", [(64, 48), (65, 48), (64, 51), (63, 50), (16, 40), (17, 40), (16, 37), (99, 101)])
@pytest.mark.parametrize(("patch", "stride"), [(16, 12), (16, 4), (16, 16), (12, 8)])
def test_by_cell(classifier, monkeypatch, size, patch, stride):
    grid = TileGrid(*size, patch, stride)
    originals = []
    monkeypatch.setattr(classify, "extract_patches", lambda *args, **kw: originals.append(kw["order"]) or extract(*args, **kw))
    check(classifier, picture(2, 3, *size, seed=size[0]), grid)
    off_rows = (size[0] - patch) % 4 != 0
    off_cols = (size[1] - patch) % 4 != 0
    on_grid = (grid.rows - off_rows) * (grid.cols - off_cols)
    # Only the patches off the cells are extracted.
    assert sum(len(order) for order in originals) == 2 * (grid.num_patches - on_grid)


extract = classify.extract_patches


@pytest.mark.parametrize(
    ("size", "patch", "stride"),
    [((50, 41), 16, 10), ((40, 30), 18, 12), ((9, 40), 16, 12), ((40, 3), 16, 12), ((1, 60), 16, 8)],
)
def test_by_patch_where_cells_do_not_fit(classifier, size, patch, stride):
    check(classifier, picture(2, 3, *size, seed=3), TileGrid(*size, patch, stride))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float64])
@pytest.mark.parametrize("size", [(40, 52), (41, 50)])
def test_dtypes(classifier, dtype, size):
    check(classifier, as_image(picture(1, 3, *size), dtype), TileGrid(*size, 16, 12))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_images(classifier, dtype):
    image = picture(1, 3, 40, 52).to(dtype)
    check(classifier, image, TileGrid(40, 52, 16, 12))


def test_chunks_change_nothing(classifier, monkeypatch):
    image, grid = picture(2, 3, 65, 83), TileGrid(65, 83, 16, 12)
    with torch.no_grad():
        expected = classify_patches(classifier, image, grid).score
        monkeypatch.setattr(classify, "CELLS_PER_BAND", {"cpu": 30})
        monkeypatch.setattr(classify, "BATCH_BYTES", {"cpu": 1 << 17})
        torch.testing.assert_close(classify_patches(classifier, image, grid).score, expected, rtol=0, atol=1e-5)


def test_layers_without_bias(classifier):
    bare = copy.deepcopy(classifier)
    for number in (0, 4, 8):
        bare.CondNet[number].bias = None
    calibrate(bare, 16)
    check(bare.eval(), picture(1, 3, 40, 52), TileGrid(40, 52, 16, 12))


def test_another_classifier_gets_the_patches(classifier):
    class Contrast(nn.Module):
        def forward(self, patches):
            return torch.stack([patches.std(dim=(1, 2, 3)), patches.mean(dim=(1, 2, 3))], dim=1)

    class Sharpened(PatchClassifier):
        """A subclass with a forward of its own."""

        def forward(self, patches):
            return torch.softmax(3 * self.logits(patches), dim=1)

    image, grid = picture(2, 3, 40, 52), TileGrid(40, 52, 16, 12)
    check(Contrast(), image, grid)
    sharpened = Sharpened()
    sharpened.load_state_dict(classifier.state_dict())
    check(sharpened, image, grid)


def test_no_patches(classifier):
    for grid in (TileGrid(40, 52, 16, 12), TileGrid(41, 52, 16, 12), TileGrid(9, 9, 16, 12)):
        result = classify_patches(classifier, torch.zeros(0, 3, grid.height, grid.width), grid)
        assert result.score.shape == (0, 3) and result.flops == 0


def test_flops(classifier):
    per_cell = 128 * 3 * 16 + 3 * 128 * 128
    # Stride 12: 52 x 40 pixels are 13 x 10 cells, each computed once, and 4 x 3 patches with one product of 3 x 128.
    flops = check(classifier, picture(1, 3, 40, 52), TileGrid(40, 52, 16, 12))
    assert flops == 2 * (13 * 10 * per_cell + 4 * 3 * 3 * 128)
    # One more row of pixels: 4 patches on their own, of 16 cells each.
    per_patch = 2 * (16 * per_cell + 3 * 128)
    beyond = check(classifier, picture(1, 3, 41, 52), TileGrid(41, 52, 16, 12))
    assert beyond == flops + 4 * per_patch
    by_patch = check(classifier, picture(2, 3, 40, 52), TileGrid(40, 52, 16, 10))
    assert by_patch == 2 * 4 * 5 * per_patch
    # As the network itself is counted, but for the last convolution, which follows the average here.
    assert count_flops(classifier, (1, 3, 16, 16)) == per_patch + 2 * (16 * 32 * 128 + 3 * 32 - 3 * 128)
    # Patches that are no multiple of a cell go through the network.
    odd = check(classifier, picture(1, 3, 40, 36), TileGrid(40, 36, 18, 11))
    assert odd == 3 * 3 * count_flops(classifier, (1, 3, 18, 18))


@pytest.mark.parametrize("shape", [(4,), (4, 2, 1), (3, 2)])
def test_classifier_of_another_shape(shape):
    class Wrong(nn.Module):
        def forward(self, patches):
            return torch.zeros(shape)

    with pytest.raises(ValueError, match=r"classifier: must map \(4, C, p, p\) to \(4, K\); got"):
        classify_patches(Wrong(), torch.rand(1, 3, 16, 16), TileGrid(16, 16, 8, 8))
