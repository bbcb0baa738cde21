"""What several test files need: inputs, exact comparison, recompile counting."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastroute.backends import select
from fastroute.reference.pixel_mlp import apply_mlp, bilinear_reference, nearest_axis, placed_axis

HALF = (torch.float16, torch.bfloat16)
FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGER_IMAGE = (torch.uint8, torch.uint16)
# Whether these tests run the CUDA kernels emulated on the CPU (tests/cuda), with threads one after another.
EMULATED = "FASTROUTE_SHIM" in os.environ
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "expanded")
Case = TypeVar("Case")

# (height, width, patch, stride, coverage): odd sizes, exact fits, a remainder of one pixel, images smaller than a
# patch in one or both axes, strides from 1 to patch.
GEOMETRIES = [
    (11, 13, 5, 3, "full"),
    (11, 13, 5, 3, "crop"),
    (16, 12, 4, 4, "full"),
    (16, 13, 4, 4, "crop"),
    (9, 8, 4, 1, "full"),
    (9, 8, 4, 1, "crop"),
    (13, 7, 6, 5, "full"),
    (8, 8, 8, 3, "full"),
    (8, 9, 8, 8, "crop"),
    (3, 17, 6, 4, "full"),
    (17, 1, 6, 2, "full"),
    (2, 3, 7, 7, "full"),
    (1, 1, 1, 1, "full"),
    (5, 4, 1, 1, "crop"),
    (33, 41, 32, 28, "full"),
]


def few(cases: Iterable[Case], turn: int = 0) -> list[Case]:
    """All cases; one of them, by turns, where kernels are interpreted or emulated, which takes milliseconds per block."""
    cases = list(cases)
    return [cases[turn % len(cases)]] if EMULATED or os.environ.get("TRITON_INTERPRET") == "1" else cases


def same(actual: Tensor, expected: Tensor) -> None:
    """Equal type, shape, device and values: data movement has no tolerance."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.device == expected.device
    assert torch.equal(comparable(actual), comparable(expected)), describe(actual, expected)


def comparable(x: Tensor) -> Tensor:
    """uint16 tensors cannot be compared: their bits can."""
    return x.view(torch.int16) if x.dtype == torch.uint16 else x


def describe(actual: Tensor, expected: Tensor) -> str:
    """Where and by how much two tensors of one shape differ."""
    wrong = (comparable(actual) != comparable(expected)).nonzero()
    place = tuple(wrong[0].tolist()) if len(wrong) else ()
    return f"{len(wrong)} of {actual.numel()} differ, first at {place}: {actual[place]} instead of {expected[place]}"


def bits(x: Tensor) -> Tensor:
    """The bits of a tensor, in which NaN equals itself and -0 differs from 0."""
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def random(shape: Iterable[int], dtype: torch.dtype = torch.float32, device: Any = "cpu", seed: int = 0) -> Tensor:
    """Values of [-0.3, 1.3), so that clamping has something to do; integers of their whole range."""
    generator = torch.Generator().manual_seed(seed)
    if dtype in INTEGER_IMAGE:
        high = 256 if dtype == torch.uint8 else 65536
        return torch.randint(0, high, tuple(shape), generator=generator, dtype=torch.int32).to(dtype).to(device)
    values = torch.rand(tuple(shape), generator=generator, dtype=torch.float64) * 1.6 - 0.3
    return values.to(dtype).to(device)


def in_layout(x: Tensor, layout: str) -> Tensor:  # [B, C, H, W]
    """The values of `x` with other strides."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return x[:, :1].expand(x.shape)
    b, c, h, w = x.shape
    # A window into a larger tensor that starts at no aligned address.
    larger = torch.zeros(b, c + 1, h + 2, 2 * w + 3, dtype=x.dtype, device=x.device)
    view = larger[:, 1:, 1 : h + 1, 3 : 2 * w + 3 : 2]
    view.copy_(x)
    return view


def compiles_once(function: Callable, arguments: Iterable[tuple]) -> None:
    """Without graph breaks, one compilation serves all arguments, and each result is that of eager execution.

    Sizes that are equal in the first call but mean different things would be taken for one: let them differ.
    """
    torch.compiler.reset()
    # A compilation may call its backend twice, so recompilations are counted by whoever starts them.
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for args in arguments:
            for actual, expected in zip(as_tuple(compiled(*args)), as_tuple(function(*args)), strict=True):
                same(actual, expected)
    assert counter.frame_count >= 1


def inductor_equals_eager(function: Callable, *args: Any) -> None:
    """The default compiler gives the same result, with its own memory planning."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for actual, expected in zip(as_tuple(compiled(*args)), as_tuple(function(*args)), strict=True):
        same(actual, expected)


def as_tuple(result: Any) -> tuple:
    return result if isinstance(result, tuple) else (result,)


def repeats(function: Callable[[], Any], device: torch.device) -> None:
    """Bitwise the same over repeated calls and numbers of threads."""
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 2, 1):
            torch.set_num_threads(number)
            results.append([bits(x) for x in as_tuple(function())])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def half_activations(op: str, x: Tensor) -> bool:
    """Whether the backend that runs `op` on `x` may hold activations in the half type of `x`, as matrix units take them."""
    backend = "cuda" if EMULATED else select(op, x.device)
    return x.dtype in HALF and (backend in ("triton", "cuda") or (backend == "cpu" and x.dtype == torch.bfloat16))


def eager_pixel_mlp(
    features: Tensor,  # [B, D, h, w]
    mlps: list[list[tuple[Tensor, Tensor]]],
    size: tuple[int, int],
    class_map: Tensor | None,  # [B, H, W]
    residual: Tensor | None,  # [B, C, h, w]
    relative: Tensor | None = None,  # [H + W]
) -> Tensor:  # [B, C, H, W]
    """What a network of PyTorch layers computes when it is of that type, activations too."""
    (row, rel_y), (col, rel_x) = (nearest_axis(n, m) for n, m in zip(features.shape[2:], size, strict=True))
    rel_y, rel_x = rel_y / size[0], rel_x / size[1]
    if relative is not None:
        rel_y, rel_x = relative.split(size)
        row, col = (placed_axis(n, len(r), r) for n, r in zip(features.shape[2:], (rel_y, rel_x), strict=True))
    row, rel_y, col, rel_x = (t.to(features.device) for t in (row, rel_y, col, rel_x))
    shape = (features.shape[0], *size, 1)
    cell = [2 * n / m for n, m in zip(features.shape[2:], size, strict=True)]
    place = [rel_y[:, None, None].expand(shape), rel_x[:, None].expand(shape)]
    place += [torch.full(shape, c, device=features.device) for c in cell]
    feature = features[:, :, row][:, :, :, col].permute(0, 2, 3, 1)
    query = torch.cat([feature, *(p.to(features.dtype) for p in place)], dim=-1)
    output = torch.zeros((), dtype=features.dtype, device=features.device)
    for k, mlp in enumerate(mlps):
        if mlp:
            mask = torch.ones(shape, dtype=torch.bool) if class_map is None else (class_map == k)[..., None]
            output = torch.where(mask.to(features.device), apply_mlp(query, mlp), output)
    output = output.permute(0, 3, 1, 2) if output.dim() else output
    return output if residual is None else output + bilinear_reference(residual, *size)
