"""The headline: whole images routed, beside the fastest dense engine that runs the most expensive branch in one pass.

That pass is what a user would run instead, so it is the 100 % here. Per backbone and precision, all in one alternating run:
the dense engines, fastroute dense and routed by each of its own engines, and what the floor is made of: the area that each
class ran on, as executed, at the rate of the fastest engine for its branch. The classes are those of a published mix, and lie
where the edge score of a photograph puts them, so that they cluster as real ones do.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor

import fastroute
from benchmarks import images
from benchmarks.baselines import classsr_published as plain
from benchmarks.baselines import engines
from benchmarks.e2e.class_mixes import SMOKE_PATCH, SMOKE_STRIDE, SMOKE_WIDTHS, mixes
from benchmarks.e2e.patch_routing import shipped_model
from benchmarks.measure import Timing, alternate, device, exactly, first, summary
from benchmarks.setting import Setting
from fastroute import engines as own_engines
from fastroute.grid import TileGrid
from fastroute.models.adapters import ScoreClassifier
from fastroute.models.arm import edge_score
from fastroute.models.classsr import ClassSR
from fastroute.patch.assignment import within
from fastroute.patch.classify import classify_patches
from fastroute.patch.regions import Merging
from fastroute.rewrite.optimize import simplify
from fastroute.runtime.results import RoutingStats
from fastroute.runtime.tuning import GPU_PIXELS, PARALLEL_PIXELS, TRIAL_PIXELS

# LR height and width.
SIZES = {"carn": (270, 480), "srresnet": (270, 480), "fsrcnn": (540, 960)}
SMOKE_SIZE = (60, 92)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MIX, BUDGET = "test4k", 0.5
ROUNDS, SECONDS = 7, 60.0
# A dense engine that takes so many times as long as the fastest has no further run.
BEHIND = 1.5
# Of what is quicker, the first run tells too little.
QUICK_SECONDS = 1.0
# Calls in which a branch may find out how it runs fastest; a search ends by itself long before.
SETTLING_CALLS = 200
DENSE, ROUTED = "fastroute dense", "fastroute routed"
ENGINES = (own_engines.TORCH, "openvino")
EVERYWHERE = "all patches in one class"
UNMERGED, HALF = f"{ROUTED}, merge=1", f"{ROUTED}, {BUDGET:.0%} of one pass"

Run = Callable[[], object]


@dataclass(frozen=True)
class Task:
    """What is upscaled, and by which networks."""

    backbone: str
    model: ClassSR
    pixels: Tensor  # [1, 3, H, W]
    grid: TileGrid
    scores: Tensor  # [N, K], by the edge score
    engines: dict[str, engines.Engines]  # of the most expensive branch in all of its forms

    @property
    def one_pass(self) -> float:
        """The image in patches: LR pixels by those of a patch."""
        return self.grid.height * self.grid.width / self.grid.patch**2


@dataclass
class Ours:
    """fastroute in one precision with one engine."""

    engine: str
    router: fastroute.PatchRouter
    settled: bool
    stats: dict[str, RoutingStats] = field(default_factory=dict)
    rates: dict[int, list[float]] = field(default_factory=dict)  # seconds per LR pixel in the branch of each class


def task_of(backbone: str, setting: Setting) -> Task:
    """Shipped weights where there are any, else random ones, which change no time; and where the classes lie."""
    torch.manual_seed(0)
    size = SMOKE_SIZE if setting.smoke else SIZES[backbone]
    if backbone == "fsrcnn" and not setting.smoke:
        model = shipped_model()
    else:
        model = ClassSR.build(backbone, SMOKE_WIDTHS if setting.smoke else None).eval().to(device())
    patch, stride = (SMOKE_PATCH, SMOKE_STRIDE) if setting.smoke else (32, 28)
    grid = TileGrid(*size, patch, stride, scale=4)
    pixels = images.low_resolution(images.photographs("test4k")[0], size).to(device()).float() / 255
    largest = model.branches[-1]
    forms = {"": largest}
    if backbone == "fsrcnn":
        forms = {", published form": largest, ", sub-pixel form": simplify(largest)}
    dense = {name: engines.Engines(form, pixels) for name, form in forms.items()}
    return Task(backbone, model, pixels, grid, edge_classes(pixels, grid, mixes(backbone)[MIX]), dense)


def edge_classes(pixels: Tensor, grid: TileGrid, shares: list[float]) -> Tensor:  # [1, 3, H, W] -> [N, K]
    """Scores of the classes by the edge score of every patch; the largest of each patch come in these shares."""
    found = edge_score(fastroute.extract_patches(pixels, grid)).double()
    ordered, edges = found.sort().values, [sum(shares[: k + 1]) for k in range(len(shares) - 1)]
    places = [min(max(round(edge * len(found)), 1), len(found) - 1) for edge in edges]
    # Between two patches: a class holds those whose score exceeds its threshold.
    limits = [float(ordered[n - 1] + ordered[n]) / 2 for n in places]
    return ScoreClassifier(edge_score, limits).to(device())(fastroute.extract_patches(pixels, grid))


def prepare(task: Task, precision: torch.dtype, engine: str, setting: Setting) -> Ours:
    """A router that agrees with the networks and has found out how its branches run fastest.

    Raises:
        ValueError: the engine cannot run here.
    """
    grid = task.grid
    router = fastroute.PatchRouter(
        task.model.branches, task.model.classifier, patch=grid.patch, stride=grid.stride, scale=grid.scale
    ).to(precision)
    if engine != own_engines.TORCH:
        router.compile(engine)
    check_agreement(task, precision, router)
    return Ours(engine, router, settle(router, setting))


def check_agreement(task: Task, precision: torch.dtype, router: fastroute.PatchRouter) -> None:
    """On a corner that is one region: every branch gives the network's one pass; without merging, the mean of its patches."""
    merge = router.merge
    side = router.patch + (merge - 1) * router.stride
    corner = task.pixels[:, :, :side, :side].contiguous()
    grid = TileGrid(*corner.shape[2:], router.patch, router.stride, router.scale)
    for c, branch in enumerate(task.model.branches):
        ids = torch.full((grid.rows, grid.cols), c, device=device())
        result = exactly(partial(router.upscale, corner, class_map=ids))
        engines.check(result.image, exactly(partial(branch, corner)), precision)
        with merged(router, 1):
            result = exactly(partial(router.upscale, corner, class_map=ids))
        engines.check(result.image, exactly(partial(plain.tiled, branch, corner, grid, grid.num_patches)), precision)


@contextmanager
def merged(router: fastroute.PatchRouter, merge: int) -> Iterator[None]:
    """The router with another `merge`: what its networks are compiled to serves both."""
    before, router.merge = router.merge, merge
    try:
        yield
    finally:
        router.merge = before


def settle(router: fastroute.PatchRouter, setting: Setting) -> bool:
    """Let the branches find out on regions how they run fastest, as they would in the calls that are timed."""
    networks, place = router.networks, device()
    if setting.smoke:
        return all(networks.settled(c, place) for c in range(router.num_classes))
    side = router.patch + (router.merge - 1) * router.stride
    at_once = max(GPU_PIXELS) if place.type == "cuda" else max(PARALLEL_PIXELS) * torch.get_num_threads()
    count = -(-max(at_once, TRIAL_PIXELS[place.type]) // side**2)
    regions = torch.rand(count, router.channels, side, side, device=place)
    for c in range(router.num_classes):
        calls = 0
        while not networks.settled(c, place) and calls < SETTLING_CALLS:
            networks.run(c, regions)
            networks.remember()
            calls += 1
    return all(networks.settled(c, place) for c in range(router.num_classes))


def routed(task: Task, ours: Ours, label: str, share: float | None = None) -> Tensor:
    """One image: the network's classifier runs and is timed, its answer is replaced by the edge score's.

    Args:
        share: of one pass that may be spent, as `budget_flops` counts; default the classes as they are.
    """
    router = ours.router
    merging = Merging(task.grid, router.merge, True)
    spent = classify_patches(router.classifier, task.pixels, task.grid).flops
    if share is None:
        ids = fastroute.assign_classes(task.scores, router.costs)
    else:
        ids = within(task.scores, router.flop_costs, share * task.one_pass * max(router.flop_costs) - spent, merging)
    result = router.upscale(task.pixels, class_map=ids.view(task.grid.rows, task.grid.cols), promote=True)
    ours.stats[label] = result.stats
    return result.image


def one_class(task: Task, ours: Ours, c: int) -> None:
    """All patches in one class: what a pixel takes in its branch, last layers included."""
    stats = ours.router.upscale(task.pixels, class_map=torch.full((task.grid.rows, task.grid.cols), c, device=device())).stats
    pixels = sum(stats.work_per_class or stats.counts_per_class) * task.grid.patch**2
    ours.rates.setdefault(c, []).append(stats.seconds["branches"] / pixels)


def dense_engines(
    task: Task, precision: torch.dtype, setting: Setting, missing: dict[str, str]
) -> tuple[dict[str, Run], dict[str, Timing]]:
    """Those near the fastest, to be timed in turn, and the times of those far behind; what disagrees is missing."""
    largest = task.model.branches[-1]
    expected = exactly(lambda: largest(task.pixels))
    runs: dict[str, Run] = {}
    seconds: dict[str, float] = {}
    for form, every in task.engines.items():
        for name, run in every.ways(precision, setting):
            label = f"{name}{form}"
            if isinstance(run, str):
                missing[label] = run
                continue
            begun = first(run)
            try:
                engines.check(exactly(run) if device().type == "cuda" else begun.result, expected, precision)
            except AssertionError as error:
                missing[label] = str(error)
                continue
            runs[label] = run
            seconds[label] = begun.seconds if begun.seconds > QUICK_SECONDS else first(run).seconds
    behind = {label for label, taken in seconds.items() if taken > BEHIND * min(seconds.values())}
    return {n: r for n, r in runs.items() if n not in behind}, {n: summary([seconds[n]]) for n in behind}


def unmerged(task: Task, ours: Ours) -> Tensor:
    """:func:`routed`, every patch on its own."""
    with merged(ours.router, 1):
        return routed(task, ours, UNMERGED)


def least_share(task: Task, router: fastroute.PatchRouter) -> float:
    """FLOPs of the cheapest branch everywhere and the classifier, relative to one pass of the most expensive branch."""
    most = max(router.flop_costs)
    everywhere = min(router.flop_costs) / most * Merging(task.grid, router.merge).patches()
    return (everywhere + classify_patches(router.classifier, task.pixels, task.grid).flops / most) / task.one_pass


def own_ways(task: Task, all_ours: list[Ours], missing: dict[str, str]) -> tuple[Ours, dict[str, Run]]:
    """The engine that routes this image fastest, and what is timed of ours: that engine's in full, and the others routed."""
    runs: dict[str, Run] = {}
    taken: dict[str, float] = {}
    for ours in all_ours:
        label = f"{ROUTED}, {ours.engine}"
        runs[label] = partial(routed, task, ours, label)
        first(runs[label])
        taken[ours.engine] = first(runs[label]).seconds
    best = min(all_ours, key=lambda ours: taken[ours.engine])
    runs[f"{DENSE}, {best.engine}"] = partial(best.router.upscale, task.pixels, budget=1.0)
    runs[UNMERGED] = partial(unmerged, task, best)
    if (least := least_share(task, best.router)) <= BUDGET:
        runs[HALF] = partial(routed, task, best, HALF, BUDGET)
    else:
        missing[HALF] = f"the cheapest branch everywhere and the classifier take {least:.0%} of the FLOPs of one pass"
    for ours in (ours for ours in all_ours if taken[ours.engine] <= BEHIND * taken[best.engine]):
        for c in range(len(task.model.branches)):
            runs[f"{EVERYWHERE}, class {c}, {ours.engine}"] = partial(one_class, task, ours, c)
    for label, run in runs.items():
        if not label.startswith(EVERYWHERE):
            run()
    return best, runs


@dataclass
class Case:
    """One precision: what is timed in turn, and what is known already."""

    precision: str
    missing: dict[str, str]
    all_ours: list[Ours]
    best: Ours
    dense: dict[str, Run]
    behind: dict[str, Timing]
    own: dict[str, Run]

    @property
    def runs(self) -> dict[str, Run]:
        """All that take turns."""
        return {f"{self.precision}|{label}": run for label, run in {**self.dense, **self.own}.items()}


def case_of(task: Task, precision: str, names: Sequence[str], setting: Setting) -> Case:
    """Everything of one precision, ready to be timed: checked, compiled and settled; ours by the engines `names`."""
    dtype = PRECISIONS[precision]
    missing: dict[str, str] = {}
    dense, behind = dense_engines(task, dtype, setting, missing)
    all_ours: list[Ours] = []
    for engine in names:
        try:
            all_ours.append(prepare(task, dtype, engine, setting))
        except ValueError as error:
            missing[f"{ROUTED}, {engine}"] = str(error)
    best, own = own_ways(task, all_ours, missing)
    return Case(precision, missing, all_ours, best, dense, behind, own)


def row_of(task: Task, case: Case, timed: dict[str, Timing], fastest_float32: float | None) -> dict:
    """What one precision came to."""
    times = {label: timed[f"{case.precision}|{label}"] for label in (*case.dense, *case.own)}
    peers = {label: times[label] for label in case.dense} | case.behind
    fastest = min(peers, key=lambda label: peers[label].median)
    base, label, patch = peers[fastest].median, f"{ROUTED}, {case.best.engine}", task.grid.patch
    stats = case.best.stats[label]
    work = stats.work_per_class or [float(n) for n in stats.counts_per_class]
    measured = [ours.rates for ours in case.all_ours if ours.rates]
    rates = [min(statistics.median(one[c]) for one in measured) for c in range(len(work))]
    # The whole image is a region too.
    rates[-1] = min(rates[-1], base / (task.grid.height * task.grid.width))
    floor = sum(n * patch**2 * rate for n, rate in zip(work, rates, strict=True))
    spent = classify_patches(case.best.router.classifier, task.pixels, task.grid).flops
    own = {n: t for n, t in times.items() if n.startswith("fastroute")}
    flops = {n: s.flops for ours in case.all_ours for n, s in ours.stats.items()}
    return {
        "op": f"{task.backbone}, {case.precision}",
        "backbone": task.backbone,
        "precision": case.precision,
        "lr_size": [task.grid.width, task.grid.height],
        "class_shares": [n / sum(stats.counts_per_class) for n in stats.counts_per_class],
        "area_shares": [n / task.one_pass for n in work],
        "engine": case.best.engine,
        "routed": label,
        "settled": all(ours.settled for ours in case.all_ours),
        "fastest_dense": fastest,
        "times": {**peers, **own},
        "missing": case.missing,
        "of_fastest_dense": {n: t.median / base for n, t in own.items()},
        "of_fastest_float32": {n: t.median / (fastest_float32 or base) for n, t in own.items()},
        "flops_of_one_pass": {n: (f.routed + spent) / f.one_pass for n, f in flops.items() if f.one_pass},
        "rates": rates,
        "floor": floor,
        "floor_of_fastest_dense": floor / base,
        "over_floor": own[label].median / floor,
    }


def tell(row: dict) -> None:
    """Print a row."""
    width, height = row["lr_size"]
    areas = " / ".join(f"{share:.0%}" for share in row["area_shares"])
    print(f"\n{row['backbone']}, {row['precision']}, {width} x {height}, area of the classes {areas} of the image")
    for label, timing in sorted(row["times"].items(), key=lambda entry: entry[1].median):
        ratio, flops = row["of_fastest_dense"].get(label), row["flops_of_one_pass"].get(label)
        told = "" if ratio is None else f"  {ratio:6.3f} of the fastest dense engine"
        if ratio is not None and row["precision"] != "float32":
            told += f", {row['of_fastest_float32'][label]:.3f} of that in float32"
        told += "" if flops is None else f", FLOPs {flops:.3f} of one pass"
        print(f"  {label:<42} {timing} of {timing.runs}{told}")
    for label, reason in row["missing"].items():
        print(f"  {label:<42} not timed: {reason}")
    rates = ", ".join(f"{1e6 * rate:.2f}" for rate in row["rates"])
    print(
        f"  floor {1e3 * row['floor']:.1f} ms, {row['floor_of_fastest_dense']:.3f} of the fastest dense engine "
        f"(us per LR pixel: {rates}); routed by {row['engine']} takes {row['over_floor']:.3f} of it"
        + ("" if row["settled"] else "; branches were still finding out how they run fastest"),
        flush=True,
    )


@pytest.mark.parametrize("backbone", sorted(SIZES))
def test_headline(backbone: str, setting: Setting) -> None:
    """Both precisions of one backbone in one alternating run."""
    if setting.smoke and backbone == "srresnet":
        pytest.skip("a smoke run takes CARN alone of the two that differ in their layers only")
    task = task_of(backbone, setting)
    precisions, names = list(PRECISIONS), ENGINES
    if setting.smoke and backbone != "fsrcnn":
        # A smoke run has all of them where they take the least time.
        precisions, names = precisions[:1], names[:1]
    cases = [case_of(task, precision, names, setting) for precision in precisions]
    everything = {label: run for case in cases for label, run in case.runs.items()}
    timed = alternate(everything, 1 if setting.smoke else ROUNDS, warm_up=0, limit=SECONDS)
    rows: list[dict] = []
    for case in cases:
        row = row_of(task, case, timed, rows[0]["times"][rows[0]["fastest_dense"]].median if rows else None)
        tell(row)
        rows.append(row)
    weights = "shipped weights" if backbone == "fsrcnn" and not setting.smoke else "random weights"
    agreement = " and ".join(f"{own_engines.AGREEMENT[dtype]:g} in {name}" for name, dtype in PRECISIONS.items())
    setting.save(
        f"headline_{backbone}",
        rows,
        f"x4, {weights}, float32 images in and out, {torch.get_num_threads()} threads each; classes of the mix {MIX} by the "
        f"edge score of {images.photographs('test4k')[0].stem} of {images.source('test4k')}, the classifier's time included; "
        f"dense engines agree within {agreement} of the largest value; medians of alternating runs, of one run where a dense "
        f"engine is {BEHIND:g} times as slow as the fastest",
    )
