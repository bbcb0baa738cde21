"""pixel_mlp at the widths of the published upsamplers, beside the sgemm of this machine and plain PyTorch.

The rate counts multiply-adds done: the first layer's product with a feature once per LR pixel, the other layers once per
output pixel. The ceiling is the best of several matrix products that stay in the caches, measured in the same run.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastroute
from benchmarks.measure import alternate, save
from fastroute.reference.pixel_mlp import pixel_mlp_reference

SCALE = 4
# Feature width, then the hidden widths: FSRCNN-PCSR and CARN-PCSR, as published.
SETUPS = {"58 wide (FSRCNN)": (48, [58] * 4, [10] * 3), "74 wide (CARN)": (52, [74] * 4, [20] * 3)}
GEMM_SIZES = (256, 512, 768)


def make_layers(width: int, hidden: list[int], channels: int) -> list[tuple[Tensor, Tensor]]:
    """Random layers of the given widths that keep the size of what goes through."""
    layers, fan_in = [], width + 4
    for fan_out in (*hidden, channels):
        layers.append((torch.randn(fan_out, fan_in) / fan_in**0.5, 0.1 * torch.randn(fan_out)))
        fan_in = fan_out
    return layers


def multiply_adds(layers: list[tuple[Tensor, Tensor]], width: int, features: int) -> int:
    """Done for features · SCALE² output pixels; the coordinates' two per unit of the first layer included."""
    first = layers[0][0].shape[0]
    tail = sum(weight.numel() for weight, _ in layers[1:])
    return features * (first * width + SCALE**2 * (2 * first + tail))


def plain(features: Tensor, layers: list[tuple[Tensor, Tensor]], size: tuple[int, int], residual: Tensor) -> Tensor:
    """Plain PyTorch: the same queries in chunks of 300,000, one linear layer after the other."""
    weights, biases = [w for w, _ in layers], [b for _, b in layers]
    return pixel_mlp_reference(features, weights, biases, [len(layers)], *size, None, residual)


@pytest.mark.parametrize("setup", SETUPS, ids=lambda name: name.split()[0])
def test_pixel_mlp(setup: str, smoke: bool, saving: bool) -> None:
    """The dearer upsampler everywhere, the cheaper one everywhere, and a third of each block dear."""
    torch.manual_seed(0)
    width, heavy, light = SETUPS[setup]
    h, w = (16, 24) if smoke else (160, 240)
    size = (h * SCALE, w * SCALE)
    features = torch.randn(1, width, h, w).contiguous(memory_format=torch.channels_last)
    residual = torch.rand(1, 3, h, w)
    mlps = [make_layers(width, light, 3), make_layers(width, heavy, 3)]
    class_map = (torch.rand(1, h // 4, w // 4) < 0.33).to(torch.uint8).repeat_interleave(16, 1).repeat_interleave(16, 2)
    rounds = 2 if smoke else 9
    squares = {n: (torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)) for n in GEMM_SIZES}
    for layers in mlps:
        ours = fastroute.pixel_mlp(features, [layers], size, None, residual)
        torch.testing.assert_close(ours, plain(features, layers, size, residual), rtol=1e-4, atol=1e-4)
    variants = {f"sgemm {n}": lambda n=n: torch.mm(squares[n][0], squares[n][1], out=squares[n][2]) for n in GEMM_SIZES}
    times = alternate(
        {
            **variants,
            "dear": lambda: fastroute.pixel_mlp(features, [mlps[1]], size, None, residual),
            "cheap": lambda: fastroute.pixel_mlp(features, [mlps[0]], size, None, residual),
            "a third dear": lambda: fastroute.pixel_mlp(features, mlps, size, class_map, residual),
            "dear, plain PyTorch": lambda: plain(features, mlps[1], size, residual),
        },
        rounds,
    )
    peak = max(2 * n**3 / times[f"sgemm {n}"].median for n in GEMM_SIZES)
    rows = []
    for name, layers in (("dear", mlps[1]), ("cheap", mlps[0])):
        rate = 2 * multiply_adds(layers, width, h * w) / times[name].median
        rows.append({"setup": setup, "mlp": name, "flops_per_second": rate, "of_sgemm": rate / peak})
        print(
            f"\n{setup}, {name}: {times[name]}, {rate / 1e9:.0f} GFLOP/s, {100 * rate / peak:.0f} % of sgemm's {peak / 1e9:.0f}"
        )
    speedup = times["dear, plain PyTorch"].median / times["dear"].median
    print(f"  plain PyTorch: {times['dear, plain PyTorch']}, {speedup:.1f} x; a third dear: {times['a third dear']}")
    if saving and not smoke:
        name = f"pixel_mlp_{setup.split()[0]}"
        save(name, [{"times": times, "rates": rows, "speedup": speedup}], "float32, x4, 160 x 240 features; medians")
