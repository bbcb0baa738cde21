"""Numbers at their edges, in every argument of the routers, grids, windows and counts: refused by name, or right."""

from __future__ import annotations

import itertools
import math
import re
from functools import cache

import pytest
import torch
from networks import picture, random_classsr
from torch import nn

import fastroute
from fastroute import FixedPatchRouter, FixedPixelRouter, PatchRouter, TileGrid
from fastroute.profiling import count_flops, mix_flops

EDGES = [0, -1, 2**31 - 1, 2**31, 2**31 + 1, 2**63 - 1, 2**63, -(2**63), math.inf, -math.inf, math.nan]
MORE = [1, 0.5, 1e308, -1e308, 5e-324, True, "3", 10**400]
IMAGE = picture(1, 3, 20, 24)[0]
# What the dispatcher, the allocator or Python itself says.
NOT_OURS = re.compile("not supported between|cannot convert|aten::|alloc_cpu|must be real number|fastroute error|Traceback")


@cache
def system():
    return random_classsr((4, 6), 4, 16)


@cache
def patches():
    return PatchRouter(system().branches, system().classifier, patch=16, stride=12, scale=4, batch=4)


@cache
def pixels():
    return fastroute.load("pcsr-fsrcnn-x4")


class Reader:
    shape, dtype = (3, 20, 24), torch.float32

    def read(self, top, bottom, left, right):
        return IMAGE[:, top:bottom, left:right]


class Writer:
    def write(self, top, left, pixels):
        pass


def grid(**options):
    made = TileGrid(**{"height": 20, "width": 20, "patch": 8, "stride": 4, "scale": 2, **options})
    return made.rows, made.num_patches, made.output_size


def network(**options):
    return PatchRouter([system().branches[0]], None, **{"patch": 16, "stride": 12, "scale": 4, **options})


# A call by the name of its argument, which the message names.
CALLS = {
    **{f"upscale {n}": lambda v, n=n: patches().upscale(IMAGE, **{n: v}) for n in ("penalty", "memory_limit")},
    **{f"upscale {n}": lambda v, n=n: patches().upscale(IMAGE, **{n: v}) for n in ("budget", "budget_flops")},
    **{f"stream {n}": lambda v, n=n: patches().stream(Reader(), Writer(), **{n: v}) for n in ("budget", "memory_limit")},
    **{f"pixels {n}": lambda v, n=n: pixels().upscale(IMAGE, **{n: v}) for n in ("budget", "penalty", "scale", "budget_flops")},
    "pixels memory_limit": lambda v: pixels().upscale(IMAGE, memory_limit=v),
    "pixels size": lambda v: pixels().upscale(IMAGE, size=(9, v)),
    **{f"PatchRouter {n}": lambda v, n=n: network(**{n: v}) for n in ("patch", "stride", "scale", "batch", "channels")},
    "PatchRouter cost": lambda v: PatchRouter(
        system().branches, system().classifier, patch=16, stride=12, costs=[1, v]
    ).upscale(IMAGE),
    **{
        f"tiled {n}": lambda v, n=n: fastroute.tiled(system().branches[0], **{"patch": 16, n: v})
        for n in ("patch", "stride", "overlap", "scale", "batch", "channels")
    },
    **{f"TileGrid {n}": lambda v, n=n: grid(**{n: v}) for n in ("height", "width", "patch", "stride", "scale")},
    **{
        f"window {n}, {w}": lambda v, n=n, w=w: fastroute.make_window(w, **{"size": 8, "stride": 4, n: v})
        for n in ("size", "stride")
        for w in ("hann", "crop")
    },
    **{f"load {n}": lambda v, n=n: fastroute.load("classsr-fsrcnn-x4", **{n: v}) for n in ("scale", "patch", "stride")},
    **{
        f"FixedPatchRouter {n}": lambda v, n=n: FixedPatchRouter(patches(), IMAGE.shape, sample=IMAGE, **{n: v})
        for n in ("slack", "budget", "penalty")
    },
    "FixedPatchRouter capacities": lambda v: FixedPatchRouter(patches(), IMAGE.shape, capacities=[v, 1.0]),
    "FixedPatchRouter shape": lambda v: FixedPatchRouter(patches(), (3, v, 24), capacities=[1.0, 1.0]),
    **{
        f"FixedPixelRouter {n}": lambda v, n=n: FixedPixelRouter(pixels(), IMAGE.shape, **{n: v})
        for n in ("scale", "penalty", "budget")
    },
    "mix_flops": lambda v: mix_flops([1, v], [1, 2]).fraction,
    "thresholds": lambda v: fastroute.ScoreClassifier(lambda p: p.mean((1, 2, 3)), [v]),
    "count_flops": lambda v: count_flops(system().branches[0], (1, 3, v, 16)),
}


@pytest.mark.parametrize("values", [pytest.param(EDGES, id="edges"), pytest.param(MORE, id="more", marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", CALLS)
def test_refused_by_name_or_right(name, values):
    for value in values:
        try:
            result = CALLS[name](value)
        except (ValueError, TypeError, MemoryError) as error:
            message = str(error)
            assert ": " in message and not NOT_OURS.search(message), (value, message)
        else:
            image = getattr(result, "image", None)
            assert image is None or bool(image.isfinite().all()), value


@pytest.mark.parametrize("router", [patches, pixels])
def test_a_value_that_is_too_large_is_found_wherever_it_lies(router):
    for image, (row, column) in itertools.product(range(2), ((0, 0), (1, 131), (69, 140), (68, 77))):
        x = torch.zeros(2, 3, 70, 141)
        x[image, 2, row, column] = 3.0
        with pytest.raises(ValueError, match=r"upscale: a floating image must lie in about .* like 3: divide by 255"):
            router().upscale(x)


def test_values_without_a_bound():
    """Of a network of HDR images none is refused, wherever it lies, and nothing is clamped."""
    x = torch.rand(1, 3, 70, 141)
    x[0, 2, 68, 77], x[0, 1, 3, 3] = 3e4, -7.0
    network = nn.Conv2d(3, 3, 1)
    for router in (
        PatchRouter([network], patch=32, stride=28, scale=1, value_range=None),
        fastroute.tiled(network, patch=32, overlap=4, value_range=None),
    ):
        assert torch.allclose(router.upscale(x).image, network(x), rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match=r"like 30000: divide by 255, or give the router of an HDR network value_range=None"):
        PatchRouter([network], patch=32, stride=28, scale=1).upscale(x)
