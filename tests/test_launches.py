"""Launches, allocations and waits of an image of 1920 x 1080 at x4 on a GPU, counted without one: a table of the documentation.

They are those of float16, of the kernels of Triton, and of the second image of a size: the first one also arranges weights and
computes coordinates.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from launches import Counted, counting
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from waits import GPU

import fastroute
from fastroute.models.classsr import ClassSR
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR
from fastroute.patch import patch_memory, regions
from fastroute.patch.regions import Merging
from fastroute.windows import window_on

pytestmark = [
    pytest.mark.usefixtures("quick_tuning"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]
DOCS = Path(__file__).parents[1] / "docs" / "benchmarks.md"
SIZE, SCALE = (1080, 1920), 4
PIXELS = SIZE[0] * SIZE[1] * SCALE**2
WIDTHS = (16, 36, 56)
# The most launches beside an encoder, and waits: before statistics are asked for, and to find them.
PIXEL_CASES = {"the classifier's choice": ({}, 30), "a penalty": ({"penalty": 0.5}, 35), "a budget": ({"budget": 0.5}, 60)}
MOST_OF_PATCHES = 150


def image() -> Tensor:
    return torch.empty((3, *SIZE), dtype=torch.uint8, device=GPU)


def counted_pixels(monkeypatch, options) -> tuple[Counted, list[int]]:
    """What the second image takes, and the number of waits before and after its statistics were asked for."""
    router = fastroute.PixelRouter(PCSR.build(FSRCNN(56, upsample=False), ([16] * 4, [256] * 4), [16]))
    router.to(GPU, torch.float16)
    with counting(monkeypatch, lambda x: [PIXELS // len(x)] * len(x)) as counted:
        router.upscale(image(), scale=SCALE, **options)
        counted.clear()
        result = router.upscale(image(), scale=SCALE, **options)
        waits = [len(counted.waits)]
        launched = counted.taken()
        assert sum(result.stats.counts_per_class) == PIXELS
        waits.append(len(counted.waits))
    assert result.image.shape == (3, 4 * SIZE[0], 4 * SIZE[1])
    return launched, waits


def counted_patches(monkeypatch, merge: int | None = None) -> tuple[Counted, list[int]]:
    """The same on the patch path, with a third of the patches in each class, side by side."""
    system, bands = ClassSR.build("fsrcnn", WIDTHS, SCALE), []
    router = fastroute.PatchRouter(system.branches, system.classifier, scale=SCALE, merge=merge)
    window_on("uniform", 128, 112, GPU, torch.float32)
    plan_bands = patch_memory.plan_bands
    monkeypatch.setattr(patch_memory, "plan_bands", lambda *args: bands.append(plan_bands(*args)) or bands[-1])

    def read(x: Tensor) -> list:
        """The numbers of regions of such classes."""
        grid = router.grid(*SIZE)
        ids, found = torch.arange(grid.num_patches) * 3 // grid.num_patches, []
        with _disable_current_modes(), pytest.MonkeyPatch.context() as patched:
            tolist = Tensor.tolist
            patched.setattr(Tensor, "tolist", lambda x: found.append(tolist(x)) or found[-1])
            regions.sort_regions(ids, [1.0, 2.0, 3.0], Merging(grid, router.merge), bands[-1])
        return next(values for values in found if len(values) == len(x))

    with counting(monkeypatch, read) as counted:
        router.to(GPU, torch.float16)
        router.upscale(image())
        counted.clear()
        result = router.upscale(image())
        waits = [len(counted.waits)]
        launched = counted.taken()
        assert sum(result.stats.counts_per_class) == router.grid(*SIZE).num_patches
        waits.append(len(counted.waits))
    return launched, waits


@pytest.mark.slow
@pytest.mark.parametrize("case", PIXEL_CASES)
def test_pixels(monkeypatch, case):
    options, most = PIXEL_CASES[case]
    taken, waits = counted_pixels(monkeypatch, options)
    assert 15 < taken.launches() <= most
    # The upscaled image itself is waited for by nobody, statistics once.
    assert waits == [0, 1]
    assert taken.events <= 20


@pytest.mark.slow
def test_patches(monkeypatch):
    taken, waits = counted_patches(monkeypatch)
    assert 50 < taken.launches() <= MOST_OF_PATCHES
    # For the numbers of regions, which size the batches, and for the times.
    assert waits == [1, 2]
    assert taken.events <= 20


def test_counts_notice_what_they_count(monkeypatch):
    def answer(x: Tensor) -> list:
        return [7] * len(x)

    with torch.inference_mode(), counting(monkeypatch, answer) as counted:
        x = torch.empty(5, 4, device=GPU)
        y = (x + 1).view(20)[2:].mul_(3)
        assert y.tolist()[0] == 7
        torch.nn.functional.conv2d(x.view(1, 1, 5, 4), x.view(1, 1, 5, 4), torch.zeros(1, device=GPU))
    assert dict(counted.kernels) == {
        ("add", False): 1, ("mul_", False): 1, ("zeros", False): 1, ("conv2d", False): 1, ("bias of a convolution", False): 1,
    }  # fmt: skip
    assert counted.allocations == 4 and len(counted.waits) == 1 and counted.launches() == 5


@pytest.mark.slow
def test_the_documentation_tells_these_numbers(monkeypatch):
    """The column "now" of the table."""
    rows = {
        "PCSR, the classifier's choice": counted_pixels(monkeypatch, {}),
        "PCSR, `budget=0.5`": counted_pixels(monkeypatch, {"budget": 0.5}),
        "ClassSR-FSRCNN": counted_patches(monkeypatch),
        "ClassSR-FSRCNN, `merge=4`": counted_patches(monkeypatch, 4),
    }
    text = DOCS.read_text()
    for name, (taken, waits) in rows.items():
        line = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", text, re.MULTILINE)
        assert line is not None, name
        now = [cell.split("→")[1].strip() for cell in line[1].split("|")]
        assert now == [str(n) for n in (taken.launches(), taken.allocations, waits[0], taken.events)], f"{name}: {now}"
