"""Rewritten networks compute the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import randomise
from torch import nn

from fastroute.models.fsrcnn import FSRCNN, TransposedConv2d
from fastroute.models.subpixel import SubpixelPlan, dense_equivalent
from fastroute.rewrite.convolutions import Conv1x1, Conv3x3
from fastroute.rewrite.optimize import OneSlope, optimize, parameter_dtype, simplify, split_shuffle

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def images(c: int = 3, size: int = 11, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, c, size, size + 2, generator=torch.Generator().manual_seed(1), dtype=dtype)


def check(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """`optimize` keeps what `model` computes, and `model` itself; returns the result."""
    model.eval()
    expected = model(x).detach()
    assert expected.std() > 1e-3, "an output without contrast proves little"
    before = copy.deepcopy(model.state_dict())
    structure, grads = str(model), [p.requires_grad for p in model.parameters()]
    result = optimize(model)
    given = x.clone()
    with torch.inference_mode():
        torch.testing.assert_close(result(given), expected, **TOLERANCE)
    assert torch.equal(given, x), "the input was written to"
    assert not any(p.requires_grad for p in result.parameters())
    assert str(model) == structure
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    own = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in own for p in result.parameters()), "a weight is shared with the original"
    return result


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("width", [3, 16])
def test_fsrcnn(scale, width):
    result = check(randomise(FSRCNN(width, scale), 5), images())
    kinds = [type(layer) for layer in result]
    assert kinds[-1] is nn.PixelShuffle
    assert nn.ConvTranspose2d not in kinds and TransposedConv2d not in kinds and nn.PReLU not in kinds
    body, factor = split_shuffle(result)
    assert factor == scale
    torch.testing.assert_close(nn.functional.pixel_shuffle(body(images()), factor), result(images()), rtol=0, atol=0)


def test_fsrcnn_features_and_one_pixel():
    check(randomise(FSRCNN(6, upsample=False), 2), images())
    check(randomise(FSRCNN(6, 4, channels=1), 2), torch.rand(1, 1, 1, 1))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_is_folded(affine, bias):
    conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect", bias=bias)
    model = nn.Sequential(conv, nn.BatchNorm2d(8, affine=affine), nn.ReLU(), nn.Conv2d(8, 3, 1), nn.BatchNorm2d(3))
    result = check(randomise(model, 7), images())
    assert not any(isinstance(part, nn.BatchNorm2d) for part in result.modules())
    assert len(result) == 3


def test_batch_norms_that_stay():
    # In front of the convolution, behind something else, and without running statistics.
    before = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    assert sum(isinstance(part, nn.BatchNorm2d) for part in check(randomise(before, 3), images())) == 2
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    assert isinstance(check(model, images())[1], nn.BatchNorm2d)


def test_activations():
    channelwise = check(randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4)), 4), images())
    assert isinstance(channelwise[1], nn.PReLU)
    single = check(randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU()), 4), images())
    assert isinstance(single[1], nn.LeakyReLU) and single[1].inplace
    # In place it would destroy the caller's image.
    assert isinstance(check(randomise(nn.Sequential(nn.PReLU(), nn.Conv2d(3, 4, 3)), 4), images())[0], nn.PReLU)
    assert isinstance(check(randomise(nn.Sequential(nn.Identity(), nn.PReLU()), 4), images())[0], nn.PReLU)


def test_nested_sequences_are_flattened():
    inner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.PReLU(), nn.Identity(), nn.Sequential(nn.Conv2d(4, 12, 3))))
    model = randomise(nn.Sequential(inner, nn.Sequential(nn.PixelShuffle(2))), 6)
    result = check(model, images())
    assert [type(layer) for layer in simplify(model)] == [nn.Conv2d, OneSlope, nn.Conv2d, nn.PixelShuffle]
    # The slope is taken over by the convolution before it.
    assert [type(layer) for layer in result] == [Conv1x1, nn.Identity, nn.Conv2d, nn.PixelShuffle]
    assert split_shuffle(result)[1] == 2


def test_subclass_of_sequential_keeps_its_forward():
    class Residual(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Residual(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.PReLU()))
    result = check(randomise(model, 8), images())
    assert isinstance(result[1], Residual)
    assert [type(layer) for layer in result[1]] == [Conv3x3, nn.BatchNorm2d, nn.PReLU]


def test_module_that_reads_parts_of_a_sequence():
    """A forward of its own may name the layers of a sequence and read what lies between them."""

    class Taps(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.PReLU()), nn.Conv2d(3, 3, 1), nn.PReLU())

        def forward(self, x):
            features = self.body[1](self.body[0](x))
            return features + self.body[2](features)

    check(randomise(Taps(), 9), images())


def test_subclasses_of_layers_keep_their_forward():
    class Clamped(nn.ConvTranspose2d):
        def forward(self, x, output_size=None):
            return super().forward(x, output_size).clamp(0, 0.1)

    class Standardised(nn.Conv2d):
        def forward(self, x):
            weight = self.weight / self.weight.std((1, 2, 3), keepdim=True)
            return nn.functional.conv2d(x, weight, self.bias, padding=self.padding)

    check(randomise(nn.Sequential(Clamped(3, 4, 4, 2, 1)), 1), images())
    check(randomise(nn.Sequential(Standardised(3, 4, 3), nn.BatchNorm2d(4)), 1), images())


def test_result_is_in_evaluation_mode():
    model = nn.Sequential(FSRCNN(4), nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), nn.Dropout()).train()
    for result in (optimize(model), optimize(model[0]), dense_equivalent(model[0].tail_conv.eval())):
        assert not any(part.training for part in result.modules())


def test_shared_layers():
    conv, slope = nn.Conv2d(3, 3, 3, padding=1), nn.PReLU()
    check(randomise(nn.Sequential(conv, slope, conv, nn.BatchNorm2d(3), slope), 2), images())


def test_transposed_convolutions_that_stay():
    for layer in (nn.ConvTranspose2d(4, 4, 4, 2, 1, groups=2), nn.ConvTranspose2d(4, 3, 3, 2)):
        assert isinstance(check(randomise(nn.Sequential(layer), 1), images(4))[0], nn.ConvTranspose2d)


@st.composite
def layers(draw: st.DrawFn) -> nn.ConvTranspose2d:
    stride, padding = draw(st.integers(1, 5)), draw(st.integers(0, 4))
    extra = draw(st.integers(0, stride - 1))
    kernel = stride + 2 * padding - extra
    bias = draw(st.booleans())
    layer = nn.ConvTranspose2d(draw(st.integers(1, 3)), draw(st.integers(1, 3)), kernel, stride, padding, extra, bias=bias)
    return randomise(layer.double(), draw(st.integers(0, 99)))


@given(layers(), st.integers(1, 6), st.integers(1, 6))
def test_dense_equivalent(layer, height, width):
    x = torch.randn(2, layer.in_channels, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = dense_equivalent(layer)(x)
    assert result.shape[2:] == (height * layer.stride[0], width * layer.stride[0])
    torch.testing.assert_close(result, layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "extra", "before", "after"),
    [(9, 4, 3, 1, 1, 1), (9, 3, 3, 0, 1, 1), (9, 2, 4, 1, 2, 2), (4, 2, 1, 0, 1, 1), (2, 2, 0, 0, 0, 0), (1, 1, 0, 0, 0, 0)],
)
def test_plan(kernel, stride, padding, extra, before, after):
    plan = SubpixelPlan.of(nn.ConvTranspose2d(2, 3, kernel, stride, padding, extra))
    assert (plan.before, plan.after, plan.width) == (before, after, before + 1 + after)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kernel_size": 4, "stride": 2, "padding": 1, "groups": 2}, "grouped or dilated"),
        ({"kernel_size": 4, "stride": 2, "padding": 1, "dilation": 2}, "grouped or dilated"),
        ({"kernel_size": (4, 2), "stride": 2, "padding": (1, 0)}, "not square"),
        ({"kernel_size": 4, "stride": (2, 1), "padding": 1}, "not square"),
        ({"kernel_size": 3, "stride": 2}, "its output is not stride times its input"),
    ],
)
def test_plan_refuses(options, reason):
    layer = nn.ConvTranspose2d(2, 2, **options)
    assert SubpixelPlan.unsupported_reasons(layer) == [reason]
    for function in (SubpixelPlan.of, dense_equivalent):
        with pytest.raises(ValueError, match=f"no sub-pixel form: {reason}"):
            function(layer)


@pytest.mark.parametrize(("kernel", "stride", "padding", "extra"), [(9, 4, 3, 1), (9, 3, 3, 0), (9, 2, 4, 1), (5, 4, 1, 1)])
def test_training_form_of_a_transposed_convolution(kernel, stride, padding, extra):
    layer = randomise(TransposedConv2d(2, 3, kernel, stride, padding, extra).double(), 3)
    results = []
    for training in (True, False):
        layer.train(training).zero_grad()
        x = images(2, 5, torch.float64).requires_grad_()
        output = layer(x)
        (output * torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)).sum().backward()
        results.append([output.detach(), x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()])
    for trained, evaluated in zip(*results, strict=True):
        torch.testing.assert_close(trained, evaluated, rtol=1e-11, atol=1e-11)


def test_training_form_gradcheck():
    layer = TransposedConv2d(1, 2, 4, 2, 1).double().train()
    x = images(1, 3, torch.float64)[:1].requires_grad_()

    def run(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x, layer.weight, layer.bias))


def test_training_form_with_an_output_size():
    layer = TransposedConv2d(1, 2, 3, 2, 1, 1).train()
    x = images(1, 3)
    assert layer(x, output_size=[5, 9]).shape[2:] == (5, 9)


def test_split_shuffle():
    tail = nn.PixelShuffle(3)
    body, factor = split_shuffle(nn.Sequential(nn.Conv2d(3, 27, 1), tail))
    assert factor == 3 and [type(layer) for layer in body] == [nn.Conv2d]
    for branch in (nn.Conv2d(3, 3, 1), nn.Sequential(tail), nn.Sequential(tail, nn.Conv2d(3, 3, 1))):
        assert split_shuffle(branch) == (branch, 1)


def test_parameter_dtype():
    assert parameter_dtype(nn.Conv2d(1, 1, 1).bfloat16()) == torch.bfloat16
    assert parameter_dtype(nn.Upsample(scale_factor=2)) == torch.float32
