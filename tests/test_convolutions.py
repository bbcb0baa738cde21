"""Networks whose convolutions run by `conv3x3` and `conv1x1`: the same numbers, whatever becomes of their weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from networks import randomise
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute import use_backend
from fastroute.backends import EXTENSION
from fastroute.models import rrdbnet
from fastroute.models.carn import CARN
from fastroute.models.compact import Compact
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.rcan import RCAN
from fastroute.models.rrdbnet import DenseBlock, RRDBNet
from fastroute.models.srresnet import SRResNet
from fastroute.rewrite.convolutions import (
    Conv1x1,
    Conv3x3,
    FusedConv2d,
)
from fastroute.rewrite.optimize import optimize
from fastroute.rewrite.replace import is_rectifier, replace_convolutions

needs_kernels = pytest.mark.skipif(bool(EXTENSION.reasons), reason="; ".join(EXTENSION.reasons))
NETWORKS = {
    "carn": lambda: CARN(16, 4, groups=4),
    "carn features": lambda: CARN(16, upsample=False),
    "srresnet": lambda: SRResNet(16, 4, blocks=2),
    "srresnet features": lambda: SRResNet(16, blocks=2, upsample=False),
    "rcan": lambda: RCAN(16, 4, 1, 2, 4),
    "fsrcnn": lambda: FSRCNN(16, 4),
    "rrdbnet": lambda: RRDBNet(16, 1, 8),
    "compact": lambda: Compact(width=16, depth=3),
}


class Foreign(nn.Module):
    """A module of someone else, which names its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.PReLU(12))
        self.mix, self.grouped = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 24, 3, padding=1, groups=3, bias=False)
        self.strided, self.same = nn.Conv2d(24, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding="same")
        self.reflected, self.thin = (
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
        )

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        x = self.head[1](self.head[0](x))
        x = self.strided(F.relu(self.grouped(self.mix(x) + x)))
        return self.thin(self.reflected(self.same(x)))


def kinds(module: nn.Module) -> list[type]:
    return [type(layer) for layer in module.modules() if isinstance(layer, nn.Conv2d)]


def picture(*size: int) -> Tensor:
    return torch.rand(size or (2, 3, 13, 18), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def alike(network: nn.Module, original: nn.Module, x: Tensor) -> None:
    expected = original(x)
    assert expected.std() > 1e-3, "an output without contrast proves little"
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [(2, 3, 13, 18), (1, 3, 1, 1), (3, 3, 4, 40)], ids=str)
def test_networks_of_the_package(name, size):
    network = randomise(NETWORKS[name](), 4).eval()
    result = optimize(network)
    assert any(issubclass(kind, FusedConv2d) for kind in kinds(result)) and not any(
        issubclass(kind, FusedConv2d) for kind in kinds(network)
    )
    x = picture(*size)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        alike(result, network, x.contiguous(memory_format=memory_format))
    with use_backend("reference"):
        alike(result, network, x)


def test_foreign_module():
    network = randomise(Foreign(), 2).eval()
    result = optimize(network)
    alike(result, network, picture())
    plain = nn.Conv2d
    assert kinds(result) == [Conv3x3, Conv1x1, Conv3x3, plain, plain, plain, plain]
    # What the module itself calls stays a layer.
    assert isinstance(result.head[1], nn.PReLU) and result.head[0].rectifier is None


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rectifier", [nn.ReLU(), nn.LeakyReLU(0.2), nn.PReLU(), nn.PReLU(16), None], ids=str)
def test_sequences(groups, rectifier):
    layers = [nn.Conv2d(16, 16, 3, padding=1, groups=groups), *([rectifier] if rectifier else []), nn.PixelShuffle(2)]
    network = randomise(nn.Sequential(*layers, nn.Conv2d(4, 6, 1), nn.ReLU()), 5).eval()
    result = optimize(network)
    alike(result, network, picture(2, 16, 9, 7))
    first = result[0]
    # One pass over the image, unless the shuffle would mix groups.
    assert type(first) is Conv3x3 and first.shuffle == 2
    assert (first.rectifier is None) == (rectifier is None)
    assert [type(layer) for layer in result if not isinstance(layer, FusedConv2d | nn.Identity)] == []


def test_a_last_shuffle_is_left_to_the_stitching():
    network = randomise(nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2)), 1).eval()
    result = optimize(network)
    assert type(result[-1]) is nn.PixelShuffle and result[0].shuffle == 1
    alike(result, network, picture())


def test_a_shared_layer():
    layer = nn.Conv2d(8, 8, 3, padding=1)
    network = randomise(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), layer, nn.ReLU(), layer, nn.PReLU(), layer), 3).eval()
    alike(optimize(network), network, picture())


def layer_of(*following: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A network of one convolution, and the same rewritten; both share their weights."""
    network = randomise(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), *following), 6).eval().requires_grad_(False)
    return network, replace_convolutions(nn.Sequential(*network), owned=True)


def test_changed_weights_are_noticed():
    network, result = layer_of(nn.PReLU(8))
    x = picture(1, 4, 9, 9)
    alike(result, network, x)
    layer = result[0]
    with torch.no_grad():
        network[0].weight.mul_(-2)
        alike(result, network, x)
        network[0].weight[3] = 0.5
        network[0].bias.add_(1)
        network[1].weight.neg_()
        alike(result, network, x)
    other = randomise(copy.deepcopy(result), 9)
    result.load_state_dict(other.state_dict())
    alike(result, network, x)
    layer.weight = nn.Parameter(network[0].weight * 3, requires_grad=False)
    network[0].weight = layer.weight
    alike(result, network, x)
    network[0].weight.data = network[0].weight.data * 0.5
    alike(result, network, x)
    alike(result.double().float(), network.float(), x)
    before = layer.weight.clone()
    result.half().float()
    network[0].weight.data = before.half().float()
    alike(result, network, x)


def test_slopes_that_change_are_noticed():
    network, result = layer_of(nn.LeakyReLU(0.1))
    x = picture(1, 4, 9, 9)
    alike(result, network, x)
    network[1].negative_slope = 0.7
    alike(result, network, x)


@pytest.mark.parametrize("ran", [False, True])
def test_copies_and_pickles(ran):
    network, result = layer_of(nn.ReLU())
    x = picture(1, 4, 9, 9)
    if ran:
        result(x)
    for other in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert torch.equal(other(x), result(x))
        with torch.no_grad():
            other[0].weight.zero_()
            other[0].bias.fill_(0.25)
        assert (other(x) == 0.25).all()
    alike(result, network, x)
    assert set(result.state_dict()) == {"0.weight", "0.bias"}


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    return layer


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        return super().forward(x) * 2


class Doubling(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:  # [...]
        return super().forward(x) * 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: hooked(nn.Conv2d(4, 8, 3, padding=1)),
        lambda: Doubled(4, 8, 3, padding=1),
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 3, padding=1)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 8, 3, padding=1)),
        lambda: nn.Conv2d(4, 8, 3, padding=1, stride=2),
        lambda: nn.Conv2d(4, 8, 3, padding=2, dilation=2),
        lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"),
        lambda: nn.Conv2d(4, 8, 3),
        lambda: nn.Conv2d(4, 8, 5, padding=2),
        lambda: nn.Conv2d(4, 8, (3, 1), padding=(1, 0)),
        lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
        lambda: nn.Conv2d(4, 8, 1, groups=2),
    ],
)
def test_what_stays(make):
    layer = make().eval().requires_grad_(False)
    x = picture(1, 4, 9, 9)
    expected = layer(x)
    result = replace_convolutions(nn.Sequential(layer, nn.ReLU()), owned=True)
    assert result[0] is layer and type(result[1]) is nn.ReLU
    assert torch.equal(result(x), F.relu(expected))


@pytest.mark.parametrize("rectifier", [hooked(nn.ReLU()), Doubling(), nn.GELU(), nn.Identity()], ids=str)
def test_what_follows_and_stays(rectifier):
    network, result = layer_of(rectifier)
    assert not is_rectifier(rectifier) and result[1] is rectifier
    alike(result, network, picture(1, 4, 9, 9))


def test_modules_of_others_keep_their_sequences():
    """Anything may look at the layers of a sequence that is not owned."""
    network = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU())
    result = replace_convolutions(network)
    assert [type(layer) for layer in result] == [Conv3x3, nn.ReLU]


@needs_kernels
def test_when_the_kernel_runs():
    _, result = layer_of(nn.ReLU())
    layer, x = result[0], picture(1, 4, 9, 9)
    assert layer.has_kernel(x)
    assert not layer.has_kernel(x.double()) and not layer.has_kernel(x.bfloat16()) and not layer.has_kernel(x.to("meta"))
    assert not layer.has_kernel(x.clone().requires_grad_())
    with torch.no_grad():
        assert layer.has_kernel(x.clone().requires_grad_())
    with use_backend("reference"):
        assert not layer.has_kernel(x)
    assert layer.has_kernel(x)
    assert not copy.deepcopy(layer).requires_grad_(True).has_kernel(x)


def test_gradients_are_those_of_the_network():
    network, result = layer_of(nn.PReLU(8), nn.PixelShuffle(2), nn.Conv2d(2, 3, 1))
    x = picture(1, 4, 9, 9).requires_grad_()
    with torch.no_grad():
        result(x)
    for given in (network.requires_grad_(), result):
        given(x).square().sum().backward()
        found, x.grad = x.grad, None
    expected = torch.autograd.grad(network(x).square().sum(), x)[0]
    torch.testing.assert_close(found, expected)
    assert network[0].weight.grad is not None and torch.isfinite(network[0].weight.grad).all()


def test_half_types_run_as_pytorch_has_them():
    network, result = layer_of(nn.ReLU())
    x = picture(1, 4, 9, 9)
    result(x)
    network, result = (copy.deepcopy(module).bfloat16() for module in (network, result))
    assert torch.equal(result(x.bfloat16()), network(x.bfloat16()))


# Those that interpolate the image do so by other operations in a graph, in other last bits.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["carn", "srresnet features", "rrdbnet", "compact"])
def test_graphs_give_the_same_bits(name):
    """Of a network that ran before; also where a graph is decomposed, as compilers do."""
    result, x = optimize(randomise(NETWORKS[name](), 4).eval()), picture(1, 3, 9, 14)
    with torch.no_grad():
        expected = result(x)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(result, fullgraph=True, backend="aot_eager")(x), expected)
        program = torch.export.export(result, (x,))
        assert torch.equal(program.module()(x), expected)
        assert torch.equal(program.run_decompositions().module()(x), expected)
    assert not EXTENSION.info or any("conv3x3" in str(node.target) for node in program.graph.nodes)


@pytest.mark.slow
def test_graphs_of_another_type_than_ran():
    network, result = layer_of(nn.ReLU())
    x = picture(1, 4, 9, 9)
    result(x)
    torch._dynamo.reset()
    compiled = torch.compile(result, fullgraph=True, backend="aot_eager")
    y = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(compiled(y).square().sum(), y)
    torch.testing.assert_close(grad, torch.autograd.grad(network(y).square().sum(), y)[0])
    halves = copy.deepcopy(result).bfloat16()
    torch._dynamo.reset()
    compiled = torch.compile(halves, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x.bfloat16()), copy.deepcopy(network).bfloat16()(x.bfloat16()))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("height", [1, 7, 23, 24, 25, 48, 61])
def test_dense_blocks_in_bands_of_rows(monkeypatch, poisoned, height, dtype):
    """Of at least 24 rows, those before the first and behind the last one included: the same bits as at once."""
    block = randomise(DenseBlock(8, 4), 1).eval().requires_grad_(False)
    x, around = picture(2, 8, height, 19), picture(2, 8, height, 19).flip(3)
    expected = {None: block(x), around: block(x, around)}
    rewritten = replace_convolutions(copy.deepcopy(block)).to(dtype)
    ran = []
    plain = DenseBlock._banded
    monkeypatch.setattr(DenseBlock, "_banded", staticmethod(lambda *given: ran.append(0) or plain(*given)))
    for given, wanted in expected.items():
        results = []
        for most in (0, 1 << 30):
            monkeypatch.setattr(rrdbnet, "cached_bytes", lambda most=most: most)
            results.append(rewritten(x.to(dtype), None if given is None else given.to(dtype)))
        assert torch.equal(*results)
        for found in (result.float() for result in results):
            off = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
            torch.testing.assert_close(found, wanted, rtol=off, atol=off * float(wanted.abs().max()))
    assert len(ran) == 2
