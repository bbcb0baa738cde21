"""CDNSR: its classifier, the Gumbel relaxation, its losses by hand and by finite differences, its layout."""

from __future__ import annotations

import json
import math

import pytest
import torch
from networks import calibrate, picture, randomise
from torch import nn

import fastroute
from fastroute.models.cdnsr import CDNSR, CLASSIFIER_LAYERS, WIDTHS, annealed, gumbel_noise, gumbel_softmax, mix
from fastroute.models.checkpoints import CheckpointError, save_checkpoint
from fastroute.models.classsr import ClassSR, PatchClassifier
from fastroute.models.fsrcnn import FSRCNN
from fastroute.profiling import count_flops
from fastroute.training.distillation import (
    EPSILON,
    VGG19_LAYERS,
    ContrastiveLoss,
    CSDLoss,
    FeatureStack,
    small_features,
    vgg19_features,
)
from fastroute.training.losses import cdnsr_loss, expected_cost, flops_loss

pytestmark = pytest.mark.usefixtures("quick_tuning")
PATCH = (1, 3, 32, 32)


def test_classifier_flops_as_the_report_prints_them(data_folder):
    table = json.loads((data_folder / "fixtures" / "paper-tables.json").read_text())
    printed = table["cdnsr_classifier_flops_by_conv_layers"]
    for layers in CLASSIFIER_LAYERS:
        classifier = PatchClassifier(3, layers=layers)
        hidden = [m for m in classifier.CondNet if isinstance(m, nn.Conv2d)]
        assert len(hidden) == layers
        # The report counts multiply-adds once, and one operation for every bias and every activation, on 8 x 8 cells.
        extra = 64 * sum(m.out_channels for m in hidden) + 64 * sum(m.out_channels for m in hidden[:-1])
        products = count_flops(classifier.CondNet, PATCH) // 2
        # Each more layer costs 1.065 M there too; the last figure is printed 1 M too high.
        misprint = 1e6 if layers == 6 else 0
        assert products + extra == pytest.approx(printed[str(layers)] - misprint, abs=0.5e3)


@pytest.mark.slow
def test_widths(data_folder):
    table = json.loads((data_folder / "fixtures" / "paper-tables.json").read_text())
    assert {name: list(widths) for name, widths in WIDTHS.items()} == table["cdnsr_widths"]
    with torch.device("meta"):
        for backbone in WIDTHS:
            assert [branch.width for branch in CDNSR.build(backbone).branches] == table["cdnsr_widths"][backbone]


@pytest.mark.slow
@pytest.mark.parametrize("layers", CLASSIFIER_LAYERS)
@torch.no_grad()
def test_routed_through_load(tmp_path, layers):
    system = randomise(CDNSR.build("fsrcnn", (3, 4, 6), layers=layers)).eval()
    calibrate(system.classifier, 32)
    save_checkpoint(tmp_path / "cdnsr.safetensors", system, {"stride": 32})
    image = picture(1, 3, 96, 128)
    result = fastroute.load(tmp_path / "cdnsr.safetensors", window="uniform", merge=1).upscale(image)
    patches = fastroute.extract_patches(image, fastroute.TileGrid(96, 128, 32, 32))
    assert torch.equal(result.class_map.flatten(), system.classifier(patches).argmax(dim=1))
    own = fastroute.extract_patches(result.image, fastroute.TileGrid(384, 512, 128, 128))
    torch.testing.assert_close(own, system(patches), rtol=0, atol=1e-5)
    within = fastroute.load(tmp_path / "cdnsr.safetensors").upscale(image, budget=0.9).stats
    counts, cost = torch.tensor(within.counts_per_class), torch.tensor([count_flops(b, PATCH) for b in system.branches])
    assert (counts * cost).sum() <= 0.9 * counts.sum() * cost.max() and counts[1:].sum() > 0


def test_layout_is_that_of_classsr():
    assert CDNSR.build("fsrcnn").state_dict().keys() == ClassSR.build("fsrcnn").state_dict().keys()


def test_gumbel_softmax_by_its_definition():
    logits, noise = torch.tensor([[0.0, 1.0, -1.0]]), torch.tensor([[0.5, -0.5, 2.0]])
    for temperature in (1.0, 0.5, 2.0):
        powers = [math.exp(x / temperature) for x in (0.5, 0.5, 1.0)]
        expected = [power / sum(powers) for power in powers]
        assert gumbel_softmax(logits, temperature, noise)[0].tolist() == pytest.approx(expected)
    cold = gumbel_softmax(logits, 1e-3, noise)
    assert cold[0].tolist() == pytest.approx([0, 0, 1])


def test_gumbel_noise_is_gumbel():
    noise = gumbel_noise((200_000,), torch.Generator().manual_seed(0))
    # Mean: Euler's constant; variance: pi² / 6; P(g < x) = exp(-exp(-x)).
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    for x in (-1.0, 0.0, 1.5):
        assert (noise < x).double().mean().item() == pytest.approx(math.exp(-math.exp(-x)), abs=0.005)
    assert noise.isfinite().all()


def test_gumbel_choices_follow_the_probabilities():
    logits = torch.tensor([[0.3, 1.2, -0.4]])
    noise = gumbel_noise((100_000, 3), torch.Generator().manual_seed(1))
    chosen = gumbel_softmax(logits.expand(100_000, 3), 0.4, noise).argmax(dim=1)
    shares = torch.bincount(chosen, minlength=3) / len(chosen)
    torch.testing.assert_close(shares, logits.softmax(dim=1)[0], rtol=0, atol=0.006)


def test_gradients_of_the_relaxation():
    logits = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    noise = gumbel_noise((4, 3), torch.Generator().manual_seed(3))
    assert torch.autograd.gradcheck(lambda x: gumbel_softmax(x, 0.7, noise), logits)


def test_temperature():
    assert [annealed(step, 100) for step in (0, 1, 50, 60, 99)] == pytest.approx([1, 0.99, 0.5, 0.4, 0.4])
    assert annealed(0, 0) == 1
    with pytest.raises(ValueError, match="gumbel_softmax: temperature must be above 0; got 0"):
        gumbel_softmax(torch.zeros(1, 2), 0)
    with pytest.raises(ValueError, match=r"gumbel_softmax: noise must be \(1, 2\) as logits; got \(2,\)"):
        gumbel_softmax(torch.zeros(1, 2), 1, torch.zeros(2))


def test_mixture():
    system = randomise(CDNSR.build("fsrcnn", (3, 4), scale=2)).eval()
    system.temperature = 0.6
    x, noise = torch.rand(5, 3, 8, 8), gumbel_noise((5, 2), torch.Generator().manual_seed(4))
    mixed, weights = system.mixture(x, noise)
    torch.testing.assert_close(
        weights, ((system.classifier.logits(x) + noise) / 0.6).softmax(dim=1).float(), rtol=1e-5, atol=1e-6
    )
    for n in range(5):
        one = sum(w * branch(x[n : n + 1]) for w, branch in zip(weights[n], system.branches, strict=True))
        torch.testing.assert_close(mixed[n : n + 1], one, rtol=1e-4, atol=1e-5)
    mixed.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in system.parameters())


def test_flops_loss_by_hand():
    """Equations 2 and 3: E(F) = (1 + 3) / 2, of C_max = 4, above alpha; nothing else divides it."""
    probability = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    cost = torch.tensor([1.0, 2.0, 4.0])
    assert expected_cost(probability, cost).item() == pytest.approx(0.5)
    assert flops_loss(probability, cost, 0.2).item() == pytest.approx(0.5 - 0.2)
    assert flops_loss(probability, cost, 0.5).item() == flops_loss(probability, cost, 0.9).item() == 0
    # The unit of the cost does not matter.
    assert flops_loss(probability, 1e9 * cost, 0.2).item() == pytest.approx(0.3)
    assert flops_loss(torch.ones(3, 1), torch.ones(1), 0.9).item() == pytest.approx(0.1)
    output, target = torch.tensor([[[[0.5, 0.1]]]]).expand(2, 1, 1, 2), torch.full((2, 1, 1, 2), 0.2)
    total = cdnsr_loss(output, target, probability, cost, alpha=0.2, lambda_reg=5.0, image_weight=10.0)
    assert total.item() == pytest.approx(10 * 0.2 + 5 * 0.3)


def test_gradients_of_the_losses():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    outputs = torch.rand(3, 4, 2, 3, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    target, cost = torch.rand(4, 2, 3, 3, dtype=torch.float64, generator=generator), torch.tensor([1.0, 2.0, 3.0])
    noise = gumbel_noise((4, 3), generator)

    def loss(logits, outputs):
        weights = gumbel_softmax(logits, 0.8, noise)
        return cdnsr_loss(mix(outputs, weights), target, weights, cost, alpha=0.1, lambda_reg=30.0)

    assert torch.autograd.gradcheck(loss, (logits, outputs))
    # Above its target, the regularisation moves probability to the cheap class.
    grad = torch.autograd.grad(flops_loss(logits.softmax(dim=1), cost, 0.1), logits)[0]
    assert (grad[:, 0] < 0).all() and (grad[:, 2] > 0).all()


class Identity(nn.Module):
    """The image itself and twice its half, as two features."""

    def forward(self, x):
        return [x, 2 * x[..., ::2]]


def test_csd_loss_by_hand():
    student = torch.tensor([[[[0.0, 1.0]]], [[[1.0, 1.0]]]])
    teacher = torch.tensor([[[[0.5, 1.0]]], [[[1.0, 0.0]]]])
    negatives = torch.tensor([[[[1.0, 1.0]]], [[[0.0, 0.0]]]])
    # Layer 1: teacher (0.5 + 0 + 0 + 1) / 4; negatives (1 + 0 + 0 + 0) / 4 + (0 + 1 + 1 + 1) / 4.
    first = 0.375 / (1 + EPSILON)
    # Layer 2, twice the left pixels: teacher (1 + 0) / 2; negatives (2 + 0) / 2 + (0 + 2) / 2.
    second = 0.5 / (2 + EPSILON)
    loss = CSDLoss(Identity(), weights=(0.25, 3.0))
    assert loss(student, teacher, negatives).item() == pytest.approx(0.25 * first + 3 * second)
    # Without weights: the last ones of 1/32 … 1.
    assert CSDLoss(Identity())(student, teacher, negatives).item() == pytest.approx(first / 4 + second)


class Means(nn.Module):
    """The image is its feature; the loss averages it over the image."""

    channels = 2

    def forward(self, x):
        return [None, x]


def test_contrastive_loss_by_hand():
    """Equations 7 to 9, with vectors in a plane whose angles are known, and a projection that changes nothing there."""
    loss = ContrastiveLoss(Means())
    with torch.no_grad():
        for layer in (loss.projection[0], loss.projection[2]):
            layer.weight.copy_(torch.eye(2))
            layer.bias.zero_()

    def images(*degrees: float) -> torch.Tensor:
        """A vector of length 3 in the mean of two pixels each; in the first quadrant, where ReLU changes nothing."""
        vectors = torch.tensor([[3 * math.cos(math.radians(d)), 3 * math.sin(math.radians(d))] for d in degrees])
        return torch.stack([0.5 * vectors, 1.5 * vectors], dim=-1)[:, :, None]

    def cos(degrees: float) -> float:
        return math.cos(math.radians(degrees))

    found = loss(images(10, 80), images(40, 80), images(90, 70, 0)).item()
    first = -math.log(math.exp(cos(30)) / (math.exp(cos(80)) + math.exp(cos(60)) + math.exp(cos(10))))
    second = -math.log(math.exp(cos(0)) / (math.exp(cos(10)) + math.exp(cos(10)) + math.exp(cos(80))))
    assert found == pytest.approx((first + second) / 2, rel=1e-6)
    # One negative equal to the teacher: the similarities cancel.
    assert loss(images(10), images(40), images(40)).item() == pytest.approx(0, abs=1e-6)
    # The projection is used: two layers, a ReLU between them.
    with torch.no_grad():
        loss.projection[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        loss.projection[2].bias.copy_(torch.tensor([0.0, 1.0]))
    vector = [3 * cos(10), 1.0], [3 * cos(40), 1.0], [3 * cos(90), 1.0]
    near, far = (torch.cosine_similarity(torch.tensor([vector[0]]), torch.tensor([vector[k]])).item() for k in (1, 2))
    assert loss(images(10), images(40), images(90)).item() == pytest.approx(far - near, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ContrastiveLoss, CSDLoss])
def test_contrastive_gradients(kind):
    generator = torch.Generator().manual_seed(6)
    student, teacher, negatives = (
        torch.rand(n, 3, 6, 6, dtype=torch.float64, generator=generator, requires_grad=True) for n in (2, 2, 3)
    )
    torch.manual_seed(0)
    loss = kind(small_features(width=4, levels=2)).double()
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, negatives), student)
    grads = torch.autograd.grad(loss(student, teacher, negatives), (teacher, negatives), allow_unused=True)
    assert grads == (None, None), "teacher or negatives learn"
    # Nearer to the teacher is better, nearer to a negative worse.
    toward = [student.detach() + 0.2 * (goal.detach() - student.detach()) for goal in (teacher, negatives[:2])]
    here, near, wrong = (loss(x, teacher, negatives).item() for x in (student, *toward))
    assert near < here < wrong


def test_the_projection_learns():
    torch.manual_seed(0)
    loss = ContrastiveLoss(small_features(), width=5).double()
    assert [tuple(p.shape) for p in loss.projection.parameters()] == [(5, 64), (5,), (5, 5), (5,)]
    x = [torch.rand(n, 3, 8, 8, dtype=torch.float64) for n in (2, 2, 3)]
    loss(*x).backward()
    learning = {name for name, p in loss.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {"projection.0.weight", "projection.0.bias", "projection.2.weight", "projection.2.bias"}


@pytest.mark.parametrize("kind", [ContrastiveLoss, CSDLoss])
def test_the_last_branch_only_teaches(kind):
    outputs = torch.rand(3, 2, 3, 8, 8, generator=torch.Generator().manual_seed(7), requires_grad=True)
    negatives = torch.rand(4, 3, 8, 8)
    loss = kind(small_features())
    total = loss.of_branches(outputs, negatives)
    expected = sum(loss(outputs[k], outputs[2], negatives) for k in (0, 1))
    torch.testing.assert_close(total, expected)
    total.backward()
    assert outputs.grad[0].any() and outputs.grad[1].any() and not outputs.grad[2].any()


@pytest.mark.slow
def test_vgg19(tmp_path):
    """torchvision's layout: 37 layers, of which those up to relu5_1 are read."""
    widths = [64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"]
    layers, fan_in = [], 3
    for width in widths:
        layers += [nn.MaxPool2d(2)] if width == "M" else [nn.Conv2d(fan_in, width, 3, padding=1), nn.ReLU()]
        fan_in = fan_in if width == "M" else width
    whole = nn.Sequential(*layers)
    state = {f"features.{name}": value for name, value in whole.state_dict().items()}
    torch.save({**state, "classifier.0.bias": torch.zeros(4)}, tmp_path / "vgg19.pth")
    features = vgg19_features(tmp_path / "vgg19.pth")
    assert features.channels == 512 and not any(p.requires_grad for p in features.parameters())
    x = torch.rand(1, 3, 32, 32)
    normal = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    for found, layer in zip(features(x), VGG19_LAYERS, strict=True):
        assert torch.equal(found, whole[: layer + 1](normal))
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth as VGG-19: it has no features\.0\.weight; its keys are conv"):
        vgg19_features(tmp_path / "other.pth")


def test_features():
    first, second = small_features(), small_features()
    x = torch.rand(2, 3, 16, 16)
    shapes = [tuple(f.shape) for f in first(x)]
    assert shapes == [(2, 16, 8, 8), (2, 32, 4, 4), (2, 64, 2, 2)]
    assert all(torch.equal(a, b) for a, b in zip(first(x), second(x), strict=True))
    assert not any(p.requires_grad for p in first.parameters()) and not first.train().training
    # Layers that work in place, as those of VGG do, do not change features handed out before.
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True))
    stack = FeatureStack(layers, (0, 1, 3))
    found = stack(x)
    assert (found[0] < 0).any() and torch.equal(found[1], found[0].relu()) and len(found) == 3
    normal = (x - stack.mean) / stack.std
    torch.testing.assert_close(found[2], layers(normal))
    for cuts in ((), (1, 0), (4,), (-1,)):
        with pytest.raises(ValueError, match="FeatureStack: cuts must rise within the 4 layers"):
            FeatureStack(layers, cuts)


def test_refusals():
    for arguments, message in (
        (("edsr",), "backbone must be one of"),
        (("fsrcnn", None, 4, 2), "layers must be 3 to 6; got 2"),
    ):
        with pytest.raises(ValueError, match=f"CDNSR: {message}"):
            CDNSR.build(*arguments)
    probability = torch.full((2, 2), 0.5)
    with pytest.raises(ValueError, match=r"flops_loss: alpha must lie in \[0, 1\]; got 1\.5"):
        flops_loss(probability, torch.ones(2), 1.5)
    for cost in (torch.ones(3), torch.tensor([0.0, 1.0])):
        with pytest.raises(ValueError, match=r"expected_cost: cost must be \(2,\) positive numbers"):
            flops_loss(probability, cost, 0.5)
    x = torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match="negatives must hold at least one image"):
        ContrastiveLoss(small_features())(x, x, x[:0])
    with pytest.raises(ValueError, match="weights must be one per feature, 3; got 1"):
        CSDLoss(small_features(), (1.0,))(x, x, x)
    assert isinstance(CDNSR.build("fsrcnn", (3, 4)).branches[0], FSRCNN)
