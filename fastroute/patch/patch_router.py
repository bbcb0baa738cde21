"""The patch path: classify, assign, group, extract in class order, one batched branch per class, stitch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastroute import buffers
from fastroute._arguments import LARGEST_SPAN, real, whole
from fastroute._contexts import CallLock, ordinarily
from fastroute.budget.limits import Budget, check_possible
from fastroute.engines import ANY
from fastroute.grid import TileGrid
from fastroute.models.adapters import as_module
from fastroute.models.precision import Precisions, parse_to
from fastroute.ops import _checks as check
from fastroute.ops.extract_patches import extract_patches
from fastroute.patch.assignment import PatchPaces, check_least, choose_classes
from fastroute.patch.bands import Band, plan_bands
from fastroute.patch.branches import Branches, frozen_copy
from fastroute.patch.classify import classifying_bytes
from fastroute.patch.passes import chosen_merge, run_jobs
from fastroute.patch.regions import Merging, SortedRegions, sort_regions
from fastroute.patch.workspace import Workspace
from fastroute.profiling import RoutedFlops, mix_flops
from fastroute.runtime.border import EDGE, ZERO, check_border, continued, cut, refuse_edge
from fastroute.runtime.devices import on_device
from fastroute.runtime.input_output import Ends, home, in_memory, output_like, streamed
from fastroute.runtime.memory_plan import AUTO, Limit, WorkingSet, advised, check_limit, limit_on, of_patches
from fastroute.runtime.progress import Progress, shown
from fastroute.runtime.protocols import Reader, Writer, check_reader
from fastroute.runtime.results import RoutingStats, Stopwatch, Streamed, Upscaled
from fastroute.runtime.rows import Source
from fastroute.runtime.sinks import Sink
from fastroute.runtime.threads import patiently
from fastroute.windows import make_window

# Patches whose outputs are held at a time: enough for full batches of every class; and fewer of large ones, but for a row of
# tiles, which are held in any case.
PATCHES_PER_BAND = 1024
HELD_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


class PatchRouter(Precisions):
    """Super-resolution of whole images by several networks, each patch by the one that its class says.

    Args:
        branches: one network per class, from the cheapest to the dearest; each maps (N, C, p, p) to (N, C, p * scale,
            p * scale): modules, models that spandrel loaded, or functions. They are copied, as is the classifier, and
            rewritten by `optimize` unless `optimized` is False. A class that does nothing is ``torch.nn.Identity()`` at
            scale 1, or :class:`fastroute.Bicubic`.
        classifier: a module or function from patches (N, C, p, p) to class scores (N, K); :class:`fastroute.ScoreClassifier`
            makes one of a single number per patch. Without one, several branches need a `class_map` or ``budget=1`` in every
            call.
        patch, stride: LR patch size and distance; the published ClassSR uses 32 and 28.
        scale: upscaling factor of the branches.
        window: how overlaps are merged, see :func:`fastroute.make_window`; published code averages ("uniform").
        optimized: run the branches in their fastest exact form.
        costs: cost of each branch per patch, by which `budget` and `penalty` go, in any unit. Default: its FLOPs, and for a
            branch that has none, such as an interpolation, one per output value.
        batch: patches per pass of a branch; default by measurement, which is remembered.
        channels: of the images; default those that a branch names or its first convolution reads, else 3.
        merge: side of a block of patches, 1, 2, 4 or 8: neighbouring patches of one class within it run as one region, whose
            overlaps are computed once and have no seams, see :func:`fastroute.merge_regions`. 1 runs every patch on its own,
            as published code does. Default: 4, or as much of it as a region takes no more than 512 MiB on its way through a
            branch; 1 for branches that take no other size than a patch.
        tune: find out, on the work of calls, which batches and memory format are fastest. It computes nothing twice, ends
            after some images and is remembered; until then results may differ in their last bits from call to call. Without
            it, or with FASTROUTE_TUNE=0, what is remembered from before is used, else what suits most networks.
        border: what branches see beyond the edge of an image: "zero" padding, as they were trained, or 4 more pixels like those
            of its "edge", which keeps flat borders flat. Class maps are then those of the image so continued.

    Raises:
        ValueError: no branches, impossible sizes, or a `merge` above 1 for branches that take nothing but patches.
        TypeError: a branch or classifier that cannot be called.

    Example:
        >>> router = fastroute.load("classsr-fsrcnn-x4")
        >>> result = router.upscale(image, budget=0.7)
        >>> result.image.shape, result.stats.patches_per_class
    """

    @ordinarily
    def __init__(
        self,
        branches: Sequence[nn.Module | Callable[[Tensor], Tensor] | Any],
        classifier: nn.Module | Callable[[Tensor], Tensor] | None = None,
        patch: int = 32,
        stride: int = 28,
        scale: int = 4,
        window: str | Tensor = "uniform",
        optimized: bool = True,
        costs: Sequence[float] | None = None,
        batch: int | None = None,
        channels: int | None = None,
        tune: bool = True,
        border: str = ZERO,
        merge: int | None = None,
    ) -> None:
        self.lock = CallLock()
        if not branches:
            raise ValueError("PatchRouter: branches must hold at least one network; got none")
        for name, number in (("batch", batch), ("channels", channels)):
            if number is not None:
                whole("PatchRouter", name, number, LARGEST_SPAN)
        TileGrid(patch, patch, patch, stride, scale)  # raises for impossible sizes
        whole("PatchRouter", "patch * scale", patch * scale, LARGEST_SPAN)
        costs = None if costs is None else [real("PatchRouter", "costs", cost) for cost in costs]
        make_window(window, patch * scale, stride * scale)
        self.patch, self.stride, self.scale, self.window = patch, stride, scale, window
        self.num_classes, self.border = len(branches), check_border("PatchRouter", border)
        if costs is not None and len(costs) != len(branches):
            raise ValueError(f"PatchRouter: costs must have one entry per branch, {len(branches)}; got {len(costs)}")
        self.classifier = None if classifier is None else frozen_copy(as_module("PatchRouter", "classifier", classifier))
        modules = [as_module("PatchRouter", "branches", branch) for branch in branches]
        try:
            self.networks = Branches(modules, patch, optimized, channels, batch, scale, tune)
        except RuntimeError as error:
            if channels is None or buffers.is_exhausted(error):
                raise
            reason = (str(error).splitlines() or [""])[0][:200]
            raise ValueError(f"PatchRouter: branches take no patches of channels={channels}: {reason}") from error
        self.branches, self.shuffle = self.networks.modules, self.networks.shuffle
        self.merge = chosen_merge(self.networks, stride, merge)
        self.channels, self.dtype = self.networks.channels, self.networks.dtype
        self.branch_flops, self.paper_flops = self.networks.flops, self.networks.paper_flops
        values = self.channels * (patch * scale) ** 2
        # What counts no operation writes its values all the same.
        self.flop_costs = [float(f or values) for f in self.branch_flops]
        self.costs = list(costs) if costs is not None else self.flop_costs
        self.paces = PatchPaces()
        self._possible: tuple[float | None, ...] = ()  # costs, penalty and budget that were found possible last

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"PatchRouter({self.num_classes} branches, patch={self.patch}, stride={self.stride}, scale={self.scale}, "
            f"{dtype} on {self.device})"
        )

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.networks.device

    @ordinarily
    def to(self, *args: Any, **kwargs: Any) -> PatchRouter:
        """Move the networks to a device, to a type in which they compute, or both, as :meth:`torch.nn.Module.to` does.

        Images keep their own type. What half networks of this package add to the image, or to a mean, is added in float32.

        Returns:
            The router.

        Raises:
            ValueError: float16 on a CPU that has no convolutions of it.
            TypeError: a dtype that is not floating.
        """
        device, dtype = parse_to("PatchRouter.to", self.dtype, self.device, args, kwargs)
        self.networks.to(device, dtype)
        if self.classifier is not None:
            self.classifier.to(device, dtype)
        self.dtype = self.networks.dtype
        return self

    @ordinarily
    def compile(self, engine: str = ANY) -> PatchRouter:
        """Let another engine than PyTorch run the branches, but for last layers that are computed with the stitching.

        Args:
            engine: "torch" (PyTorch as it is), "torch.compile", "openvino" (on CPUs; the extra `openvino`), "tensorrt" (on
                NVIDIA GPUs; the extra `tensorrt`), or "auto": those that are installed are compared on the work of calls,
                where the router may measure (`tune`). It is compiled now; after :meth:`to`, anew.

        Returns:
            The router.

        Raises:
            ValueError: no such engine; one that is not installed or cannot run here; a branch that it cannot compile, or for
                which it computes something else than PyTorch. The router stays as it was. "auto" leaves such an engine out.
        """
        self.networks.compile(engine)
        return self

    @ordinarily
    @torch.inference_mode()
    def upscale(
        self,
        image: Tensor,  # [B, C, H, W] or [C, H, W]
        budget: float | None = None,
        penalty: float = 0.0,
        class_map: Tensor | None = None,  # [B, rows, cols] or [rows, cols]
        progress: Progress = False,
        memory_limit: int | None = None,
        budget_flops: float | None = None,
        budget_ms: float | None = None,
        promote: bool | None = None,
    ) -> Upscaled:
        """Super-resolve an image or a batch of images.

        Args:
            image: (B, C, H, W) or (C, H, W), floating in [0, 1], uint8 or uint16; any size from one pixel on. On the device
                of the networks, or on the CPU: bands of it are then copied there and back, and the result is on the CPU.
            budget: FLOPs of the branches as a fraction of what the most expensive branch takes for all patches, both as they
                run in regions; 1 sends every patch to the most expensive branch. Default: the classifier's own choice. A
                batch shares one budget, as a folder does under :func:`fastroute.upscale_many`: it is spent where it helps
                most.
            penalty: exponent k of score / cost^k, when there is no budget.
            class_map: use these classes instead of classifying, for example those of the previous video frame.
            progress: show a progress bar, or call this function with how many patches are done and how many there are; what it
                raises ends the call.
            memory_limit: bytes to hold at most beside `image` and the result. It changes no bit of them.
            budget_flops: instead of `budget`: FLOPs of the whole call, branches and classifier, as `stats.flops` counts them.
            budget_ms: instead of `budget`: milliseconds of the whole call on this device, by what a patch takes in each branch
                and around it. That is measured before the first such call, remembered, and follows the calls that come after;
                what else the machine does is not foreseen. The classes, and so the result, depend on it.
            promote: let patches run in a higher class than their own where one region costs less than several do. Default: yes,
                but not with a `class_map`, whose classes are kept.

        Returns:
            :class:`Upscaled`, with the classes in which patches ran. A floating image is not clamped; an integer one is, and
            rounded half to even.

        Raises:
            ValueError: a wrong rank, number of channels, empty image, another device, an impossible budget, a class map of
                another shape or with ids out of range, or a limit below the least that is needed, which the message names.
                Nothing has been computed then.
            TypeError: an unsupported dtype.
        """
        images = check.images("upscale", image, self.channels, home(image, self.device))
        images = continued(images) if self.border == EDGE else images
        grid = self._grid(images.shape)
        limit = Budget(budget, budget_flops, budget_ms)
        merging = Merging(grid, self.merge, class_map is None if promote is None else promote)
        self._check(images.shape[0], images.dtype, merging, memory_limit, limit, penalty, class_map)
        output = output_like("upscale", images, (*images.shape[:2], *grid.output_size))
        ends = in_memory(images, output, self.device)
        maps, stats = self._run(ends, merging, progress, memory_limit, limit, penalty, class_map)
        maps = maps.to(images.device)
        result = Upscaled(output, maps, stats) if image.ndim == 4 else Upscaled(output[0], maps[0], stats)
        return cut(result, self.scale, per_pixel=False) if self.border == EDGE else result

    @ordinarily
    @torch.inference_mode()
    def stream(
        self,
        reader: Reader,
        writer: Writer,
        budget: float | None = None,
        penalty: float = 0.0,
        class_map: Tensor | None = None,  # [1, rows, cols] or [rows, cols]
        progress: Progress = False,
        memory_limit: Limit = AUTO,
        budget_flops: float | None = None,
        budget_ms: float | None = None,
        promote: bool | None = None,
    ) -> Streamed:
        """Super-resolve an image that need not fit in memory, and neither need its result.

        Args:
            reader: gives rectangles of the image, see :class:`fastroute.Reader`; its rows are read once or twice to classify
                and once to upscale.
            writer: takes bands of the result, see :class:`fastroute.Writer`, of the type that the reader gives.
            budget, penalty, class_map, progress, budget_flops, budget_ms, promote: see :meth:`upscale`. Reading and
                writing count where the computation waits for them.
            memory_limit: bytes to hold at most, None for no limit. By default, "auto", it is 512 MiB, and on a GPU, whose
                bands and batches are larger, 8 GiB. It changes no bit of the result, which is that of :meth:`upscale`.

        Raises:
            ValueError, TypeError: see :meth:`upscale`. Nothing has been read or written then.
            MemoryError, torch.OutOfMemoryError: memory ran out; the message names a limit that would fit.
        """
        refuse_edge("stream", self)
        check_reader("stream", reader, self.channels, check.FLOATING + check.INTEGER_IMAGE)
        memory_limit, grid = limit_on(self.device, memory_limit), self._grid((1, *reader.shape))
        limit = Budget(budget, budget_flops, budget_ms)
        merging = Merging(grid, self.merge, class_map is None if promote is None else promote)
        self._check(1, reader.dtype, merging, memory_limit, limit, penalty, class_map)
        ends = streamed(reader, writer, grid.output_size, self.device)
        maps, stats = self._run(ends, merging, progress, memory_limit, limit, penalty, class_map)
        return Streamed(maps[0], stats)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what an image of that size becomes."""
        return self._grid((1, self.channels, height, width)).output_size

    def _run(
        self,
        ends: Ends,
        merging: Merging,
        progress: Progress,
        memory_limit: int | None,
        limit: Budget,
        penalty: float,
        class_map: Tensor | None,
    ) -> tuple[Tensor, RoutingStats]:
        """Route from one end to the other; the arguments are checked. Returns the class map (B, rows, cols)."""
        source = ends.source
        grid, watch = merging.grid, Stopwatch(self.device)
        bands = plan_bands(source.shape[0], grid, self._patches_per_band(), self.merge)
        working = self._working_set(ends, merging, bands, not ends.in_place)
        rows = working.rows(memory_limit)
        lowest = partial(self._working_set, ends, merging, bands, True)
        with (
            patiently(self.device),
            advised("upscale", self.device, working.bytes(rows), lowest, ends.in_place),
            ends.opened(max(1, rows // self.scale), rows) as sink,
        ):
            if class_map is not None:
                class_ids, classifier_flops = class_map.reshape(-1).to(self.device, torch.int64), 0
                costs: Sequence[float] = self.costs
            else:
                class_ids, costs, classifier_flops = choose_classes(self, source, merging, limit, penalty, watch)
            with watch.stage("assign"):
                regions = sort_regions(class_ids, costs, merging, bands)
            self._route(source, sink, grid, bands, regions, watch, progress)
        with torch.inference_mode(False):
            maps = regions.class_ids.clone().view(source.shape[0], grid.rows, grid.cols)
        stats = self._stats(source.shape, merging, regions, classifier_flops, watch, working.bytes(rows))
        self.networks.remember()
        self.paces.learn(self, source.dtype, stats, watch.parts)
        return maps, stats

    def _patches_per_band(self) -> int:
        most = on_device(HELD_BYTES, self.device)
        return max(1, min(PATCHES_PER_BAND, most // self.networks.produced_bytes(self.device)))

    def _working_set(self, ends: Ends, merging: Merging, bands: list[Band], in_bands: bool) -> WorkingSet:
        grid = merging.grid
        extracted = self.channels * self.patch**2 * self.networks.taken.itemsize
        classifying = 0 if self.classifier is None else classifying_bytes(self.classifier, ends.source, grid)
        batch = self.networks.batch_bytes(self.device, max(merging.sizes))
        produced = self.networks.produced_bytes(self.device)
        return of_patches(grid, bands, ends.source, extracted, produced, batch, classifying, in_bands, ends.step)

    def _grid(self, shape: Sequence[int]) -> TileGrid:
        return TileGrid(shape[2], shape[3], self.patch, self.stride, self.scale)

    def _check(
        self,
        batch: int,
        dtype: torch.dtype,
        merging: Merging,
        memory_limit: int | None,
        limit: Budget,
        penalty: float,
        class_map: Tensor | None,
    ) -> None:
        op, grid = "upscale", merging.grid
        check_limit(op, memory_limit)
        limit.check(op, penalty)
        if class_map is not None:
            if limit != Budget() or penalty != 0:
                raise ValueError(f"{op}: give either class_map or budget and penalty")
            check.tensor(op, "class_map", class_map)
            check.dtype(op, "class_map", class_map.dtype, check.INDEX)
            shape = (batch, grid.rows, grid.cols)
            if tuple(class_map.shape) not in ((shape[1:], shape) if shape[0] == 1 else (shape,)):
                raise ValueError(f"{op}: class_map must be {shape} for this image; got {tuple(class_map.shape)}")
        else:
            # Refuses impossible costs and budgets, before anything is classified; once for those of many calls.
            asked = (*self.costs, penalty, limit.fraction)
            if asked != self._possible:
                check_possible(self.costs, limit.fraction, penalty)
                self._possible = asked
            if self.classifier is None and limit.fraction != 1 and self.num_classes > 1:
                raise ValueError(f"{op}: this router has no classifier; give a class_map or budget=1")
            check_least(self, limit, batch, merging, dtype)

    def _route(
        self,
        source: Source,
        sink: Sink,
        grid: TileGrid,
        bands: list[Band],
        regions: SortedRegions,
        watch: Stopwatch,
        progress: Progress,
    ) -> None:
        """Every region through the branch of its class, band by band."""
        workspace = Workspace(grid, source.shape[1], self.shuffle, self.window, self.networks.split(source.device)[1])
        with shown(progress, regions.class_ids.numel(), "patch") as bar:
            for number, band in enumerate(bands):
                groups = list(regions.of_band(number))
                with watch.stage("extract"):
                    pixels, part = band.read(source, grid)
                    extract = partial(extract_patches, pixels, part, dtype=self.networks.taken)
                    formats = {c: self.networks.setting(c, self.device).memory_format for c, _, _ in groups}
                    first = band.first_patch(grid)
                    jobs = [
                        (c, extract(order=order - first, memory_format=formats[c], size=shape)) for c, shape, order in groups
                    ]
                for (c, shape, _), results in zip(groups, run_jobs(self.networks, jobs, watch), strict=True):
                    workspace.put(results, c, shape)
                with watch.stage("stitch"):
                    rows = sink.band(band.images, band.output(grid))
                    layers = workspace.stitch(band, regions.inverse, rows, regions.region, regions.regions_of(number))
                    sink.done()
                watch.move("stitch", "branches", layers)
                bar.update(band.num_patches(grid))

    def _stats(
        self,
        shape: Sequence[int],
        merging: Merging,
        regions: SortedRegions,
        classifier_flops: int,
        watch: Stopwatch,
        working_set: int,
    ) -> RoutingStats:
        stages = ("tune", "classify", "assign", "extract", "branches", "stitch")
        seconds = {**dict.fromkeys(stages, 0.0), **watch.finish()}
        most = max(self.branch_flops)
        flops = RoutedFlops(
            mix_flops(self.branch_flops, regions.work, classifier_flops).routed,
            most * shape[0] * merging.patches(),
            most * shape[0] * merging.grid.height * merging.grid.width / self.patch**2,
        )
        paper = mix_flops(self.paper_flops, regions.patches)
        return RoutingStats(regions.patches, flops, paper, seconds, working_set, regions.work)
