"""Networks of any architectures over one image: the cheaper ones where they come near enough to the most expensive one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastroute._arguments import real, whole
from fastroute._contexts import ordinarily
from fastroute.cascades.cells import CELL, Cells, edge_scores
from fastroute.cascades.decision import Decision, Target, choose
from fastroute.cascades.networks import Networks, unsupported_half
from fastroute.cascades.plan import Plan
from fastroute.cascades.run import Piece, pieces_of, run_plan
from fastroute.engines import TORCH
from fastroute.models.network import INTERNAL, Facts
from fastroute.models.precision import probed_dtype
from fastroute.ops import _checks as check
from fastroute.profiling import RoutedFlops
from fastroute.runtime.endpoints import home, output_like
from fastroute.runtime.memory_plan import AUTO, Limit, check_limit, limit_on, pass_bytes
from fastroute.runtime.progress import Progress, shown
from fastroute.runtime.protocols import Reader, Writer, check_reader
from fastroute.runtime.results import RoutingStats, Stopwatch, Streamed, Upscaled
from fastroute.runtime.router import Router
from fastroute.runtime.threads import patiently

if TYPE_CHECKING:
    from typing_extensions import Self

# Side of the input on which memory is counted.
MEASURED = 64


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
        self._pixel_bytes: int | None = None

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

    def _before_halving(self, device: torch.device, dtype: torch.dtype) -> None:
        self.networks.halve(device, dtype)

    def _exact_in(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        return self.networks.exact_in(device, dtype)

    def _moved(self) -> None:
        self.networks.dtype = self.dtype

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
                slightly, since networks of a large receptive field see less.

        Returns:
            :class:`fastroute.Upscaled`, with the classes in which the cells ran. A floating image is not clamped; an integer
            one is, and rounded half to even.

        Raises:
            ValueError: a wrong rank, number of channels, empty image, another device, an impossible budget or fidelity, or a
                class map of another shape or with ids out of range.
            TypeError: an unsupported dtype.
        """
        images = check.images("upscale", image, self.channels, home(image, self.device))
        check_limit("upscale", memory_limit)
        target = self._target(budget, fidelity, class_map, context)
        size = (images.shape[2] * self.scale, images.shape[3] * self.scale)
        output = output_like("upscale", images, (*images.shape[:2], *size))
        watch = Stopwatch(self.device)
        maps = self._class_maps(class_map, images)
        plans = []
        largest = self._largest(memory_limit)
        with self.lock, patiently(self.device):
            for n in range(images.shape[0]):
                pixels = _floating(images[n].to(self.device), self.dtype)
                plan = self._plan(pixels, target, None if maps is None else maps[n], watch)
                result = self._run(plan, pixels, largest, watch, progress)
                with watch.stage("stitch"):
                    _store(result, output[n])
                plans.append(plan)
        with torch.inference_mode(False):
            ids = torch.stack([plan.class_ids for plan in plans]).clone().to(images.device)
        stats = self._stats(plans, watch)
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
        """Super-resolve what a reader gives into a writer; the image and its result are held in memory meanwhile.

        Args:
            reader: gives the image, see :class:`fastroute.Reader`.
            writer: takes the result, see :class:`fastroute.Writer`.
            budget, fidelity, class_map, context, progress: see :meth:`upscale`.
            memory_limit: bytes that the networks may take, see :meth:`upscale`.

        Raises:
            ValueError, TypeError: see :meth:`upscale`.
        """
        check_reader("stream", reader, self.channels, check.FLOATING + check.INTEGER_IMAGE)
        limit = limit_on(self.device, memory_limit)
        _, height, width = reader.shape
        result = self.upscale(
            reader.read(0, height, 0, width),
            budget=budget,
            fidelity=fidelity,
            class_map=class_map,
            context=context,
            progress=progress,
            memory_limit=limit,
        )
        step = max(int(getattr(writer, "row_step", 1)), 1)
        rows = max(step, 256 // step * step)
        for top in range(0, result.image.shape[1], rows):
            writer.write(top, 0, result.image[:, top : top + rows].cpu())
        return Streamed(result.class_map, result.stats)

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

    def _class_maps(self, class_map: Tensor | None, images: Tensor) -> Tensor | None:  # [B, rows, cols]
        if class_map is None:
            return None
        op = "upscale"
        check.tensor(op, "class_map", class_map)
        check.dtype(op, "class_map", class_map.dtype, check.INDEX)
        cells = Cells(*images.shape[2:])
        shape = (images.shape[0], cells.rows, cells.cols)
        if tuple(class_map.shape) not in ((shape[1:], shape) if shape[0] == 1 else (shape,)):
            raise ValueError(f"{op}: class_map must be {shape} for this image; got {tuple(class_map.shape)}")
        check.in_range(op, "class_map", class_map, self.num_classes)
        return class_map.reshape(shape).to("cpu", torch.int64)

    def _plan(self, pixels: Tensor, target: Target, class_ids: Tensor | None, watch: Stopwatch) -> Plan:  # [C, H, W]
        cells = Cells(*pixels.shape[1:])
        if self.facts[-1].tiling == INTERNAL or self.num_classes == 1:
            class_ids = torch.full((cells.rows, cells.cols), self.num_classes - 1)
        scores = None
        if class_ids is None and not target.everywhere:
            with watch.stage("classify"):
                scores = edge_scores(pixels[None])[0].double().cpu()
        with watch.stage("assign"):
            return choose(self.decision, target, cells, self.costs, scores, class_ids, self.align)

    def _run(self, plan: Plan, pixels: Tensor, largest: int | None, watch: Stopwatch, progress: Progress) -> Tensor:
        result = pixels.new_empty(pixels.shape[0], pixels.shape[1] * self.scale, pixels.shape[2] * self.scale)
        networks = [partial(self.networks.run, k) for k in range(self.num_classes)]
        total = sum(len(pieces_of(plan.cells, regions, plan.context, largest)) for regions in plan.regions)
        with watch.stage("branches"), shown(progress, total, "region") as bar:

            def done(k: int, piece: Piece) -> None:
                bar.update()

            run_plan(plan, pixels, networks, result, self.scale, largest, done)
        return result

    def _largest(self, limit: int | None) -> int | None:
        """LR pixels of a pass within `limit` bytes."""
        if limit is None:
            return None
        if self._pixel_bytes is None:
            size = (1, self.channels, *self.facts[-1].padded(MEASURED, MEASURED))
            self._pixel_bytes = -(-2 * pass_bytes(self.networks.members[-1], size, self.dtype) // (size[2] * size[3]))
        return max(limit // self._pixel_bytes, CELL * CELL)

    def _stats(self, plans: Sequence[Plan], watch: Stopwatch) -> RoutingStats:
        stages = ("tune", "classify", "assign", "branches", "stitch")
        seconds = {**dict.fromkeys(stages, 0.0), **watch.finish()}
        counts = [sum(int((plan.class_ids == k).sum()) for plan in plans) for k in range(self.num_classes)]
        work = [sum(plan.work()[k] for plan in plans) for k in range(self.num_classes)]
        routed = sum(flops * pixels for flops, pixels in zip(self.branch_flops, work, strict=True))
        dense = self.branch_flops[-1] * sum(plan.cells.height * plan.cells.width for plan in plans)
        flops = RoutedFlops(routed, dense, dense)
        return RoutingStats(counts, flops, flops, seconds, 0, [pixels / CELL**2 for pixels in work])


def _floating(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """An image in [0, 1], float32, or float64 for networks of that type."""
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    if pixels.is_floating_point():
        return pixels.to(wanted)
    return pixels.to(wanted) / (255 if pixels.dtype == torch.uint8 else 65535)


def _store(result: Tensor, output: Tensor) -> None:  # [C, H, W]
    """Into the type of the image: integers clamped and rounded half to even."""
    if output.is_floating_point():
        output.copy_(result)
        return
    most = 255 if output.dtype == torch.uint8 else 65535
    rounded = (result * most).round_().clamp_(0, most)
    # uint16 takes no part in arithmetic, but is copied to.
    output.copy_(rounded.to(torch.int32).to(output.dtype))
