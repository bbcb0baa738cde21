"""PCSR is trained at some output pixels of every LR pixel: the numbers of the network at just those."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import picture, randomise

from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR
from fastroute.training.pcsr import at_pixels, choose_pixels, run_mlp


@pytest.fixture(scope="module")
def model():
    return randomise(PCSR.build(FSRCNN(5, upsample=False), [None, (4,), (6, 6)], (3,)), seed=1)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [0, 2])
@torch.no_grad()
def test_the_numbers_of_the_network(model, scale, count):
    lr = picture(2, 3, 5, 7)
    size = (5 * scale, 7 * scale)
    features = model.features(lr)
    chosen = torch.from_numpy(choose_pixels(35, scale**2, count, np.random.default_rng(3)))
    assert chosen.shape == (35, min(count or scale**2, scale**2))
    probability = run_mlp(model.classifier, features, chosen, scale).softmax(dim=-1)
    torch.testing.assert_close(probability, at_pixels(model.probability(features, size), chosen), rtol=1e-5, atol=1e-6)
    base = model.upsample(features, lr, size, None, [0])
    for k in range(3):
        found = at_pixels(base, chosen) + run_mlp(model.upsamplers[k], features, chosen, scale)
        expected = at_pixels(model.upsample(features, lr, size, None, [k]), chosen)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_pixels_by_hand():
    image = torch.arange(24.0).reshape(1, 1, 4, 6)
    found = at_pixels(image, torch.tensor([[0, 3], [1, 2], [3, 0], [0, 1], [2, 3], [1, 0]]))
    assert found.squeeze().tolist() == [[0, 7], [3, 8], [11, 4], [12, 13], [20, 21], [17, 16]]


def test_choices():
    chosen = choose_pixels(5000, 9, 4, np.random.default_rng(0))
    assert chosen.shape == (5000, 4) and all(len(set(row)) == 4 for row in chosen.tolist())
    shares = np.bincount(chosen.ravel(), minlength=9) / chosen.size
    assert np.abs(shares - 1 / 9).max() < 0.01
    for count in (0, 9, 12):
        assert choose_pixels(2, 9, count, np.random.default_rng(0)).tolist() == [list(range(9))] * 2


@pytest.mark.parametrize("scale", [2, 3])
def test_gradients(model, scale):
    lr = picture(2, 3, 4, 5)
    chosen = torch.from_numpy(choose_pixels(20, scale**2, 2, np.random.default_rng(1)))
    places = model.upsample(model.features(lr), lr, (4 * scale, 5 * scale), None, [2])
    parameters = [*model.encoder.parameters(), *model.upsamplers[2].parameters()]
    expected = torch.autograd.grad(at_pixels(places, chosen).square().sum(), parameters)
    base = at_pixels(model.upsample(model.features(lr), lr, (4 * scale, 5 * scale), None, [0]), chosen)
    found = torch.autograd.grad(
        (base + run_mlp(model.upsamplers[2], model.features(lr), chosen, scale)).square().sum(), parameters
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
