"""The model that comes with the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import fastroute
from fastroute import io
from fastroute.catalogue import DEFAULT_MODEL, WEIGHTS
from fastroute.degradation import make_pair
from fastroute.models.checkpoints import read_checkpoint

FILE = WEIGHTS / f"{DEFAULT_MODEL}.safetensors"
SAMPLE = Path(__file__).parents[1] / "assets" / "sample.png"

pytestmark = pytest.mark.skipif(not FILE.is_file(), reason=f"the package ships no {FILE.name} yet")


@pytest.mark.slow
def test_shipped_model_is_listed_and_loads():
    assert DEFAULT_MODEL in fastroute.list_models()
    router = fastroute.load(DEFAULT_MODEL)
    assert (router.num_classes, router.channels, router.scale, router.patch, router.stride) == (3, 3, 4, 32, 28)
    assert router.classifier is not None
    assert all(p.isfinite().all() for m in (router.classifier, *router.branches) for p in m.parameters())


@pytest.mark.slow
def test_shipped_model_is_the_default_of_load():
    default, named = fastroute.load(), fastroute.load(DEFAULT_MODEL)
    for ours, theirs in zip(default.branches, named.branches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_shipped_model_says_how_it_was_made():
    metadata = {name: json.loads(value) for name, value in read_checkpoint(FILE)[1].items()}
    assert (metadata["scale"], metadata["patch"], metadata["stride"], metadata["widths"]) == (4, 32, 28, [16, 36, 56])
    assert {"system", "seed", "branch_steps", "classifier_steps", "joint_steps"} <= set(metadata)


def test_shipped_model_has_a_card():
    cards = [path for path in WEIGHTS.glob("*.md") if path.stem.startswith(DEFAULT_MODEL) or DEFAULT_MODEL in path.read_text()]
    assert cards, f"no .md file in {WEIGHTS.name}/ tells how {DEFAULT_MODEL} was made"


@pytest.mark.slow
def test_shipped_model_beats_bicubic_and_uses_all_classes():
    lr, hr = make_pair(io.read_image(SAMPLE), 4)

    def psnr(image: torch.Tensor) -> float:
        return -10 * (image.double() / 255 - hr.double() / 255).square().mean().log10().item()

    bicubic = F.interpolate(lr[None].float(), scale_factor=4, mode="bicubic").clamp(0, 255).round()[0]
    router = fastroute.load()
    routed = router.upscale(lr)
    dense = router.upscale(lr, budget=1)
    assert min(psnr(routed.image), psnr(dense.image)) > psnr(bicubic) + 0.1
    cheap, expensive = (router.upscale(lr, budget=b).stats.flops.fraction for b in (0.6, 0.9))
    assert cheap < expensive
    # Smooth and detailed parts differ on this photograph: more than one branch is in use when the budget asks for a choice.
    assert len(router.upscale(lr, budget=0.7).class_map.unique()) > 1
