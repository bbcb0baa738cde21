"""Whatever the context of torch in which a router is made, called for the first time or called later: the result is that of a
plain call, or an error names what cannot be. The rows of docs/contexts.md are the tests here."""

from __future__ import annotations

import copy
import pickle
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from contexts import (
    EVERY,
    FIXED,
    IMAGE,
    PATCH,
    ROUTERS,
    STRIDE,
    Module,
    default_dtype,
    expected,
    pixel_router,
    pixels,
    right,
    shared,
)
from networks import randomise
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import fastroute
from fastroute import FixedPixelRouter, PatchRouter, PixelRouter

ROWS = (Path(__file__).parents[1] / "docs" / "contexts.md").read_text()


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


# By their names in the first column of the first table.
SUPPORTED = {
    "`torch.inference_mode`": torch.inference_mode,
    "`torch.no_grad`": torch.no_grad,
    "`torch.enable_grad`": torch.enable_grad,
    "`torch.autocast`, bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "`torch.autocast`, float16": lambda: torch.autocast("cpu", torch.float16),
    "`torch.set_default_dtype`": lambda: default_dtype(torch.float64),
    '`torch.device("meta")` as a context': lambda: torch.device("meta"),
    "`torch.set_default_device`": lambda: default_device("meta"),
    "`torch.use_deterministic_algorithms`": lambda: _deterministic(),
    "`torch.autograd.detect_anomaly`": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "`torch.profiler.profile`": lambda: torch.profiler.profile(),
    "`FlopCounterMode` and other dispatch modes": lambda: FlopCounterMode(display=False),
    "`fastroute.use_backend`": lambda: fastroute.use_backend(None),
}


@contextmanager
def _deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def rows_of(table: int) -> list[str]:
    tables = re.findall(r"(?:^\|.*\n)+", ROWS, re.MULTILINE)
    return [line.split("|")[1].strip() for line in tables[table].splitlines()[2:]]


def test_the_documentation_lists_what_is_tested():
    assert rows_of(0) == list(SUPPORTED)
    assert rows_of(1) == list(AS_THEY_ARE)
    assert rows_of(2) == list(REFUSED)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("context", SUPPORTED)
@pytest.mark.parametrize("name", EVERY)
def test_supported(name, context):
    make, call = EVERY[name]
    before, _ = shared(name)
    with SUPPORTED[context]():
        made = make()
        within, again = call(made), call(before)
    for result in (within, again):
        assert all(torch.equal(a, b) for a, b in zip(result, expected(name), strict=False))
    assert right(name, call(made)) and right(name, call(before))


def _with_gradients(name):
    make, _ = ROUTERS[name]
    router, image = make(), IMAGE.clone().requires_grad_()
    result = router(image) if name == "tiled" else router.upscale(image).image
    assert not result.requires_grad
    result.clamp_(0, 1)


def _compiled(name):
    make, call = ROUTERS[name]
    torch.compiler.reset()
    router = make()
    graphs: list[object] = []
    compiled = torch.compile(lambda: call(router), backend=lambda graph, _: graphs.append(graph) or graph.forward)
    assert right(name, compiled()) and right(name, compiled())
    # Nothing of the router was compiled, or it would round differently.
    assert not graphs


def _copied(name):
    make, call = ROUTERS[name]
    router = make()
    call(router)
    assert right(name, call(copy.deepcopy(router))) and right(name, call(pickle.loads(pickle.dumps(router))))


def _scripted(name):
    """Networks of TorchScript, as branches."""
    network = randomise(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2))
    )
    network.eval()
    scripted = torch.jit.script(network)
    forms = [scripted, torch.jit.trace(network, torch.rand(1, 3, 9, 9)), torch.jit.freeze(scripted)]
    forms.append(torch.jit.optimize_for_inference(torch.jit.script(network)))
    if name == "tiled":
        wanted = fastroute.tiled(network, patch=16, scale=2, batch=4)(IMAGE)
        results = [fastroute.tiled(form, patch=16, batch=4)(IMAGE) for form in forms]
    else:
        cheap = nn.Upsample(scale_factor=2, mode="bilinear")
        classes = torch.arange(12).remainder(2).view(3, 4)

        def run(form):
            router = PatchRouter([cheap, form], None, patch=PATCH, stride=STRIDE, scale=2, batch=4, costs=[1, 2], channels=3)
            return router.upscale(IMAGE, class_map=classes).image

        wanted, results = run(network), [run(form) for form in forms]
    for result in results:
        torch.testing.assert_close(result, wanted, rtol=0, atol=1e-5)


AS_THEY_ARE = {
    "an image that requires gradients": (_with_gradients, ("patches", "pixels", "tiled")),
    "`torch.compile` around a router": (_compiled, ("patches, budget", "pixels", "tiled")),
    "`copy.deepcopy`, `pickle`": (_copied, ("patches, budget", "pixels, budget", "tiled")),
    "networks of TorchScript: scripted, traced, frozen": (_scripted, ("patches", "tiled")),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(("row", "name"), [(row, name) for row, (_, names) in AS_THEY_ARE.items() for name in names])
def test_calls_of_another_kind(row, name):
    AS_THEY_ARE[row][0](name)


def _fake(upscale):
    with FakeTensorMode():
        upscale(torch.empty(IMAGE.shape))


def _dual(upscale):
    with forward_ad.dual_level():
        upscale(forward_ad.make_dual(IMAGE, torch.ones_like(IMAGE)))


REFUSED = {
    "`FakeTensorMode`": _fake,
    "`torch.export.export`": lambda upscale: torch.export.export(Module(upscale), (IMAGE,), strict=False),
    "`torch.jit.trace`": lambda upscale: torch.jit.trace(upscale, (IMAGE,), check_trace=False),
    "`torch.func.vmap`": lambda upscale: torch.func.vmap(upscale)(IMAGE[None]),
    "`torch.func.grad`, `jacrev`": lambda upscale: torch.func.grad(lambda x: upscale(x).sum())(IMAGE),
    "`torch.func.jvp`, `jacfwd`": lambda upscale: torch.func.jvp(upscale, (IMAGE,), (IMAGE,)),
    "dual tensors of `torch.autograd.forward_ad`": _dual,
    "`torch.func.functionalize`": lambda upscale: torch.func.functionalize(upscale)(IMAGE),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("context", REFUSED)
@pytest.mark.parametrize("name", ROUTERS)
def test_refused(name, context):
    make, call = ROUTERS[name]
    router = make()
    upscale = (
        router if name == "tiled" else (lambda image: router.upscale(image, **({"budget": 0.95} if "," in name else {})).image)
    )
    with pytest.raises(RuntimeError, match=r"upscale: (an image is routed by its values|a router has no derivative)"):
        REFUSED[context](upscale)
    assert right(name, call(router))


@pytest.mark.parametrize("name", ROUTERS)
def test_no_router_is_made_of_fake_tensors(name):
    make = (lambda: PixelRouter(pixels())) if "pixels" in name else ROUTERS[name][0]
    with FakeTensorMode(), pytest.raises(RuntimeError, match=r"^(PatchRouter|PixelRouter|tiled): an image is routed"):
        make()


@pytest.mark.slow
@pytest.mark.parametrize("name", fastroute.list_models())
def test_shipped_models_under_autocast(name):
    router, image = fastroute.load(name), (IMAGE * 255).to(torch.uint8)
    plain = router.upscale(image)
    with torch.autocast("cpu", torch.bfloat16):
        result, again = router.upscale(image), fastroute.load(name).upscale(image)
    for other in (result, again):
        assert torch.equal(other.image, plain.image) and torch.equal(other.class_map, plain.class_map)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIXED)
def test_graphs_of_a_fixed_size_under_autocast(name):
    make, call = FIXED[name]
    fixed = make()
    wanted = call(fixed)
    torch.compiler.reset()
    compiled = torch.compile(fixed, fullgraph=True, backend="eager")
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(compiled(IMAGE), wanted.image)
        assert torch.equal(compiled(IMAGE), wanted.image)
    with torch.autocast("cpu", torch.bfloat16):
        exported = torch.export.export(fixed, (IMAGE,)).module()
    assert torch.equal(exported(IMAGE), wanted.image)


@pytest.mark.slow
@pytest.mark.parametrize("integer", [torch.uint8, torch.uint16])
def test_integer_images_of_a_fixed_size_are_compiled(integer):
    image = (IMAGE * (255 if integer == torch.uint8 else 65535)).int().to(integer)
    fixed = FixedPixelRouter(pixel_router(), image.shape, dtype=integer, scale=2)
    torch.compiler.reset()
    compiled = torch.compile(fixed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(image), fixed(image))
