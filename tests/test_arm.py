"""ARM: recorded scores, tables, classes and outputs of the published code; shared weights; routing under a budget."""

from __future__ import annotations

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from networks import picture, randomise

import fastroute
from fastroute import PatchRouter, TileGrid, io
from fastroute.degradation import make_pair
from fastroute.models.arm import ARM, BACKBONES, Bicubic, EdgeClassifier, EdgeTable, budget_scores, edge_score
from fastroute.models.checkpoints import load_weights, read_checkpoint, save_checkpoint, state_dict_of
from fastroute.models.rcan import RCAN

pytestmark = pytest.mark.usefixtures("quick_tuning")
ETAS = (1e9, 3.33333e8, 1e8, 3.33333e7)


@pytest.fixture(scope="module")
def recorded(data_folder):
    with np.load(data_folder / "fixtures" / "arm-fsrcnn-x4.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


@pytest.fixture(scope="module")
def published(data_folder, recorded):
    path = data_folder / "weights" / "arm-fsrcnn.pth"
    arm = ARM("fsrcnn")
    load_weights(arm.network, state_dict_of(read_checkpoint(path)[0], path), path)
    arm.table.score.copy_(recorded["lut_score"][0])
    arm.table.psnr.copy_(recorded["lut_psnr"])
    return arm.eval()


# Random weights of a deep RCAN give values of millions, in which every rounding shows.
NETWORKS = {**{name: name for name in BACKBONES}, "rcan": partial(RCAN, groups=1, blocks=1, reduction=2)}


def random_arm(backbone: str = "fsrcnn", widths: tuple[int, ...] = (4, 8, 12), scale: int = 2, seed: int = 0) -> ARM:
    """An ARM with random weights and a table in which every class is the best somewhere."""
    arm = ARM(NETWORKS[backbone], widths, scale, bins=8)
    randomise(arm.network, seed)
    x = picture(40, 3, 16, 16, seed)
    score = edge_score(x)
    best = score.argsort().argsort() * arm.num_classes // len(score)
    arm.table.fit(score, 30 - 4.0 * (best[:, None] - torch.arange(arm.num_classes)).abs())
    return arm.eval()


def test_scores(recorded):
    score = edge_score(recorded["patches"] / 255)
    torch.testing.assert_close(score.double(), recorded["image_score"], rtol=0, atol=1e-3)


def test_score_by_hand():
    x = torch.zeros(2, 3, 3, 3)
    # One pixel of luma round(0.299 * 100) = 30 in a corner: the centre sees it once with weight 2.
    x[0, 0, 0, 0] = 100 / 255
    x[1] = 0.3
    expected = (8 * 30 + 2 * 30) / 9  # 240 is below 255
    assert edge_score(x).tolist() == pytest.approx([expected, 0])
    # Rounded to 8-bit steps, and clamped.
    torch.testing.assert_close(edge_score(x + 0.4 / 255), edge_score(x), rtol=0, atol=0)
    strong = torch.zeros(1, 3, 2, 2)
    strong[0, :, 0, 0] = 1
    assert edge_score(strong).item() == pytest.approx(255 * 2 / 4)  # -8 and 8 times 255, both cut


def test_predicted_psnr(recorded, published):
    predicted = published.table(recorded["image_score"].float(), between=False)
    torch.testing.assert_close(predicted.double(), recorded["predicted_psnr"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("eta", ETAS)
def test_classes(recorded, published, eta):
    # The published count has 4 FLOPs more per network.
    assert published.classifier.cost.tolist() == pytest.approx(recorded["cost"].tolist(), abs=5)
    classifier = EdgeClassifier(published.table, published.classifier.cost, eta)
    classes = classifier.utility(recorded["patches"] / 255, between=False).argmax(dim=1)
    assert classes.tolist() == recorded[f"classes_eta{eta:g}"].tolist()


@torch.no_grad()
def test_outputs_of_every_width(recorded, published):
    patches = recorded["patches"][: len(recorded["output_width0"])] / 255
    branches = published.branches
    for k, width in enumerate((0, 16, 36, 56)):
        for output in (published.run(k, patches), branches[k](patches)):
            torch.testing.assert_close(output, recorded[f"output_width{width}"], rtol=0, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_published_carn(data_folder):
    path = data_folder / "weights" / "arm-carn.pth"
    arm = ARM("carn").eval()
    load_weights(arm.network, state_dict_of(read_checkpoint(path)[0], path), path)
    hr = io.read_image(sorted((data_folder / "images" / "test2k").glob("*"))[0])[:3, 400:784, 400:784]
    lr, hr = (x[None].float() / 255 for x in make_pair(hr, 4))
    psnr = arm.measure(lr, hr)[0].tolist()
    # No output is recorded; but cut in any other way, the narrow networks would be far worse than interpolation.
    assert psnr[0] < psnr[1] < psnr[2] < psnr[3]


@pytest.mark.slow
@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_widths_share_weights(backbone):
    arm = randomise(ARM(NETWORKS[backbone], (4, 8), 2)).train()
    x = torch.rand(2, 3, 6, 7)
    branches = arm.branches
    for k in (1, 2):
        with torch.no_grad():
            torch.testing.assert_close(arm.run(k, x), branches[k](x), rtol=1e-5, atol=1e-5)
    arm.run(1, x).sum().backward()
    for name, parameter in arm.network.named_parameters():
        own = dict(branches[1].named_parameters())[name].shape
        inside = torch.zeros(parameter.shape, dtype=torch.bool)
        inside[tuple(slice(n) for n in own)] = True
        assert parameter.grad is not None and parameter.grad[inside].abs().sum() > 0
        assert not parameter.grad[~inside].any(), f"{name}: a gradient outside the narrower network"


@pytest.mark.slow
def test_gradient_through_a_width():
    arm = randomise(ARM("fsrcnn", (4, 6), 2)).double()
    x = torch.rand(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    for training in (True, False):
        arm.train(training)
        assert torch.autograd.gradcheck(lambda x: arm.run(1, x), x)


def test_table_by_hand():
    table = EdgeTable(2, bins=4)
    assert not table.ready
    # Bins of width 2: scores 0 and 1.9 fall in the first, none in the second and third, 7 and 8 in the last.
    table.fit(torch.tensor([0.0, 1.9, 7.0, 8.0]), torch.tensor([[40.0, 41.0], [42.0, 43.0], [30.0, 31.0], [33.0, 37.0]]))
    assert table.ready
    assert table.score.tolist() == [1, 3, 5, 7]
    expected = [[41, 41 - 9.5 / 3, 41 - 19 / 3, 31.5], [42, 42 - 8 / 3, 42 - 16 / 3, 34]]
    torch.testing.assert_close(table.psnr, torch.tensor(expected))
    at = torch.tensor([0.0, 2.0, 6.9, 100.0])
    torch.testing.assert_close(table(at)[:, 1], torch.tensor([42, 42 - 4 / 3, 34 + 0.05 * 8 / 3, 34]))
    torch.testing.assert_close(table(at, between=False)[:, 1], torch.tensor([42, 42 - 8 / 3, 34, 34]))
    with pytest.raises(ValueError, match=r"EdgeTable: score must be \(N,\), N at least 1, and psnr \(N, 2\); got"):
        table.fit(torch.ones(3), torch.ones(3, 3))


@pytest.mark.slow
def test_table_from_data():
    arm = random_arm()
    lr, hr = picture(12, 3, 16, 16, 3), picture(12, 3, 32, 32, 4)
    psnr = arm.measure(lr, hr)
    assert psnr.shape == (12, 4)
    for k in range(4):
        with torch.no_grad():
            output = arm.run(k, lr[3:4])
        error = ((output.clamp(0, 1) * 255).round() - hr[3:4] * 255)[..., 2:-2, 2:-2].double()
        assert psnr[3, k].item() == pytest.approx(10 * math.log10(255**2 / error.square().mean().item()))
    # Exact patches have a finite PSNR.
    with torch.no_grad():
        exact = (arm.run(0, lr).clamp(0, 1) * 255).round() / 255
    assert arm.measure(lr, exact)[:, 0].tolist() == [100] * 12


def test_classifier_scores():
    table = EdgeTable(2, bins=1)
    table.fit(torch.ones(1), torch.tensor([[30.0, 33.0]]))
    x = torch.rand(5, 3, 8, 8)
    # 3 dB at four fifths of the most expensive cost; the score rises by the ratio of the costs to log(1 + slope).
    best = EdgeClassifier(table, [1.0, 5.0])(x)
    torch.testing.assert_close(best, torch.tensor([[5 ** -math.log(1 + 3.75), 1.0]]).expand(5, 2))
    # A decibel is worth 1: the second class costs 4 more and gains 3. A budget may count otherwise.
    worth = EdgeClassifier(table, [1.0, 5.0], 1.0)(x)
    torch.testing.assert_close(worth, torch.tensor([[1.0, 5 ** -math.log(1 + 1.25)]]).expand(5, 2))
    other = EdgeClassifier(table, [1.0, 5.0], 1.0, [1.0, 2.0])(x)
    torch.testing.assert_close(other, torch.tensor([[1.0, 2 ** -math.log(1 + 2)]]).expand(5, 2))


@pytest.mark.parametrize("cost", [(1.6, 22.0, 36.0, 50.0), (3.0, 1.0, 9.0, 2.0)])
def test_a_budget_is_spent_where_it_gains_most(cost):
    generator = torch.Generator().manual_seed(0)
    utility = 4 * torch.randn(300, 4, generator=generator).cumsum(dim=1)
    cost = torch.tensor(cost, dtype=torch.float64)
    score = budget_scores(utility, cost)
    assert torch.equal(score.argmax(dim=1), utility.argmax(dim=1)) and score.amax() == 1
    rows = torch.arange(300)
    for price in (0.01, 0.1, 0.5, 2.0, -0.3):
        best = (utility - price * cost).argmax(dim=1)
        penalty = math.copysign(math.log1p(abs(price) * cost.max().item()), price)
        found = fastroute.assign_classes(score, cost, penalty)
        assert cost[found].tolist() == cost[best].tolist()
        # So no other choice of that cost gains more: a budget of it finds this one.
        spent = cost[best].mean().item() / cost.max().item()
        within = fastroute.assign_classes(score, cost, budget=min(spent + 1e-9, 1))
        if price > 0:
            assert utility[rows, within].sum() == pytest.approx(utility[rows, best].sum().item(), abs=1e-3)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_router(backbone):
    arm = random_arm(backbone)
    image = picture(1, 3, 80, 96, 5)
    grid = TileGrid(80, 96, 16, 16)
    patches = fastroute.extract_patches(image, grid)
    expected = arm(patches)
    router = PatchRouter(arm.branches, arm.classifier, patch=16, stride=16, scale=2, costs=arm.costs(16), merge=1)
    result = router.upscale(image)
    assert min(result.stats.counts_per_class) > 0, "a picture without some class proves little"
    own = fastroute.extract_patches(result.image, TileGrid(160, 192, 32, 32))
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_budget():
    arm = random_arm()
    router = PatchRouter(arm.branches, arm.classifier, patch=16, stride=12, scale=2, costs=arm.costs(16), merge=1)
    image = picture(1, 3, 120, 140, 6)
    cost = torch.tensor(router.costs)
    least = float(cost.min() / cost.max())
    assert router.upscale(image, budget=1).stats.counts_per_class[:3] == [0, 0, 0]
    spent = []
    for budget in (least, 0.3, 0.5, 0.7, 0.9):
        counts = torch.tensor(router.upscale(image, budget=budget).stats.counts_per_class)
        spent.append(float((counts * cost).sum() / counts.sum() / cost.max()))
        assert spent[-1] <= budget + 1e-6
    assert spent == sorted(spent) and spent[0] == pytest.approx(least)
    # Interpolated tables let single patches change class, so that budgets are used.
    assert all(use > budget - 0.08 for use, budget in zip(spent, (least, 0.3, 0.5, 0.7, 0.9), strict=True))


def test_costs():
    arm = ARM()
    assert arm.classifier.cost.tolist() == [0, 141_262_848, 304_570_368, 467_877_888]
    costs = arm.costs()
    # 16 products and sums for each of 3 * 128 * 128 values.
    assert costs[0] == 2 * 16 * 3 * 128 * 128 and [round(c / 1e6) for c in costs[1:]] == [22, 36, 50]
    assert Bicubic(3)(torch.rand(1, 3, 4, 5)).shape == (1, 3, 12, 15)


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "ending"), [("fsrcnn", ".pth"), *((backbone, ".safetensors") for backbone in BACKBONES)])
def test_saved_and_loaded(tmp_path, backbone, ending):
    arm = random_arm(backbone, scale=2)
    arm.classifier.eta.fill_(3e9)
    path = tmp_path / f"arm{ending}"
    save_checkpoint(path, arm, {"patch": 16, "stride": 12})
    router = fastroute.load(path, window="uniform", merge=1)
    assert (router.num_classes, router.patch, router.stride, router.scale) == (4, 16, 12, 2)
    image = picture(1, 3, 50, 60, 7)
    own = PatchRouter(arm.branches, arm.classifier, patch=16, stride=12, scale=2, costs=arm.costs(16), merge=1).upscale(image)
    loaded = router.upscale(image)
    assert torch.equal(loaded.class_map, own.class_map) and router.costs == arm.costs(16)
    torch.testing.assert_close(loaded.image, own.image, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_table_without_measurements_is_refused(tmp_path):
    save_checkpoint(tmp_path / "arm.safetensors", ARM("fsrcnn", (3, 4)))
    with pytest.raises(fastroute.CheckpointError, match="holds no measurements"):
        fastroute.load(tmp_path / "arm.safetensors")


def test_no_trace():
    arm = random_arm()
    before = copy.deepcopy(arm.state_dict())
    arm(picture(3, 3, 16, 16))
    assert all(torch.equal(value, before[name]) for name, value in arm.state_dict().items())
    assert {name.split(".")[0] for name in before} == {"network", "widths", "classifier"}


def test_refusals():
    for arguments, message in (
        (("edsr",), "backbone must be one of fsrcnn, carn, srresnet, rcan; got 'edsr'"),
        (("fsrcnn", (16, 8)), r"widths must rise; got \(16, 8\)"),
        (("fsrcnn", ()), "widths must rise"),
    ):
        with pytest.raises(ValueError, match=f"ARM: {message}"):
            ARM(*arguments)
