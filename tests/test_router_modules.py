"""Routers are modules: they are moved, copied, saved and nested as any other."""

from __future__ import annotations

import copy
import io as standard_io
import pickle

import pytest
import torch
from networks import picture, random_classsr
from torch import Tensor, nn

import fastroute
from fastroute import PatchRouter, PixelRouter, Router
from fastroute.models.carn import CARN
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR

pytestmark = pytest.mark.usefixtures("quick_tuning", "one_thread")
IMAGE = picture(1, 3, 37, 41, seed=1)[0]


def patches(seed: int = 0) -> PatchRouter:
    torch.manual_seed(seed)
    system = random_classsr((4, 6), 2, 16, seed)
    return PatchRouter(system.branches, system.classifier, patch=16, stride=12, scale=2)


def pixels(seed: int = 0) -> PixelRouter:
    torch.manual_seed(seed)
    return PixelRouter(PCSR.build(FSRCNN(8, upsample=False), [[4], [16]], [8]), scale=2)


def tiles(seed: int = 0) -> PatchRouter:
    torch.manual_seed(seed)
    return fastroute.tiled(CARN(8, 2), patch=16)


ROUTERS = {"patches": patches, "pixels": pixels, "tiles": tiles}
every = pytest.mark.parametrize("make", ROUTERS.values(), ids=ROUTERS)


@pytest.mark.slow
@every
def test_a_router_is_a_module_of_its_networks(make):
    router = make()
    assert isinstance(router, nn.Module) and isinstance(router, Router)
    weights = list(router.parameters())
    assert weights and not any(p.requires_grad for p in weights)
    assert router.state_dict() and len({id(p) for p in weights}) == len(weights)
    assert torch.equal(router(IMAGE), router.upscale(IMAGE).image)
    assert torch.equal(nn.Sequential(router)(IMAGE[None])[0], router(IMAGE))


@pytest.mark.slow
@every
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))], ids=["deepcopy", "pickle"])
def test_copies_are_independent(make, duplicate):
    router = make()
    before = router(IMAGE)
    other = duplicate(router)
    assert torch.equal(other(IMAGE), before)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.bfloat16()
    assert torch.equal(router(IMAGE), before) and router.dtype == torch.float32 and other.dtype == torch.bfloat16


@pytest.mark.slow
@every
def test_torch_save(make):
    router, file = make(), standard_io.BytesIO()
    torch.save(router, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(IMAGE), router(IMAGE))


@pytest.mark.slow
@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dicts(make, dtype):
    router, other = make(0).to(dtype), make(1).to(dtype)
    wanted = router(IMAGE)
    # Whatever has been made of the old weights is made anew.
    assert not torch.equal(other(IMAGE), wanted)
    assert not any(other.load_state_dict(router.state_dict()))
    torch.testing.assert_close(other(IMAGE), wanted, rtol=0, atol=0 if dtype == torch.float32 else 1e-2)


@every
def test_the_mode_of_frozen_networks_stays(make):
    router = make()
    parent = nn.ModuleDict({"sr": router})
    parent.train()
    assert router.training and not any(m.training for child in router.children() for m in child.modules())
    parent.eval()
    assert not router.training


@pytest.mark.slow
@every
def test_a_module_around_it_moves_it(make):
    router = make()

    class Pipeline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sr, self.head = router, nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.sr(x))

    pipeline = Pipeline()
    wanted = pipeline(IMAGE[None])
    assert router.device == torch.device("cpu") and wanted.shape == (1, 3, 74, 82)
    pipeline.to(torch.bfloat16)
    assert router.dtype == torch.bfloat16 and next(router.parameters()).dtype == torch.bfloat16
    assert router(IMAGE).dtype == torch.float32
    pipeline.float()
    assert router.dtype == torch.float32
    pipeline.to("meta")
    assert router.device == torch.device("meta")


@every
def test_the_budget_of_a_plain_call(make):
    router = make()
    router.budget = 1
    assert torch.equal(router(IMAGE), router.upscale(IMAGE, budget=1).image)


@every
def test_options_are_keywords(make):
    router = make()
    with pytest.raises(TypeError, match="positional argument"):
        router.upscale(IMAGE, 0.5)
    with pytest.raises(TypeError, match="positional argument"):
        fastroute.load("classsr-fsrcnn-x4", "cpu")
