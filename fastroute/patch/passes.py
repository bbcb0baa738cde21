"""All passes of a band through the branches, side by side if that is faster, whatever their classes and shapes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from fastroute._levels import MAXIMUM
from fastroute.engines import TORCH
from fastroute.grid import TileGrid
from fastroute.models.adapters import as_module
from fastroute.ops.extract_patches import extract_patches
from fastroute.ops.merge_regions import MERGES
from fastroute.patch.bands import Band
from fastroute.patch.branches import Branches
from fastroute.patch.regions import SortedRegions
from fastroute.patch.workspace import Workspace
from fastroute.profiling import observed
from fastroute.runtime.devices import on_device
from fastroute.runtime.memory_plan import LiveBytes
from fastroute.runtime.progress import Progress, shown
from fastroute.runtime.results import Stopwatch
from fastroute.runtime.rows import Source
from fastroute.runtime.sinks import Sink
from fastroute.runtime.threads import side_by_side, workers
from fastroute.runtime.tuning import SMALL_PASS

# The default side of a block in patches, and the bytes that a region of this size may take in a branch. The result depends on
# both, so they are the same on every machine.
MERGE, REGION_BYTES = 4, 512 << 20
# Networks of fewer FLOPs per LR pixel run patches of several classes on their own. Every class and shape of region is a pass of
# its own, whose launches take a GPU longer than the overlaps that a region saves.
LEAST_MERGED = {"cpu": 0, "cuda": 200_000}


@dataclass(frozen=True)
class Pass:
    """Some patches of one job on their way through the branch of class `c`.

    Attributes:
        number: number of the job.
        c: class.
        module: module that runs.
        part: (n, C, h, w), the patches.
        given: type of the output.
    """

    number: int
    c: int
    module: nn.Module
    part: Tensor
    given: torch.dtype

    def run(self) -> tuple[Tensor, float]:
        """Run the pass. Returns its output and the seconds that it took."""
        begin = time.perf_counter()
        return self.module(self.part).to(self.given), time.perf_counter() - begin


def run_bands(
    networks: Branches,
    window: str | Tensor,  # [P]
    rounded: bool,
    source: Source,
    sink: Sink,
    grid: TileGrid,
    bands: list[Band],
    regions: SortedRegions,
    watch: Stopwatch,
    progress: Progress,
) -> None:
    """Send every region through the branch of its class, band by band: cut it out, run it, stitch it.

    Args:
        networks: the branches.
        window: weighs overlapping patches, see :func:`fastroute.make_window`.
        rounded: whether patches are rounded to 8 bits before they are merged.
        source, sink: where rows come from, and where they go.
        grid: where the patches lie.
        bands: the bands that are routed together.
        regions: the regions of all patches.
        watch: measures the time of each stage.
        progress: see :meth:`fastroute.PatchRouter.upscale`.
    """
    device = source.device
    workspace = Workspace(grid, source.shape[1], networks.shuffle, window, networks.split(device)[1])
    with shown(progress, regions.class_ids.numel(), "patch") as bar:
        for number, band in enumerate(bands):
            groups = list(regions.of_band(number, band.first_patch(grid)))
            with watch.stage("extract"):
                pixels, part = band.read(source, grid)
                extract = partial(extract_patches, pixels, part, dtype=networks.taken)
                formats = {c: networks.setting(c, device).memory_format for c, _, _ in groups}
                jobs = [(c, extract(order=order, memory_format=formats[c], size=shape)) for c, shape, order in groups]
            for (c, shape, _), results in zip(groups, run_regions(networks, jobs, watch), strict=True):
                workspace.put([in_levels(result) for result in results] if rounded else results, c, shape)
            with watch.stage("stitch"):
                rows = sink.band(band.images, band.output(grid))
                # Means of whole levels are exact in float32, so that halves are rounded as they should be.
                merged = torch.empty(rows.shape, dtype=torch.float32, device=rows.device) if rounded else rows
                layers = workspace.stitch(band, regions.inverse, merged, regions.region, regions.regions_of(number))
                if rounded:
                    store_levels(merged, rows)
                sink.done()
            watch.move("stitch", "branches", layers)
            bar.update(band.num_patches(grid))


def in_levels(patches: Tensor) -> Tensor:  # [N, C, P, P], or before a pixel shuffle
    """Convert numbers in [0, 1] to levels 0 … 255 in float32, rounded half to even."""
    return patches.float().clamp(0, 1).mul_(255).round_()


def store_levels(levels: Tensor, out: Tensor) -> None:  # [B, C, rows, W], [B, C, rows, W]
    """Write means of levels into `out`, in the unit of its type. Integers are rounded half to even."""
    if out.dtype.is_floating_point:
        out.copy_(levels.div_(255))
    else:
        factor = MAXIMUM[out.dtype] // 255
        out.copy_(levels.mul_(factor).round_().to(torch.int32))


def run_regions(networks: Branches, jobs: Sequence[tuple[int, Tensor]], watch: Stopwatch) -> list[list[Tensor]]:
    """The outputs of the branches for every job, pass by pass, in the order of `jobs`.

    Args:
        networks: the branches.
        jobs: a class and patches, or regions of one shape, (N, C, h, w) each.
        watch: measures the time of each class.
    """
    results: list[list[Tensor]] = [[] for _ in jobs]
    waiting: list[Pass] = []
    compiled: dict[int, list[int]] = {}  # jobs of classes that another engine runs
    for number, (c, patches) in enumerate(jobs):
        setting = networks.setting(c, patches.device)
        if not networks.settled(c, patches.device):
            with watch.stage("branches", c):
                results[number] = networks.run(c, patches)
        elif setting.engine != TORCH:
            compiled.setdefault(c, []).append(number)
        elif setting.parallel or (networks.batch is None and is_small(patches)):
            # All threads together run a small pass badly, whatever is best for large ones.
            small = setting if setting.parallel else replace(setting, pixels=SMALL_PASS)
            module, parts, given = networks.pieces(c, patches, small)
            waiting += [Pass(number, c, module, part, given) for part in parts]
        else:
            with watch.stage("branches", c):
                results[number] = networks.run(c, patches)
    for c, numbers in compiled.items():
        with watch.stage("branches", c):
            found = networks.programmed(c, [jobs[number][1] for number in numbers])
        for number, result in zip(numbers, found, strict=True):
            results[number] = result
    _run_waiting(networks, waiting, results, watch)
    return results


def is_small(patches: Tensor) -> bool:  # [N, C, h, w]
    """Whether patches, or regions, take passes for one thread each."""
    return patches.device.type == "cpu" and patches.shape[2] * patches.shape[3] <= SMALL_PASS


def _run_waiting(networks: Branches, waiting: list[Pass], results: list[list[Tensor]], watch: Stopwatch) -> None:
    if len(waiting) < workers():
        # Some threads would have nothing to do, so all threads share each layer instead.
        for one in waiting:
            with watch.stage("branches", one.c):
                results[one.number].append(one.run()[0])
        return
    # The longest passes come first, so that the threads end at about the same time.
    order = sorted(range(len(waiting)), key=lambda i: -waiting[i].part.numel() * networks.flops[waiting[i].c])
    begin = time.perf_counter()
    with watch.stage("branches"):
        done = dict(zip(order, side_by_side(lambda i: waiting[i].run(), order), strict=True))
    wall, seconds = time.perf_counter() - begin, dict.fromkeys((one.c for one in waiting), 0.0)
    for i, one in enumerate(waiting):
        results[one.number].append(done[i][0])
        seconds[one.c] += done[i][1]
    total = sum(seconds.values()) or 1.0
    watch.move("branches", "branches", {c: wall * own / total for c, own in seconds.items()})


def chosen_merge(networks: Branches, stride: int, asked: int | None) -> int:
    """The side of a block of patches that may run as one region, see :class:`fastroute.PatchRouter`.

    Raises:
        ValueError: `asked` is not such a side, or the branches cannot run regions.
    """
    if asked is not None and (isinstance(asked, bool) or asked not in MERGES):
        raise ValueError(f"PatchRouter: merge must be one of {MERGES}, or None; got {asked!r}")
    pixels, several = networks.size[2] * networks.size[3], len(networks.modules) > 1
    if asked is None and several and max(networks.flops) < pixels * on_device(LEAST_MERGED, networks.device):
        return 1
    takes = asked == 1 or takes_regions(networks, stride)
    if asked is not None and not takes:
        raise ValueError(f"PatchRouter: merge must be 1 for branches that take no other size than a patch; got {asked}")
    if asked is not None or not takes:
        return asked or 1
    patch, merge = networks.size[2], MERGE
    bytes_of_patch = max(networks.pass_bytes(c, networks.device) for c in range(len(networks.modules)))
    while merge > 1 and bytes_of_patch * ((patch + (merge - 1) * stride) / patch) ** 2 > REGION_BYTES:
        merge //= 2
    return merge


def takes_regions(networks: Branches, stride: int) -> bool:
    """Whether all branches map rectangles of several patches, `stride` pixels apart, as they map patches."""
    height, width = networks.size[2] + stride, networks.size[3] + 3 * stride
    sizes = (1, networks.channels, height, width)
    return all(_maps_size(module, sizes, networks.reads(c)) for c, module in enumerate(networks.modules))


def _maps_size(module: nn.Module, size: tuple[int, int, int, int], dtype: torch.dtype) -> bool:
    """Whether `module` takes an input of `size` and gives one of the same proportions, found without running it."""
    shapes: list[torch.Size] = []

    def note(output: Tensor) -> Tensor:  # [n, ...]
        shapes.append(output.shape)
        return output

    try:
        observed(nn.Sequential(module, as_module("PatchRouter", "branches", note)), size, dtype, LiveBytes)
    except Exception:  # a network that needs another size may raise anything
        return False
    return len(shapes[-1]) == 4 and shapes[-1][2] * size[3] == shapes[-1][3] * size[2]
