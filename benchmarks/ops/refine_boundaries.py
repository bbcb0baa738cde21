"""refine_boundaries into float and into 8-bit images, beside PCSR's published refinement."""

from __future__ import annotations

import torch
from torch import Tensor

import fastroute
from benchmarks.baselines.pcsr_published import unfold_refinement
from benchmarks.measure import device
from benchmarks.ops._common import OURS, ROWS, SCALE, Case, Variant, cases, close, compare, compiled, known
from benchmarks.ops.stitch_patches import TOLERANCE, quantised
from benchmarks.setting import Setting
from fastroute.reference.refine_boundaries import refine_boundaries_reference

DTYPES = (torch.float32, torch.uint8)
HALF = (torch.float16, torch.bfloat16)
# Classes are constant over squares of this many pixels: seams as of a photograph, at a few pixels in a hundred.
SQUARE = 16
# A mean of nine values.
FLOPS_PER_VALUE = 9


def run_case(case: Case, setting: Setting) -> dict:
    """One upscaled image, or a batch, and its class map."""
    torch.manual_seed(0)
    dtype = case.dtype
    shape = (case.height * SCALE, case.width * SCALE)
    image = torch.rand(case.batch, 3, *shape, device=device())
    image = (image if dtype == torch.uint8 else image.to(dtype)).contiguous(memory_format=case.memory_format)
    blocks = torch.rand(case.batch, -(-shape[0] // SQUARE), -(-shape[1] // SQUARE)) < 0.3
    class_map = blocks.to(torch.uint8).repeat_interleave(SQUARE, 1).repeat_interleave(SQUARE, 2)
    class_map = class_map[:, : shape[0], : shape[1]].contiguous().to(device())
    out = torch.empty(image.shape, dtype=dtype, device=device())

    def reference(image: Tensor, class_map: Tensor) -> Tensor:
        return quantised(refine_boundaries_reference(image, class_map), dtype)

    expected, plain = known(lambda: reference(image, class_map))
    check = close(expected, TOLERANCE.get(dtype, 0))
    into = Variant(lambda: fastroute.refine_boundaries(image, class_map, out=out), check)
    # Integers are only written into a given tensor.
    variants: dict[str, Variant | str] = {OURS: into}
    if dtype == image.dtype:
        variants = {OURS: Variant(lambda: fastroute.refine_boundaries(image, class_map), check), "fastroute, out=": into}
    variants |= {
        "reference": plain,
        "reference, compiled": compiled(reference, image, class_map, check=check, setting=setting, case=case),
        "published": Variant(lambda: quantised(unfold_refinement(image, class_map), dtype), check),
    }
    label = f"refine_boundaries, {shape[1]} x {shape[0]}, {case.suffix}"
    moved = image.nbytes + class_map.nbytes + expected.nbytes
    pairs = zip(expected.split(ROWS, dim=2), image.split(ROWS, dim=2), strict=True)
    changed = sum((made != quantised(given, dtype)).any(dim=1).count_nonzero().item() for made, given in pairs)
    return compare(label, variants, moved, "published", setting, FLOPS_PER_VALUE * 3 * changed, **case.facts)


def test_refine_boundaries(setting: Setting) -> None:
    """Every call but those with `out` allocates its result, as in use; the copy does not, which favours the copy."""
    rows = [run_case(case, setting) for case in cases(setting, DTYPES, HALF, alike=True)]
    setting.save(
        "refine_boundaries", rows, "to uint8 from float32, written into a given tensor, else to the same type; medians, warm"
    )
