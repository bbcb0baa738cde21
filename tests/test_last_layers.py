"""Which last layers of the branches a patch router leaves to the stitching, and that nothing else changes by it."""

from __future__ import annotations

import pytest
import torch
from networks import randomise
from torch import nn

import fastroute
from fastroute import FixedPatchRouter, PatchRouter
from fastroute.backends import unsupported_reasons
from fastroute.models.arm import Bicubic
from fastroute.models.carn import CARN
from fastroute.models.fsrcnn import FSRCNN

MISSING = "; ".join(unsupported_reasons("stitch_patches", "cpu", torch.device("cpu")))
pytestmark = [pytest.mark.usefixtures("quick_tuning"), pytest.mark.skipif(bool(MISSING), reason=MISSING)]
CPU = torch.device("cpu")
PATCH, STRIDE, SCALE = 16, 12, 4


def networks(*widths: int) -> list[nn.Module]:
    return [randomise(FSRCNN(width, SCALE), seed=width).eval() for width in widths]


def make(branches: list[nn.Module], scale: int = SCALE, **options: object) -> PatchRouter:
    return PatchRouter(branches, None, patch=PATCH, stride=STRIDE, scale=scale, **options, merge=1)


def run(router: PatchRouter, image: torch.Tensor) -> fastroute.Upscaled:
    grid = router.grid(*image.shape[-2:])
    return router.upscale(image, class_map=torch.arange(grid.num_patches).view(grid.rows, grid.cols) % router.num_classes)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_the_image_is_that_of_the_whole_branches(dtype):
    image = torch.rand(3, 45, 61)
    image = image if dtype.is_floating_point else (255 * image).to(dtype)
    branches = networks(5, 8, 13)
    ours, plain = make(branches), make(branches, optimized=False)
    assert len(ours.networks.split(CPU)[1]) == 3 and not plain.networks.split(CPU)[1]
    result, expected = run(ours, image), run(plain, image)
    if dtype.is_floating_point:
        torch.testing.assert_close(result.image, expected.image, rtol=0, atol=1e-5)
    else:
        assert (result.image.int() - expected.image.int()).abs().max() <= 1
    # What a patch is held as: 12 features for each LR pixel instead of 48 values.
    assert ours.networks.produced_bytes(CPU) == 12 * PATCH**2 * 4 and plain.networks.produced_bytes(CPU) == 48 * PATCH**2 * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("branches", "left"),
    [
        ([Bicubic(SCALE), *networks(5, 8)], [True, True, True]),
        ([*networks(5), randomise(CARN(8, SCALE)).eval(), *networks(8), Bicubic(SCALE)], [True, False, True, True]),
        ([randomise(CARN(8, SCALE)).eval(), Bicubic(SCALE)], [False, True]),
    ],
    ids=["a free class", "other last layers", "a free class alone"],
)
def test_some_branches_finish_their_patches(branches, left):
    # One patch at a time: libraries round differently for other batches, and a fixed router has batches of its own.
    ours, plain = make(branches, batch=1), make(branches, optimized=False)
    bodies, upsamplers = ours.networks.split(CPU)
    assert [u is not None for u in upsamplers] == left
    assert all((body is whole) == (u is None) for body, whole, u in zip(bodies, ours.branches, upsamplers, strict=True))
    # What a patch of the class that takes most is held as: pixels, or the 12 features of FSRCNN.
    most = 12 if all(left) else 48
    assert ours.networks.produced_bytes(CPU) == most * PATCH**2 * 4
    image = torch.rand(3, 45, 61)
    result = run(ours, image)
    torch.testing.assert_close(result.image, run(plain, image).image, rtol=0, atol=1e-5)
    fixed = FixedPatchRouter(ours, image.shape, capacities=[1.0] * len(branches))
    assert torch.equal(fixed.upscale(image, result.class_map).image, result.image)
    # All patches in one class.
    grid = ours.grid(*image.shape[-2:])
    for c in range(len(branches)):
        only = torch.full((grid.rows, grid.cols), c)
        ours_alone, plain_alone = (router.upscale(image, class_map=only).image for router in (ours, plain))
        torch.testing.assert_close(ours_alone, plain_alone, rtol=0, atol=1e-5)


def test_the_time_of_the_layers_is_that_of_the_branches():
    router = make(networks(5, 64))
    image = torch.rand(3, 100, 100)
    run(router, image)
    seconds = run(router, image).stats.seconds
    parts = sum(taken for stage, taken in seconds.items() if stage != "total")
    assert seconds["stitch"] > 0 and seconds["branches"] > 0 and parts <= seconds["total"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("branches", "options"),
    [
        ([randomise(CARN(8, SCALE)).eval(), randomise(CARN(12, SCALE)).eval()], {}),
        (networks(5, 6), {"optimized": False}),
        ([network.double() for network in networks(5, 6)], {}),
    ],
    ids=["other last layers", "as written", "float64"],
)
def test_others_are_left_whole(branches, options):
    router = make(branches, **options)
    assert router.networks.split(CPU) == (router.branches, [])
    run(router, torch.rand(3, 30, 30))


def test_other_backends_run_whole_branches():
    router, image = make(networks(5, 8)), torch.rand(3, 40, 33)
    ours = run(router, image).image
    with fastroute.use_backend("reference"):
        assert not router.networks.split(CPU)[1]
        torch.testing.assert_close(run(router, image).image, ours, rtol=0, atol=1e-5)


def test_a_branch_that_is_replaced_is_the_one_that_runs():
    router, image = make(networks(5, 8)), torch.rand(3, 40, 33)
    before = run(router, image).image

    class Blank(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.new_zeros(len(x), 48, PATCH, PATCH)

    router.branches[0] = router.branches[1] = Blank()
    assert run(router, image).image.abs().max() == 0 < before.abs().max()


def test_weights_that_are_written_are_the_ones_that_run():
    router, image = make(networks(5)), torch.rand(3, 40, 33)
    before = run(router, image).image
    with torch.no_grad():
        router.branches[0][-1].weight.mul_(2)
        router.branches[0][-1].bias.mul_(2)
    torch.testing.assert_close(run(router, image).image, 2 * before, rtol=1e-5, atol=1e-5)


def test_a_fixed_router_does_the_same():
    router, image = make(networks(5, 8)), torch.rand(3, 40, 33)
    expected = run(router, image)
    fixed = FixedPatchRouter(router, image.shape, capacities=[1.0, 1.0])
    assert len(fixed.upsamplers) == 2
    assert torch.equal(fixed.upscale(image, expected.class_map).image, expected.image)
