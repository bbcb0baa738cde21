"""extract_patches from float and from 8-bit images, beside unfold and beside packages that cut patches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import fastroute
from benchmarks.baselines.packages import extractors, pad_image
from benchmarks.measure import device
from benchmarks.ops._common import OURS, PATCH, STRIDE, Case, Variant, cases, compare, compiled, known, same
from benchmarks.setting import Setting
from fastroute import TileGrid
from fastroute.reference.extract_patches import extract_patches_reference

DTYPES = (torch.float32, torch.uint8)
HALF = (torch.float16, torch.bfloat16)


def unfold_patches(image: Tensor, grid: TileGrid) -> Tensor:  # [B, C, H, W] -> [N, C, p, p]
    """All patches by unfold; where the stride leaves a remainder, the image is padded with its edge, as pipelines do."""
    columns = F.unfold(pad_image(image, grid), grid.patch, stride=grid.stride)
    return columns.transpose(1, 2).reshape(-1, image.shape[1], grid.patch, grid.patch).contiguous()


def run_case(case: Case, setting: Setting) -> dict:
    """One image, or a batch: patches of all variants, float32 from uint8, otherwise of the image's type."""
    torch.manual_seed(0)
    grid = TileGrid(case.height, case.width, PATCH, STRIDE)
    image = torch.rand(case.batch, 3, case.height, case.width, device=device())
    eight_bit = case.dtype == torch.uint8
    image = (image * 255).round().to(case.dtype) if eight_bit else image.to(case.dtype)
    image = image.contiguous(memory_format=case.memory_format)
    target = torch.float32 if eight_bit else case.dtype
    reference_args = (image, None, None, None, PATCH, STRIDE, False, target, case.channels_last)
    expected, reference = known(lambda: extract_patches_reference(*reference_args))

    def inner(patches: Tensor) -> Tensor:
        """The patches that are cut alike wherever the last row and column lie."""
        return patches.unflatten(0, (case.batch, grid.rows, grid.cols))[:, :-1, :-1]

    def same_inner(patches: Tensor) -> None:
        same(inner(expected))(inner(patches))

    def pixels() -> Tensor:
        """What others must be given: floats in [0, 1]."""
        return image.float() / 255 if eight_bit else image

    def ours() -> Tensor:
        return fastroute.extract_patches(image, grid, dtype=target, memory_format=case.memory_format)

    variants: dict[str, Variant | str] = {
        OURS: Variant(ours, same(expected)),
        "reference": reference,
        "reference, compiled": compiled(
            extract_patches_reference, *reference_args, check=same(expected), setting=setting, case=case
        ),
        "unfold": Variant(lambda: unfold_patches(pixels(), grid), same_inner),
    }
    for package, extract in extractors(grid).items():
        is_there = not isinstance(extract, str)
        variants[package] = Variant(lambda e=extract: e(pixels()), same_inner, foreign=True) if is_there else extract
    label = f"extract_patches, {case.width} x {case.height}, {case.suffix}"
    # A conversion is one product per value.
    flops = expected.numel() if eight_bit else 0
    return compare(label, variants, image.nbytes + expected.nbytes, "unfold", setting, flops, **case.facts)


def test_extract_patches(setting: Setting) -> None:
    """Every call allocates its result, as in use; the copy does not, which favours the copy."""
    rows = [run_case(case, setting) for case in cases(setting, DTYPES, HALF)]
    setting.save(
        "extract_patches",
        rows,
        "to float32 from uint8, else to the same type; medians of alternating runs, warm; every call allocates its result, the "
        "copy does not; peers pad the image where the last patches are shifted inward here, and give contiguous patches",
    )
