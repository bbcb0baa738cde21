"""The last layers of FSRCNN's branches computed while their patches are stitched, beside PyTorch's and then the stitching.

The FLOPs are those of the expansion and of the 9 x 9 taps of the transposed convolution that end within a patch; its sub-pixel
form has zeros beside.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks.baselines.classsr_published import compiled_network
from benchmarks.measure import device
from benchmarks.ops._common import OURS, PATCH, SCALE, SIZES, SMOKE_SIZES, STRIDE, Variant, close, compare, complete, known
from benchmarks.setting import Setting
from fastroute import TileGrid, make_window, stitch_patches
from fastroute.models.fsrcnn import FSRCNN
from fastroute.ops._upsampled import Upsampler, stitch_upsampled, upsamples
from fastroute.patch.branches import even_parts
from fastroute.rewrite.optimize import simplify, split_shuffle, split_upsampler

WIDTH = 56
# Patches per pass, as a branch is found to run fastest.
PASS = 32
PEER = "plain PyTorch"
SUBPIXEL = "sub-pixel form, channels_last"


def last_layers() -> tuple[nn.Sequential, nn.Sequential, Upsampler]:
    """Those of FSRCNN with random weights: as it is written, in sub-pixel form without the shuffle, and for the stitching."""
    network = FSRCNN(WIDTH, SCALE).eval().requires_grad_(False)
    branch, shuffle = split_shuffle(simplify(network))
    split = split_upsampler(branch, shuffle)
    assert split is not None, "FSRCNN ends in layers that are left to the stitching"
    body, upsampler = split
    last = branch[len(body) :]
    return nn.Sequential(*last[:-1], network.tail_conv), last.to(memory_format=torch.channels_last), upsampler


def some_features(count: int, channels: int) -> Tensor:  # [count, channels, p, p]
    """As a branch leaves them."""
    return torch.rand(count, channels, PATCH, PATCH).contiguous(memory_format=torch.channels_last)


def needed_flops(plain: nn.Sequential) -> int:
    """Of one patch: the expansion of every pixel, and the taps of every pixel but those that end outside the patch."""
    expand, upsample = plain[0], plain[-1]
    kernel = upsample.kernel_size[0]
    taps = kernel * PATCH - (kernel - SCALE)  # along an axis; what sticks out is reached from one pixel each
    return 2 * (expand.weight.numel() * PATCH**2 + upsample.in_channels * upsample.out_channels * taps**2)


def run_case(
    name: str,
    height: int,
    width: int,
    upsampler: Upsampler,
    ways: Mapping[str, tuple[nn.Module | str, int]],
    flops: int,
    setting: Setting,
) -> dict:
    """The features of one image's patches to its 8-bit pixels.

    Args:
        name, height, width: of the LR image.
        upsampler: the layers, as the stitching takes them.
        ways: others to compute them, PEER first: modules, or why there is none, and the pixel shuffle that they leave out.
        flops: of a patch.
        setting: with few rounds for a smoke run.
    """
    grid = TileGrid(height, width, PATCH, STRIDE, SCALE)
    features = some_features(grid.num_patches, upsampler.features)
    batches = list(features.split(even_parts(grid.num_patches, PASS)))
    # In class order, as the routers number patches.
    inverse = torch.randperm(grid.num_patches)
    window = make_window("uniform", PATCH * SCALE, STRIDE * SCALE)
    size = (1, 3, *grid.output_size)

    def fused(out: Tensor) -> Tensor:
        stitch_upsampled(batches, [0] * len(batches), [upsampler], grid, window, inverse, (0, size[2]), out)
        return out

    def layer_by_layer(layers: nn.Module, shuffle: int, out: Tensor) -> Tensor:
        return stitch_patches([layers(batch) for batch in batches], grid, inverse=inverse, shuffle=shuffle, out=out)

    def image() -> Tensor:
        """One of each variant's own: what another has written would hide what it leaves out."""
        return torch.zeros(size, dtype=torch.uint8)

    expected, usual = known(partial(layer_by_layer, *ways[PEER], image()))
    check = close(expected, 0)
    variants: dict[str, Variant | str] = {OURS: Variant(partial(fused, image()), check), PEER: usual}
    for way, (layers, shuffle) in list(ways.items())[1:]:
        run = partial(layer_by_layer, layers, shuffle, image())
        variants[way] = layers if isinstance(layers, str) else Variant(run, check, foreign=way != SUBPIXEL)
    label = f"stitch_patches, last layers of FSRCNN-{WIDTH}, {width} x {height} -> {size[3]} x {size[2]}, to uint8"
    # Of the layers; the image is 8-bit.
    facts = {"size": name, "dtype": "float32", "output_pixels": size[2] * size[3]}
    return compare(label, variants, features.nbytes + expected.nbytes, PEER, setting, flops * grid.num_patches, **facts)


def test_stitch_patches_upsampled(setting: Setting) -> None:
    """One class's features, in the passes in which its branch leaves them."""
    if not upsamples(device()):
        pytest.skip(f"the last layers of a branch are not left to the stitching on {device()}")
    torch.manual_seed(0)
    plain, subpixel, upsampler = last_layers()
    ways: dict[str, tuple[nn.Module | str, int]] = {PEER: (plain, 1), SUBPIXEL: (subpixel, SCALE)}
    example = some_features(PASS, upsampler.features)
    # Compiled once, for passes of any length.
    ways |= {f"{way}, compiled": (compiled_network(layers, example, setting), r) for way, (layers, r) in ways.items()}
    sizes = SMOKE_SIZES if setting.smoke else SIZES
    some = {name: size for name, size in sizes.items() if name != "8K" or complete(setting)}
    rows = [run_case(name, *size, upsampler, ways, needed_flops(plain), setting) for name, size in some.items()]
    setting.save(
        "stitch_patches_upsampled",
        rows,
        f"channels_last features in passes of {PASS} patches, x4, into a given 8-bit image; layers are run or compiled per "
        "pass, their outputs stitched by stitch_patches; medians of alternating runs, warm",
    )
