"""A result written into `out` counts as a change of it, and has no gradient: for all operators that take one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from support import random
from torch import Tensor

import fastroute
from fastroute.ops.conv3x3 import conv3x3_weight

GRID = fastroute.TileGrid(12, 14, patch=8, stride=6, scale=2)


def calls() -> dict[str, tuple[Callable[..., Tensor], Tensor]]:
    """What writes into `out`, and one for it."""
    image = random((2, 8, 6, 7), seed=1).contiguous(memory_format=torch.channels_last)
    kernel, flat = random((8, 8, 3, 3), seed=2), random((8, 8), seed=3)
    patches = random((GRID.num_patches, 3, 16, 16), seed=4)
    found = {
        "conv3x3": (partial(fastroute.conv3x3, image, kernel), torch.ones_like(image)),
        "conv3x3, transformed": (partial(fastroute.conv3x3, image, conv3x3_weight(kernel)), torch.ones_like(image)),
        "conv1x1": (partial(fastroute.conv1x1, image, flat), torch.ones_like(image)),
        "stitch_patches": (partial(fastroute.stitch_patches, patches, GRID), torch.ones(1, 3, *GRID.output_size)),
        "stitch_patches, batches": (
            partial(fastroute.stitch_patches, [patches[:2], patches[2:]], GRID), torch.ones(1, 3, *GRID.output_size)
        ),
    }  # fmt: skip
    return found


NAMES = list(calls())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by", ["cpu", "reference"])
def test_what_was_saved_for_a_gradient_is_known_to_have_changed(name, by):
    run, out = calls()[name]
    factor = torch.ones(1, requires_grad=True)
    product = factor * out
    before = out._version
    with fastroute.use_backend(by):
        run(out=out)
    assert out._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by", ["cpu", "reference"])
def test_no_part_of_a_graph_is_written(name, by):
    run, out = calls()[name]
    part = out * torch.ones(1, requires_grad=True)
    with fastroute.use_backend(by):
        for refused in (part, out.clone().requires_grad_()):
            with pytest.raises(RuntimeError, match=f"{name.split(',')[0]}: out must not require gradients"):
                run(out=refused)
        with torch.no_grad():
            run(out=part)
        run(out=out)
    assert torch.equal(part.detach(), out)
    with fastroute.use_backend(by), torch.inference_mode():
        made = torch.empty_like(out)
        run(out=made)
        assert torch.equal(made, out)


@pytest.mark.parametrize("shape", [(2, 8, 0, 7), (0, 8, 6, 7), (2, 8, 6, 0)])
def test_an_empty_out_has_no_strides_to_refuse(shape):
    image, kernel, flat = torch.zeros(shape), torch.zeros(8, 8, 3, 3), torch.zeros(8, 8)
    for run in (partial(fastroute.conv3x3, image, kernel), partial(fastroute.conv1x1, image, flat)):
        for out in (torch.zeros(shape), torch.zeros(tuple(2 * n for n in shape))[::2, ::2, ::2, ::2]):
            assert run(out=out) is out


@pytest.mark.parametrize("by", ["cpu", "reference"])
def test_channels_behind_those_that_are_read(by):
    """One row of a larger tensor, whose three rows are read; and one channel, one pixel and one image of several."""
    for batch, outputs, rows, width in ((2, 4, 1, 7), (2, 1, 4, 7), (2, 4, 4, 1), (1, 4, 4, 7), (2, 1, 1, 1)):
        memory = random((batch, rows + 2, width, 4 + outputs), seed=5).permute(0, 3, 1, 2)
        read, written = memory[:, :4], memory[:, 4:, 1:-1]
        kernel = random((outputs, 4, 3, 3), seed=6)
        with fastroute.use_backend(by):
            expected = fastroute.conv3x3(read.clone(), kernel, context=1)
            assert torch.equal(fastroute.conv3x3(read, kernel, out=written, context=1), expected)
            with pytest.raises(ValueError, match="must not share memory with an input"):
                fastroute.conv3x3(read, kernel, out=memory[:, 3 : 3 + outputs, 1:-1], context=1)


def test_a_raw_weight_is_an_input_too():
    memory = torch.zeros(10000)
    weight, image = memory[:576].view(8, 8, 3, 3), random((2, 8, 6, 7), seed=1)
    out = memory.as_strided((2, 8, 6, 7), (336, 1, 56, 8), 10)
    with pytest.raises(ValueError, match="must not share memory with an input"):
        fastroute.conv3x3(image, weight, out=out)
    held = torch.nn.Parameter(weight, requires_grad=False)
    for by in ("cpu", "reference"):
        with fastroute.use_backend(by), pytest.raises(ValueError, match="must not share memory with an input"):
            fastroute.conv3x3(image, held, out=out)
