"""`pixel_mlp` in float16 and bfloat16, where GPUs hold activations in that type: all sizes of its tensor-core kernels.

Runs on every backend, by test_emulated.py with the CUDA kernels emulated on the CPU, and there with little shared memory.
"""

from __future__ import annotations

from itertools import pairwise

import builds
import pytest
import torch
from support import EMULATED, HALF, eager_pixel_mlp, in_layout, same
from torch import Tensor

from fastroute import pixel_mlp
from fastroute.backends import EXTENSION
from fastroute.reference.pixel_mlp import pixel_mlp_reference

OPS = ("pixel_mlp",)
REASON = builds.compiler_reason() or "; ".join(EXTENSION.reasons) or None

# Hidden widths of each class, D, C: all sizes of the kernels.
WIDTHS = {
    "58": ([[58] * 4], 48, 3),
    "10-74": ([[10] * 3, [74] * 3], 48, 3),
    "20-33": ([[20, 33], None, []], 7, 2),
    "48-90": ([[40, 48, 5], [90]], 70, 9),
    "128-150": ([[128, 100], [150, 2]], 16, 3),
    "256": ([[256, 1, 130]], 130, 40),
    "40-classes": ([[n] for n in range(1, 41)], 5, 1),
}


def make(dim, hidden, channels, dtype, device):
    generator = torch.Generator().manual_seed(0)
    mlps = []
    for widths in hidden:
        layers = []
        for a, b in pairwise([] if widths is None else [dim + 4, *widths, channels]):
            weight = torch.randn(b, a, generator=generator).div(a**0.5)
            bias = torch.randn(b, generator=generator).mul(0.3)
            layers.append((weight.to(dtype).to(device), bias.to(dtype).to(device)))
        mlps.append(layers)
    return mlps


def inputs(dim, small, large, classes, channels, dtype, device):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, dim, *small, generator=generator).to(dtype).to(device)
    residual = torch.rand(2, channels, *small, generator=generator).to(dtype).to(device)
    class_map = torch.randint(classes, (2, *large), generator=generator, dtype=torch.uint8).to(device)
    return features, residual, class_map


def exact(features, mlps, size, class_map, residual) -> Tensor:
    weights, biases = [w.double() for mlp in mlps for w, _ in mlp], [b.double() for mlp in mlps for _, b in mlp]
    depths = [len(mlp) for mlp in mlps]
    return pixel_mlp_reference(features.double(), weights, biases, depths, *size, class_map, residual.double())


def close(actual, features, mlps, size, class_map, residual) -> None:
    """Error against float64 at most twice eager PyTorch's in that type, plus 8 units in the last place of float32."""
    true = exact(features, mlps, size, class_map, residual)
    plain = eager_pixel_mlp(features, mlps, size, class_map, residual)
    floor = 8 * torch.finfo(torch.float32).eps * max(true.abs().max().item(), 1.0)
    assert actual.dtype == features.dtype
    assert (actual.double() - true).abs().max() <= 2 * (plain.double() - true).abs().max() + floor


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("hidden", "dim", "channels"), WIDTHS.values(), ids=list(WIDTHS))
# Emulated, a sliced tensor is read as a contiguous one is: number by number.
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"] if EMULATED else ["contiguous", "channels_last", "sliced"])
def test_half(backend, hidden, dim, channels, layout, dtype):
    mlps = make(dim, hidden, channels, dtype, backend.device)
    small, large = (3, 5), (11, 17)
    features, residual, class_map = inputs(dim, small, large, len(hidden), channels, dtype, backend.device)
    features = in_layout(features, layout)
    output = pixel_mlp(features, mlps, large, class_map, residual)
    close(output, features, mlps, large, class_map, residual)
    if not backend.is_reference:
        band = pixel_mlp(features, mlps, large, class_map, residual, rows=(4, 9))
        same(band, output[:, :, 4:9].contiguous())


def test_weights_of_another_type(backend):
    """Those of float32 are rounded to the type of the features, see `tests/ops/test_pixel_mlp.py`; no others are."""
    mlps = make(9, [[20, 6], []], 3, torch.float64, backend.device)
    features, residual, class_map = inputs(9, (3, 4), (7, 10), 2, 3, torch.float16, backend.device)
    output = pixel_mlp(features, mlps, (7, 10), class_map, residual)
    true = exact(features, mlps, (7, 10), class_map, residual)
    # Nothing but the output is rounded to float16.
    assert ((output.double() - true).abs() <= 2.0**-11 * true.abs() + 2e-6).all()


def test_unknown_class_is_free(backend):
    if backend.name != "cuda" and not EMULATED:
        pytest.skip("other backends raise, or wait for an index error")
    for dtype in (torch.float32, torch.float16):
        mlps = make(6, [[7, 5], [], [4]], 2, dtype, backend.device)
        features, residual, _ = inputs(6, (3, 4), (9, 8), 3, 2, dtype, backend.device)
        for number in (-1, 3, 255, 256, 1 << 32, -(1 << 63)):
            class_map = torch.arange(2 * 9 * 8, device=backend.device).view(2, 9, 8) % 3
            known = pixel_mlp(features, mlps, (9, 8), class_map, residual)
            free = pixel_mlp(features, [[]], (9, 8), None, residual)
            class_map[:, 2::3, 1::2] = number
            output = pixel_mlp(features, mlps, (9, 8), class_map, residual)
            same(output, torch.where((class_map == number)[:, None], free, known))


@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_streamed(monkeypatch):
    """With 24 KiB of shared memory, the weights of most networks do not stay in it."""
    monkeypatch.setenv("SHIM_SHARED_KIB", "24")
    result = builds.emulated(__file__, str(builds.HERE / "test_pixel_mlp_tf32.py"), "-k", "contiguous or tf32")
    assert result.returncode == 0, f"{result.stdout[-10000:]}\n{result.stderr[:10000]}"
