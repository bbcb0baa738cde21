"""Networks of any architectures over one image: the cheaper ones where they come near enough to the most expensive one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastroute._arguments import real, whole
from fastroute._contexts import ordinarily
from fastroute.cascades.cells import CELL, Cells, Rectangle, scores_by_rows
from fastroute.cascades.decision import Decision, Table, Target
from fastroute.cascades.memory import SMALL, Footprint, Memory, footprint, memory_within, strips
from fastroute.cascades.networks import Networks, unsupported_half
from fastroute.cascades.output_score import Base, scored_result
from fastroute.cascades.plan import Plan, aligned
from fastroute.cascades.run import FADE, Limits, Network, Piece, Read, cut, edges_of, floating, layers_of, pieces_of, store
from fastroute.cascades.samples import measure_samples, sampled_plan
from fastroute.cascades.search import choose
from fastroute.engines import TORCH
from fastroute.models.network import INTERNAL, Facts
from fastroute.models.precision import probed_dtype, sums_of
from fastroute.ops import _checks as check
from fastroute.profiling import RoutedFlops
from fastroute.runtime.endpoints import Endpoints, home, in_memory, output_like, streamed
from fastroute.runtime.memory_plan import AUTO, Limit, check_limit, limit_on
from fastroute.runtime.progress import Progress, shown
from fastroute.runtime.protocols import Reader, Writer, check_reader
from fastroute.runtime.results import RoutingStats, Stopwatch, Streamed, Upscaled
from fastroute.runtime.router import Router
from fastroute.runtime.sinks import Sink
from fastroute.runtime.threads import patiently
from fastroute.runtime.transfer import to_device

if TYPE_CHECKING:
    from typing_extensions import Self

# Pixels of context that make the result of a whole image, if they are no more, even where none is asked for.
FARTHEST = 40
# Bytes of a result that was scored and is kept for what is chosen of it, where no limit is asked for.
KEPT = 1 << 30


@dataclass(frozen=True)
class Call:
    """What one call asks for.

    Attributes:
        op: its name.
        target: by what classes are chosen.
        maps: int64 [B, rows, cols], where they are given.
        limit: bytes to hold at most.
        progress: see :meth:`CascadeRouter.upscale`.
    """

    op: str
    target: Target
    maps: Tensor | None
    limit: int | None
    progress: Progress


class CascadeRouter(Router):
    """Super-resolution of whole images by networks of any architectures and one scale; what :func:`fastroute.cascade` makes.

    Args:
        modules: the networks, from the cheapest to the most expensive.
        facts: of each.
        decision: by what the class of a cell is chosen.
        costs: of a pixel in each class, rising; default its FLOPs.
        context: pixels around a region that are computed and cropped.
        names: of the networks, for messages.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        facts: Sequence[Facts],
        decision: Decision,
        costs: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.networks = Networks(modules, facts)
        self.facts, self.decision = list(facts), decision
        self.names = list(names or (fact.architecture for fact in facts))
        self.num_classes, self.scale, self.channels = len(modules), facts[-1].scale, facts[-1].channels
        self.border, self.dtype = "zero", torch.float32
        self.align = math.lcm(*(fact.multiple for fact in facts if CELL % fact.multiple == 0))
        self.branch_flops = self.networks.flops()
        self.costs = [float(cost) for cost in costs] if costs is not None else list(self.branch_flops)
        self.register_buffer("_place", torch.empty(0), persistent=False)
        self._memory: list[Footprint] | None = None

    scale: int

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"CascadeRouter({', '.join(self.names)}; scale={self.scale}, {dtype} on {self.device})"

    def compile(self, engine: str = TORCH) -> Self:  # type: ignore[override]
        """PyTorch runs the networks; other engines are refused.

        Raises:
            ValueError: another engine than "torch".
        """
        if engine not in (TORCH, "auto"):
            raise ValueError(f"compile: the networks of a cascade run in PyTorch alone; got engine={engine!r}")
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        _, dtype = probed_dtype(fn, torch.empty(0, dtype=self.dtype, device=self.device))
        for name, facts in zip(self.names, self.facts, strict=True):
            if reason := unsupported_half(facts, dtype):
                raise ValueError(f"CascadeRouter.to: {name}: {reason}")
        return super()._apply(fn, recurse)

    def _before_halving(self, dtype: torch.dtype) -> None:
        self.networks.halve(dtype)

    def _moved(self) -> None:
        self.networks.dtype, self._memory = self.dtype, None

    @ordinarily
    @torch.inference_mode()
    def upscale(  # type: ignore[override]
        self,
        image: Tensor,  # [B, C, H, W] or [C, H, W]
        *,
        budget: float | None = None,
        fidelity: float | None = None,
        class_map: Tensor | None = None,  # [B, rows, cols] or [rows, cols]
        context: int | None = None,
        progress: Progress = False,
        memory_limit: int | None = None,
    ) -> Upscaled:
        """Super-resolve an image or a batch of images.

        Args:
            image: (B, C, H, W) or (C, H, W), floating in [0, 1], uint8 or uint16; any size from one pixel on. On the device of
                the networks, or on the CPU.
            budget: cost as a fraction of what the most expensive network takes for the whole image; 1 runs it everywhere.
            fidelity: nearness to what the most expensive network would give for the whole image, in dB of PSNR, which the
                result is expected to keep; needs a calibrated cascade. Default: the fidelity that was calibrated.
            class_map: the least class of every cell of 32 pixels, instead.
            context: pixels around a region that are computed and cropped; default what is calibrated, or 16.
            progress: show a progress bar, or call this function with how many pieces are done and how many there are.
            memory_limit: bytes to hold at most beside `image` and the result: regions are no larger. It changes the result
                slightly where networks see further than the context.

        Returns:
            :class:`fastroute.Upscaled`, with the classes in which the cells ran. A floating image is not clamped; an integer
            one is, and rounded half to even.

        Raises:
            ValueError: a wrong rank, number of channels, empty image, another device, an impossible budget or fidelity, or a
                class map of another shape or with ids out of range.
            TypeError: an unsupported dtype.
        """
        op = "upscale"
        images = check.images(op, image, self.channels, home(image, self.device))
        check_limit(op, memory_limit)
        target = self._target(budget, fidelity, class_map, context)
        maps = self._class_maps(class_map, images.shape)
        size = (images.shape[2] * self.scale, images.shape[3] * self.scale)
        output = output_like(op, images, (*images.shape[:2], *size))
        reads = [partial(cut, one) for one in images]
        call = Call(op, target, maps, memory_limit, progress)
        ids, stats = self._run(in_memory(images, output, self.device), reads, call)
        ids = ids.to(images.device)
        return Upscaled(output, ids, stats) if image.ndim == 4 else Upscaled(output[0], ids[0], stats)

    @ordinarily
    @torch.inference_mode()
    def stream(  # type: ignore[override]
        self,
        reader: Reader,
        writer: Writer,
        *,
        budget: float | None = None,
        fidelity: float | None = None,
        class_map: Tensor | None = None,  # [rows, cols]
        context: int | None = None,
        progress: Progress = False,
        memory_limit: Limit = AUTO,
    ) -> Streamed:
        """Super-resolve what a reader gives into a writer: neither the image nor its result is held in memory as a whole.

        Pieces of the image are read where they are needed, and rows written as soon as nothing more changes them. With the same
        `memory_limit` the result is that of :meth:`upscale`, bit for bit.

        Args:
            reader: gives the image, see :class:`fastroute.Reader`.
            writer: takes the result, see :class:`fastroute.Writer`.
            budget, fidelity, class_map, context, progress: see :meth:`upscale`.
            memory_limit: bytes to hold at most, or None for no limit. By default, "auto", it is 512 MiB, or 8 GiB for a router
                on a GPU, or what a single cell takes where that is more.

        Raises:
            ValueError, TypeError: see :meth:`upscale`.
        """
        op = "stream"
        check_reader(op, reader, self.channels, check.FLOATING + check.INTEGER_IMAGE)
        limit = limit_on(self.device, memory_limit)
        check_limit(op, limit)
        target = self._target(budget, fidelity, class_map, context)
        channels, height, width = reader.shape
        maps = self._class_maps(class_map, (1, channels, height, width))
        ends = streamed(reader, writer, self.output_size(height, width), self.device)
        call = Call(op, target, maps, limit, progress)
        ids, stats = self._run(ends, [lambda where: reader.read(where.top, where.bottom, where.left, where.right)], call)
        return Streamed(ids[0], stats)

    def pixel_map(self, class_map: Tensor, size: Sequence[int]) -> Tensor:  # [rows, cols] -> [H, W]
        """The class of every pixel of a result of that height and width."""
        rows, cols = (torch.arange(length) // (CELL * self.scale) for length in size)
        return class_map.cpu()[rows][:, cols]

    @property
    def decides(self) -> bool:
        """Whether calls without a budget have something to go by."""
        return self.num_classes == 1 or self.decision.table is not None or self.decision.thresholds is not None

    def check(self, budget: float | None = None, fidelity: float | None = None) -> None:
        """Refuse what :meth:`upscale` would refuse of these.

        Raises:
            ValueError: see :meth:`upscale`.
        """
        self._target(budget, fidelity, None, None)

    def output_size(self, height: int, width: int) -> tuple[int, int]:  # type: ignore[override]
        """Height and width of what an image of that size becomes."""
        return height * self.scale, width * self.scale

    def _target(self, budget: float | None, fidelity: float | None, class_map: Tensor | None, context: int | None) -> Target:
        # [rows, cols] of class_map
        op = "upscale"
        given = [
            name for name, value in (("budget", budget), ("fidelity", fidelity), ("class_map", class_map)) if value is not None
        ]
        if len(given) > 1:
            raise ValueError(f"{op}: give one of {' and '.join(given)}: each decides alone")
        if context is not None:
            whole(op, "context", context, 4096, least=0)
        if budget is not None and not 0 < real(op, "budget", budget) <= 1:
            raise ValueError(f"{op}: budget must be above 0 and at most 1; got {budget}")
        if fidelity is not None and not 0 < real(op, "fidelity", fidelity) < 200:
            raise ValueError(f"{op}: fidelity must be above 0 and below 200 dB; got {fidelity}")
        return self.decision.target(self.num_classes, budget, fidelity, class_map is not None, context)

    def _class_maps(self, class_map: Tensor | None, size: Sequence[int]) -> Tensor | None:  # [B, rows, cols]
        if class_map is None:
            return None
        op = "upscale"
        check.tensor(op, "class_map", class_map)
        check.dtype(op, "class_map", class_map.dtype, check.INDEX)
        cells = Cells(*size[2:])
        shape = (size[0], cells.rows, cells.cols)
        if tuple(class_map.shape) not in ((shape[1:], shape) if shape[0] == 1 else (shape,)):
            raise ValueError(f"{op}: class_map must be {shape} for this image; got {tuple(class_map.shape)}")
        check.in_range(op, "class_map", class_map, self.num_classes)
        return class_map.reshape(shape).to("cpu", torch.int64)

    def _run(self, ends: Endpoints, reads: Sequence[Read], call: Call) -> tuple[Tensor, RoutingStats]:  # [B, rows, cols]
        """All images from where they are read to where they are written, one band of rows after the other."""
        watch, device = Stopwatch(self.device), self.device
        cells = Cells(*ends.source.shape[2:])
        takes, values = self._footprints(cells, call.limit), self.channels * self.scale**2 * cells.width
        memory = memory_within(call.op, call.limit, takes, values, self._context(call.target))
        plans, pieces = [], []
        scored = kept = 0
        with self.lock, patiently(device), ends.opened(memory.rows, memory.rows * self.scale) as sink:
            for n, raw in enumerate(reads):

                def read(where: Rectangle, raw: Read = raw) -> Tensor:
                    return floating(to_device(raw(where), device), self.dtype)

                plan, base = self._plan(read, cells, call, n, memory, watch)
                plans.append(plan)
                pieces.append(self._pieces(plan, call, memory))
                if base is not None:
                    scored += base.pixels if plan.dense or base.results is None else 0
                    kept = max(kept, memory.row * cells.height if base.results is not None else 0)
                self._write(plan, pieces[-1], base, read, sink, n, memory.rows, call.progress, watch)
        with torch.inference_mode(False):
            ids = torch.stack([plan.class_ids for plan in plans]).clone()
        held = kept + max(memory.held(own, cells.height) for own in pieces)
        return ids, self._stats(plans, pieces, scored, held, watch)

    def _plan(
        self, read: Read, cells: Cells, call: Call, number: int, memory: Memory, watch: Stopwatch
    ) -> tuple[Plan, Base | None]:
        class_ids = None if call.maps is None else call.maps[number]
        if self.facts[-1].tiling == INTERNAL or self.num_classes == 1:
            class_ids = torch.full((cells.rows, cells.cols), self.num_classes - 1)
        scores, base = None, None
        if class_ids is None and not call.target.everywhere:
            with watch.stage("classify"):
                if self.decision.base is None:
                    scores = scores_by_rows(read, cells, self.decision.score)
                else:
                    scores, base = self._scored(self.decision.base, read, cells, call, memory)

        def planned(table: Table | None, coarse: bool = False) -> Plan:
            with watch.stage("assign"):
                decision = replace(self.decision, table=table)
                return choose(decision, call.target, cells, self.costs, scores, class_ids, self.align, coarse=coarse)

        def measure(pieces: Sequence[Piece]) -> Tensor:  # [K - 1, N]
            with watch.stage("classify"):
                return measure_samples(pieces, self.runs(), read, self.scale)

        table = self.decision.table
        if scores is None or table is None or call.target.fidelity is None:
            return planned(table), base
        context = aligned(table.contexts[0], self.align)
        return sampled_plan(cells, table, scores, context, self.costs, self.decision.base, planned, measure), base

    def _scored(self, k: int, read: Read, cells: Cells, call: Call, memory: Memory) -> tuple[Tensor, Base]:  # [rows, cols]
        """Scores by the result of class `k`, and that result."""
        pieces = self._pieces_of(k, (cells.whole,), self.decision.context, cells, call, memory)
        keep = call.limit is None and memory.row * cells.height <= KEPT
        return scored_result(k, pieces, partial(self.networks.run, k), read, cells, self.scale, keep)

    def runs(self) -> list[Network]:
        """Each class as a function of images."""
        return [partial(self.networks.run, k) for k in range(self.num_classes)]

    def _pieces(self, plan: Plan, call: Call, memory: Memory) -> list[list[Piece]]:
        """The pieces of each class."""
        every = enumerate(plan.regions)
        return [self._pieces_of(k, regions, plan.context, plan.cells, call, memory) for k, regions in every]

    def _pieces_of(
        self, k: int, regions: Sequence[Rectangle], context: int, cells: Cells, call: Call, memory: Memory
    ) -> list[Piece]:
        reach, limits, fade = self.facts[k].reach, memory.limits, FADE
        if tuple(regions) == (cells.whole,) and reach is not None and reach <= FARTHEST and call.target.context is None:
            # Pieces of as much context as the network sees are those of the whole image: there is nothing to blend.
            context, fade = aligned(reach, self.align), 0
            if call.limit is None:
                takes = self._footprints(cells, None)[k]
                limits = Limits(tallest=strips(cells.height, cells.width, context, takes, self.device))
        return pieces_of(cells, regions, context, limits, fade)

    def _write(
        self, plan: Plan, pieces: Sequence[Sequence[Piece]], base: Base | None, read: Read, sink: Sink, number: int, rows: int,
        progress: Progress, watch: Stopwatch,
    ) -> None:  # fmt: skip
        """The bands of one image, through its layers, into `sink`."""
        images, exact = (number, number + 1), sums_of(self.dtype)
        ready = base.ready if base is not None and not plan.dense else {}
        with shown(progress, sum(map(len, pieces)) - sum(map(len, ready.values())), "region") as bar:
            layers = layers_of(plan, pieces, self.runs(), read, self.scale, bar.update, ready)
            for top, bottom in pairwise(edges_of(pieces, plan.cells.height, rows)):
                with watch.stage("branches"):
                    for layer in layers:
                        layer.compute(bottom)
                with watch.stage("stitch"):
                    target = sink.band(images, (self.scale * top, self.scale * bottom))[0]
                    own = target.dtype == exact and target.device == self.device
                    band = target if own else torch.empty(target.shape, dtype=exact, device=self.device)
                    # What is blended with what is there must be finite.
                    band.zero_()
                    for layer in layers:
                        layer.draw(band, top)
                    if not own:
                        store(band, target)
                    sink.done()

    def _context(self, target: Target) -> int:
        """The most context that a call may choose."""
        table = self.decision.table
        if target.context is not None:
            return target.context
        reach = [facts.reach for facts in self.facts if facts.reach is not None and facts.reach <= FARTHEST]
        return max([*reach, *(table.contexts if table is not None else [self.decision.context])]) + self.align - 1

    def _footprints(self, cells: Cells, limit: int | None) -> list[Footprint]:
        """What each network takes; it is found out where a limit or the size of the image asks for it."""
        if limit is None and cells.height * cells.width < SMALL:
            return [Footprint(0, 0)] * self.num_classes
        if self._memory is None:
            networks = zip(self.networks.members, self.facts, strict=True)
            self._memory = [footprint(member, facts, self.dtype) for member, facts in networks]
        return self._memory

    def _stats(
        self, plans: Sequence[Plan], pieces: Sequence[Sequence[Sequence[Piece]]], scored: int, held: int, watch: Stopwatch
    ) -> RoutingStats:
        """What was done; class `base` ran on `scored` pixels for their scores alone."""
        stages = ("tune", "classify", "assign", "branches", "stitch")
        seconds = {**dict.fromkeys(stages, 0.0), **watch.finish()}
        counts = [sum(int((plan.class_ids == k).sum()) for plan in plans) for k in range(self.num_classes)]
        sampled = sum(plan.sampled for plan in plans)
        work = [sampled + sum(piece.outer.area for own in pieces for piece in own[k]) for k in range(self.num_classes)]
        if self.decision.base is not None:
            work[self.decision.base] += scored
        routed = sum(flops * pixels for flops, pixels in zip(self.branch_flops, work, strict=True))
        dense = self.branch_flops[-1] * sum(plan.cells.height * plan.cells.width for plan in plans)
        flops = RoutedFlops(routed, dense, dense)
        return RoutingStats(counts, flops, flops, seconds, held, [pixels / CELL**2 for pixels in work])
