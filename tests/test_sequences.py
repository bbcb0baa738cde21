"""Tests of sequences whose convolutions are called at their operators: the same bits, and no change goes unnoticed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support import same
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute import use_backend
from fastroute.backends import EXTENSION
from fastroute.models.fsrcnn import FSRCNN
from fastroute.rewrite.convolutions import Conv1x1, Conv3x3
from fastroute.rewrite.optimize import optimize, split_shuffle, split_upsampler
from fastroute.rewrite.sequence import FusedSequential

pytestmark = pytest.mark.skipif(bool(EXTENSION.reasons), reason="; ".join(EXTENSION.reasons))


def network() -> FusedSequential:
    torch.manual_seed(0)
    result = optimize(FSRCNN(8))
    assert isinstance(result, FusedSequential)
    return result


def convolution(sequence: FusedSequential, kind: type) -> nn.Module:
    return next(layer for layer in sequence if type(layer) is kind)


def plainly(sequence: FusedSequential, x: Tensor) -> Tensor:  # [B, C, H, W]
    """Layer by layer, as PyTorch's own sequence."""
    return nn.Sequential.forward(sequence, x)


def images() -> Tensor:
    return torch.rand(2, 3, 9, 14, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits(dtype, memory_format):
    sequence, x = network().to(dtype).to(memory_format=memory_format), images().to(dtype, memory_format=memory_format)
    assert sequence._ready(x) or dtype == torch.bfloat16
    same(sequence(x).contiguous(), plainly(sequence, x).contiguous())
    for shape in ((1, 3, 1, 1), (0, 3, 4, 4), (5, 3, 8, 8)):
        x = torch.rand(shape, dtype=dtype)
        same(sequence(x).contiguous(), plainly(sequence, x).contiguous())


def changes():
    """What may happen to a sequence, by name."""

    def in_place(s: FusedSequential) -> None:
        for layer in (convolution(s, Conv3x3), convolution(s, Conv1x1)):
            layer.weight.mul_(2)
            layer.bias.add_(0.5)

    def data(s: FusedSequential) -> None:
        for layer in (convolution(s, Conv3x3), convolution(s, Conv1x1)):
            layer.weight.data = layer.weight.data * 3
            layer.bias.data = layer.bias.data + 1

    def parameters(s: FusedSequential) -> None:
        for layer in (convolution(s, Conv3x3), convolution(s, Conv1x1)):
            layer.weight = nn.Parameter(layer.weight * 2, requires_grad=False)
            layer.bias = nn.Parameter(layer.bias + 1, requires_grad=False)

    def state(s: FusedSequential) -> None:
        s.load_state_dict({name: x * 2 for name, x in s.state_dict().items()})

    def slope(s: FusedSequential) -> None:
        next(layer for layer in s if getattr(layer, "rectifier", None) is not None).rectifier.negative_slope = 0.9

    def layer(s: FusedSequential) -> None:
        number = next(n for n, layer in enumerate(s) if type(layer) is Conv3x3)
        s[number] = nn.Identity()

    def first(s: FusedSequential) -> None:
        s[0].weight.mul_(2)

    def types(s: FusedSequential) -> None:
        s.double()

    def hook(s: FusedSequential) -> None:
        convolution(s, Conv3x3).register_forward_hook(lambda module, given, result: result + 1)

    def pre_hook(s: FusedSequential) -> None:
        convolution(s, Conv1x1).register_forward_pre_hook(lambda module, given: (given[0] + 1,))

    return [in_place, data, parameters, state, slope, layer, first, types, hook, pre_hook]


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
def test_changes_are_noticed(change):
    sequence = network()
    before = sequence(images())
    change(sequence)
    x = images().to(sequence[0].weight.dtype)
    found = sequence(x)
    same(found.contiguous(), plainly(copy.deepcopy(sequence), x).contiguous())
    assert not torch.equal(found.float(), before)


def test_contexts():
    """Gradients, other backends, global hooks and traces go layer by layer."""
    sequence, x = network(), images()
    assert sequence._ready(x)
    with torch.enable_grad():
        assert sequence._ready(x) is None
        given = x.clone().requires_grad_()
        sequence(given).sum().backward()
        assert given.grad is not None and given.grad.abs().sum() > 0
    with use_backend("reference"):
        assert sequence._ready(x) is None
    assert sequence._ready(x.double()) is None and sequence._ready(x.to("meta")) is None
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, result: seen.append(module))
    sequence(x)
    handle.remove()
    assert set(sequence) < set(seen)
    assert sequence._ready(x)


def test_copies():
    sequence, x = network(), images()
    expected = sequence(x)
    for other in (copy.deepcopy(sequence), pickle.loads(pickle.dumps(sequence))):
        assert other._steps is None
        same(other(x), expected)


def test_parts_of_a_branch_are_fast_too():
    sequence = network()
    body, factor = split_shuffle(sequence)
    assert isinstance(body, FusedSequential) and factor == 4
    found = split_upsampler(body, factor)
    assert found is not None and isinstance(found[0], FusedSequential)
    same(F.pixel_shuffle(body(images()), 4), sequence(images()))


def test_users_sequences_stay():
    """Nobody knows who looks into them; and one convolution has nothing to gain."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)]

    class Users(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*layers)

        def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
            return self.body(x)

    assert type(optimize(Users()).body) is nn.Sequential
    assert type(optimize(nn.Sequential(layers[0]))) is nn.Sequential
    assert type(optimize(nn.Sequential(*layers, nn.LSTM(3, 3)))) is nn.Sequential
