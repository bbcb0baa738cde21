"""RCAN: its definition written out, its range of 0 … 255, its FLOPs, its fast form."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from networks import randomise
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastroute.models.carn import MeanShift
from fastroute.models.classsr import WIDTHS
from fastroute.models.rcan import RCAN
from fastroute.profiling import count_flops
from fastroute.rewrite.optimize import optimize

PATCH = (1, 3, 32, 32)
SMALL = {"width": 8, "groups": 2, "blocks": 3, "reduction": 4}


def written_out(state: dict[str, Tensor], x: Tensor, factors: tuple[int, ...], groups: int = 2, blocks: int = 3) -> Tensor:
    """RCAN by the names of its state dict, from 0 … 255 to 0 … 255."""

    def conv(name: str, y: Tensor) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(y, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    x = conv("head.0", conv("sub_mean", x))
    y = x
    for g in range(groups):
        z = y
        for b in range(blocks):
            at = f"body.{g}.body.{b}.body"
            r = conv(f"{at}.2", F.relu(conv(f"{at}.0", z)))
            gate = F.relu(conv(f"{at}.3.conv_du.0", F.adaptive_avg_pool2d(r, 1)))
            z = z + r * torch.sigmoid(conv(f"{at}.3.conv_du.2", gate))
        y = y + conv(f"body.{g}.body.{blocks}", z)
    x = x + conv(f"body.{groups}", y)
    for i, factor in enumerate(factors):
        x = F.pixel_shuffle(conv(f"tail.0.{2 * i}", x), factor)
    return conv("add_mean", conv("tail.1", x))


@pytest.mark.parametrize(("scale", "factors"), [(2, (2,)), (3, (3,)), (4, (2, 2))])
@torch.no_grad()
def test_definition(scale, factors):
    model = randomise(RCAN(scale=scale, **SMALL)).double()
    x = torch.rand(2, 3, 7, 9, dtype=torch.float64)
    given = x.clone()
    output = model(x)
    assert output.shape == (2, 3, 7 * scale, 9 * scale)
    expected = written_out(model.state_dict(), 255 * x, factors) / 255
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, given), "the input was written to"


@torch.no_grad()
def test_input_range_matters():
    whole = randomise(RCAN(input_range=255, **SMALL)).double()
    unit = RCAN(input_range=1, **SMALL).double()
    unit.load_state_dict(whole.state_dict())
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(unit(255 * x) / 255, whole(x), rtol=1e-12, atol=1e-12)
    assert (unit(x) - whole(x)).abs().max() > 1e-3


@pytest.mark.slow
def test_gradients_reach_every_weight():
    model = randomise(RCAN(4, 2, groups=1, blocks=2, reduction=2, input_range=3)).double()
    x = torch.rand(1, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, x)
    model(x).square().mean().backward()
    gradients = torch.autograd.grad(
        (written_out(dict(model.named_parameters()), 3 * x, (2,), 1, 2) / 3).square().mean(), list(model.parameters())
    )
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch.inference_mode()
def test_fast_form(memory_format):
    model = randomise(RCAN(**SMALL), 1).eval()
    before, given = copy.deepcopy(model.state_dict()), torch.rand(2, 3, 11, 13)
    x = given.clone().contiguous(memory_format=memory_format)
    fast = optimize(model).to(memory_format=memory_format)
    assert type(fast.add_mean) is MeanShift and fast.input_range == 1
    expected = model.double()(x.double())
    # As far from float64 as the unfolded network itself.
    error = (fast(x) - expected).abs().max()
    assert error <= 2 * (model.float()(x) - expected).abs().max() + 1e-5
    assert torch.equal(x, given), "the input was written to"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the original was folded"
    # Folding twice is folding once.
    torch.testing.assert_close(optimize(fast)(x), fast(x), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_branches_as_the_papers_print_them(data_folder, number):
    table = json.loads((data_folder / "fixtures" / "paper-tables.json").read_text())["branch_flops"]["rcan"]
    assert tuple(table["widths"]) == WIDTHS["rcan"]
    with torch.device("meta"):
        flops = count_flops(RCAN(table["widths"][number]), PATCH, "paper")
    # 19.908 G is printed 19.90: less than one unit off either way.
    assert abs(flops - table["flops"][number]) < 0.01e9


def test_true_convention_counts_the_real_pass():
    model = RCAN(**SMALL)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.rand(2, 3, 8, 9))
    assert count_flops(model, (2, 3, 8, 9)) == counter.get_total_flops() > 0


def test_refusals():
    for arguments, message in (
        ({"scale": 5}, "scale must be 3 or a power of 2 from 2; got 5"),
        ({"input_range": 0}, "input_range must be positive"),
        ({"mean": (0.5,)}, "mean must have one number per channel, 3; got 1"),
    ):
        with pytest.raises(ValueError, match=f"RCAN: .*{message}"):
            RCAN(**{**SMALL, **arguments})
