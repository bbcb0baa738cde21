"""The features of ClassSR's class module for every patch of an image, beside the same layers over patches and over the image.

The FLOPs are those of each cell of the image once; patches that are run one by one compute the cells of their overlaps again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastroute
from benchmarks.measure import device
from benchmarks.ops._common import OURS, PATCH, SIZES, SMOKE_SIZES, STRIDE, Variant, close, compare, known
from benchmarks.setting import Setting
from fastroute import TileGrid
from fastroute.models.classsr import PatchClassifier
from fastroute.reference.cell_mlp import cell_mlp_reference

CELL = PatchClassifier.CELL
SPAN, STEP = PATCH // CELL, STRIDE // CELL
# Patches per pass of the usual way: the activations of more are larger than the caches.
PASS = 32
PEER = "patches, batched"
WHOLE, LAST = "convolutions over the image", "convolutions, channels_last"
# Four layers of up to 128 terms, summed in another order.
TOLERANCE = 1e-5


def whole_strides(size: int) -> int:
    """The largest part of an axis, in pixels, that patches cover without a shifted last one."""
    return STRIDE * ((size - PATCH) // STRIDE) + PATCH


def patchwise(network: nn.Module, image: Tensor, grid: TileGrid) -> Tensor:  # [1, 3, H, W] -> [rows, cols, D]
    """As the published code classifies, but many patches at a time."""
    patches = fastroute.extract_patches(image, grid)
    return torch.cat([network(part).mean(dim=(2, 3)) for part in patches.split(PASS)]).view(grid.rows, grid.cols, -1)


def imagewise(network: nn.Module, image: Tensor) -> Tensor:  # [1, 3, H, W] -> [rows, cols, D]
    """Each layer over the whole image, then one pooling."""
    return F.avg_pool2d(network(image), SPAN, STEP)[0].permute(1, 2, 0)


def ours(run: Callable[[], Tensor]) -> Tensor:  # [1, cells, cols, D] -> [rows, cols, D]
    """The rows of cells of each patch, averaged."""
    return run()[0].unfold(0, SPAN, STEP).mean(dim=-1)


def run_case(name: str, height: int, width: int, classifier: PatchClassifier, setting: Setting) -> dict:
    """One image."""
    grid = TileGrid(whole_strides(height), whole_strides(width), PATCH, STRIDE)
    image = torch.rand(1, 3, grid.height, grid.width, device=device())
    network = classifier.CondNet[:-1]
    layers = [(conv.weight.flatten(1), conv.bias) for conv in network if isinstance(conv, nn.Conv2d)]
    weights, biases = [w for w, _ in layers], [b for _, b in layers]
    last = image.contiguous(memory_format=torch.channels_last)

    def fused() -> Tensor:
        return fastroute.cell_mlp(image, layers, CELL, SPAN, STEP)

    def plain() -> Tensor:
        return cell_mlp_reference(image, weights, biases, 0.1, CELL, SPAN, STEP)

    expected, usual = known(partial(patchwise, network, image, grid))
    check = close(expected, TOLERANCE)
    variants: dict[str, Variant | str] = {
        OURS: Variant(partial(ours, fused), check),
        PEER: usual,
        WHOLE: Variant(partial(imagewise, network, image), check),
        LAST: Variant(partial(imagewise, network, last), check),
        "reference": Variant(partial(ours, plain), check),
    }
    if name in ("2K", "smoke") or setting.full:
        run = setting.compiled(imagewise, network, last)
        variants[f"{LAST}, compiled"] = run if isinstance(run, str) else Variant(run, check, foreign=True)
    rows, cols = grid.height // CELL, grid.width // CELL
    flops = 2 * rows * cols * sum(weight.numel() for weight in weights)
    bytes_moved = image.nbytes + rows * grid.cols * biases[-1].nbytes
    label = f"cell_mlp, class features of {grid.num_patches} patches, {grid.width} x {grid.height}, float32"
    facts = {"size": name, "dtype": "float32", "patches": grid.num_patches}
    return compare(label, variants, bytes_moved, PEER, setting, flops, **facts)


@torch.no_grad()
def test_cell_mlp(setting: Setting) -> None:
    """ClassSR's class module with random weights."""
    torch.manual_seed(0)
    classifier = PatchClassifier().to(device()).eval()
    sizes = SMOKE_SIZES if setting.smoke else SIZES
    rows = [run_case(name, *size, classifier, setting) for name, size in sizes.items()]
    setting.save(
        "cell_mlp",
        rows,
        f"the four layers that ClassSR's class module has before its average, patches of {PATCH} at a stride of {STRIDE}, "
        "images cropped to whole strides; medians of alternating runs, warm",
    )
