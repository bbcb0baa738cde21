"""A 1 x 1 convolution over the joined channels of several images, beside joining them first as PyTorch does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import fastroute
from benchmarks.measure import device
from benchmarks.ops._common import OURS, Variant, close, compare, known
from benchmarks.setting import Setting

PEER, CONTIGUOUS = "join and convolve, channels_last", "join and convolve, contiguous"
# Images, channels of each and outputs: the merges of CARN's cascades, and the expansion of FSRCNN.
LAYERS = {"2 x 64 to 64": (2, 64, 64), "4 x 64 to 64": (4, 64, 64), "3 x 36 to 36": (3, 36, 36), "12 to 56": (1, 12, 56)}
SIZES = {"patches": (32, 32, 32), "image": (1, 270, 480)}
SMOKE_SIZES = {"smoke": (2, 16, 18)}
# Sums of up to 256 terms, added in another order.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def plain(images: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:  # [B, C, H, W] each, [O, C, 1, 1], [O]
    """What the published networks do."""
    return F.relu_(F.conv2d(torch.cat(list(images), dim=1), weight, bias))


def run_case(layer: str, size: str, shape: tuple[int, int, int], dtype: torch.dtype, setting: Setting) -> dict:
    """One layer on images of one size, in one type."""
    number, channels, outputs = LAYERS[layer]
    batch, height, width = shape
    where = {"device": device(), "dtype": dtype}
    contiguous = [torch.rand(batch, channels, height, width, **where) for _ in range(number)]
    images = [x.contiguous(memory_format=torch.channels_last) for x in contiguous]
    weight = torch.randn(outputs, number * channels, 1, 1, **where) / (number * channels) ** 0.5
    bias, slope = torch.randn(outputs, **where), torch.zeros(outputs, **where)
    last = weight.contiguous(memory_format=torch.channels_last)

    expected, usual = known(partial(plain, images, last, bias))
    check = close(expected, TOLERANCES[dtype])
    variants: dict[str, Variant | str] = {
        OURS: Variant(lambda: fastroute.conv1x1(images, weight, bias, slope), check),
        "fastroute, contiguous": Variant(lambda: fastroute.conv1x1(contiguous, weight, bias, slope), check),
        PEER: usual,
        CONTIGUOUS: Variant(partial(plain, contiguous, weight, bias), check),
    }
    run = setting.compiled(plain, images, last, bias)
    variants[f"{PEER}, compiled"] = run if isinstance(run, str) else Variant(run, check, foreign=True)
    flops = 2 * batch * height * width * weight.numel()
    bytes_moved = sum(x.nbytes for x in images) + expected.nbytes + weight.nbytes
    kind = str(dtype).removeprefix("torch.")
    label = f"conv1x1, {layer}, {batch} x {height} x {width}, {kind}"
    facts = {"size": size, "dtype": kind, "setup": layer}
    return compare(label, variants, bytes_moved, PEER, setting, flops, **facts)


@torch.no_grad()
def test_conv1x1(setting: Setting) -> None:
    """Merges of several images, of patches and of an image."""
    torch.manual_seed(0)
    sizes = SMOKE_SIZES if setting.smoke else SIZES
    cases = [(layer, size, shape, dtype) for dtype in TOLERANCES for layer in LAYERS for size, shape in sizes.items()]
    rows = [run_case(*case, setting) for case in cases]
    setting.save("conv1x1", rows, "with bias and ReLU; channels_last unless named; medians of alternating runs, warm")
