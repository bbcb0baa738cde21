"""Started by torchrun: trains small recipes in all processes, and saves what each of them ends with.

torchrun --nproc-per-node N tests/training_processes.py IMAGES FOLDER
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch
from interrupted import Stop, stopping

from fastroute.cli import main
from fastroute.training import arm, cdnsr, classsr, pcsr
from fastroute.training.base import RecipeTrainer
from fastroute.training.data import Pool
from fastroute.training.distributed import processes, rank

# Rates at which a few steps, which begin with a two-hundredth of them, move the weights.
RECIPES = {
    "classsr": (
        classsr.Trainer,
        classsr.Recipe(widths=(3, 4), scale=2, patch=8, branch_steps=(3, 3), classifier_steps=3, joint_steps=3, routing_steps=3,
                       batch=4, learning_rate=0.1, classifier_rate=0.1, joint_rate=0.1, routing_rate=0.1),
    ),
    "cdnsr": (
        cdnsr.Trainer,
        cdnsr.Recipe(widths=(3, 4), scale=2, patch=8, branch_steps=(1, 1), classifier_steps=3, joint_steps=3, distill_steps=3,
                     batch=4, negatives=3, contrast_batch=4, contrast_weight=300.0, layers=3, alpha=0.1, classifier_rate=0.1,
                     joint_rate=0.1, distill_rate=0.1),
    ),
    "arm": (arm.Trainer, arm.Recipe(widths=(3, 5), scale=2, patch=8, steps=4, batch=4, table_patches=20, learning_rate=0.1)),
    "pcsr": (
        pcsr.Trainer,
        pcsr.Recipe(width=4, upsamplers=((), (3,), (5, 5)), scales=(2,), patch=8, heavy_steps=3, light_steps=3, batch=2,
                    pixels=2, learning_rate=0.1, light_rate=0.1),
    ),
}  # fmt: skip
COMMAND = ["arm-fsrcnn", "--set", "widths=3,5", "--set", "steps=2", "--set", "batch=4", "--set", "table_patches=20"]


def trainer(name: str, pool: Pool, path: Path) -> RecipeTrainer:
    kind, recipe = RECIPES[name]
    return kind(pool, recipe, path, save_every=2)


def train_all(images: Path, folder: Path) -> None:
    pool = Pool.build(images, scale=2, patch=8, shrinks=(1.0,))
    for name in RECIPES:
        model = trainer(name, pool, folder / f"{name}.pt").run()
        torch.save(model.state_dict(), folder / f"{name}-{rank()}.pt")
    # Stopped in its third stage, and taken up from what the first process saved.
    path = folder / "resumed.pt"
    with suppress(Stop):
        stopping(trainer("cdnsr", pool, path), 6).run()
    torch.save(trainer("cdnsr", pool, path).run().state_dict(), folder / f"resumed-{rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with processes("cpu"):
        train_all(Path(sys.argv[1]), Path(sys.argv[2]))
        main(["train", *COMMAND, "--images", sys.argv[1], "--out", sys.argv[2]], standalone_mode=False)
