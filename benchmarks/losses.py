"""What each loss of the recipes does, on small data: trained with it and without it, all else being the same.

    python -m benchmarks.losses --train DIR --images DIR --save

Branches are trained once and shared by all runs. CDNSR then takes its three other steps, ClassSR its published two, with and
without the routing loss of fastroute behind them. A last part trains ClassSR over a narrow CARN jointly, by three statistics of
its batch norms. About an hour on one core; --effort shortens all stages alike.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.loss_tables import losses_table, norms_table
from fastroute import PatchRouter, io
from fastroute.degradation import make_pair
from fastroute.quality import compare
from fastroute.training import cdnsr, classsr
from fastroute.training.data import Pool
from fastroute.training.start import Start

SCALE, BATCH = 4, 16
# HR pixels of the middle of each test image.
CROP = (640, 960)
# Steps at an effort of 1.
BRANCH_STEPS, CARN_BRANCH_STEPS = (800, 1000, 1500), (300, 400, 500)
STEPS = {
    "cdnsr": {"classifier": 900, "joint": 200, "distill": 120},
    "classsr": {"classifier": 400, "joint": 100, "routing": 300},
}
CARN_STEPS = {"classifier": 100, "joint": 200}
CARN_WIDTHS, CARN_PATCH = (8, 12, 16), 16


class Run(NamedTuple):
    """A run of some stages.

    Attributes:
        name: what the table calls it; "" for one that others start from.
        key: a short name.
        start: key of the run whose result it starts from; "" for the branches.
        stages: those that it trains; all others do nothing.
        changes: of the recipe.
    """

    name: str
    key: str
    start: str
    stages: tuple[str, ...]
    changes: dict[str, Any] = {}  # noqa: RUF012 - never written


# Three stages, each from the result of the one before.
CDNSR_RUNS = (
    Run("classifier", "classifier", "", ("classifier",)),
    Run("classifier, joint", "joint", "classifier", ("joint",)),
    Run("classifier, joint, distillation: all losses", "all", "joint", ("distill",)),
    Run("the same without the contrastive loss", "plain", "joint", ("distill",), {"contrast_weight": 0.0}),
    Run("the same with CSD's contrastive loss", "csd", "joint", ("distill",), {"contrast": "csd"}),
    Run("", "free", "", ("classifier", "joint"), {"lambda_reg": 0.0}),
    Run("the same without the FLOPs loss", "free-all", "free", ("distill",)),
)
CLASSSR_RUNS = (
    Run("all losses", "all", "", ("classifier", "joint")),
    Run("without the class loss", "no-class", "", ("classifier", "joint"), {"class_weight": 0.0}),
    Run("without the average loss", "no-average", "", ("classifier", "joint"), {"average_weight": 0.0}),
    Run("all losses, then the routing loss", "routed", "all", ("routing",)),
)
# Beside an image loss of 1000; more decides everything at so few steps.
LAMBDA = 3.0
# Whose statistics the batch norms take in joint training.
NORM_RUNS = {"running": "those of the branches' training", "batch": "of the batch", "patch": "of each patch, as published"}


class Bench:
    """Trains and measures systems on the same patches and images.

    Args:
        train, images: folders of the images to train on and to measure on.
        effort: factor of all numbers of steps.
        folder: for the states of training.
        few: so many images of each folder only.
    """

    def __init__(self, train: Path, images: Path, effort: float, folder: Path, few: int | None = None) -> None:
        self.effort, self.folder = effort, folder
        # The reduced images are sharper, and quickly read.
        exclude = [path.name for path in io.list_images(train)[few:]] if few else []
        self.pool = Pool.build(train, SCALE, shrinks=(2.5,), exclude=exclude)
        self.small = replace(self.pool, patch=CARN_PATCH)
        self.pairs = [make_pair(middle(io.read_image(path)), SCALE) for path in io.list_images(images)[:few]]

    def steps(self, number: int) -> int:
        """A number of steps at this effort."""
        return max(int(number * self.effort), 1)

    def train(
        self, trainer: type[classsr.BranchTrainer], name: str, recipe: Any, pool: Pool, start: Start | None = None
    ) -> Any:
        """The trained model of `recipe`."""
        return trainer(pool, recipe, self.folder / f"{trainer.system}-{name}.pt", start).run().eval()

    def branches(self, name: str, pool: Pool, steps: Sequence[int], **options: Any) -> Start:
        """Branches of a short training, with a classifier that has learnt nothing."""
        # Also statistics of batch norms stay as the branches' training leaves them.
        still = {"norms": "running", **only(classsr.Recipe, (), {})}
        recipe = classsr.Recipe(**options, **still, batch=BATCH, branch_steps=tuple(map(self.steps, steps)))
        return started(self.train(classsr.Trainer, name, recipe, pool), "branches")

    def staged(
        self, trainer: type[classsr.BranchTrainer], recipe: Any, runs: Sequence[Run], pool: Pool, branches: Start
    ) -> Iterator[tuple[str, Any]]:
        """The names and models of the runs that the table shows."""
        done = {"": branches}
        for run in runs:
            steps = {stage: self.steps(STEPS[trainer.system][stage]) for stage in run.stages}
            own = replace(recipe, **only(type(recipe), run.stages, steps), **run.changes)
            model = self.train(trainer, run.key, own, pool, done[run.start])
            done[run.key] = started(model, f"{trainer.system}-fsrcnn")
            if run.name:
                yield run.name, model

    def measured(self, model: nn.Module, patch: int = 32) -> dict[str, Any]:
        """PSNR as the classifier routes and with every patch in the most expensive branch, FLOPs, and shares of the classes."""
        router = PatchRouter(model.branches, model.classifier, patch=patch, stride=patch - 4, scale=SCALE, tune=False)
        found = [router.upscale(lr) for lr, _ in self.pairs]
        dense = [router.upscale(lr, budget=1.0) for lr, _ in self.pairs]
        counts = np.sum([result.stats.counts_per_class for result in found], axis=0)
        flops = [sum(result.stats.flops.routed for result in results) for results in (found, dense)]
        return {
            "psnr": self._psnr([result.image for result in found]),
            "dense_psnr": self._psnr([result.image for result in dense]),
            "flops": flops[0] / flops[1],
            "classes": (counts / counts.sum()).tolist(),
        }

    def _psnr(self, results: Sequence[Tensor]) -> float:  # uint8 [C, H, W] each
        return float(np.mean([compare(x, hr, SCALE)["psnr"] for x, (_, hr) in zip(results, self.pairs, strict=True)]))

    def rows(self) -> Iterator[dict[str, Any]]:
        """All of them, each as soon as it is known."""
        for part in (self._losses, self._norms):
            for row in part():
                print({k: v for k, v in row.items() if k not in ("op", "times")}, flush=True)
                yield row | {"op": f"{row['system']}, {row['run']}", "times": {}}

    def _losses(self) -> Iterator[dict[str, Any]]:
        branches = self.branches("branches", self.pool, BRANCH_STEPS)
        alike = {"batch": BATCH, "branch_steps": (1, 1, 1), "learning_rate": 0.0}
        for name, model in self.staged(
            cdnsr.Trainer, cdnsr.Recipe(**alike, lambda_reg=LAMBDA), CDNSR_RUNS, self.pool, branches
        ):
            yield {"system": "CDNSR", "run": name, **self.measured(model)}
        for name, model in self.staged(classsr.Trainer, classsr.Recipe(**alike), CLASSSR_RUNS, self.pool, branches):
            yield {"system": "ClassSR", "run": name, **self.measured(model)}

    def _norms(self) -> Iterator[dict[str, Any]]:
        alike = {"backbone": "carn", "widths": CARN_WIDTHS, "patch": CARN_PATCH}
        branches = self.branches("norm-branches", self.small, CARN_BRANCH_STEPS, **alike)
        still = {"batch": BATCH, "branch_steps": (1, 1, 1), "learning_rate": 0.0}
        stages = only(classsr.Recipe, tuple(CARN_STEPS), {stage: self.steps(number) for stage, number in CARN_STEPS.items()})
        for name, told in NORM_RUNS.items():
            recipe = classsr.Recipe(**alike, **still, **stages, norms="running" if name == "running" else "batch")
            trainer = PatchNorms if name == "patch" else classsr.Trainer
            trained = self.train(trainer, f"norms-{name}", recipe, self.small, branches)
            yield {"system": "norms", "run": told, **self.measured(trained, CARN_PATCH)}


def only(recipe: Any, stages: Sequence[str], steps: dict[str, int]) -> dict[str, Any]:
    """Settings of a recipe by which all stages behind the branches but `stages` take one step that changes nothing."""
    settings: dict[str, Any] = {f"{stage}_steps": number for stage, number in steps.items()}
    for stage in ("classifier", "joint", "distill", "routing"):
        if stage not in stages and any(field.name == f"{stage}_steps" for field in fields(recipe)):
            settings |= {f"{stage}_steps": 1, f"{stage}_rate": 0.0}
    return settings


def started(model: nn.Module, recipe: str) -> Start:
    """The weights of `model`, for a run to start from."""
    return Start({key: value.clone() for key, value in model.state_dict().items()}, "a run before", recipe)


class PatchNorms(classsr.Trainer):
    """Joint training in which batch norms see patch after patch, as in the published loop."""

    def begin(self, stage: Any) -> None:
        """See :class:`fastroute.training.Trainer`."""
        super().begin(stage)
        for norm in self.norms:
            # The same parameters and statistics.
            norm.__class__ = nn.InstanceNorm2d if stage.branch is None else nn.BatchNorm2d

    def finish(self) -> None:
        """See :class:`fastroute.training.Trainer`."""
        super().finish()
        for norm in self.norms:
            norm.__class__ = nn.BatchNorm2d


def middle(image: Tensor) -> Tensor:  # [C, H, W]
    """The middle of an image, of at most the size of a crop."""
    top, left = (max(side - size, 0) // 2 for side, size in zip(image.shape[1:], CROP, strict=True))
    return image[:, top : top + CROP[0], left : left + CROP[1]]


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="folder of the images to train on")
    parser.add_argument("--images", type=Path, required=True, help="folder of the images to measure on")
    parser.add_argument("--effort", type=float, default=1.0, help="factor of all numbers of steps")
    parser.add_argument("--pictures", type=int, help="so many of each folder only")
    parser.add_argument("--states", type=Path, help="folder for the states of training, from which a run goes on")
    parser.add_argument("--save", action="store_true", help="keep the results, for the tables")
    return parser.parse_args(given)


def run(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows."""
    with tempfile.TemporaryDirectory() as made:
        bench = Bench(asked.train, asked.images, asked.effort, asked.states or Path(made), asked.pictures)
        return list(bench.rows())


def main() -> None:
    """See the module."""
    asked = arguments()
    rows = run(asked)
    print(f"\n{losses_table(rows)}\n{norms_table(rows)}")
    if asked.save:
        notes = (
            f"x{SCALE}; small data: images reduced by 2.5, batches of {BATCH} patches; FSRCNN of widths 16, 36 and 56, "
            f"branches trained once for {', '.join(map(str, BRANCH_STEPS))} steps; CARN of widths "
            f"{', '.join(map(str, CARN_WIDTHS))} on patches of {CARN_PATCH}; RGB PSNR on the middle of each test image, "
            f"{CROP[1]} x {CROP[0]}; one run each"
        )
        shown = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
        print(measure.save("losses", rows, notes, command=" ".join(["python", "-m", "benchmarks.losses", *shown])))


if __name__ == "__main__":
    main()
