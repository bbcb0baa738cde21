"""What each loss of the recipes does, on small data: trained with it and without it, all else being the same.

    python -m benchmarks.losses --train DIR --images DIR --save

Branches are trained once and shared by all runs. CDNSR then takes its three other steps, ClassSR its published two, with and
without the routing loss of fastroute behind them. A last part trains ClassSR over a narrow CARN jointly, by three statistics of
its batch norms. About an hour on one core; --effort shortens all stages alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
FSRCNN_STEPS = {"branch_steps": (800, 1000, 1500), "classifier_steps": 300, "joint_steps": 150}
DISTILL_STEPS, ROUTING_STEPS = 100, 300
CARN_STEPS = {"branch_steps": (400, 500, 600), "classifier_steps": 150, "joint_steps": 250}
CARN_WIDTHS, CARN_PATCH = (8, 12, 16), 16
# What each run of a system changes of the recipe.
CDNSR_RUNS: dict[str, dict[str, Any]] = {
    "all losses": {},
    "without the FLOPs loss": {"lambda_reg": 0.0},
    "without the contrastive loss": {"contrast_weight": 0.0},
    "CSD's contrastive loss": {"contrast": "csd"},
    "without joint training": {"joint_rate": 0.0},
    "without distillation": {"distill_rate": 0.0},
    "all losses, target 0.85": {"variant": "r"},
    "all losses, target 0.5": {"variant": "s"},
}
CLASSSR_RUNS: dict[str, dict[str, Any]] = {
    "all losses": {},
    "without the class loss": {"class_weight": 0.0},
    "without the average loss": {"average_weight": 0.0},
    "without both": {"class_weight": 0.0, "average_weight": 0.0},
    "all losses, then the routing loss": {"routing_rate": 1e-3},
}
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
        self.small = dataclasses.replace(self.pool, patch=CARN_PATCH)
        self.pairs = [make_pair(middle(io.read_image(path)), SCALE) for path in io.list_images(images)[:few]]

    def steps(self, numbers: dict[str, Any]) -> dict[str, Any]:
        """The numbers of steps at this effort."""
        shortened = {k: np.maximum(np.multiply(v, self.effort).astype(int), 1).tolist() for k, v in numbers.items()}
        return {k: tuple(v) if isinstance(v, list) else v for k, v in shortened.items()}

    def train(
        self, trainer: type[classsr.BranchTrainer], name: str, recipe: Any, pool: Pool, start: Start | None = None
    ) -> Any:
        """The trained model of `recipe`."""
        path = self.folder / f"{trainer.system}-{name.replace(' ', '-')}.pt"
        return trainer(pool, recipe, path, start).run().eval()

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
        steps = self.steps(FSRCNN_STEPS)
        once = {"branch_steps": (1, 1, 1), "learning_rate": 0.0}
        branches = self._branches("branches", classsr.Recipe(batch=BATCH, **steps), self.pool)
        for name, changes in CDNSR_RUNS.items():
            count = {**steps, **self.steps({"distill_steps": DISTILL_STEPS})}
            recipe = cdnsr.Recipe(batch=BATCH, **count | once | changes)
            yield {
                "system": "CDNSR",
                "run": name,
                **self.measured(self.train(cdnsr.Trainer, name, recipe, self.pool, branches)),
            }
        for name, changes in CLASSSR_RUNS.items():
            count = {**steps, **self.steps({"routing_steps": ROUTING_STEPS})}
            recipe = classsr.Recipe(batch=BATCH, **count | once | {"routing_rate": 0.0} | changes)
            yield {
                "system": "ClassSR",
                "run": name,
                **self.measured(self.train(classsr.Trainer, name, recipe, self.pool, branches)),
            }

    def _norms(self) -> Iterator[dict[str, Any]]:
        alike = {"backbone": "carn", "widths": CARN_WIDTHS, "patch": CARN_PATCH, "batch": BATCH, "routing_rate": 0.0}
        steps = self.steps(CARN_STEPS) | {"routing_steps": 1}
        branches = self._branches("norm branches", classsr.Recipe(**alike | steps), self.small)
        once = {"branch_steps": (1, 1, 1), "learning_rate": 0.0}
        for name, told in NORM_RUNS.items():
            recipe = classsr.Recipe(**alike | steps | once, norms="running" if name == "running" else "batch")
            trainer = PatchNorms if name == "patch" else classsr.Trainer
            trained = self.train(trainer, f"norms {name}", recipe, self.small, branches)
            yield {"system": "norms", "run": told, **self.measured(trained, CARN_PATCH)}

    def _branches(self, name: str, recipe: classsr.Recipe, pool: Pool) -> Start:
        """Branches of a short training, with a classifier that has learnt nothing."""
        still = {"classifier_steps": 1, "joint_steps": 1, "routing_steps": 1}
        rates = {"classifier_rate": 0.0, "joint_rate": 0.0, "routing_rate": 0.0}
        model = self.train(classsr.Trainer, name, dataclasses.replace(recipe, **still, **rates), pool)
        return Start({key: value.clone() for key, value in model.state_dict().items()}, name, "branches")


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
            f"branches trained once for {', '.join(map(str, FSRCNN_STEPS['branch_steps']))} steps; CARN of widths "
            f"{', '.join(map(str, CARN_WIDTHS))} on patches of {CARN_PATCH}; RGB PSNR on the middle of each test image, "
            f"{CROP[1]} x {CROP[0]}; one run each"
        )
        shown = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
        print(measure.save("losses", rows, notes, command=" ".join(["python", "-m", "benchmarks.losses", *shown])))


if __name__ == "__main__":
    main()
