"""No operator and no router of a fixed size waits for the GPU: shown without one, see `waits`."""

from __future__ import annotations

import importlib.util
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from networks import random_classsr, randomise
from torch import nn
from waits import GPU, WaitError, no_waits, on_gpu, triton_launchers

import fastroute
from fastroute.backends import PRODUCTS
from fastroute.models.arm import edge_score
from fastroute.models.carn import CARN
from fastroute.models.classsr import ClassSR
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR
from fastroute.models.rcan import RCAN
from fastroute.windows import window_on

pytestmark = pytest.mark.usefixtures("quick_tuning")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SOURCES = Path(__file__).parents[1] / "csrc"
PATCH, STRIDE, SCALE = 16, 12, 4
# Functions of the CUDA runtime that wait, or that no graph can hold, and of torch that copy to the host.
FORBIDDEN = r"\bcuda(Memcpy\w*|Malloc\w*|Free\w*|HostAlloc|\w*Synchronize|StreamWaitEvent)\b|\.item<|\.item\(|\.cpu\(|to_cpu"


def image(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device=GPU)


PLANTED = {
    "a value": lambda x: x.sum().item(),
    "a branch": lambda x: 1 if x.any() else 0,
    "a list of values": lambda x: x.tolist(),
    "indices": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "counts": lambda x: torch.bincount(x.flatten().long()),
    "repeats": lambda x: torch.repeat_interleave(x.flatten(), x.flatten().long()),
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: x + torch.ones(5).to(GPU),
    "a copy into it": lambda x: x.copy_(torch.ones(5)),
    "numbers": lambda x: x * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], device=GPU),
    "numbers beside it": lambda x: x.new_tensor((1.0, 2.0)),
    "a list as an index": lambda x: x[:, [0, 1]],
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_waits_are_noticed(monkeypatch, name):
    with no_waits(monkeypatch), pytest.raises((WaitError, NotImplementedError, RuntimeError)):
        PLANTED[name](image(2, 5))


def test_what_does_not_wait_passes(monkeypatch):
    with no_waits(monkeypatch):
        x = image(2, 5)
        y = (x * 2 + torch.tensor(1.0)).sort(stable=True).indices.cumsum(0)[1:, ::2]
        assert x[:, y[0]].device == GPU and x.new_zeros(3).device == GPU


def layers(*widths):
    return [(image(b, a), image(b)) for a, b in pairwise(widths)]


OPS = {
    "extract_patches": lambda: fastroute.extract_patches(
        image(1, 3, 20, 30), fastroute.TileGrid(20, 30, 8, 6), image(7, dtype=torch.int64), image(3), image(3), size=(14, 20)
    ),
    "group_by_class": lambda: fastroute.group_by_class(image(9, dtype=torch.int32), 3),
    "assign_classes": lambda: (
        fastroute.assign_classes(image(9, 3), [1, 2, 4]),
        fastroute.assign_classes(image(9, 3), [1, 2, 4], penalty=0.5),
        fastroute.assign_classes(image(9, 3), [1, 2, 4], budget=0.5),
    ),
    "cell_mlp": lambda: fastroute.cell_mlp(image(2, 3, 16, 44), layers(48, 9, 5), 4, 4, 3),
    "conv1x1": lambda: fastroute.conv1x1([image(2, 3, 5, 6), image(2, 1, 5, 6)], image(8, 4), image(8), image(8)),
    "conv3x3": lambda: fastroute.conv3x3(
        image(2, 4, 5, 6),
        fastroute.Conv3x3Weight(image(8, 4, 3, 3), image(36, 1, 4, 64), 2),
        image(8),
        image(8),
        image(2, 2, 10, 12),
    ),
    "adaptive_threshold": lambda: fastroute.adaptive_threshold(image(2, 30)),
    "gather_groups": lambda: fastroute.gather_groups(
        image(9, 4), fastroute.ClassGroups(*(image(n, dtype=torch.int64) for n in (9, 9, 4)))
    ),
    "scatter_groups": lambda: fastroute.scatter_groups(
        image(9, 4), fastroute.ClassGroups(*(image(n, dtype=torch.int64) for n in (9, 9, 4)))
    ),
    "pixel_mlp": lambda: fastroute.pixel_mlp(
        image(1, 8, 5, 6), [layers(12, 4, 3), []], (10, 12), image(1, 10, 12, dtype=torch.uint8), image(1, 3, 5, 6)
    ),
    "stitch_patches": lambda: (
        [
            fastroute.stitch_patches(image(15, 3, 16, 16), fastroute.TileGrid(20, 30, 8, 6, 2), window, out=out)
            for window, out in (("hann", None), ("hann", image(1, 3, 40, 60)), (image(16), None))
        ]
        + [
            fastroute.stitch_patches(
                [image(3, 3, 28, 28), image(1, 3, 40, 16), image(2, 3, 28, 28)],
                fastroute.TileGrid(20, 30, 8, 6, 2),
                "hann",
                image(15, dtype=torch.int64),
                region=image(15, dtype=torch.int64),
            )
        ]
    ),
    "merge_regions": lambda: [
        fastroute.merge_regions(image(15, dtype=torch.int64), fastroute.TileGrid(20, 30, 8, 6), image(*size))
        for size in ((3,), (3, 36))
    ],
    "refine_boundaries": lambda: fastroute.refine_boundaries(image(1, 3, 9, 8), image(1, 9, 8, dtype=torch.uint8)),
}


@pytest.mark.parametrize("op", OPS)
def test_operators(monkeypatch, op):
    window_on("hann", 16, 12, GPU, torch.float32)  # copied there in a first call, and kept
    with no_waits(monkeypatch) as seen:
        OPS[op]()
    # Of those that PyTorch's own convolutions run there, none is called.
    assert set(seen.names) == (set() if op in ("conv1x1", "conv3x3") else {op})


def test_products_of_torch(monkeypatch):
    assert set(OPS) > PRODUCTS
    with no_waits(monkeypatch, "reference") as seen:
        for op in PRODUCTS:
            OPS[op]()
    assert not seen.names


@needs_triton
@pytest.mark.parametrize("op", sorted(set(OPS) - PRODUCTS))
def test_triton_launchers(monkeypatch, op):
    window_on("hann", 16, 12, GPU, torch.float32)
    with no_waits(monkeypatch), triton_launchers(monkeypatch) as launched:
        OPS[op]()
    # Those that put rows into class order and back are one kernel.
    stem = "gather_groups" if op == "scatter_groups" else op.removesuffix("_mlp")
    assert any(stem in name for name in launched)


def test_cuda_sources():
    """Nor the host code in C++: no copy, no allocation of its own, no wait."""
    paths = sorted((SOURCES / "cuda").glob("*.cu*"))
    assert len(paths) >= 8
    for path in [*paths, *(SOURCES / "common").glob("*.h"), SOURCES / "cuda" / "launch.h"]:
        code = re.sub(r"//[^\n]*", "", path.read_text())
        assert not re.search(FORBIDDEN, code), f"{path.name}: {re.search(FORBIDDEN, code)[0]}"
    assert re.search(FORBIDDEN, "cudaMemcpyAsync(a, b, n, kind, stream)") and re.search(FORBIDDEN, "cudaStreamSynchronize(s)")


def classsr(backbone, optimized=True):
    if backbone == "rcan":
        system = ClassSR([RCAN(8, SCALE, 1, 1, 4), RCAN(8, SCALE, 1, 2, 4)])
    else:
        system = ClassSR.build(backbone, (4, 8), SCALE)
    return fastroute.PatchRouter(
        system.branches, system.classifier, patch=PATCH, stride=STRIDE, scale=SCALE, optimized=optimized, batch=8
    )


ROUTERS = {
    "fsrcnn": lambda: classsr("fsrcnn"),
    "as written": lambda: classsr("fsrcnn", optimized=False),
    "carn": lambda: classsr("carn"),
    "srresnet": lambda: classsr("srresnet"),
    "rcan": lambda: classsr("rcan"),
    "scores": lambda: fastroute.PatchRouter(
        [fastroute.Bicubic(SCALE), FSRCNN(4, SCALE)],
        fastroute.ScoreClassifier(lambda x: x.std(dim=(1, 2, 3)), [0.1]),
        patch=PATCH,
        stride=STRIDE,
        scale=SCALE,
        batch=8,
    ),
    "edges": lambda: fastroute.PatchRouter(
        [fastroute.Bicubic(SCALE), FSRCNN(4, SCALE)],
        fastroute.ScoreClassifier(edge_score, [20.0]),
        patch=PATCH,
        stride=STRIDE,
        scale=SCALE,
        batch=8,
    ),
}


def fixed_on_gpu(router, size, dtype=torch.uint8, **options):
    shape, share = (2, 3, *size), 0.8 if router.num_classes > 1 else 1.0
    return on_gpu(
        fastroute.FixedPatchRouter(router, shape, dtype=dtype, capacities=[share] * router.num_classes, **options)
    ), shape


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUTERS)
def test_patch_router(monkeypatch, name):
    fixed, shape = fixed_on_gpu(ROUTERS[name](), (37, 45))
    with no_waits(monkeypatch) as seen:
        result = fixed.upscale(image(*shape, dtype=torch.uint8))
        fixed.upscale(image(*shape, dtype=torch.uint8), image(2, 3, 4, dtype=torch.int64))
    assert result.image.shape == (2, 3, 148, 180) and {x.device for x in result} == {GPU}
    assert {"extract_patches", "assign_classes", "group_by_class", "stitch_patches"} <= set(seen.names)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(40, 52), (37, 45), (9, 60)])
def test_patch_router_within_a_budget(monkeypatch, size):
    """Patches on the classifier's cells, off them, and no cells at all; as operators, and as the launchers of Triton."""
    system = random_classsr((3, 5), SCALE, PATCH)
    router = fastroute.PatchRouter(
        system.branches, system.classifier, patch=PATCH, stride=STRIDE, scale=SCALE, window="hann", batch=8
    )
    fixed, shape = fixed_on_gpu(router, size, torch.float32, budget=0.95)
    with no_waits(monkeypatch):
        fixed.upscale(image(*shape))
        if importlib.util.find_spec("triton") is not None:
            with triton_launchers(monkeypatch) as launched:
                fixed.upscale(image(*shape))
            assert "stitch_patches_kernel" in launched and "assign_classes_count_kernel" in launched


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"penalty": 0.5}, {"budget": 0.95}, {"adaptive": True, "refine": False}], ids=str)
@pytest.mark.parametrize("kind", ["fsrcnn", "carn"])
def test_pixel_router(monkeypatch, kind, options):
    encoder = FSRCNN(8, upsample=False) if kind == "fsrcnn" else CARN(8, upsample=False)
    router = fastroute.PixelRouter(randomise(PCSR.build(encoder, [[4], [64, 64]], [4])))
    fixed = on_gpu(fastroute.FixedPixelRouter(router, (2, 3, 9, 11), dtype=torch.uint8, **options))
    with no_waits(monkeypatch) as seen:
        result = fixed.upscale(image(2, 3, 9, 11, dtype=torch.uint8))
        if importlib.util.find_spec("triton") is not None:
            with triton_launchers(monkeypatch) as launched:
                fixed.upscale(image(2, 3, 9, 11, dtype=torch.uint8))
            assert "refine_boundaries_kernel" in launched
    assert result.image.shape == (2, 3, 36, 44) and {x.device for x in result} == {GPU}
    assert seen.names.count("pixel_mlp") == 2


def test_a_network_that_waits_is_noticed(monkeypatch):
    class Waits(nn.Module):
        def forward(self, x):
            return (
                x * x.new_tensor((1.0,)) if SCALE == 1 else nn.functional.interpolate(x * x.new_tensor((1.0,)), scale_factor=4)
            )

    fixed, shape = fixed_on_gpu(
        fastroute.PatchRouter([Waits()], None, patch=PATCH, stride=STRIDE, scale=SCALE, batch=8), (20, 20)
    )
    with no_waits(monkeypatch), pytest.raises(WaitError, match="new_tensor"):
        fixed.upscale(image(*shape, dtype=torch.uint8))
