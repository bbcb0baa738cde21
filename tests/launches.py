"""What an image takes on a GPU that is not there: launches, allocations, waits and timing events, counted by their calls.

Tensors are those of :mod:`waits`, without values, and the routers take the sizes of a GPU. Of this package's operators the host
code of their Triton kernels runs, which launches nothing and tells what it would have. What the host reads back comes from a
script, and every reading counts as a wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from waits import GPU, triton_launchers

from fastroute.runtime import results

# Operators that give memory without writing to it, and those of which a GPU needs more than one kernel.
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "resize_"}
KERNELS = {"constant_pad_nd": 2, "pad": 2}
Answer = Callable[[Tensor], list]


class Counted(TorchDispatchMode):
    """Counts what runs on the GPU.

    Attributes:
        kernels: launches by the name of the operator or of the Triton kernel, and by whether the encoder makes them.
        allocations: tensors that got memory of their own.
        events: timing events that were recorded.
        waits: what was waited for.
        launched: Triton kernels that would have been launched.
        in_encoder: whether the encoder is running.
    """

    def __init__(self, launched: list[str]) -> None:
        super().__init__()
        self.launched, self.in_encoder = launched, False
        self.clear()

    def clear(self) -> None:
        """Count from 0."""
        self.kernels: Counter[tuple[str, bool]] = Counter()
        self.allocations, self.events, self.waits = 0, 0, list[str]()
        self.launched.clear()

    def taken(self) -> Counted:
        """The counts so far."""
        copied = Counted([])
        copied.kernels, copied.allocations, copied.events = self.kernels.copy(), self.allocations, self.events
        for name in self.launched:
            copied.kernels[name, False] += 1
        return copied

    def launches(self, encoder: bool = False) -> int:
        """Launches beside the encoder, or in it."""
        return sum(n for (_, within), n in self.kernels.items() if within == encoder)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        taken = {id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.device == GPU]
        name = func._schema.name.split("::")[1]
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not made or views or name == "detach":
            return result
        self.allocations += sum(id(x) not in taken for x in made)
        if name not in EMPTY:
            self.kernels[name, self.in_encoder] += KERNELS.get(name, 1)
        if name in ("convolution", "conv2d") and len(args) > 2 and args[2] is not None:
            self.kernels["bias of a convolution", self.in_encoder] += 1
        return result


class Answers(TorchFunctionMode):
    """Values that the host reads back: those of the script."""

    def __init__(self, counted: Counted, answer: Answer) -> None:
        self.counted, self.answer = counted, answer

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist and args[0].device == GPU:
            self.counted.waits.append(f"{args[0].dtype} {tuple(args[0].shape)}")
            return self.answer(args[0])
        return func(*args, **(kwargs or {}))


class Event:
    """An event that measures nothing; it is over after a wait that follows it."""

    def __init__(self, counted: Counted) -> None:
        self.counted, self.before = counted, len(counted.waits)
        counted.events += 1

    def query(self) -> bool:
        return len(self.counted.waits) > self.before

    def synchronize(self) -> None:
        self.counted.waits.append("event")

    def elapsed_time(self, end: Event) -> float:
        return 1.0


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch, answer: Answer) -> Iterator[Counted]:
    """Counts within the ``with`` block, under the sizes of a GPU; a synchronisation is a wait as well."""
    from test_gpu_sizes import gpu_sizes

    from fastroute.patch import patch_router
    from fastroute.pixel import pixel_image, pixel_router
    from fastroute.runtime import memory_plan

    with monkeypatch.context() as patched, triton_launchers(patched) as launched:
        counted = Counted(launched)
        gpu_sizes(patched)
        rows = pixel_image.rows_in_bands

        def encoded(*args: Any) -> Iterator[Any]:
            bands = rows(*args)
            while True:
                before, counted.in_encoder = counted.in_encoder, True
                try:
                    band = next(bands, None)
                finally:
                    counted.in_encoder = before
                if band is None:
                    return
                yield band

        patched.setattr(memory_plan, "DEFAULT_LIMIT", {"cpu": memory_plan.DEFAULT_LIMIT["cuda"]})
        patched.setattr(pixel_image, "rows_in_bands", encoded)
        patched.setattr(results.Stopwatch, "_event", lambda self: Event(counted))
        for module in (patch_router, pixel_router):
            patched.setattr(module, "Stopwatch", lambda device: results.Stopwatch(torch.device("cuda", 0)))
        patched.setattr(torch.cuda, "synchronize", lambda device: counted.waits.append("synchronize"))
        with Answers(counted, answer), counted:
            yield counted
