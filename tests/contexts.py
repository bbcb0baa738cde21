"""Routers of every kind, with what a plain call of each gives."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from functools import cache

import torch
from networks import picture, random_classsr, randomise
from torch import nn

import fastroute
from fastroute import FixedPatchRouter, FixedPixelRouter, PatchRouter, PixelRouter
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR

PATCH, STRIDE, SCALE = 16, 12, 4
IMAGE = picture(1, 3, 40, 52)[0]


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
    return PatchRouter(system().branches, system().classifier, patch=PATCH, stride=STRIDE, scale=SCALE, batch=4)


def pixel_router():
    return PixelRouter(copy.deepcopy(pixels()))


def tiled():
    return fastroute.tiled(system().branches[1], patch=32, scale=SCALE, batch=4)


# What is made, and what is then asked of it: the image, and the classes where there are any.
ROUTERS = {
    "patches": (patch_router, lambda r: (lambda u: (u.image, u.class_map))(r.upscale(IMAGE))),
    "patches, budget": (patch_router, lambda r: (lambda u: (u.image, u.class_map))(r.upscale(IMAGE, budget=0.95))),
    "pixels": (pixel_router, lambda r: (lambda u: (u.image, u.class_map))(r.upscale(IMAGE, scale=2))),
    "pixels, budget": (pixel_router, lambda r: (lambda u: (u.image, u.class_map))(r.upscale(IMAGE, scale=2, budget=0.6))),
    "tiled": (tiled, lambda r: (r(IMAGE),)),
}
FIXED = {
    "fixed patches": (lambda: FixedPatchRouter(patch_router(), IMAGE.shape, capacities=[1.0, 1.0]), lambda r: r.upscale(IMAGE)),
    "fixed pixels": (lambda: FixedPixelRouter(pixel_router(), IMAGE.shape, scale=2), lambda r: r.upscale(IMAGE)),
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


class Module(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, image):
        return self.call(image)
