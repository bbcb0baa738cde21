"""Whether two versions of the package give the same results: images, class maps and FLOPs of both paths, bit for bit.

    python tests/same_results.py record before.npz        in the one checkout
    python tests/same_results.py record after.npz         in the other
    python tests/same_results.py compare before.npz after.npz

All shipped models run on the sample image at three budgets, in memory and streamed, in float32 and without measuring. Results
depend on the processor and on the number of threads: record both files on one machine.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = (None, 0.5, 0.8)
# (height, width) of the parts of the sample, the whole of which is larger.
SIZES = ((96, 131), (213, 160))


def main(arguments: list[str]) -> int:
    """See the module; the exit status."""
    if len(arguments) == 2 and arguments[0] == "record":
        np.savez(arguments[1], **recorded())
        return 0
    if len(arguments) == 3 and arguments[0] == "compare":
        different = differences(np.load(arguments[1]), np.load(arguments[2]))
        print("\n".join(different) or "all the same")
        return 1 if different else 0
    print(__doc__, file=sys.stderr)
    return 2


def recorded() -> dict[str, np.ndarray]:
    """All results, by name."""
    os.environ["FASTROUTE_TUNE"] = "0"
    sys.path.insert(0, str(ROOT))
    import torch

    import fastroute
    from fastroute import io

    torch.set_num_threads(1)
    sample = io.read_image(ROOT / "assets" / "sample.png")
    found: dict[str, np.ndarray] = {}
    for model in fastroute.list_models():
        router = fastroute.load(model)
        if router.num_classes == 1:
            continue
        for height, width in SIZES:
            image = sample[:, :height, :width].contiguous()
            for budget in BUDGETS:
                name = f"{model} {height}x{width} budget={budget}"
                result = router.upscale(image, budget=budget)
                found[f"{name} image"] = result.image.numpy()
                found[f"{name} classes"] = result.class_map.to(torch.int64).numpy()
                found[f"{name} FLOPs"] = flops(result.stats)
                streamed = io_array(result.image)
                outcome = router.stream(fastroute.ArrayReader(image.permute(1, 2, 0).numpy()), streamed[1], budget=budget)
                found[f"{name} streamed"] = streamed[0]
                found[f"{name} streamed FLOPs"] = flops(outcome.stats)
    return found


def io_array(like: Any) -> tuple[np.ndarray, Any]:
    """An array for a streamed result, and what writes into it."""
    import fastroute

    array = np.empty(tuple(like.permute(1, 2, 0).shape), dtype=like.numpy().dtype)
    return array, fastroute.ArrayWriter(array)


def flops(stats: Any) -> np.ndarray:
    """What was done and what a dense run does, in both conventions."""
    return np.array(
        [stats.flops.routed, stats.flops.dense, stats.paper_flops.routed, stats.paper_flops.dense], dtype=np.float64
    )


def differences(before: Any, after: Any) -> list[str]:
    """What is not the same, in words."""
    told = [f"{name}: only in one" for name in sorted(set(before) ^ set(after))]
    for name in sorted(set(before) & set(after)):
        if not np.array_equal(before[name], after[name]):
            told.append(f"{name}: different")
    return told


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
