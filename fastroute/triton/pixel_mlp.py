"""pixel_mlp: pixels sorted by class, then per class a hoisted first layer and one persistent kernel over its pixels.

Nothing is read back: a persistent kernel takes the number of its pixels from the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fastroute.reference.pixel_mlp import pixel_mlp_reference
from fastroute.triton._common import ARCHS, NAMES, WIDER, Variant, ceil_div, check_on_host, launch, next_power
from fastroute.triton._pixel_kernels import UNSPECIALISED, pixel_mlp_kernel, pixel_mlp_wide_kernel
from fastroute.triton._pixel_prepare import (
    AXIS_BLOCK,
    GROUP_BLOCK,
    GROUP_WARPS,
    AxisTables,
    PixelList,
    axis_tables,
    list_pixels,
    nearest,
    pixel_axis_kernel,
    pixel_count_kernel,
    pixel_list_kernel,
)
from fastroute.triton._pixel_weights import HOIST_ROWS, PACK_BLOCK, PACK_PARTS, pixel_hoist_kernel, pixel_pack_kernel

# The launchers build their arguments from lists of tensors, which a compiled graph keeps as one node.
OPAQUE = ("pixel_mlp", "pixel_mlp.tf32")

# Units of one matrix product, and the smallest that tensor cores take.
PIECE, SMALLEST = 64, 16
# Pixels of a tile, and warps that share it; the residual of more channels than one piece takes more registers.
TILE, WARPS, MANY_WARPS = 64 * WIDER, 4, 8
# Widest layers whose activations, and bytes of weights that, a program keeps on the chip.
WIDEST_HALF, WIDEST_TF32, RESIDENT_BYTES = 128, 64, 64 << 10
# Compute capabilities, times ten, whose matrix products read weights in shared memory: Hopper's and those of Blackwell in data
# centres. Blackwell in desktops, 12.0, multiplies as Ampere does.
KEEPING = range(90, 120)
# Programs of a persistent kernel per multiprocessor: about as many as run at once.
PROGRAMS = 4
# Tables of floats; all others hold 64-bit integers.
FLOATS = ("given_ptr", "relative_ptr", "blend_ptr")
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Plan:
    """How the MLP of one class is computed; `widths` are those of its layers, none for a free class."""

    widths: tuple[int, ...]
    channels: int
    dtype: torch.dtype  # of the products
    precision: str = "ieee"
    keep_weights: bool = False  # where there is room, on a GPU whose products read them in shared memory

    @property
    def wide(self) -> bool:
        """Whether activations go through memory."""
        widest = WIDEST_HALF if self.dtype != torch.float32 else WIDEST_TF32 if self.precision == "tf32" else 0
        return len(self.widths) > 1 and max(self.widths) > widest

    @property
    def piece(self) -> int:
        """Units of one matrix product."""
        return min(PIECE, max(SMALLEST, next_power(max(self.widths)))) if self.wide else PIECE

    @property
    def padded(self) -> tuple[int, ...]:
        """Units of each layer that are computed."""
        hidden = self.widths[:-1]
        if self.wide:
            return *(ceil_div(width, self.piece) * self.piece for width in hidden), self.output
        return *(pad(width, PIECE) for width in hidden), self.output

    @property
    def output(self) -> int:
        """Channels of the output that are computed."""
        return ceil_div(self.channels, SMALLEST) * SMALLEST

    @property
    def warps(self) -> int:
        """Warps of a program."""
        return WARPS if self.output == SMALLEST else MANY_WARPS

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments of the kernel but SHIFT."""
        padded = self.padded if self.widths else ()
        bytes_ = sum(a * b for a, b in pairwise(padded)) * self.dtype.itemsize
        values: dict[str, Any] = {
            "PADDED": padded,
            "OUT_PADDED": self.output,
            "PIECE": self.piece,
            "CHANNELS": self.channels,
            "BLOCK": TILE,
            "TYPE": TYPES[self.dtype],
            "PRECISION": self.precision,
        }
        if self.wide:
            return values | {"WIDEST": max(padded), "STEP": step(self.dtype, self.precision, self.piece)}
        return values | {"RESIDENT": self.keep_weights and bytes_ <= RESIDENT_BYTES}


def pad(width: int, piece: int) -> int:
    """Units of a layer that are computed: whole pieces and a power of two."""
    rest = width % piece
    return width - rest + (max(SMALLEST, next_power(rest)) if rest else 0)


def step(dtype: torch.dtype, how: str, most: int) -> int:
    """Inputs that one product of a loop takes; without tensor cores they all lie in registers."""
    return min(16 if dtype == torch.float32 and how == "ieee" else 32, most)


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; the interpreter runs programs one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def keeps_weights(device: torch.device) -> bool:
    """Whether weights that a program keeps lie in shared memory; elsewhere they would take registers."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor in KEEPING


def pixel_mlp_triton(
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
    *,
    precision: str = "ieee",
) -> Tensor:  # [B, C, rows, W]
    """See :func:`fastroute.pixel_mlp`; `precision` says how products of float32 are made.

    Half types have products of half types and float32 sums, to which weights of float32 are rounded, as under autocast; other
    tensors of several types are computed in float32. In float64 the reference runs. Pixels of no class are free.
    """
    rows, size = (row_begin, row_end), (height, width)
    if class_map is not None and check_on_host(class_map):
        part = class_map[:, row_begin:row_end]
        if bool(((part < 0) | (part >= len(depths))).any()):
            raise ValueError(f"pixel_mlp: class_map must lie in [0, {len(depths)}), one class per MLP")
    if features.dtype == torch.float64:
        return pixel_mlp_reference(features, weights, biases, depths, height, width, class_map, residual, rows, relative)
    batch, dim, h, w = features.shape
    channels = weights[-1].shape[0] if weights else (0 if residual is None else residual.shape[1])
    out = features.new_empty((batch, channels, row_end - row_begin, width))
    if out.numel() == 0:
        return out
    mixed = any(x.dtype not in (features.dtype, torch.float32) for x in (*weights, *biases))
    dtype = torch.float32 if mixed else features.dtype
    # Given coordinates may make a pixel read a feature beside its nearest.
    beside = int(relative is not None)
    lr_rows = max(nearest(row_begin, h, height) - beside, 0), min(nearest(row_end - 1, h, height) + beside, h - 1) + 1
    tables = axis_tables((batch, channels, *size), (h, w), rows, lr_rows, residual, relative, features.device)
    groups = None if class_map is None else list_pixels(class_map, len(depths), rows)

    layers = list(zip(weights, biases, strict=True))
    for first, last in runs(depths, groups is not None):
        depth = depths[first] if first < len(depths) else 0
        own, layers = layers[:depth], layers[depth:]
        how = precision if dtype == torch.float32 else "ieee"
        plan = Plan(tuple(len(bias) for _, bias in own), channels, dtype, how, keeps_weights(features.device))
        prepared: tuple[Tensor | None, ...] = (None, None, None)
        if own:
            flat = torch.cat([x.reshape(-1) for column in zip(*own, strict=True) for x in column])
            prepared = (hoist(features, flat, own[0][1], lr_rows, size, plan), *pack(flat, dim, plan))
        run_class(plan, prepared, tables, groups, (first, last), residual, out)
    return out


def pixel_mlp_tf32_triton(*args: Any) -> Tensor:
    """The same with TF32 products of float32."""
    return pixel_mlp_triton(*args, precision="tf32")


def runs(depths: list[int], listed: bool) -> Iterator[tuple[int, int]]:
    """Classes to compute at once, first and one past the last: one MLP, or neighbouring free classes.

    With a list there is one more free class at the end, of the pixels that are in none.
    """
    free = [depth == 0 for depth in depths] + [True] * listed
    first = 0
    while first < len(free):
        last = first + 1
        while free[first] and last < len(free) and free[last]:
            last += 1
        yield first, last
        first = last


def run_class(
    plan: Plan,
    prepared: tuple[Tensor | None, ...],  # [...] each: hoisted first layer, packed weights, packed biases
    tables: AxisTables,
    groups: PixelList | None,
    classes: tuple[int, int],
    residual: Tensor | None,  # [B, C, h, w]
    out: Tensor,  # [B, C, rows, W]
) -> None:
    """Launch the persistent kernel over the pixels of some classes."""
    batch, _, rows, width = out.shape
    lines, device = batch * rows, out.device
    lists: tuple[Tensor | None, ...] = (None, None)
    place, shift, tiles = (0, 0), 0, lines * ceil_div(width, TILE)
    if groups is not None:
        lists, shift, tiles = (groups.pixels, groups.ends), groups.shift, ceil_div(lines * width, TILE)
        place = classes[0] * groups.blocks, classes[1] * groups.blocks
    programs = min(tiles, PROGRAMS * multiprocessors(device))
    sizes = (*place, lines, lines + width, width, 0 if residual is None else residual.stride(1), rows * width)
    pointers: list[Any] = [*prepared, tables.feature, tables.relative, tables.target, tables.source, tables.blend]
    pointers += [*lists, residual, out]
    kernel = pixel_mlp_kernel
    if plan.wide:
        shape = (programs, 2, TILE, plan.constants["WIDEST"])
        pointers.append(torch.empty(shape, dtype=plan.dtype, device=device))
        kernel = pixel_mlp_wide_kernel
    launch(kernel, programs, *pointers, *sizes, SHIFT=shift, **plan.constants, num_warps=plan.warps)


def pack(
    flat: Tensor,  # [n] all weights, then all biases
    dim: int,
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    """The layers of one class as the kernels read them: weights, and slopes and biases."""
    units, device = plan.padded, flat.device
    packed = torch.empty(sum(a * b for a, b in pairwise(units)), dtype=plan.dtype, device=device)
    values = torch.empty(units[0] + sum(units), dtype=torch.float32, device=device)
    launch(pixel_pack_kernel, PACK_PARTS * len(units), flat, packed, values, **pack_constants(plan, dim))
    return packed, values


def pack_constants(plan: Plan, dim: int) -> dict[str, Any]:
    """Compile-time arguments of `pixel_pack_kernel`."""
    constants = {"WIDTHS": plan.widths, "PADDED": plan.padded, "D": dim, "PRECISION": plan.precision}
    return constants | {"BLOCK": PACK_BLOCK, "PARTS": PACK_PARTS}


def hoist(
    features: Tensor,  # [B, D, h, w]
    flat: Tensor,  # begins with the weight [F, D + 4]
    bias: Tensor,  # [F]
    lr_rows: tuple[int, int],
    size: tuple[int, int],
    plan: Plan,
) -> Tensor:  # [B lr_rows w, padded]
    """The first layer's product with the features of some rows, with all that is the same for every pixel."""
    batch, _, h, w = features.shape
    count = lr_rows[1] - lr_rows[0]
    pixels = batch * count * w
    constants = hoist_constants(plan, features.shape[1])
    hoisted = torch.empty((pixels, constants["STRIDE"]), dtype=torch.float32, device=features.device)
    programs = ceil_div(pixels, constants["ROWS"]) * ceil_div(constants["STRIDE"], constants["N"])
    sizes = (pixels, lr_rows[0], count, h, w, *size, *features.stride())
    launch(pixel_hoist_kernel, programs, features, flat, bias.contiguous(), hoisted, *sizes, **constants, num_warps=WARPS)
    return hoisted


def hoist_constants(plan: Plan, dim: int) -> dict[str, Any]:
    """Compile-time arguments of `pixel_hoist_kernel`."""
    stride = plan.padded[0]
    return {
        "D": dim,
        "OUT": plan.widths[0],
        "STRIDE": stride,
        "ROWS": HOIST_ROWS * WIDER,
        "N": min(stride, PIECE),
        "K": step(plan.dtype, plan.precision, max(SMALLEST, next_power(dim))),
        "TYPE": TYPES[plan.dtype],
        "PRECISION": plan.precision,
    }


def unsupported_reasons(device: torch.device) -> list[str]:
    """Why these kernels cannot run on `device`."""
    return []


def variants() -> Iterator[Variant]:
    """The kernels as the launchers call them, for each way to cut layers into pieces; weights are kept from Hopper on."""
    numbers = dict.fromkeys(UNSPECIALISED, "i32")
    tables = {"feature_ptr": "*i64", "relative_ptr": "*fp32", "target_ptr": "*i64", "source_ptr": "*i64", "blend_ptr": "*fp32"}
    fixed = numbers | tables | {"hoisted_ptr": "*fp32", "values_ptr": "*fp32", "list_ptr": "*i32", "ends_ptr": "*i64"}
    for dtype, how in ((torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")):
        name = f"*{NAMES[dtype]}"
        types = fixed | dict.fromkeys(("packed_ptr", "residual_ptr", "out_ptr", "scratch_ptr"), name)
        prepared = types | {"features_ptr": name, "weight_ptr": name, "bias_ptr": name}
        looped = set()
        for widths in ((), (3,), (256, 256, 3), (58,) * 4 + (3,), (74,) * 4 + (3,), (20, 64)):
            plan, kept = (Plan(widths, widths[-1] if widths else 3, dtype, how, keep) for keep in (False, True))
            if plan.wide and plan.output in looped:
                continue  # layers of any width are one loop, in pieces of one size
            looped |= {plan.output} if plan.wide else set()
            if plan.constants == kept.constants:
                yield from class_variants(plan, types, ARCHS)
            else:
                yield from class_variants(plan, types, tuple(arch for arch in ARCHS if arch not in KEEPING))
                yield from class_variants(kept, types, tuple(arch for arch in ARCHS if arch in KEEPING))
            if widths[:1] == (256,):
                yield from prepare_variants(plan, prepared)
    yield from list_variants()


def class_variants(plan: Plan, types: dict[str, Any], archs: tuple[int, ...]) -> Iterator[Variant]:
    """The kernel of one class, with a list of pixels and a residual, of some MLPs without them too."""
    kernel, options = pixel_mlp_wide_kernel if plan.wide else pixel_mlp_kernel, {"num_warps": plan.warps}
    absent = {} if plan.widths else dict.fromkeys(("hoisted_ptr", "packed_ptr", "values_ptr"))
    yield Variant(kernel, types, plan.constants | absent | {"SHIFT": 16}, options, archs)
    if plan.widths[:1] in ((3,), (256,)):
        absent |= dict.fromkeys(("list_ptr", "ends_ptr", "residual_ptr"))
        yield Variant(kernel, types, plan.constants | absent | {"SHIFT": 0}, options, archs)


def prepare_variants(plan: Plan, types: dict[str, Any]) -> Iterator[Variant]:
    """What runs before the kernel of one class."""
    sizes = ("pixels", "lr_begin", "lr_rows", "h", "w", "height", "width", "stride_b", "stride_d", "stride_y", "stride_x")
    types = types | dict.fromkeys(sizes, "i32")
    yield Variant(pixel_hoist_kernel, types, hoist_constants(plan, 48), {"num_warps": WARPS})
    yield Variant(pixel_pack_kernel, types | {"flat_ptr": types["weight_ptr"]}, pack_constants(plan, 48))


def list_variants() -> Iterator[Variant]:
    """The tables of rows and columns, and the sorting of pixels."""
    names = {*pixel_axis_kernel.arg_names, *pixel_list_kernel.arg_names, *pixel_count_kernel.arg_names}
    types = {n: "i32" if not n.endswith("_ptr") else "*fp32" if n in FLOATS else "*i64" for n in names}
    for absent in ({}, {"given_ptr": None}):
        yield Variant(pixel_axis_kernel, types, {"BLOCK": AXIS_BLOCK} | absent)
    for known in ("*u8", "*i64"):
        types |= {"class_map_ptr": known}
        yield Variant(pixel_count_kernel, types, {"BLOCK": GROUP_BLOCK}, {"num_warps": GROUP_WARPS})
        for shift, entry in ((16, "*i32"), (32, "*i64")):
            yield Variant(
                pixel_list_kernel,
                types | {"list_ptr": entry},
                {"BLOCK": GROUP_BLOCK, "SHIFT": shift},
                {"num_warps": GROUP_WARPS},
            )
