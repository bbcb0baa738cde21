"""Where the numbers of a training go: a CSV file, or TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fastroute._extras import remedy

COLUMNS = ("stage", "step", "steps", "rate", "loss", "psnr", "validation_psnr", "validation_ssim")
LOGS = ("csv", "tensorboard")


class Log(Protocol):
    """Takes the numbers of a training."""

    def begin(self, steps: int) -> None:
        """Called before the first step, of which there have been `steps` before; what was written of later ones is void."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Take one row.

        Args:
            row: the stage's name, its `step`, the `steps` of all stages so far, and some of: the rate, the loss, the smoothed
                PSNR of the training batches in dB, the PSNR in dB and the SSIM of the validation.
        """

    def end(self) -> None:
        """Called after the last step, or where the training was interrupted."""


class CsvLog:
    """One line per row, with a head.

    Args:
        path: of the file; lines are added to what there is.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def begin(self, steps: int) -> None:
        """See :class:`Log`."""
        kept = []
        if steps and self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                kept = [
                    row for row in csv.DictReader(file) if (row.get("steps") or "").isdigit() and int(row["steps"]) <= steps
                ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)

    def write(self, row: Mapping[str, Any]) -> None:
        """See :class:`Log`."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})

    def end(self) -> None:
        """See :class:`Log`."""


class TensorBoardLog:
    """Scalars for TensorBoard, one curve per column, over the steps of all stages.

    Args:
        folder: of the event files.

    Raises:
        ValueError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        if find_spec("tensorboard") is None:
            raise ValueError(f"train: log=tensorboard needs another package: {remedy('tensorboard')}")
        self.folder = Path(folder)

    def begin(self, steps: int) -> None:
        """See :class:`Log`."""
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        self.writer = SummaryWriter(str(self.folder), purge_step=steps + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        """See :class:`Log`."""
        for name in COLUMNS[3:]:
            if name in row:
                self.writer.add_scalar(name, row[name], row["steps"])

    def end(self) -> None:
        """See :class:`Log`."""
        self.writer.close()


def make_log(name: str, folder: Path) -> Log:
    """The log `name`, one of `LOGS`, in `folder`: log.csv, or event files."""
    if name not in LOGS:
        raise ValueError(f"train: log must be one of {', '.join(LOGS)}; got {name!r}")
    return CsvLog(folder / "log.csv") if name == "csv" else TensorBoardLog(folder)
