"""`published=True`: the published whole-image result, in 8 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from networks import picture, random_classsr
from torch import Tensor

import fastroute
from fastroute import FixedPatchRouter, PatchRouter, io
from fastroute.cli import main
from fastroute.models.checkpoints import save_checkpoint
from fastroute.models.classsr import ClassSR

pytestmark = pytest.mark.usefixtures("quick_tuning", "one_thread")
SCALE, PATCH, STRIDE = 2, 16, 12


@torch.no_grad()
def published(system: ClassSR, image: Tensor) -> np.ndarray:  # [3, H, W] uint8 -> [H', W', 3] uint8
    """Patch after patch through its most probable branch, as 8-bit pictures; overlaps are halved along either axis."""
    total, count = None, None
    tops, lefts = (range(0, side - PATCH + 1, STRIDE) for side in image.shape[1:])
    height, width = ((r[-1] + PATCH) * SCALE for r in (tops, lefts))
    total, count = np.zeros((height, width, 3), np.float32), np.zeros((height, width, 1), np.float32)
    for top in tops:
        for left in lefts:
            patch = image[None, :, top : top + PATCH, left : left + PATCH].float() / 255
            branch = system.branches[int(system.classifier(patch).argmax())]
            result = (branch(patch)[0].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
            rows, columns = (slice(at * SCALE, (at + PATCH) * SCALE) for at in (top, left))
            total[rows, columns] += result
            count[rows, columns] += 1
    return np.rint(total / count).astype(np.uint8)


@pytest.fixture
def system() -> ClassSR:
    return random_classsr((4, 6, 8), SCALE, PATCH)


@pytest.fixture
def checkpoint(system, tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, system, {"scale": SCALE, "patch": PATCH, "stride": STRIDE})
    return path


@pytest.mark.slow
@pytest.mark.parametrize("size", [(16, 16), (40, 52), (45, 61)])
def test_equals_the_published_result(system, checkpoint, size):
    image = (picture(1, 3, *size, seed=3)[0].clamp(0, 1) * 255).to(torch.uint8)
    router = fastroute.load(checkpoint, published=True)
    result = router.upscale(image).image
    expected = published(system, image)
    assert result.shape[1:] == expected.shape[:2] == router.output_size(*size)
    different = np.abs(result.permute(1, 2, 0).numpy().astype(int) - expected)
    # Levels may differ by one where a branch's number lies within float32's last bits of a half.
    assert different.max() <= 1 and (different > 0).mean() < 1e-3
    # Floating images hold the same levels, in their own unit, and a stream writes the same.
    exact = router.upscale(image.float() / 255).image * 255
    assert (exact - result).abs().max() <= 0.5 + 1e-4
    array = np.empty((*expected.shape[:2], 3), np.uint8)
    router.stream(fastroute.ArrayReader(image.permute(1, 2, 0).numpy()), fastroute.ArrayWriter(array))
    assert np.array_equal(array, result.permute(1, 2, 0).numpy())


@pytest.mark.slow
def test_what_it_decides(system, checkpoint):
    with pytest.raises(ValueError, match="published=True decides window"):
        fastroute.load(checkpoint, published=True, window="hann")
    router = fastroute.load(checkpoint, published=True)
    with pytest.raises(ValueError, match="no fixed form"):
        FixedPatchRouter(router, (3, 40, 40), capacities=[1.0] * 3)
    with pytest.raises(ValueError, match="coverage must be one of"):
        PatchRouter(system.branches, system.classifier, patch=PATCH, stride=STRIDE, scale=SCALE, coverage="most")
    # PCSR is routed as published in any case.
    image = torch.rand(3, 10, 12)
    pixels = fastroute.load("pcsr-fsrcnn-x4", published=True)
    assert torch.equal(pixels.upscale(image).image, fastroute.load("pcsr-fsrcnn-x4").upscale(image).image)


@pytest.mark.slow
def test_on_the_command_line(system, checkpoint, tmp_path):
    image = (picture(1, 3, 45, 61, seed=3)[0].clamp(0, 1) * 255).to(torch.uint8)
    io.write_image(tmp_path / "in.png", image)
    arguments = ["upscale", str(tmp_path / "in.png"), str(tmp_path / "out.png"), "--model", str(checkpoint), "--quiet"]
    result = CliRunner().invoke(main, [*arguments, "--as-published", "--class-map", str(tmp_path / "classes.png")])
    assert result.exit_code == 0, result.output
    written = io.read_image(tmp_path / "out.png")
    assert torch.equal(written, fastroute.load(checkpoint, published=True).upscale(image).image)
    assert io.read_image(tmp_path / "classes.png").shape == written.shape
    result = CliRunner().invoke(
        main, ["evaluate", str(checkpoint), "--images", str(tmp_path / "out.png"), "--as-published", "--quiet"]
    )
    assert result.exit_code == 0 and "out.png" in result.output, result.output
