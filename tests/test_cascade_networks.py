"""Networks that routers of patches run in parts, as members of a cascade."""

from __future__ import annotations

import pytest
import torch
from support import random

import fastroute
from fastroute.models.carn import CARN
from fastroute.models.checkpoints import save_checkpoint
from fastroute.models.fsrcnn import FSRCNN


@pytest.mark.parametrize("scale", [2, 4])
def test_networks_whose_last_shuffle_routers_undo(scale, tmp_path):
    """FSRCNN and CARN, which routers of patches run without their last pixel shuffle, as members of a cascade."""
    torch.manual_seed(0)
    networks = {"small": FSRCNN(4, scale), "large": FSRCNN(8, scale), "carn": CARN(16, scale)}
    for name, network in networks.items():
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(0.5)
        save_checkpoint(tmp_path / f"{name}.safetensors", network.eval(), {"scale": scale})
    image = random((3, 40, 70), seed=3).clamp(0, 1)
    for names in (("small", "large"), ("bicubic", "large"), ("small", "carn")):
        router = fastroute.cascade([x if x == "bicubic" else tmp_path / f"{x}.safetensors" for x in names])
        for k, name in enumerate(names):
            found = router.upscale(image, class_map=torch.full((2, 3), k)).image
            if name != "bicubic":
                with torch.no_grad():
                    expected = networks[name](image[None])[0].clamp(0, 1)
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
            assert found.shape == (3, 40 * scale, 70 * scale)
