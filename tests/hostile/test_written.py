"""What is written in place shares no memory with what is read, on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastroute
from fastroute import TileGrid
from fastroute.ops import _checks as check

GRID = TileGrid(8, 8, 4, 4)
CLASSES = torch.randint(0, 2, (1, 8, 8), dtype=torch.uint8)


def stitch(patches: Tensor, out: Tensor) -> None:
    fastroute.stitch_patches(patches, GRID, out=out)


def stitch_batches(patches: Tensor, out: Tensor) -> None:
    fastroute.stitch_patches([patches[:1], patches[1:]], GRID, out=out)


def refine(image: Tensor, out: Tensor) -> None:
    fastroute.refine_boundaries(image, CLASSES.expand(image.shape[0], -1, -1), out=out)


WRITERS = {"stitch": (stitch, (4, 2, 4, 4)), "batches": (stitch_batches, (4, 2, 4, 4)), "refine": (refine, (1, 2, 8, 8))}


@pytest.mark.parametrize("asked", ["cpu", "reference"])
@pytest.mark.parametrize("writer", WRITERS)
def test_out_that_is_an_input(writer, asked):
    write, shape = WRITERS[writer]
    x = torch.rand(shape)
    before = x.clone()
    with fastroute.use_backend(asked), pytest.raises(ValueError, match="out must not share memory with an input"):
        write(x, x.view(1, 2, 8, 8))
    assert torch.equal(x, before)


@pytest.mark.parametrize("asked", ["cpu", "reference"])
@pytest.mark.parametrize("writer", WRITERS)
def test_out_whose_rows_overlap(writer, asked):
    write, shape = WRITERS[writer]
    for out in (torch.zeros(8).expand(1, 2, 8, 8), torch.zeros(40).as_strided((1, 2, 8, 8), (40, 8, 2, 1))):
        with fastroute.use_backend(asked), pytest.raises(ValueError, match="share memory between its own elements"):
            write(torch.rand(shape), out)
        assert not out.any()


@pytest.mark.parametrize("asked", ["cpu", "reference"])
def test_bands_of_one_image_may_be_read_and_written(asked):
    whole = torch.rand(2, 3, 24, 8)
    image, out = whole[:, :, :8], whole[:, :, 16:]
    with fastroute.use_backend(asked):
        expected = fastroute.refine_boundaries(image.clone(), CLASSES.expand(2, -1, -1))
        refine(image, out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("asked", ["cpu", "reference"])
def test_channels_of_one_image_may_be_read_and_written(asked):
    whole, weight = torch.rand(2, 5, 6, 24).permute(0, 3, 1, 2), torch.rand(16, 8, 3, 3)
    with fastroute.use_backend(asked):
        expected = fastroute.conv3x3(whole[:, :8].clone(), weight)
        fastroute.conv3x3(whole[:, :8], weight, out=whole[:, 8:])
        with pytest.raises(ValueError, match=r"^conv3x3: out must not share memory with an input"):
            fastroute.conv3x3(whole[:, :8], weight, out=whole[:, 7:23])
        with pytest.raises(ValueError, match=r"^conv3x3: out must not share memory between its own elements"):
            fastroute.conv3x3(whole[:, :8], weight, out=torch.zeros(2, 5, 1, 16).expand(2, 5, 6, 16).permute(0, 3, 1, 2))
    assert torch.equal(whole[:, 8:], expected)


def same_memory(x: Tensor, y: Tensor) -> bool:
    """The truth, element by element."""

    def places(t: Tensor) -> set[int]:
        indices = torch.ones_like(t).nonzero().tolist()
        return {t.data_ptr() + 4 * sum(i * s for i, s in zip(at, t.stride(), strict=True)) for at in indices}

    return bool(places(x) & places(y))


def test_slices_are_told_apart():
    # Never "apart" where memory is shared; and slices along any one dimension are known to be apart.
    generator = torch.Generator().manual_seed(0)
    shape, found = (3, 4, 5, 6), 0
    for _ in range(400):
        whole = torch.zeros(shape)
        views = []
        for _ in range(2):
            view = whole
            for d, size in enumerate(shape):
                begin = int(torch.randint(size, (1,), generator=generator))
                view = view.narrow(d, begin, int(torch.randint(1, size - begin + 1, (1,), generator=generator)))
            views.append(view)
        apart = not check._may_overlap(*views)
        found += apart
        assert not (apart and same_memory(*views))
    assert found > 100
    for d, size in enumerate(shape):
        whole = torch.zeros(shape)
        assert not check._may_overlap(whole.narrow(d, 0, size // 2), whole.narrow(d, size // 2, size - size // 2))
