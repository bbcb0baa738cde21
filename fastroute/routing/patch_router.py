"""The patch path: classify, assign, group, extract in class order, one batched branch per class, stitch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastroute import memory
from fastroute.grid import TileGrid
from fastroute.models.optimize import optimize, parameter_dtype, split_shuffle
from fastroute.ops import _checks as check
from fastroute.ops.assign_classes import assign_classes
from fastroute.ops.extract_patches import extract_patches
from fastroute.ops.group_by_class import group_by_class
from fastroute.ops.stitch_patches import stitch_patches
from fastroute.profiling import RoutedFlops, count_flops, mix_flops
from fastroute.routing.classify import classify_patches
from fastroute.routing.result import RoutingStats, Stopwatch, Upscaled
from fastroute.routing.tuning import Tuning, tune
from fastroute.windows import make_window

# Patches whose outputs are held at a time: enough for full batches of every class, little enough to stay near the caches.
PATCHES_PER_BAND = 256


@dataclass(frozen=True)
class Band:
    """Consecutive tile rows of some images, routed together.

    Attributes:
        images: first image and one past the last; several only when the band holds them whole.
        rows: first tile row and one past the last.
    """

    images: tuple[int, int]
    rows: tuple[int, int]


class PatchRouter:
    """Super-resolution of whole images by several networks, each patch by the one that its class says.

    Args:
        branches: one network per class, from the cheapest to the dearest; each maps (N, C, p, p) to (N, C, p * scale,
            p * scale). They are copied, as is the classifier, and rewritten by `optimize` unless `optimized` is False.
        classifier: maps patches (N, C, p, p) to class scores (N, K). Without one, several branches need a `class_map` or
            ``budget=1`` in every call.
        patch, stride: LR patch size and distance; the published ClassSR uses 32 and 28.
        scale: upscaling factor of the branches.
        window: how overlaps are merged, see :func:`fastroute.make_window`; published code averages ("uniform").
        optimized: run the branches in their fastest exact form.
        costs: cost of each branch per patch, by which `budget` and `penalty` go, in any unit. Default: its FLOPs, and for a
            branch that has none, such as an interpolation, one per output value.

    Raises:
        ValueError: no branches, or impossible sizes.

    Example:
        >>> router = fastroute.load("classsr-fsrcnn-x4")
        >>> result = router.upscale(image, budget=0.7)
        >>> result.image.shape, result.stats.patches_per_class
    """

    def __init__(
        self,
        branches: Sequence[nn.Module],
        classifier: nn.Module | None = None,
        patch: int = 32,
        stride: int = 28,
        scale: int = 4,
        window: str | Tensor = "uniform",
        optimized: bool = True,
        costs: Sequence[float] | None = None,
    ) -> None:
        if not branches:
            raise ValueError("PatchRouter: branches must hold at least one network; got none")
        TileGrid(patch, patch, patch, stride, scale)  # raises for impossible sizes
        make_window(window, patch * scale)
        self.patch, self.stride, self.scale, self.window = patch, stride, scale, window
        self.num_classes = len(branches)
        self.classifier = None if classifier is None else frozen_copy(classifier)
        self.channels = _first_channels(branches[0])
        self.dtype = parameter_dtype(branches[0])
        size = (1, self.channels, patch, patch)
        self.branch_flops = [count_flops(branch, size) for branch in branches]
        self.paper_flops = [count_flops(branch, size, "paper") for branch in branches]
        if costs is not None and len(costs) != len(branches):
            raise ValueError(f"PatchRouter: costs must have one entry per branch, {len(branches)}; got {len(costs)}")
        values = self.channels * (patch * scale) ** 2
        self.costs = list(costs) if costs is not None else [float(f or values) for f in self.branch_flops]
        prepared = [optimize(b) if optimized else frozen_copy(b) for b in branches]
        split = [split_shuffle(branch) for branch in prepared]
        # The stitching undoes a pixel shuffle on the way when all branches end with the same one.
        self.shuffle = split[0][1] if len({factor for _, factor in split}) == 1 else 1
        self.branches = [body for body, _ in split] if self.shuffle > 1 else prepared
        self._tunings: dict[tuple[int, torch.device, int], Tuning] = {}

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next((p.device for branch in self.branches for p in branch.parameters()), torch.device("cpu"))

    def to(self, device: str | torch.device) -> PatchRouter:
        """Move the networks; returns self."""
        for module in [*self.branches, *([] if self.classifier is None else [self.classifier])]:
            module.to(device)
        self._tunings.clear()
        return self

    @torch.inference_mode()
    def upscale(
        self,
        image: Tensor,  # [B, C, H, W] or [C, H, W]
        budget: float | None = None,
        penalty: float = 0.0,
        class_map: Tensor | None = None,  # [B, rows, cols] or [rows, cols]
        progress: bool = False,
    ) -> Upscaled:
        """Super-resolve an image or a batch of images.

        Args:
            image: (B, C, H, W) or (C, H, W), floating in [0, 1], uint8 or uint16, on the device of the networks; any size
                from one pixel on.
            budget: mean FLOPs of the chosen branches as a fraction of the dearest branch's, see
                :func:`fastroute.assign_classes`; 1 sends every patch to the dearest branch. Default: the classifier's own
                choice.
            penalty: exponent k of score / cost^k, when there is no budget.
            class_map: use these classes instead of classifying, for example those of the previous video frame.
            progress: show a progress bar.

        Returns:
            :class:`Upscaled`. A floating image is not clamped; an integer one is, and rounded half to even.

        Raises:
            ValueError: a wrong rank, number of channels, empty image, another device, an impossible budget, or a class map
                of another shape or with ids out of range. Nothing has been computed then.
            TypeError: an unsupported dtype.
        """
        images, grid = self._check(image, budget, penalty, class_map)
        watch = Stopwatch(images.device)
        number = images.shape[0] * grid.num_patches
        # All patches go to the dearest class: nothing to classify.
        if class_map is None and (budget == 1 or self.num_classes == 1):
            dearest = max(range(self.num_classes), key=self.costs.__getitem__)
            class_ids, classifier_flops = torch.full((number,), dearest, device=images.device), 0
        elif class_map is not None:
            class_ids, classifier_flops = class_map.reshape(-1).to(torch.int64), 0
        else:
            with watch.stage("classify"):
                assert self.classifier is not None  # checked
                scores = classify_patches(self.classifier, images, grid)
            with watch.stage("assign"):
                class_ids = assign_classes(self._checked_scores(scores.score), self.costs, penalty, budget)
            classifier_flops = scores.flops
        output, counts = self._route(images, grid, class_ids, watch, progress)
        shape = (images.shape[0], grid.rows, grid.cols)
        with torch.inference_mode(False):
            maps = class_ids.clone().view(shape)
        stats = self._stats(counts, classifier_flops, watch)
        if image.ndim == 3:
            return Upscaled(output[0], maps[0], stats)
        return Upscaled(output, maps, stats)

    def _checked_scores(self, score: Tensor) -> Tensor:
        if score.shape[1:] != (self.num_classes,):
            raise ValueError(
                f"upscale: the classifier must give one score per branch, {self.num_classes}; got {tuple(score.shape[1:])}"
            )
        return score

    def _check(self, image: Tensor, budget: float | None, penalty: float, class_map: Tensor | None) -> tuple[Tensor, TileGrid]:
        op = "upscale"
        images = check.images(op, image, self.channels, self.device)
        grid = TileGrid(images.shape[2], images.shape[3], self.patch, self.stride, self.scale)
        if class_map is not None:
            if budget is not None or penalty != 0:
                raise ValueError(f"{op}: give either class_map or budget and penalty")
            check.tensor(op, "class_map", class_map)
            check.dtype(op, "class_map", class_map.dtype, check.INDEX)
            shape = (images.shape[0], grid.rows, grid.cols)
            if tuple(class_map.shape) not in ((shape[1:], shape) if shape[0] == 1 else (shape,)):
                raise ValueError(f"{op}: class_map must be {shape} for this image; got {tuple(class_map.shape)}")
            check.same_device(op, "image", images, "class_map", class_map)
        else:
            # Also refuses an impossible budget, before anything is classified.
            assign_classes(torch.ones(1, self.num_classes), self.costs, penalty, budget)
            if self.classifier is None and budget != 1 and self.num_classes > 1:
                raise ValueError(f"{op}: this router has no classifier; give a class_map or budget=1")
        return images, grid

    def _route(
        self, images: Tensor, grid: TileGrid, class_ids: Tensor, watch: Stopwatch, progress: bool
    ) -> tuple[Tensor, list[int]]:
        bands = plan_bands(images.shape[0], grid)
        k = self.num_classes
        with watch.stage("assign"):
            # Band-major, class-minor: one sort gives every band's batches.
            sizes = torch.tensor(
                [(b.images[1] - b.images[0]) * (b.rows[1] - b.rows[0]) * grid.cols for b in bands], dtype=torch.int64
            )
            band_of = torch.repeat_interleave(torch.arange(len(bands)), sizes).to(class_ids.device)
            per_class = group_by_class(class_ids, k).offsets  # refuses ids out of range
            groups = group_by_class(band_of * k + class_ids, max(len(bands), 1) * k)
            read = torch.cat([per_class, groups.offsets]).tolist()  # the one wait for the device
            totals, offsets = read[: k + 1], read[k + 1 :]
        size = (images.shape[0], images.shape[1], *grid.output_size)
        # What leaves is an ordinary tensor, which may be changed in place.
        with torch.inference_mode(False):
            output = memory.empty(size, images.dtype, images.device)
        workspace = Workspace(self, grid, images)
        with tqdm(total=class_ids.numel(), unit="patch", desc="upscale", disable=not progress) as bar:
            for number, band in enumerate(bands):
                begin = offsets[number * k]
                for c in range(k):
                    first, last = offsets[number * k + c], offsets[number * k + c + 1]
                    self._run_branch(c, images, grid, groups.order[first:last], workspace, watch)
                    bar.update(last - first)
                with watch.stage("stitch"):
                    workspace.stitch(band, groups.inverse, begin, output, self.window)
        return output, [totals[c + 1] - totals[c] for c in range(k)]

    def _run_branch(
        self, c: int, images: Tensor, grid: TileGrid, order: Tensor, workspace: Workspace, watch: Stopwatch
    ) -> None:
        if order.numel() == 0:
            return
        with watch.stage("tune"):
            tuning = self.tuning(c, images.device)
        with watch.stage("extract"):
            patches = extract_patches(images, grid, order=order, dtype=self.dtype, memory_format=tuning.memory_format)
        # Batches of one size: the last is not left with a few patches, which run at a fraction of the speed.
        for batch in patches.tensor_split(-(-order.numel() // tuning.batch)):
            with watch.stage("branches"):
                result = self.branches[c](batch)
            workspace.put(result)

    def tuning(self, c: int, device: torch.device) -> Tuning:
        """How branch `c` runs on `device`; measured on the first call."""
        key = (c, device, torch.get_num_threads())
        if key not in self._tunings:
            example = torch.full((1, self.channels, self.patch, self.patch), 0.5, dtype=self.dtype, device=device)
            self._tunings[key] = tune(self.branches[c], example)
            self.branches[c].to(memory_format=self._tunings[key].memory_format)  # type: ignore[call-overload]
        return self._tunings[key]

    def _stats(self, counts: list[int], classifier_flops: int, watch: Stopwatch) -> RoutingStats:
        seconds = {
            "tune": 0.0,
            "classify": 0.0,
            "assign": 0.0,
            "extract": 0.0,
            "branches": 0.0,
            "stitch": 0.0,
            **watch.finish(),
        }
        paper: RoutedFlops = mix_flops(self.paper_flops, counts)
        return RoutingStats(counts, mix_flops(self.branch_flops, counts, classifier_flops), paper, seconds)


class Workspace:
    """Branch outputs of a band, and of earlier ones as long as output rows to come are covered by their patches."""

    def __init__(self, router: PatchRouter, grid: TileGrid, images: Tensor) -> None:
        self.router, self.grid, self.images = router, grid, images
        self.batches: list[Tensor] = []
        self.number = 0  # of patches in `batches`
        # Batches of earlier bands: last tile row of the band, and how many batches there were with it.
        self.marks: list[tuple[int, int]] = []
        self.places = torch.empty(0)  # [images, patches] of the current band's images; those not held are not read

    def put(self, result: Tensor) -> None:  # [n, C·r·r, P / r, P / r]
        """Keep the next batch of branch outputs."""
        span = self.grid.patch * self.grid.scale // self.router.shuffle
        size = (self.images.shape[1] * self.router.shuffle**2, span, span)
        if tuple(result.shape[1:]) != size:
            patch = f"{self.grid.patch} x {self.grid.patch}"
            before = f" before its pixel shuffle of factor {self.router.shuffle}" if self.router.shuffle > 1 else ""
            raise ValueError(f"upscale: a branch must map {patch} patches to {size}{before}; got {tuple(result.shape[1:])}")
        like = self.batches[0] if self.batches else result
        # A branch may answer in a memory format of its own.
        if result.stride()[1:] != like.stride()[1:]:
            result = torch.empty_strided(result.shape, like.stride(), dtype=result.dtype, device=result.device).copy_(result)
        self.batches.append(result)
        self.number += result.shape[0]

    def stitch(self, band: Band, inverse: Tensor, begin: int, output: Tensor, window: str | Tensor) -> None:
        """Write the output rows that are complete with `band`, and drop what no later row needs."""
        grid, cols = self.grid, self.grid.cols
        (image, end), (top, bottom) = band.images, band.rows
        if top == 0:
            self.places = torch.full((end - image, grid.num_patches), -1, dtype=torch.int64, device=inverse.device)
        held = (end - image) * (bottom - top) * cols
        here = inverse[image * grid.num_patches + top * cols :][:held] - begin
        self.places[:, top * cols : bottom * cols] = here.view(end - image, -1) + self.number - held
        y0 = grid.row_origins[top] * grid.scale if top else 0
        y1 = grid.row_origins[bottom] * grid.scale if bottom < grid.rows else grid.output_size[0]
        stitch_patches(
            self.batches,
            grid,
            window,
            inverse=self.places.flatten(),
            shuffle=self.router.shuffle,
            rows=(y0, y1),
            out=output[image:end, :, y0:y1],
        )
        self.marks.append((bottom, len(self.batches)))
        needed = self._first_needed(bottom)
        while self.marks and self.marks[0][0] <= needed:
            self._drop(self.marks.pop(0)[1])

    def _drop(self, count: int) -> None:
        """Forget the first `count` batches."""
        dropped = sum(batch.shape[0] for batch in self.batches[:count])
        del self.batches[:count]
        self.number -= dropped
        self.places -= dropped
        self.marks = [(row, number - count) for row, number in self.marks]

    def _first_needed(self, row: int) -> int:
        """First tile row that covers the first pixel of tile row `row`; all rows are done with after the last."""
        if row >= self.grid.rows:
            return row
        at = self.grid.row_origins[row]
        return next(i for i, y in enumerate(self.grid.row_origins) if y + self.grid.patch > at)


def plan_bands(batch: int, grid: TileGrid) -> list[Band]:
    """Whole images while they fit in one band, else bands of tile rows of one image."""
    if grid.num_patches <= PATCHES_PER_BAND:
        per_band = max(1, PATCHES_PER_BAND // grid.num_patches)
        return [Band((i, min(i + per_band, batch)), (0, grid.rows)) for i in range(0, batch, per_band)]
    count = -(-grid.num_patches // PATCHES_PER_BAND)
    # Bands of equal height, so that none is left with one row.
    edges = sorted({round(grid.rows * i / count) for i in range(count + 1)})
    return [Band((b, b + 1), rows) for b in range(batch) for rows in pairwise(edges)]


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy for inference; the caller's own stays as it is."""
    return copy.deepcopy(module).eval().requires_grad_(False)


def _first_channels(branch: nn.Module) -> int:
    channels = getattr(branch, "channels", None)
    if isinstance(channels, int):
        return channels
    return next((m.in_channels for m in branch.modules() if isinstance(m, nn.Conv2d)), 3)
