"""ClassSR: recorded outputs of the published code, its losses, its state-dict layout."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from networks import merge, picture, random_classsr
from support import random
from torch import nn

import fastroute
from fastroute import PatchRouter, TileGrid, stitch_patches
from fastroute.models.checkpoints import load_weights, read_checkpoint, save_checkpoint, state_dict_of
from fastroute.models.classsr import ClassSR, PatchClassifier
from fastroute.models.fsrcnn import FSRCNN
from fastroute.training.losses import average_loss, class_loss, routing_loss

pytestmark = pytest.mark.usefixtures("quick_tuning")
# The recorded numbers are float32 results of another order of sums.
TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def recorded(data_folder):
    with np.load(data_folder / "fixtures" / "classsr-fsrcnn-random.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


@pytest.fixture
def published(data_folder):
    path = data_folder / "weights" / "classsr-fsrcnn-random.pth"
    system = ClassSR.fsrcnn()
    load_weights(system, state_dict_of(read_checkpoint(path)[0], path), path)
    return system.eval()


@torch.no_grad()
def test_probabilities_and_classes(recorded, published):
    probability = published.classifier(recorded["patches"])
    torch.testing.assert_close(probability, recorded["class_probability"], **TOLERANCE)
    assert probability.argmax(dim=1).tolist() == recorded["class_ids"].tolist()
    assert set(recorded["class_ids"].tolist()) == {0, 1, 2}, "a record without some class proves little"


@torch.no_grad()
def test_routed_output(recorded, published):
    torch.testing.assert_close(published(recorded["patches"]), recorded["output"], **TOLERANCE)


@torch.no_grad()
def test_training_mixture(recorded, published):
    mixed, probability = published.mixture(recorded["patches"])
    torch.testing.assert_close(probability, recorded["class_probability"], **TOLERANCE)
    torch.testing.assert_close(mixed, recorded["mixed_output_training"], **TOLERANCE)
    # Training mode computes transposed convolutions in another form.
    torch.testing.assert_close(published.train()(recorded["patches"]), recorded["mixed_output_training"], **TOLERANCE)


@pytest.mark.parametrize(("backbone", "scale"), [("fsrcnn", 2), ("fsrcnn", 3), ("fsrcnn", 4), ("srresnet", 4)])
def test_mixture_and_its_gradients_are_those_of_the_definition(backbone, scale):
    torch.manual_seed(0)
    system = ClassSR.build(backbone, (4, 6), scale).double().train()
    for parameter in system.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    patches = random((3, 3, 8, 12), torch.float64)
    found, probability = system.mixture(patches)
    expected = sum(probability[:, k, None, None, None] * branch(patches) for k, branch in enumerate(system.branches))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    parameters, seed = list(system.parameters()), random(found.shape, torch.float64)
    gradients = [torch.autograd.grad(image, parameters, seed, retain_graph=True) for image in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_mixture_of_networks_that_do_not_fit():
    images, weights = random((2, 3, 8, 8)), torch.full((2, 2), 0.5)
    for other in (FSRCNN(4, scale=2), FSRCNN(4, upsample=False)):
        with pytest.raises(ValueError, match="must all end with a transposed convolution of one kernel, stride and padding"):
            FSRCNN.mixture([FSRCNN(4, scale=4), other], images, weights)


@pytest.mark.slow
@pytest.mark.parametrize("optimized", [True, False])
def test_router_on_known_patches(recorded, published, optimized):
    """An image made of the recorded patches side by side: routing and stitching give the recorded outputs back."""
    patches, grid = recorded["patches"], TileGrid(96, 128, patch=32, stride=32, scale=4)
    image = merge(patches, TileGrid(96, 128, 32, 32), 1).float()
    expected = stitch_patches(recorded["output"], grid)
    router = PatchRouter(published.branches, published.classifier, patch=32, stride=32, scale=4, optimized=optimized, merge=1)
    result = router.upscale(image)
    assert result.class_map.flatten().tolist() == recorded["class_ids"].tolist()
    assert result.stats.counts_per_class == [4, 4, 4]
    torch.testing.assert_close(result.image, expected, **TOLERANCE)


@pytest.mark.slow
@torch.no_grad()
def test_router_on_overlapping_patches():
    system = random_classsr((4, 6, 8))
    image = picture(2, 3, 45, 61)
    grid = TileGrid(45, 61, patch=16, stride=12, scale=4)
    expected = stitch_patches(system(fastroute.extract_patches(image, grid)), grid)
    result = PatchRouter(system.branches, system.classifier, patch=16, stride=12, scale=4, merge=1).upscale(image)
    assert min(result.stats.counts_per_class) > 0
    torch.testing.assert_close(result.image, expected, **TOLERANCE)


@pytest.mark.slow
def test_loaded_checkpoint_is_the_published_network(recorded, data_folder):
    router = fastroute.load(data_folder / "weights" / "classsr-fsrcnn-random.pth")
    assert (router.num_classes, router.patch, router.stride, router.scale) == (3, 32, 28, 4)
    result = router.upscale(recorded["patches"])
    assert result.class_map.flatten().tolist() == recorded["class_ids"].tolist()
    torch.testing.assert_close(result.image, recorded["output"], **TOLERANCE)


def test_recorded_losses(data_folder):
    record = json.loads((data_folder / "fixtures" / "classsr-losses.json").read_text())
    probability = torch.tensor(record["probability"])
    assert class_loss(probability).item() == pytest.approx(record["class_loss"], abs=1e-6)
    assert average_loss(probability).item() == pytest.approx(record["average_loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "of_class", "of_average"),
    [
        # One sure patch: pairs |1-0| + |1-0| + |0-0| = 2 = K - 1. Shares 1, 0, 0 miss 1/3 by 2/3 + 1/3 + 1/3, over 4/3.
        ([[1.0, 0.0, 0.0]], 0.0, 1.0),
        # Undecided: no difference between classes, and every class has its share.
        ([[1 / 3, 1 / 3, 1 / 3]], 2.0, 0.0),
        # Two sure patches of two classes: shares 1, 1 are what they should be.
        ([[1.0, 0.0], [0.0, 1.0]], 0.0, 0.0),
        # |0.7 - 0.3| = 0.4 short of 1; totals 1.4 and 0.6 miss 1 by 0.4 each, over 4.
        ([[0.7, 0.3], [0.7, 0.3]], 0.6, 0.2),
        # Pairs 0.3 + 0.4 + 0.1 = 0.8 short of 2; 0.6 - 1/3, 1/3 - 0.3 and 1/3 - 0.1 make 8/15, over 4/3.
        ([[0.6, 0.3, 0.1]], None, None),
        ([[1.0]], 0.0, 0.0),
    ],
)
def test_hand_computed_losses(rows, of_class, of_average):
    if of_class is None:
        of_class, of_average = 2 - (0.3 + 0.5 + 0.2), (0.8 / 3 + 0.1 / 3 + 0.7 / 3) / (4 / 3)
    probability = torch.tensor(rows, dtype=torch.float64)
    assert class_loss(probability).item() == pytest.approx(of_class, abs=1e-12)
    assert average_loss(probability).item() == pytest.approx(of_average, abs=1e-12)


def routed(probability: torch.Tensor) -> torch.Tensor:
    errors = torch.tensor([[3e-3, 1e-3, 9e-4], [2e-3, 2e-3, 1e-3], [1e-3, 1e-3, 1e-3]], dtype=torch.float64)
    return routing_loss(probability, errors, torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64), 1e-3)


@pytest.mark.parametrize("loss", [class_loss, average_loss, routed])
def test_loss_gradient(loss):
    # Away from ties, where an absolute difference has a kink.
    probability = torch.tensor([[0.61, 0.28, 0.11], [0.2, 0.35, 0.45], [0.05, 0.9, 0.05 + 1e-2]], dtype=torch.float64)
    assert torch.autograd.gradcheck(loss, probability.requires_grad_())


@pytest.mark.parametrize("loss", [class_loss, average_loss])
@pytest.mark.parametrize("shape", [(3,), (0, 3), (3, 0), (2, 3, 4)])
def test_loss_refuses_other_shapes(loss, shape):
    with pytest.raises(ValueError, match=rf"{loss.__name__}: probability must be \(N, K\)"):
        loss(torch.zeros(shape))


def test_published_names_and_shapes(data_folder):
    layouts = json.loads((data_folder / "fixtures" / "classsr-state-dict-shapes.json").read_text())["state_dict_shapes"]
    own = {name: list(value.shape) for name, value in ClassSR.fsrcnn().state_dict().items()}
    assert own == layouts["classsr-fsrcnn"]


def test_default_architecture():
    system = ClassSR.fsrcnn()
    assert [branch.width for branch in system.branches] == [16, 36, 56]
    assert system.scale == 4
    assert isinstance(system.classifier, PatchClassifier)
    with pytest.raises(ValueError, match="at least one network"):
        ClassSR([])


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("scale", [2, 4])
def test_round_trip(tmp_path, ending, scale):
    system = random_classsr((3, 5), scale)
    path = tmp_path / f"weights{ending}"
    save_checkpoint(path, system.to(memory_format=torch.channels_last), {"scale": scale, "patch": 24, "stride": 20})
    content, metadata = read_checkpoint(path)
    own = system.state_dict()
    assert list(content) == list(own) or ending == ".safetensors"
    assert content.keys() == own.keys()
    assert all(torch.equal(content[name], own[name]) for name in own)
    assert metadata == {"scale": str(scale), "patch": "24", "stride": "20"}
    router = fastroute.load(path)
    assert (router.scale, router.patch, router.stride, router.num_classes) == (scale, 24, 20, 2)
    image = picture(1, 3, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(router.upscale(image).image, system.eval()(image), **TOLERANCE)


@torch.no_grad()
def test_evaluation_sends_each_patch_through_one_branch():
    """Branches of constant colour, a classifier that reads the class off the first pixel."""

    class Constant(nn.Module):
        scale = 2

        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x):
            return x.new_full((*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]), self.value)

    class First(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot(x[:, 0, 0, 0].long(), 3).float()

    system = ClassSR([Constant(10.0), Constant(20.0), Constant(40.0)], First()).eval()
    patches = torch.tensor([2.0, 0, 2, 1])[:, None, None, None].expand(4, 3, 4, 4)
    output = system(patches)
    assert output.shape == (4, 3, 8, 8)
    assert output[:, 0, 0, 0].tolist() == [40, 10, 40, 20]
    assert torch.equal(output, output[:, :1, :1, :1].expand_as(output))
    assert system(patches[:0]).shape == (0, 3, 8, 8)
    assert system.train()(patches)[:, 1, 3, 3].tolist() == [40, 10, 40, 20]


def test_classifier_probabilities_and_logits():
    classifier = PatchClassifier(4, width=8)
    patches = picture(5, 3, 12, 12)
    probability = classifier(patches)
    torch.testing.assert_close(probability.sum(dim=1), torch.ones(5))
    torch.testing.assert_close(probability, classifier.logits(patches).softmax(dim=1))
    # The average makes it indifferent to the order of its cells.
    cells = patches.unflatten(3, (3, 4)).flip(3).flatten(3)
    torch.testing.assert_close(classifier(cells), probability, rtol=0, atol=1e-6)


@torch.no_grad()
def test_fresh_branches_upscale_like_a_bilinear_filter():
    image = picture(1, 3, 12, 12)
    for scale in (2, 3, 4):
        expected = nn.functional.interpolate(image, scale_factor=scale, mode="bilinear")
        torch.manual_seed(0)
        output = FSRCNN(8, scale).eval()(image)
        inside = (..., slice(4 * scale, -4 * scale), slice(4 * scale, -4 * scale))
        # The other features enter with a weight of 0.001 each.
        torch.testing.assert_close(output[inside], expected[inside], rtol=0, atol=0.05)
