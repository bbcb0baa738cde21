"""The result of a routed upscale, and how its time is measured."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastroute.profiling import RoutedFlops

if TYPE_CHECKING:
    from typing_extensions import Self


# Two threads that ask for the same statistics find them once.
_finding = threading.RLock()


@dataclass(frozen=True)
class RoutingStats:
    """Statistics of one call of `upscale`.

    On a GPU they are found when the first of them is asked for, which waits for the call to end; `upscale` itself returns while
    the device still computes.

    Attributes:
        counts_per_class: number of patches that went through each branch, cheapest first.
        work_per_class: area that each branch ran on, in patches. It is less than `counts_per_class` where neighbouring patches
            ran as one region, whose overlaps are computed once. None for a router of pixels.
        flops: FLOPs in the true convention: multiply-adds done, classifier included, times two.
        paper_flops: FLOPs as the paper that its `paper` names counts them: ClassSR, like CDNSR and ARM, without the classifier;
            PCSR with it. None of them counts it in what is dense.
        seconds: wall time of each stage (classify, assign, extract, branches, stitch) and the total. The stage "tune" is always
            0: calls find out how branches run fastest on their own work, and an engine prepares them when it is requested.
            Where the last layers of the branches are computed while their patches are stitched, the time of the threads is
            divided between the two stages. On a GPU a stage is the time that the device took for it; during the rest of the
            total the device waited for the host. The total is then the time from the first kernel to the last.
        working_set: the largest number of bytes held beside the image and the result; for a streamed run, the largest number
            held at all. It is a model of what is allocated, without the program itself.
    """

    counts_per_class: list[int]
    flops: RoutedFlops
    paper_flops: RoutedFlops
    seconds: dict[str, float]
    # Made by factories, because a default value would hide one that is still to be found.
    working_set: int = field(default_factory=int)
    work_per_class: list[float] | None = field(default_factory=lambda: None)

    @classmethod
    def when_asked(cls, find: Callable[[], Self], later: bool) -> Self:
        """The statistics that `find` returns; with `later`, it is called when the first of them is asked for."""
        if not later:
            return find()
        made = object.__new__(cls)
        vars(made)["_find"] = find
        return made

    def __getattr__(self, name: str) -> Any:
        # Called only for what is not there: anything, until it has been found.
        with _finding:
            find = vars(self).get("_find")
            if find is not None and not name.startswith("__"):
                vars(self).update(vars(find()))
                del vars(self)["_find"]
        if name not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return vars(self)[name]

    def __getstate__(self) -> dict[str, Any]:
        if "_find" in vars(self):
            _ = self.seconds  # what waits for a device belongs to this process
        return vars(self)

    @property
    def overhead(self) -> float:
        """The share of the time that is spent outside the networks (classifier and branches)."""
        networks = self.seconds["classify"] + self.seconds["branches"]
        return 1 - networks / (self.seconds["total"] - self.seconds["tune"])

    def __str__(self) -> str:
        total = max(sum(self.counts_per_class), 1)
        shares = " / ".join(f"{100 * n / total:.0f} %" for n in self.counts_per_class)
        whole = self.flops.of_one_pass
        paper = f" ({100 * self.paper_flops.fraction:.0f} % as {named} counts)" if (named := self.paper_flops.paper) else ""
        one_pass = f", {100 * whole:.0f} % of those of one pass over the image" if whole is not None else ""
        return (
            f"{total} patches, {shares} per class (cheapest first); {100 * self.flops.fraction:.0f} % of the dense FLOPs"
            f"{one_pass}{paper}; {self.seconds['total']:.2f} s, "
            f"{100 * self.overhead:.1f} % of it routing"
        )


@dataclass(frozen=True)
class Upscaled:
    """A super-resolved image, its class map and statistics.

    Attributes:
        image: the result, with the rank, dtype and device of the input and `scale` times its height and width.
        class_map: int64 (B, rows, cols), or (rows, cols) for an unbatched input: the branch of every patch, 0 the cheapest.
        stats: counts, FLOPs and times.
    """

    image: Tensor
    class_map: Tensor
    stats: RoutingStats

    def __repr__(self) -> str:
        tensors = {"image": self.image, "class_map": self.class_map}
        shown = [f"{name}: {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}" for name, x in tensors.items()]
        return f"Upscaled({', '.join(shown)}; {self.stats})"


@dataclass(frozen=True)
class Streamed:
    """The class map and statistics of a streamed upscale. The image is wherever the writer put it.

    Attributes:
        class_map: int64 (rows, cols), the branch of every patch, 0 the cheapest; None for a router of pixels, whose map is
            as large as the image.
        stats: counts, FLOPs and times.
    """

    class_map: Tensor | None
    stats: RoutingStats


@dataclass
class Stopwatch:
    """Wall time by stage.

    On a GPU a stage lasts from one event of the current stream to another, and the total from the start to :meth:`stop`.
    Nothing waits for the events, so `seconds` and `parts` include the stage only after :meth:`finish`.
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    parts: dict[int, float] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)
    pending: list[tuple[str, int | None, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    ends: list[torch.cuda.Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.later:
            self.ends.append(self._event())

    @property
    def later(self) -> bool:
        """Whether times are known only after a wait."""
        return self.device.type == "cuda"

    def stop(self) -> None:
        """End the total here; :meth:`finish` does so where nobody has."""
        if self.later and len(self.ends) == 1:
            self.ends.append(self._event())

    @contextmanager
    def stage(self, name: str, part: int | None = None) -> Iterator[None]:
        """Add the time of the ``with`` block to stage `name`, and to class `part` where one is given."""
        if self.later:
            before = self._event()
            yield
            self.pending.append((name, part, before, self._event()))
            return
        begin = time.perf_counter()
        yield
        self._add(name, part, time.perf_counter() - begin)

    @contextmanager
    def waited(self, name: str) -> Iterator[None]:
        """:meth:`stage` for a block that waits for the device anyway, so that its time is known when the block ends."""
        begin = self.elapsed()
        yield
        self._add(name, None, self.elapsed() - begin)

    def move(self, stage: str, to: str, seconds: Mapping[int, float]) -> None:
        """Move `seconds` per class from `stage` to the stage `to`."""
        for part, taken in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) - taken
            self.seconds[to] = self.seconds.get(to, 0.0) + taken
            self.parts[part] = self.parts.get(part, 0.0) + taken

    def elapsed(self) -> float:
        """The seconds since the start, once the device has finished its work."""
        if self.later:
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self.start

    def finish(self) -> dict[str, float]:
        """The seconds of all stages, and the total."""
        if self.later:
            self.stop()
            first, last = self.ends
            if not last.query():
                last.synchronize()
            total = first.elapsed_time(last) / 1e3
        else:
            total = self.elapsed()
        for name, part, begin, end in self.pending:
            self._add(name, part, begin.elapsed_time(end) / 1e3)
        self.pending.clear()
        return {**self.seconds, "total": total}

    def _add(self, name: str, part: int | None, taken: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + taken
        if part is not None:
            self.parts[part] = self.parts.get(part, 0.0) + taken

    def _event(self) -> torch.cuda.Event:
        with torch.cuda.device(self.device):
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
        return event
