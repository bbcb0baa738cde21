"""Whatever the context of torch in which a router is made, called for the first time or called later: the result is that of a
plain call, or an error names what cannot be. The rows of docs/contexts.md are the tests here."""

from __future__ import annotations

import copy
import pickle
import random
import re
import threading
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from networks import picture, random_classsr, randomise
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import fastroute
from fastroute import FixedPatchRouter, FixedPixelRouter, PatchRouter, PixelRouter, TileGrid, windows
from fastroute.grid import _kept_origins
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR
from fastroute.routing import classify

PATCH, STRIDE, SCALE = 16, 12, 4
IMAGE = picture(1, 3, 40, 52)[0]
GRID = TileGrid(8, 8, 4, 3, 1)
ROWS = (Path(__file__).parents[1] / "docs" / "contexts.md").read_text()


@cache
def system():
    return random_classsr((4, 6), SCALE, PATCH)


@cache
def pixels():
    model = randomise(PCSR.build(FSRCNN(8, shrink=4, depth=2, upsample=False), [(4,), (24, 24)], [4], (0.4, 0.5, 0.3))).eval()
    with torch.no_grad():
        score = model.probability(model.features(IMAGE[None]), (80, 104)).log()
        model.classifier.layers[2].bias.sub_(score.mean(dim=(0, 2, 3)))
    return model


def patch_router():
    # Nothing is measured: a batch size that depends on the machine would round differently.
    return PatchRouter(system().branches, system().classifier, PATCH, STRIDE, SCALE, batch=4)


def pixel_router():
    return PixelRouter(copy.deepcopy(pixels()))


def tiled():
    return fastroute.tiled(system().branches[1], 32, scale=SCALE, batch=4)


# What is made, and what is then asked of it: the image, and the classes where there are any.
ROUTERS = {
    "patches": (patch_router, lambda r: (lambda u: (u.image, u.class_map))(r.upscale(IMAGE))),
    "patches, budget": (patch_router, lambda r: (lambda u: (u.image, u.class_map))(r.upscale(IMAGE, budget=0.95))),
    "pixels": (pixel_router, lambda r: (lambda u: (u.image, u.class_map))(r.upscale(IMAGE, scale=2))),
    "pixels, budget": (pixel_router, lambda r: (lambda u: (u.image, u.class_map))(r.upscale(IMAGE, scale=2, budget=0.6))),
    "tiled": (tiled, lambda r: (r(IMAGE),)),
}
FIXED = {
    "fixed patches": (lambda: FixedPatchRouter(patch_router(), IMAGE.shape, capacities=[1.0, 1.0]), lambda r: r(IMAGE)),
    "fixed pixels": (lambda: FixedPixelRouter(pixel_router(), IMAGE.shape, scale=2), lambda r: r(IMAGE)),
}
EVERY = {**ROUTERS, **FIXED}


@cache
def shared(name):
    """One made plainly, and called plainly first."""
    make, call = EVERY[name]
    router = make()
    return router, tuple(x.clone() for x in call(router))


def expected(name):
    return shared(name)[1]


def right(name, results):
    kinds = all(not x.is_inference() and x.device.type == "cpu" for x in results)
    return kinds and all(map(torch.equal, results, expected(name)))


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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
        wanted = fastroute.tiled(network, 16, scale=2, batch=4)(IMAGE)
        results = [fastroute.tiled(form, 16, batch=4)(IMAGE) for form in forms]
    else:
        cheap = nn.Upsample(scale_factor=2, mode="bilinear")
        classes = torch.arange(12).remainder(2).view(3, 4)

        def run(form):
            router = PatchRouter([cheap, form], None, PATCH, STRIDE, 2, batch=4, costs=[1, 2], channels=3)
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


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(("row", "name"), [(row, name) for row, (_, names) in AS_THEY_ARE.items() for name in names])
def test_calls_of_another_kind(row, name):
    AS_THEY_ARE[row][0](name)


class Module(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, image):
        return self.call(image)


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


@pytest.mark.parametrize("name", fastroute.list_models())
def test_shipped_models_under_autocast(name):
    router, image = fastroute.load(name), (IMAGE * 255).to(torch.uint8)
    plain = router.upscale(image)
    with torch.autocast("cpu", torch.bfloat16):
        result, again = router.upscale(image), fastroute.load(name).upscale(image)
    for other in (result, again):
        assert torch.equal(other.image, plain.image) and torch.equal(other.class_map, plain.class_map)


@pytest.mark.parametrize("name", FIXED)
def test_graphs_of_a_fixed_size_under_autocast(name):
    make, call = FIXED[name]
    fixed = make()
    wanted = call(fixed)
    torch.compiler.reset()
    compiled = torch.compile(fixed, fullgraph=True, backend="eager")
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert all(torch.equal(a, b) for a, b in zip(compiled(IMAGE), wanted, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(compiled(IMAGE), wanted, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        exported = torch.export.export(fixed, (IMAGE,)).module()
    assert all(torch.equal(a, b) for a, b in zip(exported(IMAGE), wanted, strict=True))


@pytest.mark.parametrize("integer", [torch.uint8, torch.uint16])
def test_integer_images_of_a_fixed_size_are_compiled(integer):
    image = (IMAGE * (255 if integer == torch.uint8 else 65535)).int().to(integer)
    fixed = FixedPixelRouter(pixel_router(), image.shape, integer, scale=2)
    torch.compiler.reset()
    compiled = torch.compile(fixed, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(image), fixed(image), strict=True))


# Eight threads.

PLANS = [
    lambda: nullcontext(),
    lambda: torch.autocast("cpu", torch.bfloat16),
    lambda: fastroute.use_backend("reference"),
    lambda: fastroute.use_backend(None),
]


def clear():
    """What this process keeps from earlier calls."""
    windows._named.cache_clear()
    windows._named_on.cache_clear()
    _kept_origins.cache_clear()
    classify._FLOPS.clear()
    classify._BYTES.clear()


@pytest.mark.parametrize("rounds", [1, pytest.param(50, marks=pytest.mark.soak)])
def test_eight_threads_share_routers_from_their_first_call_on(rounds):
    """Two routers of each kind, every call of every thread under a context of its own."""
    jobs = [(name, plan) for name in EVERY for plan in range(len(PLANS))]

    def alone(name, plan):
        with PLANS[plan]():
            make, call = EVERY[name]
            return [x.clone() for x in call(make())]

    wanted = {(name, plan): alone(name, plan) for name, plan in jobs}
    for seed in range(rounds):
        clear()
        pcsr = copy.deepcopy(pixels())
        # Two routers of one model, and two of each kind besides.
        routers = {name: [make(), make()] for name, (make, _) in EVERY.items()}
        routers["pixels"] = [PixelRouter(pcsr), PixelRouter(pcsr)]
        start, wrong = threading.Barrier(8), []

        def work(number, routers=routers, start=start, wrong=wrong, seed=seed):
            order = list(jobs)
            random.Random(100 * seed + number).shuffle(order)
            start.wait()
            for name, plan in order:
                try:
                    with PLANS[plan]():
                        results = EVERY[name][1](routers[name][(number + plan) % 2])
                    if not all(torch.equal(a, b) for a, b in zip(results, wanted[name, plan], strict=True)):
                        wrong.append((name, plan, "other numbers"))
                except Exception as error:
                    wrong.append((name, plan, repr(error)))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong, (seed, wrong[:5])


def test_first_calls_that_overlap_know_the_cost_of_classes():
    """The cost was once counted by hooks on the encoder that other threads ran."""
    wanted = pixel_router().model.class_cost(2.0)
    for _ in range(6):
        model, found = copy.deepcopy(pixels()), []
        router = PixelRouter(model)
        threads = [threading.Thread(target=lambda r=router, f=found: f.append(r.model.class_cost(2.0))) for _ in range(3)]
        threads += [threading.Thread(target=lambda m=model: m.features(IMAGE[None])) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [wanted] * 3


# Orders of calls.


def _stitch(window):
    return lambda patches: fastroute.stitch_patches(patches, GRID, window=window)


PATCHES = torch.rand(GRID.num_patches, 2, 4, 4, generator=torch.Generator().manual_seed(0))
OPERATORS = {f"stitch, {window}": _stitch(window) for window in (*windows.WINDOWS, windows.CROP)}


def _exported(call, x):
    torch.export.export(Module(call), (x,), strict=False)


def _faked(call, x):
    with FakeTensorMode() as mode:
        call(mode.from_tensor(x))


def _under(context):
    def run(call, x):
        with context():
            call(x)

    return run


def _graded(call, x):
    result = call(x.clone().requires_grad_())
    if result.requires_grad:
        result.sum().backward()


# A call in a context may be refused; whatever comes of it, it leaves nothing behind.
ACTIONS = {
    "fake": _faked,
    "meta device": _under(lambda: torch.device("meta")),
    "meta tensor": lambda call, x: call(x.to("meta")),
    "inference": _under(torch.inference_mode),
    "autocast": _under(lambda: torch.autocast("cpu", torch.bfloat16)),
    "grad": _graded,
    "export": _exported,
    "compile": lambda call, x: torch.compile(call, backend="eager", dynamic=False)(x),
    "vmap": lambda call, x: torch.func.vmap(call)(x[None]),
    "func.grad": lambda call, x: torch.func.grad(lambda z: call(z).sum())(x),
    "float64": _under(lambda: default_dtype(torch.float64)),
    "plain": lambda call, x: call(x),
}


@pytest.mark.parametrize("rounds", [4, pytest.param(1000, marks=pytest.mark.soak)])
def test_no_order_of_calls_makes_a_plain_one_wrong(rounds):
    plain = {name: call(PATCHES) for name, call in OPERATORS.items()}
    for name in EVERY:
        expected(name)
    for seed in range(rounds):
        draw = random.Random(seed)
        clear()
        if seed % 25 == 0:
            torch.compiler.reset()
        made: dict[str, object] = {}
        steps = [(draw.choice(list(ACTIONS)), draw.choice([*OPERATORS, *EVERY])) for _ in range(8)]
        for action, name in steps:
            try:
                if name in OPERATORS:
                    ACTIONS[action](OPERATORS[name], PATCHES)
                else:
                    # Made in that context too, where it was not before.
                    ACTIONS[action](partial(_upscale, made, name), IMAGE)
            except Exception:
                assert action != "plain", (seed, steps)
            if name in OPERATORS:
                found = OPERATORS[name](PATCHES)
                assert torch.equal(found, plain[name]) and not found.is_inference(), (seed, steps, action, name)
            else:
                found = EVERY[name][1](made.setdefault(name, EVERY[name][0]()))
                assert right(name, found), (seed, steps, action, name)


def _upscale(made, name, image):
    router = made.get(name)
    if router is None:
        router = made[name] = EVERY[name][0]()
    if isinstance(router, nn.Module):
        result = router(image)
        return result if isinstance(result, torch.Tensor) else result.image
    return router.upscale(image).image


@pytest.mark.parametrize("window", [*windows.WINDOWS, windows.CROP])
@pytest.mark.parametrize("first", ["fake", "meta device", "meta tensor", "inference", "vmap", "func.grad", "compile", "export"])
def test_windows_of_an_unlucky_first_call(window, first):
    stitch = _stitch(window)
    wanted = stitch(PATCHES)
    clear()
    # Refused or not, it leaves nothing behind.
    with suppress(Exception):
        ACTIONS[first](stitch, PATCHES)
    assert torch.equal(stitch(PATCHES), wanted)
    x = PATCHES.clone().requires_grad_()
    stitch(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
