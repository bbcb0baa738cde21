"""pixel_mlp at the widths of the published upsamplers, beside plain PyTorch, other layouts and the products of this machine.

The FLOPs are those that must be done: the first layer's product with a feature once per LR pixel, its coordinates' two
multiply-adds per unit and the other layers once per output pixel.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fastroute
from benchmarks import measure
from benchmarks.baselines.mlp_layouts import Layers, by_columns, grouped
from benchmarks.measure import device
from benchmarks.ops._common import OURS, SCALE, SIZES, Variant, close, compare, known
from benchmarks.setting import Setting
from fastroute.reference.pixel_mlp import pixel_mlp_reference

# Feature width, then the hidden widths of the expensive and of the cheap upsampler: FSRCNN-PCSR and CARN-PCSR, as published.
SETUPS = {"FSRCNN": (48, [58] * 4, [10] * 3), "CARN": (52, [74] * 4, [20] * 3)}
SMOKE_SIZE = (16, 24)
PEER = "plain PyTorch"
# Share of the pixels whose MLP is the expensive one; classes are constant over squares of this many pixels.
SHARE, SQUARE = 0.33, 16
# A product of a hundred and more terms, several layers deep, summed in another order; of bfloat16 rounded after every layer.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}


def make_layers(width: int, hidden: list[int], channels: int) -> Layers:
    """Random layers of the given widths that keep the size of what goes through."""
    layers, fan_in = [], width + 4
    for fan_out in (*hidden, channels):
        weight, bias = torch.randn(fan_out, fan_in) / fan_in**0.5, 0.1 * torch.randn(fan_out)
        layers.append((weight.to(device()), bias.to(device())))
        fan_in = fan_out
    return layers


def multiply_adds(layers: Layers, width: int, features: int, pixels: int) -> int:
    """Done for some output pixels of one class, when all features are read."""
    first = layers[0][0].shape[0]
    return features * first * width + pixels * (2 * first + sum(weight.numel() for weight, _ in layers[1:]))


def plain(features: Tensor, mlps: list[Layers], size: tuple[int, int], class_map: Tensor | None, residual: Tensor) -> Tensor:
    """Plain PyTorch: the queries of each class in chunks of 300,000, one linear layer after the other."""
    weights, biases = [w for layers in mlps for w, _ in layers], [b for layers in mlps for _, b in layers]
    return pixel_mlp_reference(features, weights, biases, [len(layers) for layers in mlps], *size, class_map, residual)


def run_case(setup: str, which: str, name: str, h: int, w: int, dtype: torch.dtype, setting: Setting) -> dict:
    """One image's features through the expensive MLP, the cheap one, or each pixel through its own."""
    torch.manual_seed(0)
    width, heavy, light = SETUPS[setup]
    size = (h * SCALE, w * SCALE)
    features = torch.randn(1, width, h, w).contiguous(memory_format=torch.channels_last).to(device(), dtype)
    residual = torch.rand(1, 3, h, w).to(device(), dtype)
    both = [make_layers(width, hidden, 3) for hidden in (light, heavy)]
    both = [[(weight.to(dtype), bias.to(dtype)) for weight, bias in layers] for layers in both]
    class_map, mlps, pixels = None, [both[which == "expensive"]], [size[0] * size[1]]
    if which == "mixed":
        blocks = (torch.rand(1, -(-size[0] // SQUARE), -(-size[1] // SQUARE)) < SHARE).to(torch.uint8)
        class_map = blocks.repeat_interleave(SQUARE, 1).repeat_interleave(SQUARE, 2)[:, : size[0], : size[1]]
        class_map = class_map.contiguous().to(device())
        mlps, pixels = both, torch.bincount(class_map.flatten(), minlength=2).tolist()
    expected, usual = known(lambda: plain(features, mlps, size, class_map, residual))
    check = close(expected, TOLERANCE[dtype])
    variants: dict[str, Variant | str] = {
        OURS: Variant(lambda: fastroute.pixel_mlp(features, mlps, size, class_map, residual), check),
        PEER: usual,
    }
    if name in ("2K", "smoke") and dtype == torch.float32:
        run = setting.compiled(plain, features, mlps, size, class_map, residual)
        variants["plain PyTorch, compiled"] = run if isinstance(run, str) else Variant(run, check, foreign=True)
        if class_map is not None:
            variants["queries as columns"] = Variant(
                lambda: by_columns(features, mlps, size, class_map, residual), check, foreign=True
            )
            many = grouped(mlps)
            is_there = not isinstance(many, str)
            run_many = Variant(lambda: many(features, size, class_map, residual), check, True) if is_there else many
            variants["torch._grouped_mm"] = run_many
    flops = 2 * sum(multiply_adds(layers, width, h * w, n) for layers, n in zip(mlps, pixels, strict=True))
    parts = [features, residual, expected, *([] if class_map is None else [class_map])]
    label = f"pixel_mlp, {which}, {setup}, {size[1]} x {size[0]}, {str(dtype).removeprefix('torch.')}"
    facts = {"setup": setup, "mlp": which, "size": name, "dtype": str(dtype).removeprefix("torch.")}
    bytes_moved = sum(part.nbytes for part in parts)
    pixel_count = size[0] * size[1]
    return compare(label, variants, bytes_moved, PEER, setting, flops, dtype, **facts, output_pixels=pixel_count)


def test_pixel_mlp(setting: Setting) -> None:
    """The expensive upsampler everywhere, the cheap one everywhere, and a third of the pixels in the expensive one."""
    sizes = {"smoke": SMOKE_SIZE} if setting.smoke else SIZES
    rows = []
    for setup in SETUPS:
        for name, (h, w) in sizes.items():
            # Plain PyTorch takes half a minute for 33 million pixels on two cores.
            if name == "8K" and not setting.full and measure.device().type == "cpu":
                continue
            for which in ("mixed",) if name == "4K" and measure.device().type == "cpu" else ("expensive", "cheap", "mixed"):
                rows.append(run_case(setup, which, name, h, w, torch.float32, setting))
        name, (h, w) = next(iter(sizes.items()))
        rows.append(run_case(setup, "mixed", name, h, w, torch.bfloat16, setting))
    setting.save("pixel_mlp", rows, "channels_last features, x4; a third of the pixels expensive where mixed; medians, warm")
