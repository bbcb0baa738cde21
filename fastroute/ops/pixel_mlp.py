"""`pixel_mlp`: every output pixel through the MLP of its class, without a query tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastroute.ops import _checks as check
from fastroute.ops._library import call, register
from fastroute.reference.pixel_mlp import _pixel_mlp_backward_reference, pixel_mlp_reference

SCHEMAS = [
    "pixel_mlp(Tensor features, Tensor[] weights, Tensor[] biases, int[] depths, SymInt height, SymInt width, "
    "Tensor? class_map, Tensor? residual, Tensor? relative, SymInt row_begin, SymInt row_end) -> Tensor",
    "pixel_mlp.tf32(Tensor features, Tensor[] weights, Tensor[] biases, int[] depths, SymInt height, SymInt width, "
    "Tensor? class_map, Tensor? residual, Tensor? relative, SymInt row_begin, SymInt row_end) -> Tensor",
    "_pixel_mlp_backward(Tensor grad, Tensor features, Tensor[] weights, Tensor[] biases, int[] depths, SymInt height, "
    "SymInt width, Tensor? class_map, Tensor? residual, Tensor? relative, SymInt row_begin, SymInt row_end) -> Tensor[]",
]

# Relative coordinate and cell, y and x of each: what an MLP reads beside the feature.
POSITION = 4
MAX_WIDTH = 256
MAX_CLASSES = 256

Layers = Sequence[tuple[Tensor, Tensor]]


def pixel_mlp(
    features: Tensor,  # [B, D, h, w]
    mlps: Sequence[Layers],  # K times (weight [F_out, F_in], bias [F_out]) of each layer
    size: tuple[int, int],
    class_map: Tensor | None = None,  # [B, H, W]
    residual: Tensor | None = None,  # [B, C, h, w]
    rows: tuple[int, int] | None = None,
    relative: Tensor | None = None,  # [H + W]
) -> Tensor:  # [B, C, H, W]
    """For each output pixel, the MLP of its class on its nearest feature, its place in it and the size of a pixel.

    The input of an MLP is LIIF's, [feature | rel_y | rel_x | cell_y | cell_x], D + 4 numbers; ReLU stands between layers.
    Half way between two features the even one is read. The first layer's product with the features is made once per feature
    and the queries of the pixels are never stored.

    On a GPU, products of float32 are made as torch makes its own: where `torch.backends.cuda.matmul` allows TF32, which it
    does not by default, their operands are rounded to 10 bits behind the point; sums stay float32. Beside features of a half
    type, weights of float32 are rounded to that type there, as torch.autocast rounds them.

    Args:
        features: (B, D, h, w), float32, float16, bfloat16 or float64.
        mlps: one MLP per class, each a sequence of (weight, bias), first layer first, of at most 256 units per layer. All
            end in C channels. An empty MLP is the free class: its pixels are the residual, or 0.
        size: (H, W) of the output, at any ratio to (h, w).
        class_map: uint8 or int64 (B, H, W), the MLP of each pixel; may be left out for one MLP.
        residual: (B, C, h, w), bilinearly interpolated between pixel centres and added.
        rows: compute only these output rows (first, one past the last); `class_map` is that of the whole output.
        relative: (H + W,), rel_y of each row, then rel_x of each column, in half features, of the type of the sums: float32,
            or float64 for float64 features. A pixel then reads the feature whose centre lies that far away: the nearest, or
            one beside it. Default: the exact fractions. A network that was trained with rounded coordinates, as the
            published one was, takes those it knows; see :func:`fastroute.models.pcsr.relative_coordinates`.

    Returns:
        (B, C, H, W), or (B, C, rows, W), contiguous, of the dtype of `features`.

    Raises:
        ValueError: shapes that do not match, several MLPs without a class map, layers wider than 256, tensors on several
            devices, or, on the CPU, a class out of range. A kernel of a GPU cannot raise: there such a pixel is a free one.
        TypeError: an unsupported dtype.

    Differentiable: with respect to `features`, `mlps` and `residual`; class map and coordinates are taken as they are. The
        backward pass recomputes the forward one in plain PyTorch, some rows at a time.
    Deterministic: yes, bit for bit, for any number of threads; the gradient on a CPU too.
    Synchronises: no.
    CUDA-graph safe: yes.
    Memory layout: any strides, channels_last features are read fastest; writes a contiguous image.

    Source: PCSR (Jeong et al., ECCV 2024); the input of the MLPs is LIIF's (Chen et al., CVPR 2021).
    """
    op = "pixel_mlp"
    check.rank(op, "features", features, "(B, D, h, w)", 4)
    check.dtype(op, "features", features.dtype, check.FLOATING)
    height, width = size
    check.at_least(op, 0, height=height, width=width)
    if not torch.compiler.is_compiling():
        for pixels, known in zip(size, features.shape[2:], strict=True):
            check.product(op, "size", 4, max(known, 1), max(pixels, 1))
    if 0 in features.shape[2:] and height * width * features.shape[0] > 0:
        raise ValueError(f"{op}: features must have at least one pixel; got {tuple(features.shape)}")
    channels = _check_mlps(features, mlps, residual)
    _check_class_map(features, len(mlps), size, class_map)
    if residual is not None:
        check.rank(op, "residual", residual, "(B, C, h, w)", 4)
        check.same_device(op, "features", features, "residual", residual)
        if residual.dtype != features.dtype:
            raise TypeError(f"{op}: residual must have the dtype of features, {features.dtype}; got {residual.dtype}")
        expected = (features.shape[0], channels, *features.shape[2:])
        if tuple(residual.shape) != expected:
            raise ValueError(f"{op}: residual must be {expected}; got {tuple(residual.shape)}")
    _check_relative(features, size, relative)
    begin, end = check.rows(op, rows, height)
    weights, biases = [w for mlp in mlps for w, _ in mlp], [b for mlp in mlps for _, b in mlp]
    depths = [len(mlp) for mlp in mlps]
    args = (features, weights, biases, depths, height, width, class_map, residual, relative, begin, end)
    overload = "tf32" if multiplies_as_tf32(features) else "default"
    return call(f"{op}.{overload}", _checked_reference, features.device, *args)


def multiplies_as_tf32(x: Tensor) -> bool:  # [...]
    """Whether torch's own matrix products of `x` round float32 to TF32."""
    return x.dtype == torch.float32 and x.device.type == "cuda" and _tf32_is_allowed()


def _tf32_is_allowed() -> bool:
    # This name of the switch can be read whichever it was set by; `allow_tf32` raises once it was set by another.
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


# A compiled graph is guarded by the switch anyway: a trace takes its value and does not look inside.
setattr(_tf32_is_allowed, "_dynamo_marked_constant", True)  # noqa: B010


def _check_mlps(features: Tensor, mlps: Sequence[Layers], residual: Tensor | None) -> int:  # [B, D, h, w], [B, C, h, w]
    op = "pixel_mlp"
    if not 1 <= len(mlps) <= MAX_CLASSES:
        raise ValueError(f"{op}: mlps must hold 1 to {MAX_CLASSES} MLPs; got {len(mlps)}")
    ends: set[int] = set()
    for k, mlp in enumerate(mlps):
        fan_in = features.shape[1] + POSITION
        for n, (weight, bias) in enumerate(mlp):
            name = f"the weight of layer {n} of MLP {k}"
            check.rank(op, name, weight, "(F_out, F_in)", 2)
            check.rank(op, f"the bias of layer {n} of MLP {k}", bias, "(F_out,)", 1)
            check.dtype(op, name, weight.dtype, check.FLOATING)
            check.dtype(op, f"the bias of layer {n} of MLP {k}", bias.dtype, check.FLOATING)
            check.same_device(op, "features", features, name, weight)
            check.same_device(op, name, weight, "its bias", bias)
            if weight.shape[1] != fan_in or bias.shape[0] != weight.shape[0]:
                raise ValueError(
                    f"{op}: {name} must have {fan_in} columns and as many rows as its bias; got {tuple(weight.shape)} and a "
                    f"bias of {bias.shape[0]}"
                )
            fan_in = weight.shape[0]
            if not 1 <= fan_in <= MAX_WIDTH:
                raise ValueError(f"{op}: {name} must have 1 to {MAX_WIDTH} rows; got {fan_in}")
        if len(mlp):
            ends.add(fan_in)
    if len(ends) > 1:
        raise ValueError(f"{op}: mlps must all end in the same number of channels; got {sorted(ends)}")
    if ends:
        return ends.pop()
    return 0 if residual is None else residual.shape[1]


def _check_class_map(
    features: Tensor,  # [B, D, h, w]
    classes: int,
    size: tuple[int, int],
    class_map: Tensor | None,  # [B, H, W]
) -> None:
    op = "pixel_mlp"
    if class_map is None:
        if classes > 1:
            raise ValueError(f"{op}: class_map must be given for {classes} MLPs; got None")
        return
    check.rank(op, "class_map", class_map, "(B, H, W)", 3)
    check.dtype(op, "class_map", class_map.dtype, (torch.uint8, torch.int64))
    check.same_device(op, "features", features, "class_map", class_map)
    expected = (features.shape[0], *size)
    if tuple(class_map.shape) != expected:
        raise ValueError(f"{op}: class_map must be {expected}; got {tuple(class_map.shape)}")


def _check_relative(features: Tensor, size: tuple[int, int], relative: Tensor | None) -> None:  # [B, D, h, w], [H + W]
    op = "pixel_mlp"
    if relative is None:
        return
    check.rank(op, "relative", relative, "(H + W,)", 1)
    check.same_device(op, "features", features, "relative", relative)
    check.dtype(op, "relative", relative.dtype, (torch.float64 if features.dtype == torch.float64 else torch.float32,))
    if relative.shape[0] != size[0] + size[1]:
        raise ValueError(f"{op}: relative must be ({size[0] + size[1]},), H + W numbers; got {tuple(relative.shape)}")


def _checked_reference(
    features: Tensor,  # [B, D, h, w]
    weights: list[Tensor],  # [F_out, F_in] each
    biases: list[Tensor],  # [F_out] each
    depths: list[int],
    height: int,
    width: int,
    class_map: Tensor | None,  # [B, H, W]
    residual: Tensor | None,  # [B, C, h, w]
    relative: Tensor | None,  # [H + W]
    row_begin: int,
    row_end: int,
) -> Tensor:
    part = None if class_map is None else class_map[:, row_begin:row_end]
    if part is not None and check.looks_at(part) and not 0 <= int(part.min()) <= int(part.max()) < len(depths):
        raise ValueError(f"pixel_mlp: class_map must lie in [0, {len(depths)}), one class per MLP")
    rows = (row_begin, row_end)
    return pixel_mlp_reference(features, weights, biases, depths, height, width, class_map, residual, rows, relative)


def _checked_backward_reference(grad: Tensor, features: Tensor, *rest: Any) -> list[Tensor]:  # [B, C, rows, W], [B, D, h, w]
    op = "pixel_mlp"
    weights, _, _, height, width, _, residual, _, begin, end = rest
    channels = weights[-1].shape[0] if weights else (0 if residual is None else residual.shape[1])
    check.rank(op, "features", features, "(B, D, h, w)", 4)
    check.at_least(op, 0, height=height, width=width)
    expected = (features.shape[0], channels, end - begin, width)
    if tuple(grad.shape) != expected:
        raise ValueError(f"{op}: grad must be {expected}, as the output; got {tuple(grad.shape)}")
    return _pixel_mlp_backward_reference(grad, features, *rest)


def _fake(
    features: Tensor,  # [B, D, h, w]
    weights: list[Tensor],  # [F_out, F_in] each
    biases: list[Tensor],  # [F_out] each
    depths: list[int],
    height: int,
    width: int,
    class_map: Tensor | None,  # [B, H, W]
    residual: Tensor | None,  # [B, C, h, w]
    relative: Tensor | None,  # [H + W]
    row_begin: int,
    row_end: int,
) -> Tensor:
    channels = weights[-1].shape[0] if weights else (0 if residual is None else residual.shape[1])
    return features.new_empty((features.shape[0], channels, row_end - row_begin, width))


def _backward_fake(
    grad: Tensor,  # [B, C, rows, W]
    features: Tensor,  # [B, D, h, w]
    weights: list[Tensor],  # [F_out, F_in] each
    biases: list[Tensor],  # [F_out] each
    depths: list[int],
    height: int,
    width: int,
    class_map: Tensor | None,  # [B, H, W]
    residual: Tensor | None,  # [B, C, h, w]
    relative: Tensor | None,  # [H + W]
    row_begin: int,
    row_end: int,
) -> list[Tensor]:
    inputs = [features, *weights, *biases, *([] if residual is None else [residual])]
    return [x.new_empty(x.shape) for x in inputs]


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # [B, C, rows, W]
    features, weights, biases, depths, height, width, class_map, residual, relative, begin, end = inputs
    ctx.save_for_backward(features, class_map, residual, relative, *weights, *biases)
    ctx.number, ctx.depths, ctx.size, ctx.rows = len(weights), depths, (height, width), (begin, end)


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple:  # [B, C, rows, W]
    features, class_map, residual, relative, *layers = ctx.saved_tensors
    n = ctx.number
    grads = ops._pixel_mlp_backward(
        grad, features, layers[:n], layers[n:], ctx.depths, *ctx.size, class_map, residual, relative, *ctx.rows
    )
    last = None if residual is None else grads[1 + 2 * n]
    return grads[0], grads[1 : 1 + n], grads[1 + n : 1 + 2 * n], None, None, None, None, last, None, None, None


register("pixel_mlp", _checked_reference, _fake, _backward, _setup_context)
register("pixel_mlp.tf32", _checked_reference, _fake, _backward, _setup_context)
register("_pixel_mlp_backward", _checked_backward_reference, _backward_fake, once=True)
