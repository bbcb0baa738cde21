"""ClassSR over four backbones at given class mixes, beside the time ratios that the papers print.

Weights are random: they change no time. The classifier runs and its answer is replaced by the given classes. The mixes are
those of the papers' test sets, as far as their mean FLOPs tell (see `paper_tables.mix_of`), and every patch in one class.
"""

from __future__ import annotations

import pytest
import torch

import fastroute
from benchmarks import images
from benchmarks.baselines import paper_tables
from benchmarks.e2e._patches import DENSE, ROUTED, SLOW_SECONDS, dense_runs, patchwise, routed_runs
from benchmarks.measure import alternate, device, exactly
from benchmarks.setting import Setting
from fastroute.grid import TileGrid
from fastroute.models.classsr import ClassSR
from fastroute.patch.classify import classify_patches

# LR height and width: what a backbone does in seconds on a CPU, and on a GPU.
CPU_SIZES = {"fsrcnn": (540, 960), "carn": (180, 320), "srresnet": (96, 160), "rcan": (96, 160)}
GPU_SIZES = {"fsrcnn": (1080, 1920), "carn": (540, 960), "srresnet": (540, 960), "rcan": (270, 480)}
SMOKE_SIZE, SMOKE_WIDTHS, SMOKE_PATCH, SMOKE_STRIDE = (28, 40), (8, 12, 16), 16, 12
ROUNDS, SECONDS = 5, 20.0


def mixes(backbone: str) -> dict[str, list[float]]:
    """Shares of the classes, cheapest first, by name."""
    flops = paper_tables.BRANCH_FLOPS[backbone]
    published = zip(paper_tables.TEST_SETS, paper_tables.CLASSSR[backbone], strict=True)
    papers = {name: paper_tables.mix_of(row.flops, flops) for name, row in published}
    single = {"100/0/0": [1.0, 0.0, 0.0], "0/100/0": [0.0, 1.0, 0.0], "0/0/100": [0.0, 0.0, 1.0]}
    return papers | single


def class_ids(shares: list[float], count: int) -> list[int]:
    """Classes of so many patches in these shares, scattered over the image."""
    edges = [round(sum(shares[: k + 1]) * count) for k in range(len(shares))]
    ids = torch.bucketize(torch.arange(count), torch.tensor(edges), right=True)
    return ids[torch.randperm(count, generator=torch.Generator().manual_seed(0))].tolist()


def run_backbone(backbone: str, size: tuple[int, int], setting: Setting) -> list[dict]:
    """One row per mix, and one of the ways that do not route."""
    torch.manual_seed(0)
    model = ClassSR.build(backbone, SMOKE_WIDTHS if setting.smoke else None).eval().to(device())
    patch, stride = (SMOKE_PATCH, SMOKE_STRIDE) if setting.smoke else (32, 28)
    router = fastroute.PatchRouter(model.branches, model.classifier, patch=patch, stride=stride)
    image = images.low_resolution(images.photographs("test4k")[0], size).to(device())
    grid = TileGrid(*size, patch, stride, scale=4)
    pixels = image.float() / 255
    chosen = {name: class_ids(shares, grid.num_patches) for name, shares in mixes(backbone).items()}
    maps = {name: torch.tensor(ids, device=device()).view(grid.rows, grid.cols) for name, ids in chosen.items()}

    def routed(name: str) -> None:
        fastroute.assign_classes(classify_patches(router.classifier, image, grid).score, router.costs)
        router.upscale(image, class_map=maps[name])

    with patchwise(router):
        dense_image = exactly(lambda: router.upscale(pixels, budget=1.0).image)
    absent: dict[str, str] = {}
    runs = dense_runs(model, pixels, grid, dense_image, setting, absent, {})
    missing: dict[str, dict[str, str]] = {name: {} for name in maps}
    peers: dict[str, dict] = {name: {} for name in maps}
    # On a CPU the peers run at one of the mixes; --full runs them at all.
    few = device().type == "cpu" and not setting.full
    for name in paper_tables.TEST_SETS[-1:] if few or setting.smoke else paper_tables.TEST_SETS:
        with patchwise(router):
            expected = exactly(lambda n=name: router.upscale(pixels, class_map=maps[n]).image)
        peers[name] = routed_runs(model, pixels, grid, expected, setting, missing[name], {}, chosen[name])
    everything = {("dense", DENSE): lambda: router.upscale(image, budget=1.0)}
    everything |= {("dense", label): run for label, run in runs.items()}
    for name in maps:
        everything[name, ROUTED] = lambda n=name: routed(n)
        everything |= {(name, label): run for label, run in peers[name].items()}
    # The names of a timing are texts. The others have run to agree; ours run from uint8 for the first time.
    named = {"|".join(key): run for key, run in everything.items()}
    ours = ["|".join(key) for key in everything if key[1] in (ROUTED, DENSE)]
    for name in ours[:2]:
        named[name]()
    rounds = 1 if setting.smoke else ROUNDS
    timed = alternate(named, rounds, warm_up=0, limit=SECONDS, slow=SLOW_SECONDS, kept=ours)
    times = {key: timed["|".join(key)] for key in everything}
    dense = times["dense", DENSE]
    classifier_flops = classify_patches(router.classifier, image, grid).flops
    ratios = {name: row.time_ratio for name, row in zip(paper_tables.TEST_SETS, paper_tables.CLASSSR[backbone], strict=True)}
    rows: list[dict] = []
    print(f"\nClassSR-{backbone}, {size[1]} x {size[0]}, dense {dense}")
    for label, reason in absent.items():
        print(f"  {label:<42} not timed: {reason}")
    for name, shares in mixes(backbone).items():
        own = {label: timing for (mix, label), timing in times.items() if mix == name}
        stats = router.upscale(image, class_map=maps[name]).stats
        row = {
            "backbone": backbone,
            "mix": name,
            "lr_size": [size[1], size[0]],
            "class_shares": shares,
            "times": {**own, DENSE: dense},
            "missing": missing[name],
            "time_ratio": own[ROUTED].median / dense.median,
            "flops_ratio": (stats.flops.routed + classifier_flops) / stats.flops.dense,
            "paper_flops_ratio": stats.paper_flops.fraction,
            "published_time_ratio": ratios.get(name),
        }
        rows.append(row)
        said = f", table I prints {ratios[name]:.2f}" if name in ratios else ""
        print(
            f"  {name:<8} {'/'.join(f'{100 * s:.0f}' for s in shares)} %: time {row['time_ratio']:.3f} of dense at "
            f"{row['flops_ratio']:.3f} of its FLOPs ({row['paper_flops_ratio']:.3f} as the papers count){said}"
        )
        for label, timing in own.items():
            print(f"    {label:<42} {timing}   {timing.median / own[ROUTED].median:6.2f} x routed", flush=True)
    own = {label: timing for (mix, label), timing in times.items() if mix == "dense"}
    for label, timing in own.items():
        print(f"  {label:<44} {timing}   {timing.median / dense.median:6.2f} x dense", flush=True)
    base = {"backbone": backbone, "mix": "no routing", "lr_size": [size[1], size[0]]}
    return [*rows, {**base, "times": own, "missing": absent}]


@pytest.mark.parametrize("backbone", sorted(paper_tables.BRANCH_FLOPS))
def test_class_mixes(backbone: str, setting: Setting) -> None:
    """All mixes of one backbone in one alternating run."""
    on_cpu = device().type == "cpu"
    if backbone == "rcan" and on_cpu and (setting.smoke or not setting.full):
        pytest.skip("RCAN takes minutes on a CPU: --full runs it")
    size = SMOKE_SIZE if setting.smoke else (CPU_SIZES if on_cpu else GPU_SIZES)[backbone]
    rows = run_backbone(backbone, size, setting)
    notes = "x4, random weights, given classes with the classifier's time; fastroute from uint8 to uint8, the others float32"
    runs = f"medians of alternating runs, of one where a peer's takes more than {SLOW_SECONDS:g} s"
    setting.save(f"class_mixes_{backbone}", rows, f"{notes}; {runs}")
