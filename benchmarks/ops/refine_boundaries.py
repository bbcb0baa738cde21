"""refine_boundaries into float and into 8-bit images, beside PCSR's published refinement."""

from __future__ import annotations

import torch
from torch import Tensor

import fastroute
from benchmarks.baselines.pcsr_published import unfold_refinement
from benchmarks.measure import save
from benchmarks.ops._common import OURS, SCALE, Variant, compare, compiled, sizes
from benchmarks.ops.stitch_patches import quantised
from fastroute.reference.refine_boundaries import refine_boundaries_reference

DTYPES = (torch.float32, torch.uint8)
# Classes are constant over squares of this many pixels: seams as of a photograph, at a few pixels in a hundred.
SQUARE = 16


def run_case(name: str, height: int, width: int, dtype: torch.dtype, smoke: bool) -> dict:
    """One upscaled image and its class map."""
    torch.manual_seed(0)
    shape = (height * SCALE, width * SCALE)
    image = torch.rand(1, 3, *shape)
    blocks = (torch.rand(1, -(-shape[0] // SQUARE), -(-shape[1] // SQUARE)) < 0.3).to(torch.uint8)
    class_map = blocks.repeat_interleave(SQUARE, 1).repeat_interleave(SQUARE, 2)[:, : shape[0], : shape[1]].contiguous()
    out = torch.empty(image.shape, dtype=dtype)
    expected = quantised(refine_boundaries_reference(image, class_map), dtype)

    def close(result: Tensor) -> None:
        if dtype == torch.uint8:
            # A mean of nine summed in another order may lie on the other side of a half.
            assert (result.int() - expected.int()).abs().max() <= 1, "more than one level off"
        else:
            torch.testing.assert_close(result, expected)

    def reference(image: Tensor, class_map: Tensor) -> Tensor:
        return quantised(refine_boundaries_reference(image, class_map), dtype)

    variants: dict[str, Variant | str] = {}
    if dtype == image.dtype:
        variants[OURS] = Variant(lambda: fastroute.refine_boundaries(image, class_map), close)
        variants["fastroute, out="] = Variant(lambda: fastroute.refine_boundaries(image, class_map, out=out), close)
    else:
        # Integers are only written into a given tensor.
        variants[OURS] = Variant(lambda: fastroute.refine_boundaries(image, class_map, out=out), close)
    variants |= {
        "reference": Variant(lambda: reference(image, class_map), close),
        "reference, compiled": compiled(reference, image, class_map, check=close, smoke=smoke),
        "published": Variant(lambda: quantised(unfold_refinement(image, class_map), dtype), close),
    }
    kind = str(dtype)[6:]
    label = f"refine_boundaries, {shape[1]} x {shape[0]}, {kind}"
    facts = {"size": name, "dtype": kind, "output_pixels": shape[0] * shape[1]}
    return compare(label, variants, image.nbytes + class_map.nbytes + expected.nbytes, "published", smoke, **facts)


def test_refine_boundaries(smoke: bool, saving: bool) -> None:
    """Every call but those with `out` allocates its result, as in use; the copy does not, which favours the copy."""
    rows = [run_case(name, *size, dtype, smoke) for name, size in sizes(smoke).items() for dtype in DTYPES]
    if saving and not smoke:
        save("refine_boundaries", rows, "from float32; 8-bit results are written into a given tensor; medians, warm")
