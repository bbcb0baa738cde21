"""`pixel_mlp` in float32 where torch allows TF32: what its tensor-core kernels compute, and who is asked for it.

Runs on every backend, Triton's interpreter too, and by test_emulated.py with the CUDA kernels emulated on the CPU, there with
little shared memory as well.
"""

from __future__ import annotations

import math
import sys

import pytest
import torch
from support import EMULATED, in_layout, same
from test_pixel_widths import WIDTHS, exact, inputs, make
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastroute
from fastroute import backends, pixel_mlp
from fastroute.ops.pixel_mlp import _tf32_is_allowed
from fastroute.reference.pixel_mlp import pixel_mlp_reference

OPS = ("pixel_mlp",)
OP = torch.ops.fastroute.pixel_mlp.tf32
MODULE = sys.modules["fastroute.ops.pixel_mlp"]


@pytest.fixture
def tf32(monkeypatch):
    """As if the switch were on and the tensors on a GPU."""
    monkeypatch.setattr(MODULE, "multiplies_as_tf32", lambda x: True)


def rounded(x: Tensor) -> Tensor:
    """To 10 bits behind the point, ties away from zero."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Rounding(TorchFunctionMode):
    """Layers of PyTorch as a GPU computes them where TF32 is allowed."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            args = (rounded(args[0]), rounded(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))


def close(actual: Tensor, features, mlps, size, class_map, residual) -> None:
    """Error against float64 at most twice that of PyTorch's layers in TF32, plus 8 units in the last place of float32."""
    true = exact(features, mlps, size, class_map, residual)
    weights, biases = [w for mlp in mlps for w, _ in mlp], [b for mlp in mlps for _, b in mlp]
    with Rounding():
        plain = pixel_mlp_reference(features, weights, biases, [len(mlp) for mlp in mlps], *size, class_map, residual)
    floor = 8 * torch.finfo(torch.float32).eps * max(true.abs().max().item(), 1.0)
    assert actual.dtype == torch.float32
    assert (actual.double() - true).abs().max() <= 2 * (plain.double() - true).abs().max() + floor


@pytest.mark.parametrize("name", WIDTHS)
def test_widths(backend, tf32, name):
    hidden, dim, channels = WIDTHS[name]
    mlps = make(dim, hidden, channels, torch.float32, backend.device)
    small, large = (3, 5), (11, 17)
    features, residual, class_map = inputs(dim, small, large, len(hidden), channels, torch.float32, backend.device)
    features = in_layout(features, ("contiguous", "channels_last")[list(WIDTHS).index(name) % 2])
    output = pixel_mlp(features, mlps, large, class_map, residual)
    close(output, features, mlps, large, class_map, residual)
    if not backend.is_reference:
        band = pixel_mlp(features, mlps, large, class_map, residual, rows=(4, 9))
        same(band, output[:, :, 4:9].contiguous())


@pytest.mark.slow
def test_opcheck(operator):
    mlps = make(2, [[4, 3], None], 3, torch.float32, operator.device)
    features, residual, class_map = inputs(2, (3, 4), (7, 5), 2, 3, torch.float32, operator.device)
    weights, biases = [w for mlp in mlps for w, _ in mlp], [b for mlp in mlps for _, b in mlp]
    for x in (features, residual, *weights, *biases):
        x.requires_grad_()
    depths = [len(mlp) for mlp in mlps]
    opcheck(OP, (features, weights, biases, depths, 7, 5, class_map, residual, None, 0, 7))


def test_table(backend, tf32):
    if backend.name not in ("triton", "cuda") and not EMULATED:
        pytest.skip("other backends keep float32")
    with backend.device:
        # A feature is rounded to the nearest of 10 bits, a tie away from zero, in the first layer and behind a ReLU; what is
        # beside products is not: a bias, the coordinates.
        step = 2.0**-10
        numbers = torch.tensor([1 + step / 2, 1 + step / 4, 1 + 3 * step / 4, -1 - step / 2, 1 + step, math.nan, math.inf])
        nearest = torch.tensor([1 + step, 1, 1 + step, -1 - step, 1 + step, math.nan, math.inf])
        bias = step / 8
        one, zero = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]), torch.zeros(5)
        first = (one[None], torch.tensor([bias]))
        features = numbers[None, None, None]
        size = (1, len(numbers))
        torch.testing.assert_close(
            pixel_mlp(features, [[first]], size)[0, 0, 0], nearest + bias, rtol=0, atol=0, equal_nan=True
        )
        # Of a deeper one the first unit is a bias that the second layer rounds.
        deep = [(torch.stack([zero, one]), torch.tensor([1 + step / 2, 0.0])), (torch.ones(1, 2), torch.tensor([bias]))]
        # The first of them multiplies what is not finite by 0.
        expected = torch.where(numbers.isfinite(), 1 + step + nearest.clamp(min=0) + bias, math.nan)
        torch.testing.assert_close(pixel_mlp(features, [deep], size)[0, 0, 0], expected, rtol=0, atol=0, equal_nan=True)
        # Weights are rounded too; the operator that nobody asked to round does not.
        weight = torch.tensor([[1 + step / 2, 0.0, 0.0, 0.0, 0.0]])
        ones, still = torch.ones(1, 1, 1, 1), torch.zeros(1)
        assert pixel_mlp(ones, [[(weight, still)]], (1, 1)).item() == 1 + step
        assert torch.ops.fastroute.pixel_mlp(ones, [weight], [still], [1], 1, 1, None, None, None, 0, 1).item() == 1 + step / 2


@pytest.fixture
def switches():
    """The switches of matrix products, put back afterwards."""
    products = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before, everywhere = [p.fp32_precision for p in products], torch.backends.fp32_precision
    yield torch.backends
    torch.backends.fp32_precision = everywhere
    torch.set_float32_matmul_precision("highest")
    for product, value in zip(products, before, strict=True):
        product.fp32_precision = value


class Called(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def called(backend: str, dtype: torch.dtype) -> str:
    """The operator that a call on a GPU takes, tensors without memory standing for its own."""
    with FakeTensorMode(), fastroute.use_backend(backend), Called() as seen:
        features, weight, bias = (torch.empty(size, dtype=dtype, device="cuda") for size in ((1, 5, 3, 4), (3, 9), (3,)))
        pixel_mlp(features, [[(weight, bias)]], (6, 8))
    return next(name for name in seen.names if "pixel_mlp" in name)


@pytest.mark.parametrize(("backend_name", "space"), [("cuda", "fastroute"), ("triton", "fastroute_triton")])
def test_follows_the_switch(monkeypatch, switches, backend_name, space):
    if backend_name == "triton":
        pytest.importorskip("triton.language", reason="triton is not installed")
        from fastroute.triton import _library

        _library.load()
    monkeypatch.setattr(backends, "unsupported_reasons", lambda op, backend, device: [])

    def asked(dtype=torch.float32) -> bool:
        name = called(backend_name, dtype)
        assert name in (f"{space}.pixel_mlp.tf32", f"{space}.pixel_mlp.default")
        return name.endswith("tf32")

    assert not asked()
    torch.set_float32_matmul_precision("high")
    assert asked()
    assert not asked(torch.float16)
    switches.cuda.matmul.allow_tf32 = False
    assert not asked()
    # Set by its newer name the switch can no longer be read by the older one.
    switches.cuda.matmul.fp32_precision = "tf32"
    assert asked()
    switches.cuda.matmul.fp32_precision = "none"
    assert not asked()
    switches.fp32_precision = "tf32"
    assert asked()


def test_a_compiled_graph_follows_the_switch(switches):
    compiled = torch.compile(lambda x: x + 1 if _tf32_is_allowed() else x, fullgraph=True, backend="eager")
    for value in ("ieee", "tf32", "ieee", "tf32"):
        switches.cuda.matmul.fp32_precision = value
        assert compiled(torch.zeros(())).item() == (value == "tf32")
