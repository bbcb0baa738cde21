"""FLOPs in both conventions, against the papers' tables and against a count of the real pass."""

from __future__ import annotations

import json

import pytest
import torch
from networks import random_classsr
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastroute.models.architectures import network_of
from fastroute.models.classsr import PatchClassifier
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.pcsr import PCSR
from fastroute.pixel.pixel_router import PixelRouter
from fastroute.pixel.pixel_stats import Work
from fastroute.profiling import RoutedFlops, count_flops, mix_flops

PATCH = (1, 3, 32, 32)
ORIGINALS = {"fsrcnn": 468e6, "carn": 1.15e9, "srresnet": 5.20e9, "rcan": 32.60e9}


@pytest.fixture(scope="module")
def tables(data_folder):
    return json.loads((data_folder / "fixtures" / "paper-tables.json").read_text())


def test_branches_as_the_papers_print_them(tables):
    table = tables["branch_flops"]["fsrcnn"]
    for width, printed in zip(table["widths"], table["flops"], strict=True):
        flops = count_flops(FSRCNN(width), PATCH, "paper")
        # Printed in millions; 304.57 is printed 304 and 467.88 is printed 468: less than one unit off either way.
        assert abs(flops - printed) < 0.6e6, f"width {width}: {flops / 1e6:.2f} M"


@pytest.mark.slow
def test_literal_figures():
    paper = [count_flops(FSRCNN(width), PATCH, "paper") for width in (16, 36, 56)]
    assert paper == [141_262_848, 304_570_368, 467_877_888]
    true = [count_flops(FSRCNN(width), PATCH) for width in (16, 36, 56)]
    assert [round(flops / 1e6) for flops in true] == [22, 36, 50]
    assert round(count_flops(PatchClassifier(), PATCH) / 1e6, 1) == 7.6
    # A network without transposed convolutions costs the same in both.
    assert count_flops(PatchClassifier(), PATCH, "paper") == count_flops(PatchClassifier(), PATCH)


def test_by_hand():
    # 8·8 pixels, 5 · 3 · 9 products each; two operations per product. The transposed layer: 5 · 2 · 16 per input pixel,
    # or per output pixel (16·16) as the papers count.
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.PReLU(), nn.ConvTranspose2d(5, 2, 4, 2, 1))
    assert count_flops(model, (1, 3, 8, 8)) == 2 * 64 * (5 * 3 * 9 + 5 * 2 * 16)
    assert count_flops(model, (1, 3, 8, 8), "paper") == 2 * (64 * 5 * 3 * 9 + 256 * 5 * 2 * 16)
    assert count_flops(model, (3, 3, 8, 8), "paper") == 3 * count_flops(model, (1, 3, 8, 8), "paper")
    grouped = nn.ConvTranspose2d(6, 4, 4, 2, 1, groups=2)
    assert count_flops(grouped, (1, 6, 8, 8), "paper") == 2 * 256 * 6 * 4 // 2 * 16
    assert count_flops(nn.Linear(7, 3), (5, 7)) == 2 * 5 * 7 * 3
    assert count_flops(nn.Identity(), (1, 3, 8, 8)) == 0


@pytest.mark.parametrize("size", [PATCH, (2, 3, 7, 13)])
@pytest.mark.parametrize("model", [FSRCNN(16), FSRCNN(5, 3), random_classsr((3, 4)).net2], ids=["w16", "x3", "routed"])
def test_true_convention_counts_the_real_pass(model, size):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.rand(size))
    assert count_flops(model, size) == counter.get_total_flops() > 0


def test_training_form_counts_as_written():
    """A transposed convolution in training runs as a larger dense one: the count is of the network as it is written."""
    model = FSRCNN(6)
    assert count_flops(model.train(), PATCH) == count_flops(model.eval(), PATCH)


def test_counting_leaves_no_trace():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    # A frozen batch norm in a network that trains.
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_flops(model, PATCH)
    assert [part.training for part in model.modules()] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(part._forward_hooks for part in model.modules())


def test_counting_leaves_no_trace_after_an_error():
    model = FSRCNN(4).train()
    with pytest.raises(RuntimeError):
        count_flops(model, (1, 5, 8, 8))
    assert all(part.training and not part._forward_hooks for part in model.modules())


def test_counts_wherever_the_weights_are():
    expected = count_flops(FSRCNN(4), PATCH)
    assert count_flops(FSRCNN(4).to("meta"), PATCH) == expected
    assert count_flops(FSRCNN(4).half(), PATCH) == expected


def test_unknown_convention():
    with pytest.raises(ValueError, match=r"convention must be one of \('true', 'paper', 'pcsr'\); got 'printed'"):
        count_flops(FSRCNN(4), PATCH, "printed")


@pytest.mark.parametrize("network", ORIGINALS)
def test_routed_mixes_of_table_1(tables, network):
    """A class mix with the printed FLOPs has the printed percentage."""
    branches = tables["branch_flops"][network]["flops"]
    assert tables["cdnsr_report_table_1"][network]["original"]["test2k"][2] == ORIGINALS[network] == branches[-1]
    for system, rows in tables["cdnsr_report_table_1"][network].items():
        for name, (_, _, flops, percent, _) in rows.items():
            cheap = (branches[2] - flops) / (branches[2] - branches[0])
            mix = mix_flops(branches, [cheap, 0, 1 - cheap])
            assert mix.routed == pytest.approx(flops)
            # Some rows are rounded down, others to the nearest: 232 of 468 is printed 49, 299 of 468 is printed 64.
            possible = (int(100 * mix.fraction), round(100 * mix.fraction))
            assert percent in possible, f"{network} {system} {name}: {100 * mix.fraction:.2f}"


def test_routed_mix_of_the_real_branches(tables):
    """ClassSR on test8K: 238 M are 51 % of the FLOPs in the papers' count, and 76 % with the classifier in truth."""
    paper = [count_flops(FSRCNN(width), PATCH, "paper") for width in (16, 36, 56)]
    true = [count_flops(FSRCNN(width), PATCH) for width in (16, 36, 56)]
    flops, percent = tables["cdnsr_report_table_1"]["fsrcnn"]["classsr"]["test8k"][2:4]
    cheap = (paper[2] - flops) / (paper[2] - paper[0])
    shares = [cheap, 0.0, 1 - cheap]
    assert round(100 * mix_flops(paper, shares).fraction) == percent == 51
    assert round(100 * mix_flops(true, shares, count_flops(PatchClassifier(), PATCH)).fraction) == 76


def test_pcsr_by_hand():
    """Beside the products, two per number that a batch norm reads and one per number that a PReLU reads; a ReLU is free."""
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.PReLU(), nn.ReLU(), nn.ConvTranspose2d(5, 2, 4, 2, 1)
    )
    products = count_flops(model, (2, 3, 8, 8), "paper")
    for mode in (model.eval(), model.train()):
        assert count_flops(mode, (2, 3, 8, 8), "pcsr") == products + (2 + 1) * 2 * 5 * 64
    assert count_flops(nn.Linear(7, 3), (5, 7), "pcsr") == 2 * 5 * 7 * 3


@pytest.mark.slow
def test_pcsr_demo(data_folder):
    """What the published demo prints for a 420 x 276 image: 130.91 G for CARN, 74.03 G for PCSR, its classifier included."""
    size = (1, 3, 276, 420)
    state = torch.load(data_folder / "weights" / "carn-x4.pth", map_location="cpu", weights_only=True)["model"]["sd"]
    carn = network_of("carn", state, "", 64, 4)
    assert (
        f"{count_flops(carn, size, 'pcsr') / 1e9:.2f}" == "130.91"
        and f"{count_flops(carn, size, 'paper') / 1e9:.2f}" == "130.74"
    )
    model = PCSR.from_published(torch.load(data_folder / "weights" / "pcsr-carn-x4.pth", map_location="cpu", weights_only=True))
    flops, pixels = PixelRouter(model).flops, 1104 * 1680
    # The share of expensive pixels is not printed; at this one the total is.
    expensive = round(0.14462 * pixels)
    work = Work(features=276 * 420, pixels=pixels, encoded=276 * 420, classified=pixels)
    paper = flops.done([pixels - expensive, expensive], work)[1]
    assert f"{paper.routed / 1e9:.2f}" == "74.03" and paper.paper == "PCSR"
    without = flops.done([pixels - expensive, expensive], Work(276 * 420, pixels, 276 * 420))[1]
    # Two per weight of its layers, 56 to 10 to 10 to 2, at every output pixel.
    assert paper.routed - without.routed == 2 * (56 * 10 + 10 * 10 + 10 * 2) * pixels
    assert (
        paper.dense == without.dense == 2 * (56 * 74 + 3 * 74**2 + 74 * 3) * pixels + count_flops(model.encoder, size, "pcsr")
    )


def test_what_the_code_of_classsr_prints():
    """For FSRCNN it adds 7.4 M per patch to the mean of 141, 304 and 468 M, and divides by 468 M."""
    counts = [60, 30, 10]
    printed = (141 * 60 + 304 * 30 + 468 * 10) / 100 + 7.4
    mix = mix_flops([141e6, 304e6, 468e6], counts).with_classifier(100)
    assert mix.routed / 100e6 == pytest.approx(printed) and mix.fraction == pytest.approx(printed / 468)


def test_mix_by_hand():
    mix = mix_flops([1.0, 4.0, 2.0], [5, 2, 1], 3.0)
    assert mix == RoutedFlops(5 + 8 + 2 + 3, 4 * 8)
    assert mix.fraction == 18 / 32
    with pytest.raises(ValueError, match="counts must have 3 entries, one per class; got 2"):
        mix_flops([1.0, 4.0, 2.0], [5, 2])
