"""Which of two backends has the faster kernel of an operator on a GPU: measured on whole images, operator by operator.

CUDA C++ and Triton differ by device, type and shape: on Hopper the matrix products of Triton read shared memory by themselves,
elsewhere CUDA's kernel of `pixel_mlp` keeps more weights there. What was measured holds for the device in this process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable

import torch

from fastroute import backends
from fastroute.runtime.tuning import CACHE, EARNED, METHOD, enabled

logger = logging.getLogger("fastroute")

# Images by each backend, of which the fastest counts; the first of all compiles.
ROUNDS = 3


def choose_kernels(device: torch.device, run: Callable[[], object], about: object) -> dict[str, str]:
    """Find, for every operator that `run` calls, the faster of the backends that have a kernel of it, and use it from now on.

    Nothing is measured off GPUs, within :func:`fastroute.use_backend`, where the environment allows no measuring, or where an
    operator has one kernel alone. What is known of an earlier process is taken over.

    Args:
        device: where `run` works.
        run: upscales an image.
        about: what the outcome depends on beside device and versions, such as networks and sizes; of JSON's types.

    Returns:
        The backend of each operator that had a choice.
    """
    if device.type != "cuda" or not enabled() or backends.requested():
        return {}
    index = device.index if device.index is not None else torch.cuda.current_device()
    device = torch.device("cuda", index)
    with backends.recorded() as called:
        run()
    contenders = {op: backends.kernels_on_gpu(op, index) for op in sorted(called)}
    contenders = {op: names for op, names in contenders.items() if len(names) > 1}
    if not contenders:
        return {}
    versions = [
        torch.__version__,
        *map(backends.installed_version, backends.TRITON),
        backends.EXTENSION.info.get("schema_digest"),
    ]
    facts = [METHOD, torch.cuda.get_device_name(index), versions, about, contenders]
    key = "kernels-" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
    found = _known(CACHE.read().get(key, {}), contenders)
    if not found:
        for op, names in contenders.items():
            found[op] = _faster(op, names, index, run)
        CACHE.remember(key, {"kernels": found})
    for op, name in found.items():
        backends.prefer(op, index, name)
    return found


def _known(entry: dict, contenders: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """What an entry of the cache says, if it says it of all operators."""
    held = entry.get("kernels")
    whole = isinstance(held, dict) and all(held.get(op) in names for op, names in contenders.items())
    return {op: held[op] for op in contenders} if whole else {}  # type: ignore[index]


def _faster(op: str, names: tuple[str, ...], index: int, run: Callable[[], object]) -> str:
    """The backend of `names` with which `run` is fastest; the first unless another one is faster by more than noise."""
    least = dict.fromkeys(names, float("inf"))
    for turn in range(ROUNDS + 1):
        for name in names:
            backends.prefer(op, index, name)
            seconds = _seconds(run, index)
            if turn:
                least[name] = min(least[name], seconds)
    best = min(names, key=least.__getitem__)
    chosen = best if EARNED * least[best] < least[names[0]] else names[0]
    backends.prefer(op, index, chosen)
    told = ", ".join(f"{name} {1e3 * seconds:.3f} ms" for name, seconds in least.items())
    logger.info("an image with %s by %s: %s is used from now on", op, told, chosen)
    return chosen


def _seconds(run: Callable[[], object], index: int) -> float:
    torch.cuda.synchronize(index)
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize(index)
    return time.perf_counter() - begin
