"""Whatever calls came before, in whatever contexts and threads: a plain call gives what it always does."""

from __future__ import annotations

import copy
import random
import threading
from contextlib import nullcontext, suppress
from functools import partial

import pytest
import torch
from contexts import EVERY, IMAGE, Module, default_dtype, expected, pixel_router, pixels, right
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastroute
from fastroute import PixelRouter, TileGrid, windows
from fastroute.grid import _kept_origins
from fastroute.patch import classify

GRID = TileGrid(8, 8, 4, 3, 1)

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_first_calls_that_overlap_know_the_cost_of_classes():
    """The cost was once counted by hooks on the encoder that other threads ran."""
    wanted = pixel_router().class_cost(2.0)
    for _ in range(6):
        model, found = copy.deepcopy(pixels()), []
        threads = [threading.Thread(target=lambda m=model, f=found: f.append(m.class_cost(2.0))) for _ in range(3)]
        threads += [threading.Thread(target=lambda m=model: m.features(IMAGE[None])) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [wanted] * 3


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


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [2, pytest.param(1000, marks=pytest.mark.soak)])
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
