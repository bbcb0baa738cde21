"""extract_patches from float and from 8-bit images, beside unfold and beside packages that cut patches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import fastroute
from benchmarks.baselines.packages import extractors, pad_image
from benchmarks.measure import save
from benchmarks.ops._common import OURS, PATCH, SCALE, STRIDE, Variant, compare, compiled, same, sizes
from fastroute import TileGrid
from fastroute.reference.extract_patches import extract_patches_reference

DTYPES = (torch.float32, torch.uint8)


def unfold_patches(image: Tensor, grid: TileGrid) -> Tensor:  # [1, C, H, W] -> [N, C, p, p]
    """All patches by unfold; where the stride leaves a remainder, the image is padded with its edge, as pipelines do."""
    columns = F.unfold(pad_image(image, grid), grid.patch, stride=grid.stride)
    return columns.transpose(1, 2).reshape(-1, image.shape[1], grid.patch, grid.patch).contiguous()


def run_case(name: str, height: int, width: int, dtype: torch.dtype, smoke: bool) -> dict:
    """One image: float32 patches of all variants."""
    torch.manual_seed(0)
    grid = TileGrid(height, width, PATCH, STRIDE)
    image = torch.rand(1, 3, height, width)
    if dtype == torch.uint8:
        image = (image * 255).round().to(dtype)
    reference_args = (image, None, None, None, PATCH, STRIDE, False, torch.float32)
    expected = extract_patches_reference(*reference_args)

    def inner(patches: Tensor) -> Tensor:
        """The patches that are cut alike wherever the last row and column lie."""
        return patches.view(grid.rows, grid.cols, 3, PATCH, PATCH)[:-1, :-1]

    def same_inner(patches: Tensor) -> None:
        same(inner(expected))(inner(patches))

    def pixels() -> Tensor:
        """What others must be given: floats in [0, 1]."""
        return image.float() / 255 if dtype == torch.uint8 else image

    variants: dict[str, Variant | str] = {
        OURS: Variant(lambda: fastroute.extract_patches(image, grid, dtype=torch.float32), same(expected)),
        "reference": Variant(lambda: extract_patches_reference(*reference_args), same(expected)),
        "reference, compiled": compiled(extract_patches_reference, *reference_args, check=same(expected), smoke=smoke),
        "unfold": Variant(lambda: unfold_patches(pixels(), grid), same_inner),
    }
    for package, extract in extractors(grid).items():
        is_there = not isinstance(extract, str)
        variants[package] = Variant(lambda e=extract: e(pixels()), same_inner, foreign=True) if is_there else extract
    bytes_moved = image.nbytes + expected.nbytes
    label = f"extract_patches, {width} x {height}{', uint8' if dtype == torch.uint8 else ''}"
    pixel_count = height * width * SCALE**2
    return compare(label, variants, bytes_moved, "unfold", smoke, size=name, dtype=str(dtype)[6:], output_pixels=pixel_count)


def test_extract_patches(smoke: bool, saving: bool) -> None:
    """Every call allocates its result, as in use; the copy does not, which favours the copy."""
    rows = [run_case(name, *size, dtype, smoke) for name, size in sizes(smoke).items() for dtype in DTYPES]
    if saving and not smoke:
        save(
            "extract_patches",
            rows,
            "to float32; medians of alternating runs, warm; every call allocates its result, the copy does not; peers pad "
            "the image where the last patches are shifted inward here",
        )
