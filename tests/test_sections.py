"""A rectangle of a result, computed on its own, is that of the whole result, bit for bit; so are scores of some tile rows."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from networks import as_image, picture, random_classsr
from support import bits

from fastroute import PatchRouter
from fastroute.patch import classify, patch_memory
from fastroute.patch.bands import plan_bands
from fastroute.patch.classify import block_rows, classify_patches, score_rows
from fastroute.runtime.protocols import ArrayReader
from fastroute.runtime.rectangles import RectangleWriter
from fastroute.runtime.rows import ReaderSource

pytestmark = pytest.mark.usefixtures("quick_tuning")
HOST = torch.device("cpu")


class Rows:
    """A writer that keeps what it gets, in whole steps."""

    def __init__(self, shape, dtype, step=1):
        self.row_step, self.pixels, self.written = step, torch.zeros(shape, dtype=dtype), []

    def write(self, y, x, pixels):
        end = y + pixels.shape[1]
        assert x == 0 and y % self.row_step == 0 and (end % self.row_step == 0 or end == self.pixels.shape[1])
        self.written += range(y, end)
        self.pixels[:, y:end] = pixels


class Places:
    """A writer of rectangles, which counts how often each pixel is written."""

    row_step = 1

    def __init__(self, shape, dtype):
        self.pixels, self.times = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=torch.uint8)

    def write(self, y, x, pixels):
        here = slice(None), slice(y, y + pixels.shape[1]), slice(x, x + pixels.shape[2])
        self.pixels[here] = pixels
        self.times[here] += 1


def by_rows(router, image, edges, step, ids):
    """The result in parts, each by a call of its own."""
    size = router.output_size(*image.shape[1:])
    writer = Rows((3, *size), image.dtype, step)
    for rows in pairwise(edges):
        router.stream(ArrayReader(image.numpy(), True), writer, class_map=ids, rows=rows, promote=False)
    assert sorted(writer.written) == list(range(edges[0], edges[-1]))
    return writer.pixels


ROUTERS = [
    (16, 12, 4, "hann", "full"),
    (16, 12, 1, "uniform", "crop"),
    (16, 5, 2, "linear", "full"),
    (8, 8, 4, "uniform", "full"),
    (16, 8, 8, "crop", "full"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("patch", "stride", "merge", "window", "coverage"), ROUTERS)
@pytest.mark.parametrize("promote", [False, True])
def test_rectangles_have_the_bits_of_the_whole(monkeypatch, patch, stride, merge, window, coverage, promote):
    monkeypatch.setattr(patch_memory, "PATCHES_PER_BAND", {"cpu": 20})
    system = random_classsr((3, 5, 8), 4, patch)
    settings = {"patch": patch, "stride": stride, "scale": 4, "merge": merge, "window": window, "coverage": coverage}
    router = PatchRouter(system.branches, system.classifier, tune=False, **settings)
    image = as_image(picture(1, 3, 93, 161, seed=patch), torch.uint8)[0]
    grid, read = router.grid(93, 161), []
    ids = torch.arange(grid.num_patches).view(grid.rows, grid.cols) * 7 % 5 % 3
    expected = router.upscale(image, class_map=ids, promote=promote).image

    class Noted(ArrayReader):
        def read(self, y0, y1, x0, x1):
            read.append((x0, x1))
            return super().read(y0, y1, x0, x1)

    writer, (height, width) = Places(expected.shape, expected.dtype), expected.shape[1:]
    for rows, columns in product(pairwise((0, 97, 200, height)), pairwise((0, 1, 190, 193, 340, width))):
        call = {"class_map": ids, "promote": promote}
        router.stream(Noted(image.numpy(), True), writer, rows=rows, columns=columns, **call)
        # No more than the blocks of patches that cover the rectangle.
        around = patch + merge * stride
        assert min(x for x, _ in read) >= columns[0] // 4 - around and max(x for _, x in read) <= -(-columns[1] // 4) + around
        read.clear()
    assert bool((writer.times == 1).all())
    assert torch.equal(writer.pixels, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("patch", "stride", "merge", "window", "coverage"), ROUTERS)
def test_rows_have_the_bits_of_the_whole(monkeypatch, patch, stride, merge, window, coverage):
    monkeypatch.setattr(patch_memory, "PATCHES_PER_BAND", {"cpu": 20})
    system = random_classsr((3, 5, 8), 4, patch)
    settings = {"patch": patch, "stride": stride, "scale": 4, "merge": merge, "window": window, "coverage": coverage}
    router = PatchRouter(system.branches, system.classifier, tune=False, **settings)
    image = as_image(picture(1, 3, 157, 61, seed=patch), torch.uint8)[0]
    ids = router.upscale(image).class_map
    expected = router.upscale(image, class_map=ids, promote=False).image
    height = expected.shape[1]
    assert len(plan_bands(1, router.grid(157, 61), 20, merge)) > 2
    for step, edges in [(1, (0, 1, 97, 300, height)), (40, (0, 40, 200, 240, height)), (48, (0, 192, 480, height))]:
        assert torch.equal(by_rows(router, image, edges, step, ids), expected)


@pytest.mark.slow
def test_classes_may_be_raised_as_in_the_whole(monkeypatch):
    """Classes as the classifier gives them, raised where regions form."""
    monkeypatch.setattr(patch_memory, "PATCHES_PER_BAND", {"cpu": 20})
    system = random_classsr((3, 5, 8), 4, 16)
    router = PatchRouter(system.branches, system.classifier, patch=16, stride=12, scale=4, tune=False)
    image = picture(1, 3, 90, 61)[0]
    score = classify_patches(router.classifier, image[None], router.grid(90, 61)).score
    ids = score.argmax(1).view(router.grid(90, 61).rows, -1)
    expected = router.upscale(image, class_map=ids, promote=True)
    assert not torch.equal(expected.class_map.long(), ids), "nothing was raised"
    writer = Rows(expected.image.shape, image.dtype, 24)
    for rows in ((0, 192), (192, 360)):
        router.stream(ArrayReader(image.numpy(), True), writer, class_map=ids, rows=rows, promote=True)
    assert torch.equal(bits(writer.pixels), bits(expected.image))


def test_a_limit_holds_and_little_is_read(monkeypatch):
    monkeypatch.setattr(patch_memory, "PATCHES_PER_BAND", {"cpu": 20})
    system = random_classsr((3, 5), 2, 16)
    router = PatchRouter(system.branches, system.classifier, patch=16, stride=12, scale=2, tune=False)
    image, read = picture(1, 3, 400, 61)[0], []

    class Noted(ArrayReader):
        def read(self, y0, y1, x0, x1):
            read.append((y0, y1))
            return super().read(y0, y1, x0, x1)

    ids = torch.ones(router.grid(400, 61).rows, router.grid(400, 61).cols, dtype=torch.int64)
    call = {"class_map": ids, "rows": (384, 448)}
    done = router.stream(Noted(image.numpy(), True), Rows((3, 800, 122), image.dtype, 64), **call, memory_limit=50_000_000)
    assert done.stats.working_set <= 50_000_000
    assert min(y for y, _ in read) >= 192 - 2 * 48 and max(y for _, y in read) <= 224 + 48 + 4
    with pytest.raises(ValueError, match=r"memory_limit must be at least"):
        router.stream(ArrayReader(image.numpy(), True), Rows((3, 800, 122), image.dtype, 64), **call, memory_limit=1000)


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ((0, 64), {}, "rows must come with the class_map of the whole image"),
        ((64, 64), {"class_map": torch.zeros(5, 5)}, r"rows must be two rows of the result, .* of 128; got \(64, 64\)"),
        ((0, 129), {"class_map": torch.zeros(5, 5)}, "rows must be two rows of the result"),
        ((0, 65), {"class_map": torch.zeros(5, 5)}, "rows must be multiples of the writer's row_step, 64"),
        (None, {"columns": (0, 8)}, "columns must come with the class_map of the whole image"),
        (None, {"columns": (7, 7), "class_map": torch.zeros(5, 5)}, r"columns must be two columns of the result, .* of 128"),
        (None, {"columns": (0, 129), "class_map": torch.zeros(5, 5)}, "columns must be two columns of the result"),
        ((0, 64), {"class_map": torch.zeros(5, 4)}, r"class_map must be \(5, 5\) for this image; got \(5, 4\)"),
    ],
)
def test_refused_rows(rows, options, words):
    system = random_classsr((3, 5), 2, 16)
    router = PatchRouter(system.branches, system.classifier, patch=16, stride=12, scale=2)
    writer = Rows((3, 128, 128), torch.float32, 64)
    with pytest.raises(ValueError, match=words):
        router.stream(ArrayReader(picture(1, 3, 64, 64)[0].numpy(), True), writer, rows=rows, **options)
    assert not writer.written


# On the cells along both axes, off them along either, a last block of one row off the cells, and no cells at all.
@pytest.mark.parametrize("size", [(148, 100), (149, 100), (148, 101), (150, 103), (149, 61)])
@pytest.mark.parametrize("stride", [12, 10])
@torch.no_grad()
def test_scores_of_some_tile_rows(monkeypatch, size, stride):
    monkeypatch.setattr(classify, "BLOCK_PATCHES", 20)
    monkeypatch.setattr(classify, "CELLS_PER_BAND", {"cpu": 200})
    classifier = random_classsr((3, 3, 3), 2, 16, seed=5).classifier
    router = PatchRouter([torch.nn.Identity()], patch=16, stride=stride, scale=1)
    grid = router.grid(*size)
    image = as_image(picture(1, 3, *size), torch.uint8)
    whole = classify_patches(classifier, image, grid)
    step = block_rows(grid)
    assert grid.rows > 3 * step
    source = ReaderSource(ArrayReader(image[0].numpy(), True), HOST)
    edges = [0, 2 * step, 3 * step, grid.rows - (grid.rows - 1) % step - 1, grid.rows]
    parts = [score_rows(classifier, source, grid, rows) for rows in pairwise(edges)]
    assert torch.equal(torch.cat(parts), whole.score)


def test_rows_that_arrive_in_any_pieces():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 57, 3, generator=generator)
    for step, rows in [(1, (0, 57)), (8, (16, 40)), (8, (24, 57)), (5, (10, 15)), (20, (40, 57))]:
        for _ in range(20):
            cuts = sorted({0, 57, *torch.randint(0, 58, (6,), generator=generator).tolist()})
            writer = Rows((2, 57, 3), torch.float32, step)
            part = RectangleWriter(writer, (0, 0), rows, (0, 3))
            for first, end in pairwise(cuts):
                part.write(first, 0, pixels[:, first:end])
            assert writer.written == list(range(*rows))
            assert torch.equal(writer.pixels[:, slice(*rows)], pixels[:, slice(*rows)])
