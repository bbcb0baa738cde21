"""The patch path: classify, assign, group, extract in class order, run one batched branch per class, stitch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastroute import buffers
from fastroute._arguments import LARGEST_SPAN, real, whole
from fastroute._contexts import ordinarily
from fastroute._copies import inference_copy
from fastroute.budget.limits import Budget
from fastroute.budget.speed import Speed, Speeds
from fastroute.engines import ANY
from fastroute.grid import TileGrid
from fastroute.models.adapters import in_range
from fastroute.ops import _checks as check
from fastroute.patch.assignment import (
    ClassRequest,
    PatchCall,
    PatchCosts,
    assign_patches,
    check_least_time,
    check_request,
    score_image,
)
from fastroute.patch.bands import Band, plan_bands
from fastroute.patch.branches import Branches
from fastroute.patch.passes import chosen_merge, run_bands
from fastroute.patch.patch_memory import fewest_bands, least_memory, patches_per_band, plan_memory
from fastroute.patch.patch_speed import Measured, learn_patch_speed, measure_patch_speed
from fastroute.patch.regions import Merging, patch_stats, sort_regions
from fastroute.patch.sections import sectioned
from fastroute.runtime.border import EDGE, ZERO, check_border, continued, cut, refuse_edge
from fastroute.runtime.endpoints import Endpoints, home, in_memory, output_like, streamed
from fastroute.runtime.memory_plan import AUTO, Limit, WorkingSet, advised, check_limit, limit_on
from fastroute.runtime.progress import Progress
from fastroute.runtime.protocols import Reader, Writer, check_reader
from fastroute.runtime.results import RoutingStats, Stopwatch, Streamed, Upscaled
from fastroute.runtime.router import Router
from fastroute.runtime.threads import patiently
from fastroute.runtime.tuning import tuning_key
from fastroute.windows import make_window

# Class maps are uint8.
MOST_CLASSES = 256


class PatchRouter(Router):
    """Super-resolution of whole images by several networks, where every patch runs through the network of its class.

    Args:
        branches: one network per class, from the cheapest to the most expensive, each mapping (N, C, p, p) to (N, C, p * scale,
            p * scale). A network is a module, a model loaded by spandrel, or a function. Branches and classifier are copied,
            and branches are rewritten by `optimize` unless `optimized` is False. A class that does nothing is
            ``torch.nn.Identity()`` at scale 1, or :class:`fastroute.Bicubic`.
        classifier: a module or function from patches (N, C, p, p) to class scores (N, K). :class:`fastroute.ScoreClassifier`
            turns a single number per patch into scores. Without a classifier, several branches need a `class_map` or
            ``budget=1`` in every call.
        patch, stride: LR patch size and distance; the published ClassSR uses 32 and 28.
        scale: upscaling factor of the branches.
        window: how overlaps are merged, see :func:`fastroute.make_window`; published code averages ("uniform").
        optimized: whether the branches run in their fastest exact form.
        costs: cost of each branch per patch, in any unit, which `budget` and `penalty` refer to. Default: its FLOPs, or one per
            output value for a branch that has none, such as an interpolation.
        batch: patches per pass of a branch. Default: by measurement, which is remembered.
        channels: number of channels of the images. Default: what a branch names or its first convolution reads, else 3.
        merge: side of a block of patches, 1, 2, 4 or 8: neighbouring patches of one class within it run as one region, whose
            overlaps are computed once and have no seams, see :func:`fastroute.merge_regions`. 1 runs every patch on its own, as
            published code does. Default: the largest side up to 4 for which a region takes no more than 512 MiB on its way
            through a branch; 1 for branches that take no other size than a patch and, on a GPU, for several small networks.
        tune: find out, on the work of calls, which batches and memory format are fastest. This computes nothing twice, ends
            after some images and is remembered. Until then results may differ in their last bits from call to call. Without
            it, or with FASTROUTE_TUNE=0, a remembered outcome is used, else what suits most networks.
        border: what branches see beyond the edge of an image: "zero" padding, as they were trained, or 4 more pixels repeating
            the "edge", which keeps flat borders flat. Class maps are then those of the extended image.
        coverage: "full", or "crop" to drop what lies beyond the last whole stride, see :class:`fastroute.TileGrid`. The result
            is then smaller.
        rounded: clamp every patch to [0, 1] and round it to 8 bits before patches are merged, as published code does.
        value_range: what white is to branches and classifier, such as 255; images stay in [0, 1] all the same. None lets
            floating images have any values, for networks of HDR images.

    Raises:
        ValueError: no branches, impossible sizes, or a `merge` above 1 for branches that take no other size than a patch.
        TypeError: a branch or classifier cannot be called.

    Example:
        >>> router = fastroute.load("classsr-fsrcnn-x4")
        >>> result = router.upscale(image, budget=0.7)
        >>> result.image.shape, result.stats.counts_per_class
    """

    scale: int

    @ordinarily
    def __init__(
        self,
        branches: Sequence[nn.Module | Callable[[Tensor], Tensor] | Any],
        classifier: nn.Module | Callable[[Tensor], Tensor] | None = None,
        *,
        patch: int = 32,
        stride: int = 28,
        scale: int = 4,
        window: str | Tensor = "uniform",  # [P]
        optimized: bool = True,
        costs: Sequence[float] | None = None,
        batch: int | None = None,
        channels: int | None = None,
        tune: bool = True,
        border: str = ZERO,
        merge: int | None = None,
        coverage: str = "full",
        rounded: bool = False,
        value_range: float | None = 1.0,
    ) -> None:
        super().__init__()
        if not 0 < len(branches) <= MOST_CLASSES:
            found = len(branches) or "none"
            raise ValueError(f"PatchRouter: branches must hold at least one network, and at most {MOST_CLASSES}; got {found}")
        for name, number in (("batch", batch), ("channels", channels)):
            if number is not None:
                whole("PatchRouter", name, number, LARGEST_SPAN)
        TileGrid(patch, patch, patch, stride, scale, coverage)  # raises for impossible sizes
        self.coverage, self.rounded, self.bounded = coverage, rounded, value_range is not None
        whole("PatchRouter", "patch * scale", patch * scale, LARGEST_SPAN)
        costs = None if costs is None else [real("PatchRouter", "costs", cost) for cost in costs]
        make_window(window, patch * scale, stride * scale)
        self.patch, self.stride, self.scale, self.window = patch, stride, scale, window
        self.num_classes, self.border = len(branches), check_border("PatchRouter", border)
        if costs is not None and len(costs) != len(branches):
            raise ValueError(f"PatchRouter: costs must have one entry per branch, {len(branches)}; got {len(costs)}")
        taken = partial(in_range, "PatchRouter", value_range)
        self.classifier = None if classifier is None else inference_copy(taken("classifier", classifier))
        modules = [taken("branches", branch) for branch in branches]
        try:
            self.networks = Branches(modules, patch, optimized, channels, batch, scale, tune)
        except RuntimeError as error:
            if channels is None or buffers.is_exhausted(error):
                raise
            reason = (str(error).splitlines() or [""])[0][:200]
            raise ValueError(f"PatchRouter: branches take no patches of channels={channels}: {reason}") from error
        self.networks.finishes = rounded
        self.branches, self.shuffle = self.networks.modules, self.networks.shuffle
        self.register_buffer("_place", torch.empty(0, device=self.networks.device), persistent=False)
        self.register_load_state_dict_post_hook(_weights_loaded)
        self._asked_merge, self.merge = merge, chosen_merge(self.networks, stride, merge)
        self.channels, self.dtype = self.networks.channels, self.networks.dtype
        self.branch_flops, self.paper_flops = self.networks.flops, self.networks.paper_flops
        # A network without counted operations still writes its values.
        self.flop_costs = [float(f or self.channels * (patch * scale) ** 2) for f in self.branch_flops]
        self.costs, self.speeds = list(costs) if costs is not None else self.flop_costs, Speeds()

    def __repr__(self) -> str:
        return (
            f"PatchRouter({self.num_classes} branches, patch={self.patch}, stride={self.stride}, scale={self.scale}, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    def _before_halving(self, dtype: torch.dtype) -> None:
        self.networks.before_halving(dtype)

    def _exact_in(self, dtype: torch.dtype) -> list[Tensor]:
        return self.networks.exact_in(dtype)

    def _moved(self) -> None:
        self.networks.moved()
        self.merge = chosen_merge(self.networks, self.stride, None) if self._asked_merge is None else self.merge

    @ordinarily
    def compile(self, engine: str = ANY) -> PatchRouter:  # type: ignore[override]
        """Let another engine than PyTorch run the branches, except for last layers that are computed with the stitching.

        Args:
            engine: "torch" (plain PyTorch), "torch.compile", "openvino" (on CPUs; needs the extra `openvino`), "tensorrt" (on
                NVIDIA GPUs; needs the extra `tensorrt`), or "auto", which compares the installed engines on the work of calls
                if the router may measure (`tune`). Branches are compiled now, and again after :meth:`to`.

        Returns:
            The router.

        Raises:
            ValueError: the engine is unknown, is not installed or cannot run here, or it cannot compile a branch or computes
                something else than PyTorch for it. The router stays as it was. "auto" leaves such an engine out.
        """
        self.networks.compile(engine)
        return self

    @ordinarily
    @torch.inference_mode()
    def upscale(  # type: ignore[override]
        self,
        image: Tensor,  # [B, C, H, W] or [C, H, W]
        *,
        budget: float | None = None,
        budget_flops: float | None = None,
        budget_ms: float | None = None,
        penalty: float = 0.0,
        class_map: Tensor | None = None,  # [B, rows, cols] or [rows, cols]
        promote: bool | None = None,
        progress: Progress = False,
        memory_limit: int | None = None,
    ) -> Upscaled:
        """Super-resolve an image or a batch of images.

        Args:
            image: (B, C, H, W) or (C, H, W), floating in [0, 1], uint8 or uint16; any size from one pixel on. It lies on the
                device of the networks, or on the CPU: then bands of it are copied there and back, and the result is on the CPU.
            budget: FLOPs of the branches as a fraction of what the most expensive branch takes for all patches, both as they
                run in regions. 1 sends every patch to the most expensive branch. Default: the classifier's own choice. Images
                of a batch share one budget, as images of a folder do under :func:`fastroute.upscale_many`: it is spent where
                it helps most.
            penalty: exponent k of score / cost^k, if there is no budget.
            class_map: classes to use instead of classifying, for example those of the previous video frame.
            progress: show a progress bar, or call this function with the number of patches done and the number of all patches.
                If it raises, the call ends.
            memory_limit: the largest number of bytes to hold beside `image` and the result. It does not change the result.
            budget_flops: instead of `budget`, FLOPs of the whole call, branches and classifier, as `stats.flops` counts them.
            budget_ms: instead of `budget`, milliseconds of the whole call on this device, estimated from what a patch takes in
                each branch and around it. These times are measured before the first such call, remembered, and updated by
                later calls. Other load on the machine is not foreseen. The classes, and so the result, depend on the times.
            promote: let patches run in a higher class than their own where one region costs less than several. Default: yes,
                but not with a `class_map`, whose classes are kept.

        Returns:
            :class:`Upscaled`, with the classes in which patches ran. A floating result is not clamped; an integer one is
            clamped and rounded half to even.

        Raises:
            ValueError: a wrong rank, number of channels or device, an empty image, an impossible budget, a class map of
                another shape or with ids out of range, a limit below the least that is needed, which the message names, or, on
                the CPU, a floating image with a value above 2, unless `value_range` is None. Nothing has been computed then.
            TypeError: an unsupported dtype.
        """
        images = check.images("upscale", image, self.channels, home(image, self.device), bounded=self.bounded)
        images = continued(images) if self.border == EDGE else images
        limit = Budget(budget, budget_flops, budget_ms)
        call = self._checked(images.shape, images.dtype, limit, penalty, class_map, promote, memory_limit, progress)
        output = output_like("upscale", images, (*images.shape[:2], *call.merging.grid.output_size))
        maps, stats = self._run(in_memory(images, output, self.device), call)
        maps = maps.to(images.device)
        result = Upscaled(output, maps, stats) if image.ndim == 4 else Upscaled(output[0], maps[0], stats)
        return cut(result, self.scale, per_pixel=False) if self.border == EDGE else result

    @ordinarily
    @torch.inference_mode()
    def stream(  # type: ignore[override]
        self,
        reader: Reader,
        writer: Writer,
        *,
        budget: float | None = None,
        budget_flops: float | None = None,
        budget_ms: float | None = None,
        penalty: float = 0.0,
        class_map: Tensor | None = None,  # [1, rows, cols] or [rows, cols]
        promote: bool | None = None,
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
        progress: Progress = False,
        memory_limit: Limit = AUTO,
    ) -> Streamed:
        """Super-resolve an image without holding it or its result in memory as a whole.

        Args:
            reader: source of the image, see :class:`fastroute.Reader`. Rows are read once or twice to classify them and once to
                upscale them.
            writer: destination of the result, see :class:`fastroute.Writer`. Pixels have the type that the reader returns.
            budget, penalty, class_map, progress, budget_flops, budget_ms, promote: see :meth:`upscale`. Reading and writing
                count towards the time where the computation waits for them.
            memory_limit: the largest number of bytes to hold, or None for no limit. By default, "auto", it is 512 MiB, or 8 GiB
                on a GPU, whose bands and batches are larger, or the least that is possible where that is more. It does not
                change the result, which is that of :meth:`upscale`.
            rows, columns: write only these of the result, the first and one past the last; needs the `class_map` of the whole
                image. They have the bits of a run over all of it with `promote` as given, and need no more of it than a band or
                a block of patches around. So several processes can share one image, and wide images take little memory.

        Raises:
            ValueError, TypeError: see :meth:`upscale`. Nothing has been read or written then.
            MemoryError, torch.OutOfMemoryError: memory ran out. The message names a limit that would fit.
        """
        refuse_edge("stream", self)
        check_reader("stream", reader, self.channels, check.FLOATING + check.INTEGER_IMAGE)
        limit, most, bands = Budget(budget, budget_flops, budget_ms), limit_on(self.device, memory_limit), None
        if rows is not None or columns is not None:
            merging = Merging(self.grid(*reader.shape[1:]), self.merge)
            bands = plan_bands(1, merging.grid, patches_per_band(self.networks, self.device)[-1], self.merge)
            part = sectioned("stream", reader, writer, rows, columns, class_map, merging, bands)
            reader, writer, class_map, bands = part.reader, part.writer, part.class_map, part.bands
        call = self._checked((1, *reader.shape), reader.dtype, limit, penalty, class_map, promote, most, progress, bands)
        if most is not None:
            buffers.give_back()
        maps, stats = self._run(streamed(reader, writer, call.merging.grid.output_size, self.device), call)
        return Streamed(maps[0], stats)

    def output_size(self, height: int, width: int) -> tuple[int, int]:  # type: ignore[override]
        """Height and width of the result for an image of the given size."""
        return self.grid(height, width).output_size

    def grid(self, height: int, width: int) -> TileGrid:
        """The grid of the patches of an image of the given size."""
        return TileGrid(height, width, self.patch, self.stride, self.scale, self.coverage)

    def _checked(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        limit: Budget,
        penalty: float,
        class_map: Tensor | None,  # [B, rows, cols] or [rows, cols]
        promote: bool | None,
        memory_limit: int | None,
        progress: Progress,
        bands: list[Band] | None = None,
    ) -> PatchCall:
        """The validated arguments of a call for images of `shape` (B, C, H, W)."""
        merging = Merging(self.grid(*shape[2:]), self.merge, class_map is None if promote is None else promote)
        check_limit("upscale", memory_limit)
        check_request(limit, penalty, class_map, merging, shape[0], self._costs, self.classifier is not None)
        speed = None
        if limit.ms is not None and class_map is None:
            speed = self.speed(dtype)
            check_least_time(limit.ms, (speed, self.speeds.measured(speed)), shape[0], merging)
        return PatchCall(merging, ClassRequest(limit, penalty, class_map, speed), memory_limit, progress, bands)

    _costs = property(lambda self: PatchCosts(self.costs, self.flop_costs))

    def _run(self, endpoints: Endpoints, call: PatchCall) -> tuple[Tensor, RoutingStats]:  # [B, rows, cols]
        """Upscale the images from their source to their sink. Returns the class map and statistics."""
        source, merging, watch = endpoints.source, call.merging, Stopwatch(self.device)
        limit, plan_of = call.memory_limit, partial(self._memory_plan, endpoints, merging)
        sizes = patches_per_band(self.networks, self.device)
        if call.bands is None:
            bands, plan = fewest_bands(sizes, source, merging, partial(plan_of, not endpoints.in_place), limit)
        else:
            bands, plan = call.bands, plan_of(not endpoints.in_place, call.bands)
        rows, lowest = plan.rows(limit), partial(least_memory, sizes, source, merging, partial(plan_of, True))
        with (
            patiently(self.device),
            advised("upscale", self.device, plan.bytes(rows), lowest, endpoints.in_place),
            endpoints.opened(max(1, rows // self.scale), rows) as sink,
        ):
            class_ids, flops = assign_patches(self.classifier, source, merging, call.classes, self._costs, watch)
            with watch.stage("assign"):
                regions = sort_regions(class_ids, call.classes.unit_costs(self._costs), merging, bands)
            run_bands(
                self.networks, self.window, self.rounded, source, sink, merging.grid, bands, regions, watch, call.progress
            )
        with torch.inference_mode(False):
            maps = regions.class_ids.to(torch.uint8, copy=True).view(source.shape[0], merging.grid.rows, merging.grid.cols)
        known = self.speeds.known.get(self._place_of(source.dtype))
        watch.stop()
        counted = (self.branch_flops, self.paper_flops, source.shape[0], merging, regions, flops, watch, plan.bytes(rows))
        # What is measured, to run faster or to keep a budget of time, is waited for.
        stats = RoutingStats.when_asked(
            partial(patch_stats, *counted), watch.later and known is None and not self.networks.measuring
        )
        self.networks.remember()
        # A speed that nobody has asked for is not kept up to date.
        if known is not None:
            learn_patch_speed(known, stats, watch.parts)
        return maps, stats

    def speed(self, dtype: torch.dtype) -> Speed:
        """The time that a patch of an image of type `dtype` takes now. It is measured on the first call, and remembered."""
        return self.speeds.find(
            self._place_of(dtype), self.num_classes, partial(self._speed_facts, dtype), partial(self._measured_speed, dtype)
        )

    def _place_of(self, dtype: torch.dtype) -> tuple[object, ...]:
        return dtype, self.device, torch.get_num_threads()

    def _speed_facts(self, dtype: torch.dtype) -> list[object]:
        example = torch.empty(self.networks.size, dtype=self.dtype, device=self.device)
        networks = [tuning_key(n, example) for n in (*self.branches, self.classifier) if n is not None]
        window = self.window if isinstance(self.window, str) else "own"
        return [*networks, self.stride, self.merge, self.scale, self.shuffle, window, dtype, self.networks.batch]

    def _measured_speed(self, dtype: torch.dtype) -> Speed:
        parts = Measured(
            run=lambda image, class_map: self.upscale(image, class_map=class_map).stats,
            classify=partial(score_image, self.classifier, num_classes=self.num_classes)
            if self.classifier is not None and self.num_classes > 1
            else None,
            num_classes=self.num_classes,
            batch=max(self.networks.batch_of(c, self.device) for c in range(self.num_classes)),
        )
        return measure_patch_speed(parts, self.channels, self.grid(self.patch, self.patch), dtype, self.device)

    def _memory_plan(self, endpoints: Endpoints, merging: Merging, in_bands: bool, bands: list[Band]) -> WorkingSet:
        return plan_memory(self.networks, self.classifier, self.rounded, endpoints, merging, bands, in_bands)


def _weights_loaded(router: nn.Module, _: object) -> None:
    assert isinstance(router, PatchRouter)
    router.networks.weights_changed()
