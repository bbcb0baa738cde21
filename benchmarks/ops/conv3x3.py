"""A 3 x 3 convolution with its rectifier, beside PyTorch's own (oneDNN), compiled PyTorch and OpenVINO.

The FLOPs are those of a direct convolution, two per multiply-add. Winograd's minimal filtering does a quarter of the products,
so the operator may take less time than the floor in float32. In bfloat16 it does all of them.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastroute
from benchmarks.baselines.engines import Engines
from benchmarks.measure import device
from benchmarks.ops._common import OURS, Variant, close, compare, known
from benchmarks.setting import Setting

PEER, CONTIGUOUS = "PyTorch, channels_last", "PyTorch, contiguous"
# Inputs, outputs, groups and the factor of a pixel shuffle: a layer of SRResNet, one of CARN with 4 groups, an upsampler, the
# last layer of RRDBNet's dense block, the body of FSRCNN,
# the last layer of CARN and SRResNet.
LAYERS = {
    "64 to 64": (64, 64, 1, 1),
    "36 to 36 in 4 groups": (36, 36, 4, 1),
    "64 to 256, shuffled by 2": (64, 256, 1, 2),
    "192 to 64": (192, 64, 1, 1),
    "12 to 12": (12, 12, 1, 1),
    "64 to 3": (64, 3, 1, 1),
}
SIZES = {"patches": (32, 32, 32), "image": (1, 270, 480)}
SMOKE_SIZES = {"smoke": (2, 16, 18)}
# Sums of up to 1,728 terms, and the rounding of the transforms.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class Layer(nn.Module):
    """What PyTorch runs: convolution, rectifier, pixel shuffle."""

    def __init__(self, inputs: int, outputs: int, groups: int, shuffle: int) -> None:
        super().__init__()
        self.conv, self.shuffle = nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups), shuffle

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        """See the class."""
        return F.pixel_shuffle(F.relu_(self.conv(x)), self.shuffle)


def run_case(layer: str, size: str, shape: tuple[int, int, int], dtype: torch.dtype, setting: Setting) -> dict:
    """One layer on images of one size, in one type."""
    inputs, outputs, groups, shuffle = LAYERS[layer]
    batch, height, width = shape
    network = Layer(inputs, outputs, groups, shuffle).to(device(), dtype).eval()
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    contiguous = torch.rand(batch, inputs, height, width, device=device(), dtype=dtype)
    image = contiguous.contiguous(memory_format=torch.channels_last)
    conv = network.conv
    prepared, slope = fastroute.conv3x3_weight(conv.weight, groups, shuffle), torch.zeros(outputs, device=device(), dtype=dtype)

    expected, usual = known(partial(last, image))
    check = close(expected, TOLERANCES[dtype])
    variants: dict[str, Variant | str] = {
        OURS: Variant(lambda: fastroute.conv3x3(image, prepared, conv.bias, slope), check),
        "fastroute, contiguous": Variant(lambda: fastroute.conv3x3(contiguous, prepared, conv.bias, slope), check),
        PEER: usual,
        CONTIGUOUS: Variant(partial(network, contiguous), check),
    }
    peers = {f"{PEER}, compiled": setting.compiled(last, image)}
    if dtype == torch.float32:
        # In bfloat16 a single layer would be converted on both sides.
        peers["OpenVINO"] = Engines(network, contiguous).by_openvino(dtype, "LATENCY")
    for variant, run in peers.items():
        variants[variant] = run if isinstance(run, str) else Variant(run, check, foreign=True)
    flops = 2 * batch * height * width * conv.weight.numel()
    bytes_moved = image.nbytes + expected.nbytes + prepared.weight.nbytes
    kind = str(dtype).removeprefix("torch.")
    label = f"conv3x3, {layer}, {batch} x {height} x {width}, {kind}"
    facts = {"size": size, "dtype": kind, "setup": layer}
    return compare(label, variants, bytes_moved, PEER, setting, flops, **facts)


@torch.no_grad()
def test_conv3x3(setting: Setting) -> None:
    """Layers of the usual networks, of patches and of an image."""
    torch.manual_seed(0)
    sizes = SMOKE_SIZES if setting.smoke else SIZES
    cases = [(layer, size, shape, dtype) for dtype in TOLERANCES for layer in LAYERS for size, shape in sizes.items()]
    rows = [run_case(*case, setting) for case in cases]
    setting.save(
        "conv3x3",
        rows,
        "with bias and ReLU, channels_last unless named; FLOPs of the direct convolution; medians of alternating runs, warm",
    )
