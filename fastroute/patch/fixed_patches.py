"""The patch path at a fixed size: every tensor has the same shape in every call, and nothing waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastroute._arguments import LARGEST_EXPONENT, real
from fastroute._contexts import computing_in_own_type, ordinarily
from fastroute._copies import inference_copy
from fastroute.budget.limits import check_possible, most_expensive
from fastroute.grid import TileGrid
from fastroute.models.precision import HALVES
from fastroute.ops import _checks as check
from fastroute.ops._library import OPERATORS, call
from fastroute.ops._upsampled import Upsampler, Upsamplers, stitch_upsampled
from fastroute.ops.assign_classes import assign_classes
from fastroute.ops.extract_patches import extract_patches
from fastroute.patch.branches import even_parts
from fastroute.patch.classify import cellwise, classify_patches, patches_per_batch, score_patches
from fastroute.patch.patch_router import PatchRouter
from fastroute.patch.slots import Slots, capacities_for, check_capacities
from fastroute.patch.workspace import Workspace
from fastroute.runtime.border import refuse_edge
from fastroute.runtime.cuda_graphs import CudaGraph
from fastroute.runtime.fixed_size import FixedUpscaled, check_fixed, check_shape
from fastroute.runtime.rows import TensorSource
from fastroute.runtime.threads import side_by_side, workers
from fastroute.windows import make_window


class FixedPatchRouter(nn.Module):
    """:meth:`PatchRouter.upscale` for images of one size, with a fixed number of slots for the patches of each class.

    Every call runs every slot, whether it is used or not, so `capacities` decide the time, which is the same for every image.
    Shapes never depend on values and nothing is read back, so a call can be captured in a CUDA graph (:meth:`capture`),
    exported (:func:`torch.export.export`) and compiled (``torch.compile(fullgraph=True)``).

    If the classifier wants more patches of a class than there are slots, the hardest ones move to free slots of the next higher
    class that has any. How hard a patch is follows from its scores of higher classes minus its scores of lower ones. If no
    higher class has a free slot, the easiest patches move to the highest free slots below. No patch is lost, and `overflow`
    counts those that moved. With a given `class_map`, the first patches move up and the last ones down. If all patches fit, the
    classes are those of :meth:`PatchRouter.upscale` with ``merge=1``, and so is the image, up to what a network rounds
    differently in batches of another size.

    Patches are not merged into regions, whatever the router's `merge` is: a slot has one shape, and a fixed number of slots for
    each class and each of up to 36 shapes of regions would reserve many times the work.

    Args:
        router: the router whose networks are copied, on their device.
        shape: shape of the images, (B, C, H, W) or (C, H, W).
        dtype: type of the images: floating in [0, 1], uint8 or uint16. Default: the type of `sample`, else float32.
        capacities: slots of each class, cheapest first, as numbers of patches or as fractions (floats) of all patches. Together
            they must hold all patches.
        sample: instead of `capacities`, images like those to come, (B, C, H, W) or (C, H, W), of any size and number. They are
            split into calls of as many images as `shape` has, each of which meets the budget on its own. A class gets the
            largest share of patches that it has in any of these calls.
        slack: with `sample`, additional slots as a fraction of those.
        budget, penalty: see :meth:`PatchRouter.upscale`. The images of a batch share one budget.

    Raises:
        ValueError: an invalid shape, budget or capacities, or no capacities for several classes.
        TypeError: an unsupported dtype, or `router` is not a :class:`PatchRouter`.

    Shape:
        images as `shape` says, and optionally a class map (B, rows, cols) or (rows, cols) on the same device, to images
        `scale` times as large; :meth:`upscale` gives a :class:`FixedUpscaled`.

    Differentiable: no.
    Deterministic: yes, as far as the networks are.
    Synchronises: no; making one does.
    CUDA-graph safe: yes with the kernels of a GPU, if the networks are.
    Memory layout: any strides; contiguous output. Outputs of all slots are held at once, not in bands.

    Example:
        >>> fixed = fastroute.FixedPatchRouter(router, (3, 540, 960), torch.uint8, sample=frame, budget=0.6)
        >>> graph = fixed.capture(frame)
        >>> result = graph(next_frame)
    """

    OP = "FixedPatchRouter"
    window: Tensor  # [P]
    higher: Tensor  # [K, K], 1 where the second class is higher than the first, -1 where it is lower

    @ordinarily
    def __init__(
        self,
        router: PatchRouter,
        shape: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        capacities: Sequence[int | float] | None = None,
        sample: Tensor | None = None,  # [B, C, H, W] or [C, H, W]
        slack: float = 0.25,
        budget: float | None = None,
        penalty: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(router, PatchRouter):
            raise TypeError(f"{self.OP}: router must be a PatchRouter; got {type(router).__name__}")
        refuse_edge(self.OP, router)
        if router.rounded:
            raise ValueError(f"{self.OP}: a router whose patches are rounded has no fixed form; load it without published=True")
        if dtype is None:
            dtype = sample.dtype if isinstance(sample, Tensor) else torch.float32
        self.shape, self.dtype, self.device = check_shape(self.OP, shape, router.channels), dtype, router.device
        check.dtype(self.OP, "dtype", dtype, check.FLOATING + check.INTEGER_IMAGE)
        real(self.OP, "penalty", penalty, LARGEST_EXPONENT)
        if budget is not None:
            budget = real(self.OP, "budget", budget)
        check_possible(router.costs, budget, penalty)
        batch, _, height, width = [1, *self.shape][-4:]
        self.grid = router.grid(height, width)
        self.number, self.num_classes = batch * self.grid.num_patches, router.num_classes
        self.costs, self.budget, self.penalty = list(router.costs), budget, penalty
        # Then nothing needs to be classified.
        self.only = most_expensive(self.costs) if budget == 1 or self.num_classes == 1 else None
        self.classifier = None
        if self.only is None and router.classifier is not None:
            self.classifier = FixedClassifier(
                inference_copy(router.classifier), (batch, *self.shape[-3:]), self.grid, self.device
            )
        self.slots = Slots(self._capacities(router, capacities, sample, slack), self.number, self.device)

        # Per branch: how it runs, and patches per pass; nothing that a call could change.
        self.settings = [
            (router.networks.setting(c, self.device), router.networks.batch_of(c, self.device)) for c in range(self.num_classes)
        ]
        # Copies, because a graph knows weights by their addresses, and the router may rearrange its own.
        self.branches = nn.ModuleList(map(inference_copy, router.branches))
        for branch, (setting, _) in zip(self.branches, self.settings, strict=True):
            branch.to(memory_format=setting.memory_format)  # type: ignore[call-overload]
        self.shuffle = router.shuffle
        # Types of the patches that are cut out, that each branch reads, and of what it gives.
        self.taken, self.given = router.networks.taken, router.networks.given(self.device)
        self.reads = [router.networks.reads(c) for c in range(self.num_classes)]
        # What of them runs before the stitching, and what with it; a CPU alone has kernels for that.
        networks = router.networks
        left = networks.split(self.device)[1]
        bodies, upsamplers = networks.cut(list(self.branches)) if left else ((), [])
        if networks.dtype in HALVES:
            upsamplers = left
        # Not registered once more: their layers are those of `branches`.
        self.bodies = tuple(bodies)
        self.upsamplers = nn.ModuleDict({str(c): UpsamplerLayers(u) for c, u in enumerate(upsamplers) if u is not None})
        # A compiler or an export sees the kernels that ran before, and the weights that were transformed for them.
        with torch.no_grad():
            for c, branch in enumerate(self.bodies or self.branches):
                size = (1, router.channels, router.patch, router.patch)
                branch(torch.zeros(size, dtype=self.reads[c], device=self.device))
        work = torch.float64 if router.dtype == torch.float64 else torch.float32
        span = router.patch * router.scale
        window = make_window(router.window, span, router.stride * router.scale).to(self.device, work)
        self.register_buffer("window", window, persistent=False)
        rising = torch.arange(self.num_classes, device=self.device)
        self.register_buffer("higher", (rising - rising[:, None]).sign().float(), persistent=False)

    @property
    def capacities(self) -> list[int]:
        """Slots of each class."""
        return self.slots.capacities

    def forward(
        self,
        image: Tensor,  # [B, C, H, W] or [C, H, W]
        class_map: Tensor | None = None,  # [B, rows, cols] or [rows, cols]
    ) -> Tensor:
        """The upscaled image, see :meth:`upscale`."""
        return self.upscale(image, class_map).image

    @computing_in_own_type
    @torch.no_grad()
    def upscale(
        self,
        image: Tensor,  # [B, C, H, W] or [C, H, W]
        class_map: Tensor | None = None,  # [B, rows, cols] or [rows, cols]
    ) -> FixedUpscaled:
        """Super-resolve images of the fixed size, see the class. The values of floating images are not checked."""
        images = check_fixed("upscale", image, self.shape, self.dtype, self.device)
        batch, channels = images.shape[:2]
        placed = self.slots(*self._classes(images, class_map))
        upsamplers = self._upsamplers() if self.device.type == "cpu" else []
        branches = self.bodies if upsamplers else self.branches
        space, first = Workspace(self.grid, channels, self.shuffle, "uniform", upsamplers), 0
        for c, (branch, (setting, most), count) in enumerate(zip(branches, self.settings, self.capacities, strict=True)):
            if not count:
                continue
            order = placed.patches[first : first + count]
            first += count
            patches = extract_patches(images, self.grid, order=order, dtype=self.taken, memory_format=setting.memory_format)
            parts = patches.to(self.reads[c]).split(even_parts(count, most))
            # As the router does, to the last bit; not while a graph is made.
            beside = setting.parallel and not torch.compiler.is_compiling() and len(parts) >= workers()
            results = side_by_side(branch, parts) if beside else [branch(part) for part in parts]
            space.put([result.to(self.given) for result in results], c)
        output = torch.empty((batch, channels, *self.grid.output_size), dtype=self.dtype, device=self.device)
        self._stitch(space, placed.places, output)
        maps = placed.classes.to(torch.uint8).view(batch, self.grid.rows, self.grid.cols)
        if image.ndim == 3:
            output, maps = output[0], maps[0]
        return FixedUpscaled(output, maps, placed.overflow)

    def _upsamplers(self) -> Upsamplers:
        """The last layers of each branch that are left to the stitching."""
        if not self.upsamplers:
            return []
        names = [str(c) for c in range(self.num_classes)]
        return [self.upsamplers[name]() if name in self.upsamplers else None for name in names]

    def capture(
        self,
        image: Tensor,  # [B, C, H, W] or [C, H, W]
        class_map: Tensor | None = None,  # [B, rows, cols] or [rows, cols]
    ) -> CudaGraph:
        """Capture this upscale in a CUDA graph that takes images like `image`, and class maps if one is given here."""
        return CudaGraph(self.upscale, *(x for x in (image, class_map) if x is not None))

    def _capacities(
        self, router: PatchRouter, capacities: Sequence[int | float] | None, sample: Tensor | None, slack: float
    ) -> list[int]:  # [B, C, H, W] or [C, H, W]
        if capacities is not None and sample is not None:
            raise ValueError(f"{self.OP}: give either capacities or a sample")
        if capacities is None and sample is not None:
            capacities = capacities_for(self._counts(router, sample), self.number, slack)
        elif capacities is None and self.only is not None:
            capacities = [self.number * (c == self.only) for c in range(self.num_classes)]
        if capacities is None:
            raise ValueError(f"{self.OP}: give capacities, the slots of each class, or a sample of the images to come")
        return check_capacities(self.OP, capacities, self.num_classes, self.number)

    @torch.no_grad()
    def _counts(self, router: PatchRouter, sample: Tensor) -> list[list[int]]:  # [B, C, H, W]
        """The number of patches of each class in each call of a sample."""
        images = check.images(self.OP, sample, router.channels, sample.device, bounded=router.bounded).to(self.device)
        grid = router.grid(*images.shape[2:])
        if self.only is not None:
            return [[int(c == self.only) for c in range(self.num_classes)]]
        if router.classifier is None:
            raise ValueError(f"{self.OP}: this router has no classifier to look at a sample; give capacities")
        score = classify_patches(router.classifier, TensorSource(images, self.device), grid).score
        per_call = self.number // self.grid.num_patches * grid.num_patches
        ids = [assign_classes(part, self.costs, self.penalty, self.budget) for part in score.split(per_call)]
        return [torch.bincount(part, minlength=self.num_classes).tolist() for part in ids]

    def _classes(self, images: Tensor, class_map: Tensor | None) -> tuple[Tensor, Tensor | None]:  # [N], [N]
        """The class of every patch, and how hard the classifier finds it."""
        if class_map is not None:
            check.dtype("upscale", "class_map", class_map.dtype, check.INDEX)
            check.same_device("upscale", "image", images, "class_map", class_map)
            if class_map.numel() != self.number or tuple(class_map.shape[-2:]) != (self.grid.rows, self.grid.cols):
                expected = (*images.shape[:1], self.grid.rows, self.grid.cols)
                raise ValueError(f"upscale: class_map must be {expected} for this size; got {tuple(class_map.shape)}")
            return class_map.reshape(-1).long(), None
        if self.only is not None:
            return torch.full((self.number,), self.only, dtype=torch.int64, device=self.device), None
        if self.classifier is None:
            raise ValueError("upscale: this router has no classifier; give a class_map")
        score = self.classifier(images)
        if score.shape[1:] != (self.num_classes,):
            raise ValueError(
                f"upscale: the classifier must give one score per branch, {self.num_classes}; got {tuple(score.shape[1:])}"
            )
        ids = assign_classes(score, self.costs, self.penalty, self.budget)
        return ids, (score.float() * self.higher[ids]).sum(dim=1)

    def _stitch(self, space: Workspace, places: Tensor, out: Tensor) -> None:  # [N], [B, C, H·s, W·s]
        """`stitch_patches` with a window that is on the device already: a copy from the host would wait for it."""
        grid, rows = self.grid, (0, self.grid.output_size[0])
        if space.upsamplers:
            held = (space.batches, space.kinds, space.upsamplers)
            stitch_upsampled(*held, grid, self.window, places, rows, out)
            return
        op = "stitch_patches.batches_out"
        sizes = (grid.height, grid.width, grid.patch, grid.stride, grid.scale, grid.crop, self.shuffle, *rows)
        call(op, OPERATORS[op].reference, out.device, space.batches, places, None, self.window, *sizes, out=out)


class UpsamplerLayers(nn.Module):
    """An upsampler as a module, so that it moves and is exported with the module that holds it."""

    expand: Tensor
    expand_bias: Tensor
    slope: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, upsampler: Upsampler) -> None:
        super().__init__()
        self.shuffle = upsampler.shuffle
        for name, tensor in zip(Upsampler._fields, upsampler.layers, strict=False):
            self.register_buffer(name, tensor.clone(), persistent=False)

    def forward(self) -> Upsampler:
        """The same upsampler, of the buffers."""
        return Upsampler(self.expand, self.expand_bias, self.slope, self.weight, self.bias, self.shuffle)


class FixedClassifier(nn.Module):
    """:func:`fastroute.patch.classify.classify_patches` for images of one size, with all indices on the device.

    Args:
        classifier: maps patches (N, C, p, p) to scores (N, K).
        shape: (B, C, H, W) of the images.
        grid: where the patches lie.
        device: where the images are.

    Shape:
        images to scores (N, K).
    """

    numbers: Tensor  # [n], patches off the cells

    def __init__(self, classifier: nn.Module, shape: Sequence[int], grid: TileGrid, device: torch.device) -> None:
        super().__init__()
        self.classifier: nn.Module = classifier
        self.grid, self.batch = grid, shape[0]
        self.scored = next((p.dtype for p in classifier.parameters()), torch.float32)
        self.most = patches_per_batch(classifier, (1, shape[1], grid.patch, grid.patch), device)
        self.cells, self.rows, self.cols = None, 0, 0
        if cellwise(classifier, grid):
            cell: int = classifier.CELL  # type: ignore[assignment]
            aligned = [[x for x in origins if x % cell == 0] for origins in (grid.row_origins, grid.col_origins)]
            self.rows, self.cols = map(len, aligned)
            # The image without the part that only patches off the cells cover.
            height, width = (origins[-1] + grid.patch for origins in aligned)
            self.cells = TileGrid(height, width, grid.patch, grid.stride, grid.scale)
        alone = torch.ones(shape[0], grid.rows, grid.cols, dtype=torch.bool)
        alone[:, : self.rows, : self.cols] = False
        self.register_buffer("numbers", alone.flatten().nonzero().squeeze(1).to(device), persistent=False)

    def forward(self, images: Tensor) -> Tensor:  # [B, C, H, W] -> [N, K]
        """The scores of all patches."""
        pieces = [
            score_patches(self.classifier, extract_patches(images, self.grid, order=order, dtype=self.scored))
            # Older versions of torch cannot export the split of nothing.
            for order in (self.numbers.split(self.most) if len(self.numbers) else ())
        ]
        if self.cells is None:
            return torch.cat(pieces)
        inner = images[:, :, : self.cells.height, : self.cells.width]
        score = classify_patches(self.classifier, inner, self.cells).score
        if not pieces:
            return score
        full = score.new_empty(self.batch, self.grid.rows, self.grid.cols, score.shape[1])
        full[:, : self.rows, : self.cols] = score.view(self.batch, self.rows, self.cols, -1)
        return full.view(-1, score.shape[1]).index_copy(0, self.numbers, torch.cat(pieces))
