"""`stitch_patches`: overlapping patches merged into an image, one write per pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastroute import buffers
from fastroute.backends import select
from fastroute.grid import TileGrid, covered_size, tile_count, tile_origins
from fastroute.ops import _checks as check
from fastroute.ops._batches import checked_batches, checked_regions
from fastroute.ops._library import call, exhausted, is_transformed, register
from fastroute.reference.stitch_patches import (
    _stitch_patches_backward_reference,
    patches_of_regions,
    stitch_patches_reference,
)
from fastroute.windows import window_on

SCHEMAS = [
    "stitch_patches(Tensor patches, Tensor? inverse, Tensor window, SymInt height, SymInt width, int patch, int stride, "
    "int scale, bool crop, int shuffle, ScalarType? dtype, SymInt row_begin, SymInt row_end) -> Tensor",
    "stitch_patches.out(Tensor patches, Tensor? inverse, Tensor window, SymInt height, SymInt width, int patch, int stride, "
    "int scale, bool crop, int shuffle, SymInt row_begin, SymInt row_end, *, Tensor(a!) out) -> ()",
    "stitch_patches.batches_out(Tensor[] batches, Tensor? inverse, Tensor? region, Tensor window, SymInt height, "
    "SymInt width, int patch, int stride, int scale, bool crop, int shuffle, SymInt row_begin, SymInt row_end, *, "
    "Tensor(a!) out) -> ()",
    "stitch_patches.upsampled_out(Tensor[] batches, int[] kinds, Tensor[] layers, Tensor? inverse, Tensor? region, "
    "Tensor window, SymInt height, SymInt width, int patch, int stride, int scale, bool crop, int shuffle, SymInt row_begin, "
    "SymInt row_end, *, Tensor(a!) out, Tensor(b!) spent) -> ()",
    "_stitch_patches_backward(Tensor grad, Tensor? inverse, Tensor window, SymInt height, SymInt width, int patch, "
    "int stride, int scale, bool crop, SymInt num_patches) -> Tensor",
]


def stitch_patches(
    patches: Tensor | Sequence[Tensor],  # [M, C, P, P] or [M, C·r·r, P / r, P / r]
    grid: TileGrid,
    window: str | Tensor = "uniform",  # [P]
    inverse: Tensor | None = None,  # [N]
    dtype: torch.dtype | None = None,
    shuffle: int = 1,
    rows: tuple[int, int] | None = None,
    out: Tensor | None = None,  # [B, C, rows, W·s]
    region: Tensor | None = None,  # [N]
) -> Tensor:  # [B, C, H·s, W·s]
    """Merge overlapping patches into images, weighted by a separable window, reading class-ordered patches directly.

    The weights of all patches that cover a pixel are normalised to sum to 1, once per axis. A write outside the image is
    dropped.

    Args:
        patches: (M, C, P, P) with P = grid.patch * grid.scale; float32, float16, bfloat16 or float64. With `out` also
            several such tensors, which stand for their concatenation along M: batches of branch outputs are then read where
            they lie.
        grid: where the patches lie, in LR pixels.
        window: "uniform", "linear", "hann", "gaussian", "crop", or 1-D weights (P,); see :func:`fastroute.make_window`.
        inverse: int64 (N,), N = B * grid.num_patches: the row of `patches` that holds patch n, as `ClassGroups.inverse`
            says. Default: row n.
        dtype: type of the image, default that of `patches`. uint8 and uint16 are also possible: [0, 1] is multiplied by
            255 or 65535, clamped and rounded half to even.
        shuffle: factor r of a pixel shuffle to undo on the way: `patches` is then (M, C * r * r, P / r, P / r), the output
            of a sub-pixel convolution, and the pixel shuffle costs no pass of its own.
        rows: write only these output rows (first, one past the last); for streaming. Rows of `patches` that other output
            rows need may then be missing: their `inverse` is not read.
        out: write into this tensor, for example a band of a larger image; its last dimension must be contiguous and its
            dtype is that of the result.
        region: int64 (N,), the number of the first patch of the region that holds patch n, as :func:`merge_regions` says.
            `patches` then hold regions of any shapes, tensors of (M, C, h * scale, w * scale), and `inverse` says the row of
            the region that holds patch n. The image is the same mean over patches; each reads its part of a region. Where a
            pixel shuffle is undone, its factor must divide `scale`.

    Returns:
        (B, C, height, width) with the size that ``grid.output_size`` gives, contiguous.

    Raises:
        ValueError: a wrong rank or size, a number of patches that fills no whole images, tensors on several devices, an entry
            of `inverse` or `region` out of range, a region that does not hold its patches, or an `out` that shares memory with
            an input or between its own rows.
        TypeError: an unsupported dtype, or both `dtype` and an `out` of another.

    Differentiable: with respect to `patches`, for whole floating images without `out` and `region`.
    Deterministic: yes, bit for bit: every pixel sums its patches in one order, columns before rows, in float32.
    Synchronises: no.
    CUDA-graph safe: yes.
    Memory layout: reads contiguous or channels_last patches (others are copied first); writes contiguous images.
    """
    op = "stitch_patches"
    batches: list[Tensor] = []
    if region is not None:
        batches = checked_regions(patches, inverse, region, grid, shuffle)
        patches = batches[0]
    elif not isinstance(patches, Tensor):
        batches = checked_batches(patches, out)
        patches = batches[0]
    check.rank(op, "patches", patches, "(M, C, P, P)", 4)
    check.dtype(op, "patches", patches.dtype, check.FLOATING)
    check.at_least(op, 1, shuffle=shuffle)
    span = grid.patch * grid.scale
    if span % shuffle or (region is None and tuple(patches.shape[2:]) != (span // shuffle, span // shuffle)):
        raise ValueError(
            f"{op}: patches must be {grid.patch} * {grid.scale} / {shuffle} = {span / shuffle:g} pixels wide, as the grid "
            f"says; got {tuple(patches.shape)}"
        )
    if patches.shape[1] < 1 or patches.shape[1] % shuffle**2:
        raise ValueError(f"{op}: patches must have C * {shuffle**2} channels, C at least 1; got {tuple(patches.shape)}")
    if out is not None:
        check.rank(op, "out", out, "(B, C, rows, W)", 4)
        check.same_device(op, "patches", patches, "out", out)
        check.without_gradient(op, out)
        if dtype not in (None, out.dtype):
            raise TypeError(f"{op}: dtype must be that of out, {out.dtype}; got {dtype}")
        dtype = out.dtype
    target = patches.dtype if dtype is None else dtype
    check.dtype(op, "dtype", target, check.FLOATING + check.INTEGER_IMAGE)
    check.index(op, "inverse", inverse, None)
    check.same_device(op, "patches", patches, "inverse", inverse)
    rows_held = sum(batch.shape[0] for batch in batches) if batches else patches.shape[0]
    number = rows_held if inverse is None else inverse.shape[0]
    if number % grid.num_patches:
        name = "patches" if inverse is None else "inverse"
        raise ValueError(f"{op}: {name} must hold a multiple of {grid.num_patches}, whole images; got {number}")
    weights = window_on(window, span, grid.stride * grid.scale, patches.device, _work(patches.dtype))
    height, width = grid.output_size
    begin, end = check.rows(op, rows, height)
    size = (number // grid.num_patches, patches.shape[1] // shuffle**2, end - begin, width)
    if out is not None and (tuple(out.shape) != size or out.stride(3) != 1):
        raise ValueError(f"{op}: out must be {size} with contiguous rows; got {tuple(out.shape)} with strides {out.stride()}")
    if rows is not None or out is not None or region is not None or not target.is_floating_point:
        patches = patches.detach()
    elif shuffle > 1 and patches.requires_grad and torch.is_grad_enabled():
        patches, shuffle = F.pixel_shuffle(patches, shuffle), 1
    geometry = (grid.height, grid.width, grid.patch, grid.stride, grid.scale, grid.crop, shuffle)
    if out is None and _reuses_memory(patches):
        try:
            out = buffers.empty(size, target, patches.device)
        except (MemoryError, RuntimeError) as error:
            raise exhausted(op, error, patches.device) from error
    if out is None and region is not None:
        out = patches.new_empty(size, dtype=target)
    if out is not None and (len(batches) > 1 or region is not None):
        held = (batches, inverse, region, weights)
        call(f"{op}.batches_out", reference_batches, patches.device, *held, *geometry, begin, end, out=out)
        return out
    if out is not None:
        call(f"{op}.out", reference_out, patches.device, patches, inverse, weights, *geometry, begin, end, out=out)
        return out
    return call(op, _checked_reference, patches.device, patches, inverse, weights, *geometry, target, begin, end)


def _reuses_memory(patches: Tensor) -> bool:  # [M, C, P, P]
    """Whether the result may lie in kept memory: not where the operator must allocate it itself, for gradients or a graph."""
    tracked = patches.requires_grad and torch.is_grad_enabled()
    plain = not tracked and not torch.compiler.is_compiling() and type(patches) is Tensor and not is_transformed([patches])
    # The other backends allocate their results anyway, and would have to copy them.
    return plain and select("stitch_patches", patches.device) == "cpu"


def _is_seen(x: Tensor) -> bool:  # [...]
    """Whether values can be looked at without a wait: what a compiler traces with is a tensor of another class."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def check_places(
    inverse: Tensor | None,  # [N]
    number: int,
    geometry: tuple[int, int, int, int, int, bool],
    begin: int,
    end: int,
) -> None:
    """What output rows [begin, end) read of `inverse` lies in [0, number); looked at on the CPU alone.

    `geometry` is height, width, patch, stride, scale and crop.
    """
    if inverse is None or not _is_seen(inverse) or begin >= end:
        return
    used, cols = _read_rows(geometry, begin, end)
    check.in_range("stitch_patches", "inverse", inverse.view(-1, len(used), len(cols))[:, used], number)


def check_regions(
    batches: Sequence[Tensor],  # [M_i, C·r·r, h_i / r, w_i / r] each
    inverse: Tensor,  # [N]
    region: Tensor,  # [N]
    geometry: tuple[int, int, int, int, int, bool],
    shuffle: int,
    begin: int,
    end: int,
) -> None:
    """Regions hold the patches that output rows [begin, end) read; looked at on the CPU alone.

    `geometry` is height, width, patch, stride, scale and crop.
    """
    op = "stitch_patches"
    check_places(inverse, sum(batch.shape[0] for batch in batches), geometry, begin, end)
    if not _is_seen(inverse) or begin >= end or inverse.numel() == 0:
        return
    height, _, patch, stride, scale, crop = geometry
    used, cols = _read_rows(geometry, begin, end)
    rows, factor = tile_origins(height, patch, stride, crop), scale // shuffle
    tiles, span = len(used) * len(cols), patch * factor
    sizes = torch.tensor([size for batch in batches for size in [batch.shape[2:]] * batch.shape[0]])  # [M, 2]
    number = torch.arange(inverse.shape[0]).view(-1, len(used), len(cols))[:, used].flatten()
    corner = region[number]
    outside = (corner < number // tiles * tiles) | (corner > number)
    if outside.any():
        n = int(number[outside][0])
        raise ValueError(
            f"{op}: region must name a patch above or left of its patches, in their image; got {int(region[n])} for patch {n}"
        )
    places = torch.cartesian_prod(torch.tensor(rows), torch.tensor(cols))  # [tiles, 2]
    within = (places[number % tiles] - places[corner % tiles]) * factor
    outside = ((within < 0) | (within + span > sizes[inverse[number]])).any(dim=1)
    if outside.any():
        n = int(number[outside][0])
        size = " x ".join(str(side) for side in sizes[inverse[n]].tolist())
        raise ValueError(f"{op}: region {int(region[n])} does not hold patch {n}; got {size}")


def _read_rows(geometry: tuple[int, int, int, int, int, bool], begin: int, end: int) -> tuple[Tensor, list[int]]:
    """Whether output rows [begin, end) read each tile row, and the origins of tile columns."""
    height, width, patch, stride, scale, crop = geometry
    rows, cols = (tile_origins(size, patch, stride, crop) for size in (height, width))
    return torch.tensor([begin < (y + patch) * scale and y * scale < end for y in rows]), cols


def _checked_reference(patches: Tensor, inverse: Tensor | None, *rest: Any) -> Tensor:  # [M, C, P, P], [N]
    height, width, patch, stride, scale, crop = rest[1:7]
    check.geometry("stitch_patches", height, width, patch, stride, crop, scale)
    check.at_least("stitch_patches", 1, shuffle=rest[7])
    check_places(inverse, patches.shape[0], rest[1:7], *rest[-2:])
    return stitch_patches_reference(patches, inverse, *rest)


def _checked_backward_reference(
    grad: Tensor,  # [B, C, H·s, W·s]
    inverse: Tensor | None,  # [N]
    window: Tensor,  # [P]
    *rest: Any,
) -> Tensor:
    op = "stitch_patches"
    height, width, patch, stride, scale, crop, num_patches = rest
    check.geometry(op, height, width, patch, stride, crop, scale)
    check.rank(op, "grad", grad, "(B, C, H, W)", 4)
    if inverse is not None:
        check.in_range(op, "inverse", inverse, num_patches)
    return _stitch_patches_backward_reference(grad, inverse, window, *rest)


def reference_out(*args: Any, out: Tensor) -> None:  # [B, C, rows, W·s]
    """The overload `out`, as the reference computes it."""
    check.written("stitch_patches", "out", out, args)
    out.copy_(_checked_reference(*args[:-2], out.dtype, *args[-2:]))


def reference_batches(
    batches: list[Tensor],  # [M_i, C, P, P] each
    inverse: Tensor | None,  # [N]
    region: Tensor | None,  # [N]
    *args: Any,
    out: Tensor,  # [B, C, rows, W·s]
) -> None:
    """:func:`reference_out` of patches, or of regions that hold them, in several tensors."""
    check.written("stitch_patches", "out", out, batches)
    if region is None or inverse is None:
        patches = torch.cat(batches)
    else:
        # Each patch is then a row of its own.
        check_regions(batches, inverse, region, args[1:7], *args[7:])
        patches, inverse = patches_of_regions(batches, inverse, region, *args[1:8]), None
    reference_out(patches, inverse, *args, out=out)


def _work(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake(
    patches: Tensor,  # [M, C, P, P]
    inverse: Tensor | None,  # [N]
    window: Tensor,  # [P]
    height: int,
    width: int,
    patch: int,
    stride: int,
    scale: int,
    crop: bool,
    shuffle: int,
    dtype: torch.dtype | None,
    row_begin: int,
    row_end: int,
) -> Tensor:
    check.geometry("stitch_patches", height, width, patch, stride, crop, scale)
    check.at_least("stitch_patches", 1, shuffle=shuffle)
    tiles = tile_count(height, patch, stride, crop) * tile_count(width, patch, stride, crop)
    number = patches.shape[0] if inverse is None else inverse.shape[0]
    size = (
        number // tiles,
        patches.shape[1] // shuffle**2,
        row_end - row_begin,
        covered_size(width, patch, stride, crop) * scale,
    )
    return torch.empty(size, dtype=dtype or patches.dtype, device=patches.device)


def _backward_fake(
    grad: Tensor,  # [B, C, H·s, W·s]
    inverse: Tensor | None,  # [N]
    window: Tensor,  # [P]
    height: int,
    width: int,
    patch: int,
    stride: int,
    scale: int,
    crop: bool,
    num_patches: int,
) -> Tensor:
    check.geometry("stitch_patches", height, width, patch, stride, crop, scale)
    return grad.new_empty((num_patches, grad.shape[1], patch * scale, patch * scale))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # [B, C, H·s, W·s]
    patches, inverse, window, height, width, patch, stride, scale, crop, shuffle, _, begin, end = inputs
    whole = covered_size(height, patch, stride, crop) * scale
    if shuffle != 1 or begin != 0 or end != whole:
        raise ValueError("stitch_patches: only whole images without a fused pixel shuffle have a gradient")
    ctx.save_for_backward(inverse, window)
    ctx.grid = (height, width, patch, stride, scale, crop, patches.shape[0])
    ctx.dtype = patches.dtype


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple:  # [B, C, H·s, W·s]
    inverse, window = ctx.saved_tensors
    # The image may be of another floating type than the patches, and the weights go with what is summed.
    weights = window.to(_work(grad.dtype))
    patches_grad = ops._stitch_patches_backward(grad, inverse, weights, *ctx.grid).to(ctx.dtype)
    return patches_grad, *[None] * 12


def _backward_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # [M, C, P, P]
    _, inverse, window, height, width, patch, stride, scale, crop, _ = inputs
    ctx.save_for_backward(inverse, window)
    ctx.grid = (height, width, patch, stride, scale, crop)


def _double_backward(ops: Any, ctx: Any, grad: Tensor) -> tuple:  # [M, C, P, P]
    height, _, patch, stride, scale, crop = ctx.grid
    rows = covered_size(height, patch, stride, crop) * scale
    image = ops.stitch_patches(grad, *ctx.saved_tensors, *ctx.grid, 1, grad.dtype, 0, rows)
    return image, *[None] * 9


register("stitch_patches", _checked_reference, _fake, _backward, _setup_context)
register("stitch_patches.out", reference_out, lambda *args, out: None)
register("stitch_patches.batches_out", reference_batches, lambda *args, out: None)
register("_stitch_patches_backward", _checked_backward_reference, _backward_fake, _double_backward, _backward_setup_context)
