"""SRResNet: its definition written out, its FLOPs, its fast form."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from networks import calibrate, picture, randomise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastroute
from fastroute import TileGrid
from fastroute.models.carn import CARN
from fastroute.models.checkpoints import save_checkpoint
from fastroute.models.classsr import WIDTHS, ClassSR, PatchClassifier
from fastroute.models.fsrcnn import FSRCNN
from fastroute.models.rcan import RCAN
from fastroute.models.srresnet import SRResNet
from fastroute.profiling import count_flops
from fastroute.rewrite.optimize import optimize

pytestmark = pytest.mark.usefixtures("quick_tuning")
PATCH = (1, 3, 32, 32)


def written_out(state: dict[str, Tensor], x: Tensor, scale: int, blocks: int) -> Tensor:
    """SRResNet by the names of its state dict."""

    def conv(name: str, y: Tensor) -> Tensor:
        return F.conv2d(y, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    def active(y: Tensor) -> Tensor:
        return F.leaky_relu(y, 0.1)

    y = active(conv("conv_first", x))
    for i in range(blocks):
        y = y + conv(f"recon_trunk.{i}.conv2", F.relu(conv(f"recon_trunk.{i}.conv1", y)))
    y = active(F.pixel_shuffle(conv("upconv1", y), 3 if scale == 3 else 2))
    if scale == 4:
        y = active(F.pixel_shuffle(conv("upconv2", y), 2))
    return conv("conv_last", active(conv("HRconv", y))) + F.interpolate(x, scale_factor=scale, mode="bilinear")


@pytest.mark.parametrize("scale", [2, 3, 4])
@torch.no_grad()
def test_definition(scale):
    model = randomise(SRResNet(6, scale, blocks=3)).double()
    x = torch.rand(2, 3, 7, 9, dtype=torch.float64)
    given = x.clone()
    output = model(x)
    assert output.shape == (2, 3, 7 * scale, 9 * scale)
    torch.testing.assert_close(output, written_out(model.state_dict(), x, scale, 3), rtol=0, atol=1e-12)
    assert torch.equal(x, given), "the input was written to"


@pytest.mark.slow
def test_gradients_reach_every_weight():
    model = randomise(SRResNet(3, 4, blocks=2)).double()
    x = torch.rand(1, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    # In-place activations and sums leave what the backward pass reads.
    assert torch.autograd.gradcheck(model, x)
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    expected = torch.autograd.grad(
        written_out(dict(model.named_parameters()), x, 4, 2).square().mean(), list(model.parameters())
    )
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch.inference_mode()
def test_fast_form(memory_format):
    model = randomise(SRResNet(8, 4, blocks=3), 1).eval()
    x = torch.rand(2, 3, 11, 13).contiguous(memory_format=memory_format)
    torch.testing.assert_close(optimize(model).to(memory_format=memory_format)(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_branches_as_the_papers_print_them(data_folder):
    table = json.loads((data_folder / "fixtures" / "paper-tables.json").read_text())["branch_flops"]["srresnet"]
    assert tuple(table["widths"]) == WIDTHS["srresnet"]
    for width, printed in zip(table["widths"], table["flops"], strict=True):
        # 5.194 G is printed 5.20: less than one unit off either way.
        assert abs(count_flops(SRResNet(width), PATCH, "paper") - printed) < 0.01e9


def test_true_convention_counts_the_real_pass():
    model = SRResNet(5, blocks=2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.rand(2, 3, 8, 9))
    assert count_flops(model, (2, 3, 8, 9)) == counter.get_total_flops() > 0
    # It has no transposed convolution.
    assert count_flops(model, PATCH) == count_flops(model, PATCH, "paper")


@pytest.mark.slow
@pytest.mark.parametrize("backbone", list(WIDTHS))
def test_published_layout(data_folder, backbone):
    shapes = json.loads((data_folder / "fixtures" / "classsr-state-dict-shapes.json").read_text())["state_dict_shapes"]
    with torch.device("meta"):
        system = ClassSR.build(backbone)
    assert {name: list(value.shape) for name, value in system.state_dict().items()} == shapes[f"classsr-{backbone}"]


def test_starts_near_the_bilinear_image():
    torch.manual_seed(0)
    x = torch.rand(1, 3, 12, 12)
    with torch.no_grad():
        assert (SRResNet(16)(x) - F.interpolate(x, scale_factor=4, mode="bilinear")).abs().max() < 0.05


def test_refusals():
    for arguments, message in (((8, 5), "scale must be 2, 3 or 4; got 5"), ((0,), "width and blocks must be at least 1")):
        with pytest.raises(ValueError, match=f"SRResNet: {message}"):
            SRResNet(*arguments)
    with pytest.raises(ValueError, match="ClassSR: backbone must be one of fsrcnn, carn, srresnet, rcan; got 'edsr'"):
        ClassSR.build("edsr")


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "layers"), [*((backbone, 3) for backbone in WIDTHS), ("fsrcnn", 5)])
@torch.no_grad()
def test_classsr_through_load(tmp_path, backbone, layers):
    """Two classes over every backbone, saved, recognised by its keys, and routed like the plain form."""
    small: dict[str, Callable[[int], nn.Module]] = {
        "fsrcnn": lambda width: FSRCNN(width),
        "carn": lambda width: CARN(width, mean_layers=True),
        "srresnet": lambda width: SRResNet(width, blocks=2),
        "rcan": lambda width: RCAN(width, groups=2, blocks=1, reduction=2),
    }
    system = ClassSR([small[backbone](width) for width in (4, 8)], PatchClassifier(2, layers=layers))
    randomise(system).eval()
    calibrate(system.classifier, 32)
    path = tmp_path / "system.safetensors"
    save_checkpoint(path, system, {"patch": 32, "stride": 32})
    router, image = fastroute.load(path, window="uniform", merge=1), picture(1, 3, 64, 96)
    assert router.num_classes == 2
    result = router.upscale(image)
    assert min(result.stats.counts_per_class) > 0
    patches = fastroute.extract_patches(image, TileGrid(64, 96, 32, 32))
    own = fastroute.extract_patches(result.image, TileGrid(256, 384, 128, 128))
    assert torch.equal(result.class_map.flatten(), system.classifier(patches).argmax(dim=1))
    expected = system(patches)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    # The same networks alone.
    save_checkpoint(path, system.branches[1])
    alone = fastroute.load(path, window="uniform", merge=1).upscale(image).image
    dense = stitch(system.branches[1](fastroute.extract_patches(image, TileGrid(64, 96, 32, 28))))
    torch.testing.assert_close(alone, dense, rtol=1e-4, atol=1e-4 * dense.abs().max().item())


def stitch(patches: Tensor) -> Tensor:
    return fastroute.stitch_patches(patches, TileGrid(64, 96, 32, 28, 4))


def test_rcan_of_another_range(tmp_path):
    network = RCAN(8, groups=1, blocks=1, reduction=4, input_range=1)
    save_checkpoint(tmp_path / "rcan.safetensors", network, {"input_range": 1})
    image = picture(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(fastroute.load(tmp_path / "rcan.safetensors").upscale(image).image, network(image))


def test_misfits_are_named(tmp_path):
    state = RCAN(8, groups=1, blocks=2, reduction=4).state_dict()
    del state["body.1.weight"]
    torch.save(state, tmp_path / "rcan.pth")
    with pytest.raises(fastroute.CheckpointError, match=r"does not fit RCAN: 1 missing: body\.1\.weight"):
        fastroute.load(tmp_path / "rcan.pth")
    whole = ClassSR([SRResNet(4, blocks=1), SRResNet(8, blocks=1)]).state_dict()
    torch.save({k: v for k, v in whole.items() if not k.startswith("classifier")}, tmp_path / "headless.pth")
    with pytest.raises(fastroute.CheckpointError, match=r"does not fit ClassSR: .* missing: classifier"):
        fastroute.load(tmp_path / "headless.pth")
