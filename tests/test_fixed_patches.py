"""The patch path at a fixed size gives what PatchRouter gives; a patch without a slot runs in another branch, in full."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import as_image, picture, random_classsr, routed_plainly
from support import bits, in_layout

import fastroute
from fastroute import FixedPatchRouter, PatchRouter, TileGrid

pytestmark = pytest.mark.usefixtures("quick_tuning")
PATCH, STRIDE, SCALE = 16, 12, 4
# Sums of at most a few thousand float32 products of about 1, in another order.
TOLERANCE = {"rtol": 0, "atol": 1e-5}
SYSTEM = random_classsr((3, 5, 8), SCALE, PATCH)


@cache
def make_router(batch=8, window="uniform", **options):
    return PatchRouter(
        SYSTEM.branches,
        SYSTEM.classifier,
        patch=PATCH,
        stride=STRIDE,
        scale=SCALE,
        window=window,
        batch=batch,
        **options,
        merge=1,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.uint16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 45, 61), (2, 3, 40, 52), (1, 3, 7, 5), (2, 3, 1, 40)], ids=str)
@pytest.mark.parametrize("options", [{}, {"budget": 0.88}, {"penalty": 1.5}], ids=str)
def test_equal_where_all_patches_fit(shape, dtype, options):
    """Bit for bit: batches are of the same size, and patches come in the same order when a class map is given."""
    router = make_router(window="hann")
    image = as_image(picture(*[1, *shape][-4:], seed=3).view(shape), dtype)
    expected = router.upscale(image, **options)
    counts = expected.stats.counts_per_class
    fixed = FixedPatchRouter(router, shape, dtype=dtype, capacities=counts, **options)
    assert fixed.capacities == counts
    result = fixed.upscale(image)
    assert torch.equal(result.class_map, expected.class_map)
    assert result.image.dtype == dtype and result.overflow.tolist() == [0, 0, 0]
    if dtype == torch.float32:
        torch.testing.assert_close(result.image, expected.image, **TOLERANCE)
    assert torch.equal(bits(fixed.upscale(image, expected.class_map).image), bits(expected.image))


def test_the_pictures_use_all_classes():
    assert min(make_router().upscale(picture(2, 3, 40, 52, seed=3)).stats.counts_per_class) > 2


@pytest.mark.parametrize("capacities", [[1.0, 1.0, 1.0], [0.9, 0.8, 0.7], [40, 33, 29]], ids=str)
def test_unused_slots_change_nothing(capacities):
    router = make_router()
    image = picture(2, 3, 45, 61, seed=5)
    expected = router.upscale(image)
    fixed = FixedPatchRouter(router, image.shape, capacities=capacities)
    for _ in range(2):
        result = fixed.upscale(image)
        assert torch.equal(result.class_map, expected.class_map) and not result.overflow.any()
        torch.testing.assert_close(result.image, expected.image, **TOLERANCE)


@pytest.mark.parametrize("capacities", [[30, 5, 5], [0, 0, 1.0], [3, 40, 0], [0.34, 0.34, 0.34]], ids=str)
@pytest.mark.parametrize("options", [{}, {"budget": 0.88}], ids=str)
def test_overflow(capacities, options):
    """The class map says where patches ran: the image is that of a loop with it, and of PatchRouter."""
    router = make_router()
    image = picture(2, 3, 45, 61, seed=5)
    wanted = router.upscale(image, **options)
    fixed = FixedPatchRouter(router, image.shape, capacities=capacities, **options)
    result = fixed.upscale(image)
    counts = torch.bincount(result.class_map.flatten(), minlength=3)
    assert (counts <= torch.tensor(fixed.capacities)).all() and int(counts.sum()) == fixed.number
    over = torch.tensor(wanted.stats.counts_per_class) - torch.tensor(fixed.capacities)
    assert result.overflow.tolist() == over.clamp(min=0).tolist() and result.overflow.any()
    grid = TileGrid(45, 61, PATCH, STRIDE, SCALE)
    plain = routed_plainly(image, grid, SYSTEM.branches, result.class_map.flatten())
    torch.testing.assert_close(result.image.double(), plain, **TOLERANCE)
    torch.testing.assert_close(result.image, router.upscale(image, class_map=result.class_map).image, **TOLERANCE)


def test_the_hardest_move_up():
    """The patches that move up are those to which the classifier gives the highest scores for more expensive classes."""
    router, image = make_router(), picture(2, 3, 64, 76, seed=5)
    wanted = router.upscale(image)
    counts = wanted.stats.counts_per_class
    result = FixedPatchRouter(router, image.shape, capacities=[counts[0] - 3, counts[1], 1.0]).upscale(image)
    moved = (result.class_map != wanted.class_map).flatten()
    assert int(moved.sum()) == 3 and set(result.class_map.flatten()[moved].tolist()) == {2}
    score = router.classifier(fastroute.extract_patches(image, TileGrid(64, 76, PATCH, STRIDE)))
    of_class = (wanted.class_map.flatten() == 0).nonzero().squeeze(1)
    hardest = of_class[score[of_class, 1:].sum(dim=1).topk(3).indices]
    assert set(hardest.tolist()) == set(moved.nonzero().squeeze(1).tolist())


@pytest.mark.slow
@settings(max_examples=8)
@given(st.data())
def test_random_class_maps(data):
    router = make_router(batch=data.draw(st.sampled_from([1, 3, 8])))
    batch, height, width = (data.draw(st.integers(1, most)) for most in (2, 40, 40))
    grid = TileGrid(height, width, PATCH, STRIDE, SCALE)
    number = batch * grid.num_patches
    ids = data.draw(st.lists(st.integers(0, 2), min_size=number, max_size=number))
    first = [data.draw(st.integers(0, number)) for _ in range(2)]
    capacities = [*first, max(number - sum(first), 0)]
    image = picture(batch, 3, height, width, seed=number)
    class_map = torch.tensor(ids).view(batch, grid.rows, grid.cols)
    result = FixedPatchRouter(router, image.shape, capacities=capacities).upscale(image, class_map)
    plain = routed_plainly(image, grid, SYSTEM.branches, result.class_map.flatten())
    torch.testing.assert_close(result.image.double(), plain, **TOLERANCE)
    if not result.overflow.any():
        assert torch.equal(result.class_map, class_map)


def frames_of_different_detail():
    """Images of rising contrast: together they meet a budget with other classes than each alone."""
    sample = picture(4, 3, 64, 76, seed=6)
    return 0.5 + (sample - 0.5) * torch.tensor([0.05, 0.3, 0.6, 1.0]).view(4, 1, 1, 1)


@pytest.mark.parametrize("images", [1, 2, 3])
def test_capacities_of_a_sample(images):
    """The largest share of each class in any call, the last one being smaller where images are left over."""
    router, sample = make_router(), as_image(frames_of_different_detail(), torch.uint8)
    calls = [router.upscale(part, budget=0.9).stats.counts_per_class for part in sample.split(images)]
    fixed = FixedPatchRouter(router, (images, 3, 52, 64), sample=sample, slack=0.5, budget=0.9)
    number = images * TileGrid(52, 64, PATCH, STRIDE).num_patches
    most = [
        max(Fraction(n, sum(call)) for n, call in zip(of_class, calls, strict=True)) for of_class in zip(*calls, strict=True)
    ]
    assert fixed.capacities == [min(number, math.ceil(number * share * 3 / 2)) for share in most]
    assert fixed.upscale(sample[:images, :, :52, :64]).image.shape == (images, 3, 208, 256)


def test_every_frame_of_a_sample_fits():
    router, sample = make_router(), frames_of_different_detail()
    fixed = FixedPatchRouter(router, sample.shape[1:], sample=sample, slack=0, budget=0.9)
    classes = []
    for frame in sample:
        result = fixed.upscale(frame)
        assert not result.overflow.any()
        assert torch.equal(result.class_map, router.upscale(frame, budget=0.9).class_map)
        classes.append(torch.bincount(result.class_map.flatten(), minlength=3))
    # Otherwise, one budget for all of them would do as well.
    assert len({tuple(counts.tolist()) for counts in classes}) > 1
    assert (torch.stack(classes).amax(dim=0) == torch.tensor(fixed.capacities)).all()


def test_one_class_needs_no_capacities():
    image = picture(1, 3, 45, 30)
    for router, budget in (
        (make_router(), 1),
        (PatchRouter([SYSTEM.net3], None, patch=PATCH, stride=STRIDE, scale=SCALE, batch=8, merge=1), None),
    ):
        fixed = FixedPatchRouter(router, image.shape, budget=budget)
        assert sum(fixed.capacities) == max(fixed.capacities) == fixed.number
        torch.testing.assert_close(fixed.upscale(image).image, router.upscale(image, budget=budget).image, **TOLERANCE)


@pytest.mark.parametrize("window", ["crop", "linear", torch.linspace(0.1, 2, PATCH * SCALE)], ids=["crop", "linear", "own"])
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed"])
def test_windows_and_layouts(window, layout):
    router, image = make_router(window=window), in_layout(picture(2, 3, 40, 41), layout)
    fixed = FixedPatchRouter(router, image.shape, capacities=[1.0] * 3)
    torch.testing.assert_close(fixed.upscale(image).image, router.upscale(image).image, **TOLERANCE)


@pytest.mark.slow
def test_one_graph():
    """Nothing depends on values: the whole upscale is exported, and compiled, without a break."""
    image, other = picture(1, 3, 30, 41, seed=1), picture(1, 3, 30, 41, seed=2)
    system = random_classsr((3, 5), SCALE, PATCH)
    router = PatchRouter(system.branches, system.classifier, patch=PATCH, stride=STRIDE, scale=SCALE, batch=8, merge=1)
    fixed = FixedPatchRouter(router, image.shape, capacities=[0.5, 0.5])
    expected = fixed.upscale(other)
    assert expected.overflow.any()
    exported = torch.export.export(fixed, (image,)).module()
    torch.compiler.reset()
    compiled = torch.compile(fixed, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(image)
        for result in (exported(other), compiled(other)):
            assert torch.equal(result, expected.image)


def test_results_are_ordinary_tensors():
    fixed = FixedPatchRouter(make_router(), (3, 20, 20), capacities=[1.0] * 3)
    image = torch.rand(3, 20, 20, requires_grad=True)
    result = fixed.upscale(image)
    assert not result.image.requires_grad and not result.image.is_inference()
    result.image.clamp_(0, 1)


@pytest.mark.slow
def test_what_is_refused():
    router, shape = make_router(), (3, 45, 61)
    for other, options, text in [
        ((45, 61), {}, r"shape must be \(B, 3, H, W\)"),
        ((1, 45, 61), {}, r"shape must be \(B, 3, H, W\)"),
        ((0, 3, 45, 61), {}, "none 0"),
        (shape, {}, "give capacities, the slots of each class, or a sample"),
        (shape, {"capacities": [1.0] * 3, "sample": torch.rand(shape)}, "either capacities or a sample"),
        (shape, {"capacities": [9, 5, 5]}, "hold 19: add 1"),
        (shape, {"capacities": [1.0] * 3, "budget": 0.01}, "budget must lie in"),
        (shape, {"capacities": [1.0] * 3, "budget": 0.9, "penalty": 1.0}, "either penalty or budget"),
    ]:
        with pytest.raises(ValueError, match=text):
            FixedPatchRouter(router, other, **options)
    with pytest.raises(TypeError, match="router must be a PatchRouter; got Linear"):
        FixedPatchRouter(torch.nn.Linear(1, 1), shape)
    with pytest.raises(TypeError, match="dtype must be one of"):
        FixedPatchRouter(router, shape, dtype=torch.int32)
    fixed = FixedPatchRouter(router, shape, capacities=[1.0] * 3)
    expected = r"image must be float32 \(3, 45, 61\) on cpu, as this was made for; "
    with pytest.raises(ValueError, match=expected + r"got float32 \(3, 45, 60\) on cpu"):
        fixed.upscale(torch.rand(3, 45, 60))
    with pytest.raises(TypeError, match=expected + r"got uint8 \(3, 45, 61\) on cpu"):
        fixed.upscale(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(TypeError, match=expected + r"got float16 \(1, 3, 45, 61\) on meta"):
        fixed.upscale(torch.empty(1, *shape, dtype=torch.float16, device="meta"))
    with pytest.raises(ValueError, match=r"class_map must be \(1, 4, 5\) for this size; got \(5, 4\)"):
        fixed.upscale(torch.rand(shape), torch.zeros(5, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"in \[0, 3\); got 3"):
        fixed.upscale(torch.rand(shape), torch.full((4, 5), 3))
    alone = PatchRouter(SYSTEM.branches, None, patch=PATCH, stride=STRIDE, scale=SCALE, batch=8, merge=1)
    with pytest.raises(ValueError, match="no classifier to look at a sample"):
        FixedPatchRouter(alone, shape, sample=torch.rand(shape))
    with pytest.raises(ValueError, match="no classifier; give a class_map"):
        FixedPatchRouter(alone, shape, capacities=[1.0] * 3)(torch.rand(shape))
    wrong = PatchRouter(SYSTEM.branches, None, patch=PATCH, stride=STRIDE, scale=2, batch=8, merge=1)
    with pytest.raises(ValueError, match="Is scale=2 that of the branches"):
        FixedPatchRouter(wrong, shape, capacities=[1.0] * 3)(torch.rand(shape), torch.zeros(4, 5, dtype=torch.int64))
